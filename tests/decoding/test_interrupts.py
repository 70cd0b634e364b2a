"""Ctrl-C anywhere in a step or a join: the session stays whole, and every request goes on as if nothing had been."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
import torch

import tidar_kernels
from tests.toys import PROMPTS, Learned, sharp_model
from tidar_kernels import KVCache, SamplingParams, Session
from tidar_kernels.decoding.interrupts import held, let_through
from tidar_kernels.decoding.requests import Event, Request
from tidar_kernels.decoding.session import StepConfig
from tidar_kernels.decoding.strategies import SelfSpeculation, Strategy, autoregressive, isd, tidar, tree

PACKAGE = tidar_kernels.__file__.removesuffix("__init__.py")
FILES = (f"{PACKAGE}decoding/", f"{PACKAGE}cache.py")
NEW_TOKENS = 9
PARAMS = (SamplingParams(), SamplingParams(0.9, seed=3, repetition_penalty=1.2))


@pytest.fixture(autouse=True)
def _plain_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a handler was left behind"
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


class At:
    """Counts lines of decoding that are run inside, and sends SIGINT before the line of one number."""

    def __init__(self, number: int) -> None:
        self.number, self.count, self.where = number, 0, ""

    def __enter__(self) -> At:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(FILES) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.number:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                interrupt()
        return self._line


class Served:
    """Two requests, one of them sampled with a penalty, and all that was said of them."""

    def __init__(self, strategy: Strategy, model: Any = None, **config: Any) -> None:
        self.model = Learned(64) if model is None else model
        self.session = Session(self.model, StepConfig(strategy, self.model.config.mask_token_id, **config), 3, 64)
        self.called: dict[int, list[int]] = {}
        self.events: dict[int, list[int]] = {}
        self.reasons: list[str] = []
        self.requests = [self.add([3, 1, 4], PARAMS[0]), self.add([9], PARAMS[1])]

    def add(self, prompt: list[int], params: SamplingParams) -> Request:
        added = self.session.add(prompt, NEW_TOKENS, params, on_tokens=self._call)
        return self.session.requests[added]

    def _call(self, request_id: int, tokens: list[int]) -> None:
        self.called.setdefault(request_id, []).extend(tokens)

    def take(self, events: list[Event]) -> None:
        for event in events:
            self.events.setdefault(event.id, []).extend(event.tokens)
            self.reasons += [event.finish_reason] if event.finish_reason else []

    def finish(self) -> Served:
        while events := self.session.step():
            self.take(events)
        assert not self.session.requests
        assert self.session.free_slots == 3
        return self

    def said(self) -> tuple[Any, ...]:
        tokens = {request.id: request.tokens for request in self.requests}
        assert tokens == self.called == self.events
        return tokens, [request.finish_reason for request in self.requests], self.reasons


# Of the lines that are run, so many apart; with 1, minutes, each of them.
APART = 7
STRATEGIES = [autoregressive(), tidar(3), isd(3), SelfSpeculation(3), tree(3)]


def lines_of(act: Callable[[], object]) -> int:
    with At(-1) as counting:
        act()
    return counting.count


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
def test_an_interrupt_before_any_line_of_a_step(strategy: Strategy) -> None:
    """Of the second step, so that there is a past; nothing that was said is lost, nothing is said twice."""
    expected = Served(strategy).finish().said()
    counted = Served(strategy)
    counted.take(counted.session.step())
    numbers, came = range(STRATEGIES.index(strategy) + 1, lines_of(counted.session.step) + 1, APART), 0
    assert len(numbers) > 10
    for number in numbers:
        served = Served(strategy)
        served.take(served.session.step())
        with At(number) as at:
            try:
                served.take(served.session.step())
            except KeyboardInterrupt:
                came += 1
        assert served.finish().said() == expected, at.where
    assert came == len(numbers)


def test_an_interrupt_before_any_line_of_a_join() -> None:
    """The one that joins is not there afterwards, or it is whole; the others are as they were, the slot is free."""
    expected = Served(tidar(3)).finish().said()
    alone = Served(tidar(3))
    late = alone.add([7, 7], PARAMS[0])
    alone.finish()
    counted = Served(tidar(3))
    lines = lines_of(lambda: counted.add([7, 7], PARAMS[0]))
    assert lines > 50
    for number in range(1, lines + 1, APART):
        served = Served(tidar(3))
        served.take(served.session.step())
        with At(number) as at, suppress(KeyboardInterrupt):
            served.add([7, 7], PARAMS[0])
        kept = served.session.requests.get(2)
        served.finish()
        if kept is None:
            assert served.said() == expected, at.where
        else:
            assert served.events.pop(2) == served.called.pop(2) == kept.tokens == late.tokens, at.where


def test_an_interrupt_while_the_last_one_is_mended() -> None:
    expected = Served(tidar(3)).finish().said()

    def torn() -> Served:
        served = Served(tidar(3))
        served.take(served.session.step())
        served.session._is_torn = True
        return served

    lines = lines_of(torn().session.step)
    for number in range(1, lines + 1, APART):
        served = torn()
        with At(number) as at, suppress(KeyboardInterrupt):
            served.take(served.session.step())
        assert served.finish().said() == expected, at.where


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_step_that_ends_after_its_commit(monkeypatch: pytest.MonkeyPatch, exact: bool, end: Any) -> None:
    """The device is ahead of the host then. With `exact`, the cache has the bits of a run that was not interrupted."""
    strategy, model = tidar(3), sharp_model()
    plain = Served(strategy, model, exact=exact)
    expected = plain.finish().said()
    served = Served(strategy, model, exact=exact)
    commit, ends = KVCache.commit, [end()]

    def ending(self: KVCache, accepted: Any, at_most: int | None = None) -> None:
        commit(self, accepted, at_most)
        if ends and not isinstance(accepted, int):
            raise ends.pop()

    served.take(served.session.step())
    monkeypatch.setattr(KVCache, "commit", ending)
    with pytest.raises(end):
        served.session.step()
    assert served.finish().said() == expected
    if exact:
        caches = plain.session.cache, served.session.cache
        assert torch.equal(caches[0].lengths, caches[1].lengths)
        for slot, length in enumerate(caches[0].lengths.tolist()):
            for ours, theirs in zip((caches[0].k, caches[0].v), (caches[1].k, caches[1].v), strict=True):
                assert torch.equal(ours[:, slot, :, :length], theirs[:, slot, :, :length])


def test_what_is_held_back() -> None:
    order: list[str] = []

    def to_the_end() -> None:
        with held():
            interrupt()
            order.append("held")
        order.append("never")

    def at_once() -> None:
        with held(), let_through():
            interrupt()
            order.append("never")

    def before() -> None:
        with held():
            interrupt()
            order.append("held")
            with let_through():
                order.append("never")

    def twice() -> None:
        with held():
            interrupt()
            interrupt()
            order.append("never")

    def nested() -> None:
        with held():
            with held(), let_through():  # as in a callback that steps: the outer one holds
                interrupt()
            order.append("held")
        order.append("never")

    for act in (to_the_end, at_once, before, twice, nested):
        with pytest.raises(KeyboardInterrupt):
            act()
    assert order == ["held", "held", "held"]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, None])
def test_handlers_of_others_stay(handler: Any) -> None:
    """Ignored, or one of the caller's own, which need not raise; other threads have nothing to hold back."""
    calls: list[int] = []
    own = handler or (lambda number, frame: calls.append(number))
    signal.signal(signal.SIGINT, own)
    try:
        with held():
            interrupt()
            assert calls == []
        assert calls == ([] if handler else [signal.SIGINT])
        assert signal.getsignal(signal.SIGINT) == own
        thread = threading.Thread(target=lambda: Served(tidar(3)).finish())
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_second_interrupt_ends_the_wait_for_another_threads_step() -> None:
    """Or the first: whoever waits for a turn is not held."""
    session = Session(Learned(64), StepConfig(tidar(3)), 1, 64)
    session.add(PROMPTS[0], 4)
    holds, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with session._turn:
            holds.set()
            may_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait(60)
    timer = threading.Timer(0.3, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        session.step()
    may_go.set()
    thread.join()
    assert session._steps_waiting == 0
    while session.requests:
        session.step()
