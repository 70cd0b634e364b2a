"""A user's callbacks and decode functions in a shared session, and what they or a model's rows raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.sharing import A, B, C, GatedModel, alone, collected, finish, session_of, step_under_way
from tests.toys import sharp_model
from tidar_kernels import Decoder
from tidar_kernels.decoding.requests import Request
from tidar_kernels.decoding.strategies import SelfSpeculation, Strategy, isd, tidar


def test_callbacks_may_add_remove_and_step() -> None:
    session = session_of(sharp_model(), slots=3)
    got: dict[int, list[int]] = {}
    removed: list[Request] = []
    done: list[int] = []

    def act(request_id: int, tokens: list[int]) -> None:
        if not done:
            done.append(session.add(C, 12))
            removed.append(session.remove(victim))
            collected(got, session.step())

    first, victim = session.add(A, 20, on_tokens=act), session.add(B, 20)
    events = session.step()
    order: dict[int, list[int]] = {}
    collected(order, events)
    # The outer step's tokens come before those of the step within its callback.
    got = {i: order.get(i, []) + got.get(i, []) for i in {*order, *got}}
    finish(session, got)
    assert got == {first: alone(A, 20), victim: removed[0].tokens, done[0]: alone(C, 12)}
    assert removed[0].tokens == alone(B, 20)[: len(removed[0].tokens)]


def test_callbacks_that_step_leave_the_order_of_tokens() -> None:
    """A step within the first request's callback: the second one's is told of the outer step first."""
    session = session_of(sharp_model())
    called: dict[int, list[int]] = {}

    def act(request_id: int, tokens: list[int]) -> None:
        called.setdefault(request_id, []).extend(tokens)
        if request_id == 0 and len(called[0]) < 10:
            session.step()

    for prompt in (A, B):
        session.add(prompt, 20, on_tokens=act)
    finish(session)
    assert called == {0: alone(A, 20), 1: alone(B, 20)}


def test_an_interrupt_in_a_callback_loses_no_event() -> None:
    session = session_of(sharp_model())
    interrupts = [KeyboardInterrupt()]

    def act(request_id: int, tokens: list[int]) -> None:
        if interrupts:
            raise interrupts.pop()

    for prompt in (A, B, C):
        session.add(prompt, 20, on_tokens=act)
    with pytest.raises(KeyboardInterrupt):
        session.step()
    assert finish(session) == {i: alone(prompt, 20) for i, prompt in enumerate((A, B, C))}


def test_what_a_callback_raises_in_another_threads_step_is_not_adds() -> None:
    """The request joined and failed between being written down and `add` looking at it."""
    session = session_of(sharp_model())

    def fail(*_: object) -> None:
        raise RuntimeError("consumer")

    join = session._join_waiting

    def late() -> None:
        session._join_waiting = join  # type: ignore[method-assign]
        session._is_computing = False
        session.step()
        session._is_computing = True
        join()

    session._join_waiting = late  # type: ignore[method-assign]
    assert session.add(A, 20, on_tokens=fail) == 0
    assert not session.requests


def test_decode_may_add_but_not_step() -> None:
    """It is called within a step: what it adds joins with the next one, and a step of its own is refused."""
    session = session_of(sharp_model(), slots=3)
    added: list[int] = []

    def adds(tokens: list[int]) -> str:
        if not added:
            added.append(session.add(C, 12))
        return ""

    def steps(tokens: list[int]) -> str:
        session.step()
        return ""

    first = session.add(A, 20, stop_strings=["x"], decode=adds)
    bad = session.requests[session.add(B, 20, stop_strings=["x"], decode=steps)]
    got = finish(session)
    assert bad.error == "RuntimeError: step: expected a call from outside, got one from within a step"
    assert got == {first: alone(A, 20), bad.id: bad.tokens, added[0]: alone(C, 12)}


@pytest.mark.parametrize("returns", [RuntimeError("decoder"), None])
def test_a_decode_that_fails_ends_its_request_alone(returns: Exception | None) -> None:
    """It raises, or gives no text."""
    session = session_of(sharp_model())

    def decode(tokens: list[int]) -> Any:
        if len(tokens) < 3:
            return ""
        if returns is not None:
            raise returns
        return returns

    bad = session.requests[session.add(A, 20, stop_strings=["x"], decode=decode)]
    other = session.add(B, 20)
    got = finish(session)
    assert (bad.finish_reason, bad.tokens) == ("error", alone(A, 20)[:3])
    assert bad.exception is not None
    assert got == {bad.id: bad.tokens, other: alone(B, 20)}
    again = session.add(C, 20)
    assert finish(session) == {again: alone(C, 20)}


class FussyModel(GatedModel):
    """Its lm_head raises for a batch in which a row's token is the forbidden one, as a logits processor would."""

    forbidden: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self._tokens = torch.zeros(1, 1, dtype=torch.int64)
        self.logits = self._fussy

    def __call__(self, tokens: Tensor, pattern: Any, cache: Any = None) -> Tensor:
        self._tokens = tokens
        return super().__call__(tokens, pattern, cache)

    def _fussy(self, hidden: Tensor) -> Tensor:
        if self.forbidden is not None and (self._tokens[:, 0] == self.forbidden).any():
            raise RuntimeError("processor")
        return self.model.logits(hidden)


@pytest.mark.parametrize("strategy", [tidar(1), isd(3), SelfSpeculation(3)], ids=lambda s: s.name)
def test_rows_that_raise_end_their_request_alone(strategy: Strategy) -> None:
    model = FussyModel()
    session = session_of(model, strategy)
    bad = session.requests[session.add(A, 20)]
    ids = [session.add(prompt, 20) for prompt in (B, C)]
    got: dict[int, list[int]] = {}
    collected(got, session.step())
    others = {*alone(B, 20), *alone(C, 20), *B, *C, 0}
    expected = alone(A, 20)
    # A token that only the first request has, and that is the first row of one of its steps.
    at = next(i for i in range(len(bad.tokens), 20) if expected[i] not in others)
    model.forbidden = expected[at]
    finish(session, got)
    if strategy.drafts == 1:
        assert (bad.finish_reason, bad.error, bad.tokens) == ("error", "RuntimeError: processor", expected[:at])
    assert bad.tokens == expected[: len(bad.tokens)]
    assert got == {bad.id: bad.tokens, **{i: alone(p, 20) for i, p in zip(ids, (B, C), strict=True)}}
    model.forbidden = None
    again = session.add(A, 20)
    assert finish(session) == {again: expected}


def test_a_prompt_that_raises_is_the_callers_and_leaves_the_slot_free() -> None:
    """Or the request's own, if the prompt waited for a step of another thread."""
    model = FussyModel()
    session = session_of(model, slots=2)
    model.forbidden = B[0]
    with pytest.raises(RuntimeError, match="processor"):
        session.add(B, 12)
    assert session.free_slots == 2
    first = session.add(A, 12)
    with step_under_way(model, session) as returned:
        late = session.requests[session.add(B, 12)]
    got: dict[int, list[int]] = {}
    collected(got, returned[0])
    finish(session, got)
    assert (late.finish_reason, late.error) == ("error", "RuntimeError: processor")
    assert got == {first: alone(A, 12), late.id: []}
    model.forbidden = None
    again = session.add(B, 12)
    assert finish(session) == {again: alone(B, 12)}


def test_generate_raises_what_every_prompt_meets() -> None:
    """A model that fails is no prompt's fault; a prompt that fails alone is named in the result."""
    model = FussyModel()
    decoder = Decoder(model, mode="autoregressive")
    token = alone(A, 5)[4]
    assert token not in {*alone(B, 9), *B}
    model.forbidden = token
    result = decoder.generate([A, B], 9)
    assert result.finish_reasons == ["error", "length"]
    assert result.errors == ["RuntimeError: processor", None]
    assert result.tokens == [alone(A, 9)[: len(result.tokens[0])], alone(B, 9)]
    with pytest.raises(RuntimeError, match="processor"):
        decoder.generate([A, A], 9)
