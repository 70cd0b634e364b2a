"""What can be a prompt: lists, arrays and tensors of ints; all else is refused by name before anything changes."""

from __future__ import annotations

import re
from collections import UserDict, deque
from typing import Any

import numpy as np
import pytest
import torch

from tests.toys import sharp_model
from tidar_kernels import Decoder

ONE: dict[str, Any] = {
    "list": [1, 2, 3],
    "tuple": (1, 2, 3),
    "range": range(1, 4),
    "deque": deque([1, 2, 3]),
    "generator": lambda: (i for i in (1, 2, 3)),
    "array": np.array([1, 2, 3]),
    "array of uint16": np.array([1, 2, 3], dtype=np.uint16),
    "array, one row": np.array([[1, 2, 3]]),
    "array with strides": np.array([1, 0, 2, 0, 3, 0])[::2],
    "tensor": torch.tensor([1, 2, 3]),
    "tensor of int32": torch.tensor([1, 2, 3], dtype=torch.int32),
    "tensor, one row": torch.tensor([[1, 2, 3]]),
    "list of NumPy ints": [np.int64(1), np.uint8(2), 3],
    "list of tensors": [torch.tensor(1), torch.tensor(2), torch.tensor(3)],
    "nested": [[1, 2, 3]],
    "list of an array": [np.array([1, 2, 3])],
    "list of a tensor": [torch.tensor([1, 2, 3])],
}
SEVERAL: dict[str, Any] = {
    "ragged": [[1, 2, 3], [4]],
    "mixed": [np.array([1, 2, 3]), torch.tensor([4])],
    "tuples": ((1, 2, 3), (4,)),
}
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (None, TypeError, "expected token ids (ints in a list, an array or a tensor), got NoneType"),
    "an int": (5, TypeError, "expected token ids (ints in a list, an array or a tensor), got int"),
    "a float": (5.0, TypeError, "expected token ids (ints in a list, an array or a tensor), got float"),
    "text": ("abc", TypeError, "expected token ids (ints in a list, an array or a tensor), got str"),
    "bytes": (b"abc", TypeError, "expected token ids (ints in a list, an array or a tensor), got bytes"),
    "a dict": ({"input_ids": [1]}, TypeError, "expected token ids (ints in a list, an array or a tensor), got dict"),
    "a mapping": (UserDict(a=1), TypeError, "expected token ids (ints in a list, an array or a tensor), got UserDict"),
    "a set": ({1, 2}, TypeError, "expected token ids (ints in a list, an array or a tensor), got set"),
    "a 0-d array": (np.array(5), ValueError, "expected 1 or 2 dimensions, got shape []"),
    "a 0-d tensor": (torch.tensor(5), ValueError, "expected 1 or 2 dimensions, got shape []"),
    "3 dimensions": (torch.ones(1, 1, 1).long(), ValueError, "expected 1 or 2 dimensions, got shape [1, 1, 1]"),
    "floats": (np.array([1.0]), TypeError, "expected ints, got float64"),
    "a float tensor": (torch.tensor([1.0]), TypeError, "expected ints, got torch.float32"),
    "bools": (np.array([True]), TypeError, "expected ints, got bool"),
    "a bool tensor": (torch.tensor([[True]]), TypeError, "expected ints, got torch.bool"),
    "complex": (torch.tensor([1j]), TypeError, "expected ints, got torch.complex64"),
    "objects": (np.array([1, "a"], dtype=object), TypeError, "expected ints, got object"),
    "on meta": (torch.ones(3, device="meta").long(), ValueError, "got a tensor without values, on meta"),
    "a list of bools": ([True, False], TypeError, "expected ints, got bool"),
    "NumPy's bools": ([np.True_], TypeError, "expected ints, got bool"),
    "bool tensors": ([torch.tensor(True)], TypeError, "expected ints, got torch.bool"),
    "a list of floats": ([1.0, 2.0], TypeError, "expected ints, got float"),
    "None inside": ([1, None], TypeError, "expected ints, got NoneType"),
    "ragged depth": ([1, [2]], TypeError, "expected ints, got list"),
    "too deep": ([[[1]]], TypeError, "expected ints, got list in prompt 0"),
    "negative": ([1, -1], ValueError, "expected tokens in [0, 30), got -1"),
    "too large": (np.array([30]), ValueError, "expected tokens in [0, 30), got 30"),
    "huge": ([2**70], ValueError, f"expected tokens in [0, 30), got {2**70}"),
    "an empty tensor": (torch.ones(1, 0).long(), ValueError, "expected at least one token in every prompt, got none"),
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(sharp_model(), 4, batch_size=2, max_len=64)


def made(value: Any) -> Any:
    return value() if callable(value) else value


@pytest.mark.parametrize("name", ONE)
def test_one_prompt(decoder: Decoder, name: str) -> None:
    expected = decoder.generate([[1, 2, 3]], 3).tokens
    assert decoder.generate(made(ONE[name]), 3).tokens == expected
    request = decoder.session.requests[decoder.add(made(ONE[name]), 3)]
    while decoder.session.requests:
        decoder.step()
    assert [request.tokens] == expected
    assert request.prompt == [1, 2, 3]


@pytest.mark.parametrize("name", SEVERAL)
def test_several_prompts(decoder: Decoder, name: str) -> None:
    stream = decoder.stream(SEVERAL[name], 3)
    for _ in stream:
        pass
    assert stream.result.tokens == decoder.generate([[1, 2, 3], [4]], 3).tokens
    with pytest.raises(ValueError, match=r"^prompt: expected one prompt, got 2$"):
        decoder.add(SEVERAL[name], 3)


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_name(decoder: Decoder, name: str) -> None:
    value, error, message = REFUSED[name]
    calls: dict[str, Any] = {"generate": decoder.generate, "stream": decoder.stream, "add": decoder.add}
    for what, call in calls.items():
        argument = "prompt" if what == "add" else "input_ids"
        with pytest.raises(error, match=rf"^{argument}: .*{re.escape(message)}") as caught:
            call(value, 3)
        assert "\n" not in str(caught.value)
    assert decoder.session.free_slots == 2


@pytest.mark.parametrize(
    "kind",
    [list, tuple, set, frozenset, np.array, torch.tensor, lambda ids: [np.int32(i) for i in ids]],
    ids=["list", "tuple", "set", "frozenset", "array", "tensor", "NumPy ints"],
)
def test_stop_tokens(decoder: Decoder, kind: Any) -> None:
    first = decoder.generate([[1, 2, 3]], 3).tokens[0][0]
    assert decoder.generate([[1, 2, 3]], 3, stop_tokens=kind([first])).tokens == [[first]]
    request = decoder.session.requests[decoder.add([1, 2, 3], 3, stop_tokens=kind([first]))]
    decoder.step()
    assert (request.tokens, request.finish_reason) == ([first], "stop")


@pytest.mark.parametrize("stop", [None, 3, "3", {3: 4}, [True], [1.0], [30], np.array([1.0])])
def test_bad_stop_tokens(decoder: Decoder, stop: Any) -> None:
    for call in (decoder.generate, decoder.add):
        with pytest.raises((TypeError, ValueError), match=r"^stop_tokens: expected "):
            call([1, 2], 3, stop_tokens=stop)
    assert decoder.session.free_slots == 2


@pytest.mark.parametrize("function", ["decode", "on_tokens"])
def test_functions_must_be_some(decoder: Decoder, function: str) -> None:
    with pytest.raises(TypeError, match=rf"^{function}: expected a function, got int$"):
        decoder.add([1], 3, **{function: 5})
    assert decoder.session.free_slots == 2
