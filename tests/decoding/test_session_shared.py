"""A session that tasks and threads share: no event is lost, no two steps at once, each request is what it is alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toys import CONFIG, PROMPTS, sharp_model
from tidar_kernels import Decoder, SamplingParams, Session
from tidar_kernels.decoding.requests import Event, Request
from tidar_kernels.decoding.session import StepConfig
from tidar_kernels.decoding.strategies import BlockDiffusion, SelfSpeculation, Strategy, isd, tidar, tree

A, B, C = PROMPTS
PATIENCE = 60.0  # seconds until a test gives up waiting


class GatedModel:
    """A `DecoderModel` whose next forward pass waits in the middle, once `close` was called, until `open`."""

    def __init__(self) -> None:
        self.model = sharp_model()
        self.config = self.model.config
        self.parameters = self.model.parameters
        self.logits = self.model.logits
        self.entered, self.may_go, self.closed = threading.Event(), threading.Event(), False
        self.running = self.most_running = 0

    def close(self) -> None:
        self.entered.clear()
        self.may_go.clear()
        self.closed = True

    def open(self) -> None:
        self.may_go.set()

    def wait_for_it(self) -> None:
        assert self.entered.wait(PATIENCE)

    def __call__(self, tokens: Tensor, pattern: Any, cache: Any = None) -> Tensor:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        hidden: Tensor = self.model(tokens, pattern, cache)
        if self.closed:
            self.closed = False
            self.entered.set()
            assert self.may_go.wait(PATIENCE)
        self.running -= 1
        return hidden


def session_of(model: Any, strategy: Strategy | None = None, slots: int = 3) -> Session:
    return Session(model, StepConfig(strategy or tidar(4), CONFIG.mask_token_id or 0), slots, 128)


def alone(prompt: list[int], new_tokens: int, seed: int = 0, temperature: float = 0.0) -> list[int]:
    plain = Decoder(sharp_model(), mode="autoregressive")
    return plain.generate([prompt], new_tokens, seed=seed, temperature=temperature).tokens[0]


def collected(into: dict[int, list[int]], events: list[Event]) -> None:
    for event in events:
        into.setdefault(event.id, []).extend(event.tokens)


def finish(session: Session, into: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
    into = {} if into is None else into
    while session.requests:
        collected(into, session.step())
    return into


@contextmanager
def step_under_way(model: GatedModel, session: Session) -> Iterator[list[list[Event]]]:
    """Inside, a step of another thread has run the model and not yet read it; after it, what the step returned."""
    returned: list[list[Event]] = []
    model.close()
    thread = threading.Thread(target=lambda: returned.append(session.step()))
    thread.start()
    model.wait_for_it()
    try:
        yield returned
    finally:
        model.open()
        thread.join(PATIENCE)
        assert not thread.is_alive()


# Threads.


@pytest.mark.parametrize(
    "strategy", [tidar(4), isd(3), SelfSpeculation(3), tree(3), BlockDiffusion(3)], ids=lambda s: s.name
)
def test_a_request_joins_during_a_step(strategy: Strategy) -> None:
    model = GatedModel()
    session = session_of(model, strategy)
    expected = {i: alone_by(strategy, prompt) for i, prompt in enumerate((A, B))}
    session.add(A, 20)
    got: dict[int, list[int]] = {}
    with step_under_way(model, session) as returned:
        late = session.add(B, 20)  # returns although the step is not done
        assert late in session.requests
        assert session.free_slots == 1
    collected(got, returned[0])
    assert finish(session, got) == expected
    assert model.most_running == 1


def alone_by(strategy: Strategy, prompt: list[int]) -> list[int]:
    session = session_of(sharp_model(), strategy)
    session.add(prompt, 20)
    return finish(session)[0]


def test_a_request_leaves_during_a_step() -> None:
    """What was returned stays as it is, its slot can be had at once, and the step's tokens for it are dropped."""
    model = GatedModel()
    session = session_of(model, slots=2)
    first, other = session.add(A, 20), session.add(B, 20)
    got: dict[int, list[int]] = {}
    collected(got, session.step())
    with step_under_way(model, session) as returned:
        gone = session.remove(first)
        had = list(gone.tokens)
        with pytest.raises(KeyError):
            session.remove(first)
        late = session.add(C, 20)
        with pytest.raises(ValueError, match=r"^prompt: expected a free slot"):
            session.add(C, 20)
    collected(got, returned[0])
    finish(session, got)
    assert (gone.finish_reason, gone.tokens) == ("cancelled", had)
    assert got == {first: had, other: alone(B, 20), late: alone(C, 20)}
    assert 0 < len(had) < 20
    assert len(gone.accepted) == len(gone.passes) == 1


def test_one_that_waits_to_join_can_be_removed() -> None:
    model = GatedModel()
    session = session_of(model)
    first = session.add(A, 12)
    with step_under_way(model, session) as returned:
        late = session.add(B, 12)
        assert session.remove(late).tokens == []
    got: dict[int, list[int]] = {}
    collected(got, returned[0])
    assert finish(session, got) == {first: alone(A, 12)}


def test_a_second_step_waits_for_the_first() -> None:
    model = GatedModel()
    session = session_of(model)
    session.add(A, 40)
    second: list[list[Event]] = []
    thread = threading.Thread(target=lambda: second.append(session.step()))
    with step_under_way(model, session) as first:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(PATIENCE)
    got: dict[int, list[int]] = {}
    for events in (first[0], second[0]):
        collected(got, events)
    assert finish(session, got) == {0: alone(A, 40)}
    assert model.most_running == 1


def test_decoders_session_is_made_once() -> None:
    decoder = Decoder(sharp_model(), 4, batch_size=2, max_len=64)
    barrier, made = threading.Barrier(8), []

    def make() -> None:
        barrier.wait(PATIENCE)
        made.append(decoder.session)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(set(map(id, made))) == 1


# Tasks.


async def wait_for(what: Callable[[], object]) -> None:
    await asyncio.to_thread(what)


def test_an_event_loop_is_not_blocked_by_a_step() -> None:
    """`add` and `remove` return to the loop while the step is in the middle of the model."""

    async def serve() -> dict[int, list[int]]:
        got: dict[int, list[int]] = {}
        session.add(A, 20)
        model.close()
        run = asyncio.create_task(anext(session.steps()))  # type: ignore[arg-type]
        await wait_for(model.wait_for_it)
        session.add(B, 20)
        gone = session.add(C, 20)
        session.remove(gone)
        assert not model.may_go.is_set()
        model.open()
        collected(got, await run)
        async for events in session.steps():
            collected(got, events)
        return got

    model = GatedModel()
    session = session_of(model)
    assert asyncio.run(serve()) == {0: alone(A, 20), 1: alone(B, 20)}
    assert model.most_running == 1


@pytest.mark.parametrize("at_once", [True, False])
def test_cancelling_loses_no_event(at_once: bool) -> None:
    """The step that was under way is completed; whoever goes on, at once or later, gets its events first."""

    async def serve() -> dict[int, list[int]]:
        got: dict[int, list[int]] = {}
        model.close()
        run = asyncio.create_task(anext(session.steps()))  # type: ignore[arg-type]
        await wait_for(model.wait_for_it)
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run
        if not at_once:
            model.open()
            await asyncio.sleep(0.2)
            assert len(session._undelivered) == 1
        after = session.steps()
        following = asyncio.create_task(anext(after))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        model.open()
        collected(got, await following)
        async for events in after:
            collected(got, events)
        return got

    model = GatedModel()
    session = session_of(model)
    request = session.requests[session.add(A, 20)]
    assert asyncio.run(serve()) == {0: alone(A, 20)} == {0: request.tokens}
    assert model.most_running == 1


def test_a_step_collects_what_a_cancelled_iterator_left() -> None:
    """Also if that was the last step, of a request that has ended."""
    model = GatedModel()
    session = session_of(model)
    session.add(A, 1)

    async def cancelled() -> None:
        model.close()
        run = asyncio.create_task(anext(session.steps()))  # type: ignore[arg-type]
        await wait_for(model.wait_for_it)
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run
        model.open()

    asyncio.run(cancelled())
    assert [event.tokens for event in session.step()] == [alone(A, 1)]
    assert session.step() == []


def test_the_last_events_are_not_lost_while_a_callback_still_runs() -> None:
    """Between its last token and its delivery a request runs no more, and `steps` still waits for its event."""
    session = session_of(sharp_model())
    in_callback, may_go = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        in_callback.set()
        assert may_go.wait(PATIENCE)

    session.add(A, 1, on_tokens=hold)

    async def serve() -> list[Event]:
        run = asyncio.create_task(anext(session.steps()))  # type: ignore[arg-type]
        await wait_for(lambda: in_callback.wait(PATIENCE))
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run
        assert not session.requests
        following = asyncio.create_task(anext(session.steps()))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        may_go.set()
        events: list[Event] = await following
        return events

    assert [event.tokens for event in asyncio.run(serve())] == [alone(A, 1)]


def test_two_iterators_share_the_steps() -> None:
    model = GatedModel()
    session = session_of(model)
    ids = [session.add(prompt, 24) for prompt in PROMPTS]
    got: dict[int, list[int]] = {}

    async def consume() -> int:
        count = 0
        async for events in session.steps():
            collected(got, events)
            count += 1
        return count

    async def both() -> list[int]:
        return await asyncio.gather(consume(), consume())

    steps = asyncio.run(both())
    assert got == {i: alone(prompt, 24) for i, prompt in zip(ids, PROMPTS, strict=True)}
    assert sum(steps) == session.forwards
    assert model.most_running == 1


@pytest.mark.parametrize("closed", [True, False])
def test_an_iterator_abandoned_half_way(closed: bool) -> None:
    session = session_of(sharp_model())
    session.add(A, 30)
    got: dict[int, list[int]] = {}

    async def serve() -> None:
        first: AsyncIterator[list[Event]] = session.steps()
        async for events in first:
            collected(got, events)
            break
        if closed:
            await first.aclose()  # type: ignore[attr-defined]
        async for events in session.steps():
            collected(got, events)

    asyncio.run(serve())
    assert got == {0: alone(A, 30)}


def test_a_timeout_around_each_step_loses_nothing() -> None:
    session = session_of(sharp_model())
    session.add(A, 30)
    got: dict[int, list[int]] = {}

    async def serve() -> None:
        while session.requests or session._under_way or session._undelivered:
            steps = session.steps()
            with suppress(asyncio.TimeoutError, StopAsyncIteration):
                collected(got, await asyncio.wait_for(anext(steps), 0.002))  # type: ignore[arg-type]

    asyncio.run(serve())
    assert got == {0: alone(A, 30)}


def test_what_a_step_raises_reaches_the_iterator() -> None:
    """And the session goes on: here the model is not what it was, and then it is again."""
    model = sharp_model()
    session = session_of(model)
    session.add(A, 12)
    model.double()

    async def serve() -> dict[int, list[int]]:
        got: dict[int, list[int]] = {}
        with pytest.raises(ValueError, match=r"^model: expected dtype"):
            await anext(session.steps())  # type: ignore[arg-type]
        model.float()
        async for events in session.steps():
            collected(got, events)
        return got

    assert asyncio.run(serve()) == {0: alone(A, 12)}


# Functions of the user, called in a step.


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


def test_sampling_is_untouched_by_who_shares_the_session() -> None:
    """Threads add and remove while a task steps; every request is what it is alone, for its seed."""
    session = session_of(sharp_model(), tidar(4), slots=4)
    got: dict[int, list[int]] = {}
    what: dict[int, tuple[list[int], int]] = {}
    left = threading.Semaphore(24)
    lock = threading.Lock()

    def client(seed: int) -> None:
        for turn in range(6):
            prompt = PROMPTS[(seed + turn) % len(PROMPTS)]
            while True:
                with suppress(ValueError), lock:
                    request_id = session.add(prompt, 10, SamplingParams(0.9, seed=seed))
                    what[request_id] = (prompt, seed)
                    break
            left.acquire()

    async def serve() -> None:
        while any(thread.is_alive() for thread in threads) or session.requests:
            async for events in session.steps():
                collected(got, events)
            await asyncio.sleep(0)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    asyncio.run(serve())
    assert len(what) == 24
    assert got == {i: alone(prompt, 10, seed, 0.9) for i, (prompt, seed) in what.items()}
