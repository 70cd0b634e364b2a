"""Operators given tensors of kinds that are not the ordinary strided one: the result of an ordinary copy, or an error
that names an operand; caches hold the same afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_wrong_arguments import CALLS
from tests.wrong_arguments import whole

OPERATORS = (
    "attention", "step_attention", "step_attention (into)", "append_kv", "compact_kv", "rotary_append", "sample",
    "verify", "row_invariant_linear", "gated_lora", "append_kv (ragged)", "rotary_append (ragged)",
)  # fmt: skip


class Marked(torch.Tensor):
    """A subclass that does nothing of its own."""


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.ndim and len(x) else x


def read_only(x: Tensor) -> Tensor:
    memory = x.numpy().copy()
    memory.flags.writeable = False
    return torch.from_numpy(memory)


def leaf_view(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()[:] if x.is_floating_point() else x


# An odd tensor of the values of an ordinary one; None where there is none.
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "sparse CSR": lambda x: x.to_sparse_csr() if x.ndim == 2 else None,
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8) if x.dtype == torch.float32 else None,
    "nested": lambda x: torch.nested.nested_tensor([*x]) if x.ndim > 1 else None,
    "jagged": lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged) if x.ndim > 1 else None,
    "of MKL-DNN": lambda x: (
        x.to_mkldnn() if x.dtype == torch.float32 and torch.backends.mkldnn.is_available() else None
    ),
    "on meta": lambda x: x.to("meta"),
    "a subclass": lambda x: x.as_subclass(Marked),  # type: ignore[arg-type]
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "a buffer": lambda x: torch.nn.Buffer(x),
    "expanded": expanded,
    "with the negative bit": lambda x: torch._neg_view(-x) if x.dtype != torch.bool else None,
    "conjugate, imaginary part": lambda x: torch.complex(x, -x).conj().imag if x.dtype == torch.float32 else None,
    "a view of every other element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "Fortran order": lambda x: x.mT.contiguous().mT if x.ndim > 1 else None,
    "at an odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "of read-only memory": read_only,
    "a view of a leaf with a gradient": leaf_view,
    "made in inference mode": lambda x: torch.inference_mode()(x.clone)(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: x.to(torch.complex64),
    "boolean": lambda x: x.bool(),
    "int8": lambda x: x.to(torch.int8),
    "uint16": lambda x: x.to(torch.uint16),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "without elements": lambda x: x[:0],
    "without columns": lambda x: x[..., :0],
    "of one dimension more": lambda x: x[None],
    "of one dimension less": lambda x: x[0] if x.ndim else None,
}


def plain(x: Any) -> Any:
    if isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested:
        return x.detach().as_subclass(Tensor).resolve_neg().resolve_conj().clone()
    return x


def ran(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, ...]:
    """All tensors of the result, and what the caches hold."""
    with torch.no_grad():
        result = function(**arguments)
    tensors = result if isinstance(result, tuple) else (result,)
    return *tensors, *(arguments.get(name) for name in ("k_cache", "v_cache"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPERATORS)
def test_an_odd_tensor_is_an_ordinary_one_or_refused(name: str) -> None:
    wrong = []
    for argument, given in whole(name, CALLS)[1].items():
        if not isinstance(given, Tensor):
            continue
        for kind, made in KINDS.items():
            function, arguments = whole(name, CALLS)
            try:
                odd = made(arguments[argument])
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                continue  # PyTorch has none of this dtype or shape
            if odd is None:
                continue
            label = f"{argument} {kind}"
            arguments[argument] = odd
            expected: Any = None
            try:
                alike = whole(name, CALLS)[1] | {argument: plain(odd)}
                expected = ran(function, alike)
            except Exception:
                expected = None
            try:
                found = ran(function, arguments)
            except (TypeError, ValueError) as error:
                named = re.match(r"(\w+)[^:]*: expected", str(error))
                if named is None or named[1] not in {*arguments, "dtype"}:
                    wrong.append(f"{label}: {type(error).__name__}: {error}")
                elif kind in WORK and expected is not None and (kind, argument) not in UNWRITABLE:
                    wrong.append(f"{label}: refused: {error}")
                continue
            except Exception as error:
                wrong.append(f"{label}: {type(error).__name__}: {error}")
                continue
            if expected is None:
                wrong.append(f"{label}: a result, where an ordinary copy has none")
                continue
            for one, other in zip(found, expected, strict=True):
                if not isinstance(one, Tensor) or one.is_meta:
                    continue
                if not torch.allclose(plain(one), plain(other), rtol=1e-5, atol=1e-6, equal_nan=True):
                    wrong.append(f"{label}: another result than of an ordinary copy")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("name", OPERATORS)
def test_all_operands_on_meta_give_shapes(name: str) -> None:
    function, arguments = whole(name, CALLS)
    expected = function(**arguments)
    on_meta = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in whole(name, CALLS)[1].items()}
    if "rotary" in on_meta:
        on_meta["rotary"] = tuple(x.to("meta") for x in on_meta["rotary"])
    if "check" in on_meta:
        on_meta["check"] = False
    found = function(**on_meta)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert one is None if other is None else (one.is_meta and one.shape == other.shape and one.dtype == other.dtype)


# What cannot be written into is read only.
UNWRITABLE = {
    (kind, cache)
    for kind in ("with the negative bit", "conjugate, imaginary part", "made in inference mode")
    for cache in ("k_cache", "v_cache", "out")
}
# Kinds that are ordinary tensors to whoever computes with them.
WORK = {
    "a subclass", "a parameter", "a buffer", "with the negative bit", "conjugate, imaginary part",
    "a view of every other element", "Fortran order", "at an odd offset", "of read-only memory",
    "made in inference mode",
}  # fmt: skip
