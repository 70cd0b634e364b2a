"""A session that tasks and threads share: no event is lost, no two steps at once, each request is what it is alone."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext, suppress

import pytest

from tests.decoding.sharing import PATIENCE, A, B, C, GatedModel, alone, collected, finish, session_of, step_under_way
from tests.toys import PROMPTS, sharp_model
from tidar_kernels import Decoder, SamplingParams
from tidar_kernels.decoding.requests import Event
from tidar_kernels.decoding.strategies import BlockDiffusion, SelfSpeculation, Strategy, isd, tidar, tree

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("under_way", [True, False])
def test_a_forked_process_goes_on(under_way: bool) -> None:
    """Without the worker that took steps before, and without the thread whose step was under way."""
    model = GatedModel()
    session = session_of(model)
    requests = [session.requests[session.add(prompt, 12)] for prompt in PROMPTS]

    async def one_step() -> None:
        async for _ in session.steps():
            break

    async def serve() -> None:
        async for _ in session.steps():
            pass

    asyncio.run(one_step())
    expected = [alone(prompt, 12) for prompt in PROMPTS]
    with step_under_way(model, session) if under_way else nullcontext():
        child = os.fork()
        if not child:
            signal.alarm(20)  # one that waits for ever is ended
            try:
                asyncio.run(serve())
                os._exit([request.tokens for request in requests] != expected)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asyncio.run(serve())
    assert [request.tokens for request in requests] == expected


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
