"""What happens between the calls of a decoder: exceptions, calls in any order and from within, a model that changes.

The tokens are those of an undisturbed run, or a request ends with an error; nothing else.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tidar_kernels as tk
from tests.toys import PROMPTS, sharp_model
from tidar_kernels.models import Transformer
from tidar_kernels.nn.attention import RotaryEmbedding

NEW = 6


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return tk.Decoder(sharp_model().eval(), 3).generate(PROMPTS, NEW).tokens


def decoder() -> tk.Decoder:
    return tk.Decoder(sharp_model().eval(), 3, batch_size=2, max_len=32)


def on_call(made: tk.Decoder, number: int, act: Callable[[], Any]) -> Any:
    """A hook that acts in one forward pass."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            act()

    return made.model.layers[1].mlp.register_forward_hook(hook)  # type: ignore[attr-defined]


def raising(kind: type[BaseException]) -> Callable[[], None]:
    def act() -> None:
        raise kind("planted")

    return act


KINDS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, RuntimeError, StopIteration, torch.OutOfMemoryError)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_a_forward_pass_loses_no_token(kind: type[BaseException], expected: list[list[int]]) -> None:
    made = decoder()
    hook = on_call(made, 5, raising(kind))
    found: dict[int, list[int]] = {made.add(PROMPTS[index], NEW): [] for index in (0, 2)}
    for _ in range(2 * NEW):
        try:
            events = made.step()
        except kind:
            continue
        for event in events:
            found[event.id] += event.tokens
    assert list(found.values()) == [expected[0], expected[2]]
    hook.remove()
    on_call(made, 7, raising(kind))
    try:
        assert made.generate(PROMPTS, NEW).tokens == expected
    except kind:
        assert not issubclass(kind, Exception)  # one that failed is tried again
    assert made.generate(PROMPTS, NEW).tokens == expected


def test_calls_from_within_and_in_turn(expected: list[list[int]]) -> None:
    made = decoder()
    on_call(made, 4, lambda: made.generate([PROMPTS[1]], 2))
    assert made.generate(PROMPTS, NEW).tokens == expected
    first, second = made.stream(PROMPTS, NEW), made.stream(PROMPTS, NEW)
    next(first)
    assert made.generate(PROMPTS, NEW).tokens == expected
    for _ in range(3 * NEW):
        next(second, None)
        next(first, None)
    assert first.result.tokens == second.result.tokens == expected
    on_call(made, 4, made.step)
    request, found = made.add(PROMPTS[0], NEW), []
    while len(found) < NEW:
        found += [token for event in made.step() for token in event.tokens]
    assert found == expected[0]
    for wrong in (request, 99):
        with pytest.raises(KeyError, match="request_id: expected one of"):
            made.remove(wrong)
    assert made.step() == []


def last_layer_twice(model: Transformer) -> None:
    model.layers.append(copy.deepcopy(model.layers[0]))


# A model's change between two steps. None: the tokens stay; else what the error of the request says.
CHANGES: dict[str, tuple[Callable[[Transformer, tk.Decoder], Any], str | None]] = {
    "training mode": (lambda model, made: model.train(), None),
    "the same weights, assigned": (
        lambda model, made: model.load_state_dict(sharp_model().state_dict(), assign=True), None
    ),
    "gradients": (lambda model, made: model.requires_grad_(True), None),
    "a parametrisation": (
        lambda model, made: torch.nn.utils.parametrizations.weight_norm(model.layers[0].mlp.gate_proj), None  # type: ignore[arg-type, union-attr]
    ),
    "the decoder's numbers": (lambda model, made: vars(made).update(batch_size=7, max_len=7), None),
    "the decoder's model": (lambda model, made: vars(made).update(model=None), None),
    "a pickle of the decoder": (lambda model, made: pickle.loads(pickle.dumps(made)).generate(PROMPTS, 2), None),
    "a copy of the decoder": (lambda model, made: copy.deepcopy(made).generate(PROMPTS, 2), None),
    "a copy of the cache": (lambda model, made: copy.deepcopy(made.session.cache).reset(), None),
    "an adapter": (lambda model, made: tk.add_gated_lora(model, 2, 4.0, ("q_proj",)), "expected"),
    "float64": (lambda model, made: model.double(), "expected dtype"),
    "float16": (lambda model, made: model.half(), "expected dtype"),
    "meta": (lambda model, made: model.to("meta"), "expected device meta"),
    "a smaller vocabulary": (
        lambda model, made: setattr(model.embed_tokens, "weight", torch.nn.Parameter(model.embed_tokens.weight[:10])),
        "index out of range",
    ),
    "other rotary positions": (lambda model, made: setattr(model, "rotary", RotaryEmbedding(8)), "cos: expected shape"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_harmless_or_ends_the_request(change: str, expected: list[list[int]]) -> None:
    change_model, error = CHANGES[change]
    made = decoder()
    model: Any = made.model
    request = made.session.requests[made.add(PROMPTS[0], NEW)]
    found = [token for event in made.step() for token in event.tokens]
    change_model(model, made)
    while made.session.requests:
        for event in made.step():
            found += event.tokens
    if error is None:
        assert (found, request.error) == (expected[0], None)
    else:
        assert found == expected[0][: len(found)]
        assert request.finish_reason == "error"
        assert error in str(request.error)


def test_two_layers_of_one_place_in_the_cache_are_refused() -> None:
    made = decoder()
    last_layer_twice(made.model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^layers: expected one layer_idx each, got \[0, 1, 0\] of 3 layers$"):
        made.generate(PROMPTS, NEW)
