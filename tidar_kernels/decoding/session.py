"""A batch that is decoded step by step: requests join and leave between steps, each with its own sampling.

One step, for all slots of the batch at once (TiDAR, arXiv 2511.08923, decode step; `tidar_kernels.strategies`):

    rows      [d_0 .. d_{B-1} | block 1 | ... | block B]          one forward pass over the strategy's pattern
    verify    lm_head on the B draft rows, `tidar_kernels.verify` a accepted drafts and the token after them
    commit    lengths += a; the K/V of d[0:a] is in place already, everything else is forgotten
    next      [that token] + a token of rows 1..B-1 of block a    lm_head on these alone

What the rows are and where the next drafts come from is the strategy's. Autoregressive decoding is one of them, with
one draft and no block. `runner` computes a step; requests, their limits, and who may do what when are the session's.

Two locks keep a session whole when tasks and threads share it:

    _turn     who holds it may run the model and write the buffers: a whole step, or the prefill of a prompt
    _mutex    the host's lists of requests and events; held for a few lines, never while the model or a user's
              function runs

Only `step` waits for its turn. `add` and `remove` take it if it is free; if not, they write down what is to be done,
and the next step begins with that. So they never wait for a step, and an event loop may call them.

A step may end before it is done: Ctrl-C, or an error that is no request's own. What requests have received is then the
truth (`interrupts` keeps it whole), and the next turn brings the device back to it (`_mend`).
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from .. import patterns
from ..nn.adapters import has_gated_lora
from ..ops.verify import SamplingParams
from ..patterns.arguments import check_strings
from .interrupts import held, let_through
from .prompts import as_prompt, as_stop_tokens
from .requests import Event, FinishReason, Request, Taken
from .runner import SlotResult, StepConfig, StepRunner
from .strategies import DecoderModel
from .strategies.base import check_positions, check_ready

__all__ = ["DecoderModel", "Event", "FinishReason", "Request", "Session", "StepConfig"]

_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()  # of this process


class Session:
    """A batch of `batch_size` slots over one cache; see the module.

    Tasks and threads may share it. `add` and `remove` never wait for a step: call them from anywhere, callbacks and the
    event loop too, also while a step is under way. `step` waits for a step that is under way; on an event loop use
    `steps`, which does not block it. Each event is delivered once, to one caller. `check`, `free_slots` and `requests`
    may be read at any time (`dict(session.requests)` to go through them); `cache` and `replayed` are for a caller that
    has the session to itself.

    Args:
        model: its parameters' dtype and device are those of the cache.
        step: how it decodes.
        batch_size: slots; every step computes all of them, taken or not.
        max_len: cache slots per sequence: prompt, new tokens and the drafts of a step must fit.
        cuda_graph: capture the step as one CUDA graph; default where there is a GPU.
        page_size: keep the cache in pages of so many tokens (`KVCache`), None for `max_len` slots a sequence. A request
            joins if there are pages for its prompt, its new tokens and the drafts of a step, and gives them back when
            it ends; requests that run and whose prompts begin alike share the pages of that beginning, and it is
            computed once.
        num_pages: pages in all; default enough for `batch_size` requests of `max_len`.

    Attributes:
        requests: the requests that run, or wait for a step to end so that they can, by id.
        forwards, prefill_forwards: forward passes so far.
        seconds, prefill_seconds: wall time of the steps, and of the prefills.
    """

    def __init__(
        self,
        model: DecoderModel,
        step: StepConfig,
        batch_size: int,
        max_len: int,
        *,
        cuda_graph: bool | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        self.model, self.step_config = model, step
        self._runner = StepRunner(model, step, batch_size, max_len, cuda_graph, page_size, num_pages)
        self.device, self.vocab_size = self._runner.device, self._runner.vocab_size
        self.cache = self._runner.cache
        self.seconds = self.prefill_seconds = 0.0
        self._adapters = has_gated_lora(model)
        self._is_checked = False  # whether this run's model is the one that the session was made for

        self._turn = threading.RLock()
        self._steps_waiting = 0  # for their turn: they go before prompts, or a busy crowd would starve them
        self._is_computing = False  # in a turn, which the same thread could otherwise take again
        self._is_torn = False  # the device may be ahead of what requests have received
        self._mutex = threading.RLock()
        self.requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()  # to join
        self._slots: list[Request | None] = [None] * batch_size  # an ended request stays here until a turn frees it
        self._next_id = 0
        # What a step received, and the list that its event goes to, until its callback was called.
        self._to_deliver: deque[tuple[list[Event], Request, list[int], FinishReason | None]] = deque()
        self._undelivered: deque[list[Event]] = deque()  # of steps on the worker
        self._under_way: Future[None] | None = None  # the step on the worker
        self._worker: ThreadPoolExecutor | None = None
        _SESSIONS.add(self)

    def __getstate__(self) -> Any:
        raise TypeError("session: expected to be used where it was made, got copy or pickle; make another one")

    @property
    def free_slots(self) -> int:
        """How many requests could join now."""
        return len(self._slots) - len(self.requests)

    @property
    def forwards(self) -> int:
        return self._runner.forwards

    @property
    def prefill_forwards(self) -> int:
        return self._runner.prefill_forwards

    def check(self, prompt: Any, max_new_tokens: int, stop_tokens: Any = ()) -> None:
        """Raise TypeError or ValueError for a request that could not run; `add` asks it before anything is written."""
        self._checked(prompt, max_new_tokens, stop_tokens)

    def _checked(self, prompt: Any, max_new_tokens: int, stop_tokens: Any) -> tuple[list[int], frozenset[int]]:
        """The prompt and the stop tokens, as ints."""
        patterns.check_int("max_new_tokens", max_new_tokens, 1)
        stops = as_stop_tokens(stop_tokens, self.vocab_size)
        tokens = as_prompt("prompt", prompt, self.vocab_size)
        # A step appends its drafts after every sequence, also after one that has ended while others go on.
        needed = self._tokens_of(tokens, max_new_tokens)
        of = f"(prompt {len(tokens)} + max_new_tokens {max_new_tokens} + {self.step_config.slots} drafts)"
        if needed > self.cache.max_len:
            raise ValueError(f"max_len: expected >= {needed} {of}, got {self.cache.max_len}")
        pool = self.cache.pool
        if pool is not None and self.cache.pages_for(needed) > pool.num_pages:
            raise ValueError(
                f"num_pages: expected >= {self.cache.pages_for(needed)} for {needed} tokens {of}, got {pool.num_pages}"
            )
        check_positions(self.model, len(tokens), max_new_tokens)
        return tokens, stops

    def _tokens_of(self, prompt: list[int], max_new_tokens: int) -> int:
        """The most cache slots that a request fills."""
        return len(prompt) + max_new_tokens + self.step_config.slots

    def _check_pages(self, prompt: list[int], max_new_tokens: int) -> None:
        """Raise ValueError if there are too few pages for one more request: those that wait come first, and those of
        requests that have ended are free."""
        pool = self.cache.pool
        if pool is None:
            return

        ended = {
            slot
            for slot, request in enumerate(self._slots)
            if request is not None and request.finish_reason is not None
        }

        def pages_for(prompt: list[int], max_new_tokens: int) -> int:
            return self._runner.pages_for(prompt, self._tokens_of(prompt, max_new_tokens), ended)

        needed = pages_for(prompt, max_new_tokens)
        waiting = [request for request in self._waiting if request.finish_reason is None]
        promised = sum(pages_for(request.prompt, request.max_new_tokens) for request in waiting)
        users = Counter(page for slot in ended for page in self.cache.pages_of(slot))
        freed = sum(pool.users(page) == count for page, count in users.items())
        free = pool.free_pages + freed - promised
        if needed > free:
            raise ValueError(f"prompt: expected {needed} free pages, got {max(0, free)} of {pool.num_pages}")

    def check_model(self) -> None:
        """Raise if the model is no longer what the session was made for; asked once a run, see `DecoderModel`.

        Raises:
            TypeError, ValueError: its parameters have another dtype or device than the cache, its vocabulary has
                another size, gated adapters were added or taken away, or what `check_ready` of the model raises.
        """
        check_ready(self.model)
        weight = next(iter(self.model.parameters()))
        now = {
            "dtype": (self.cache.k.dtype, weight.dtype),
            "device": (self.cache.k.device, weight.device),
            "vocab_size": (self.vocab_size, self.model.config.vocab_size),
            "gated adapters": (self._adapters, has_gated_lora(self.model)),
        }
        for what, (expected, found) in now.items():
            if expected != found:
                raise ValueError(
                    f"model: expected {what} {expected} as when the decoder was made, got {found}; make a new one"
                )

    def add(
        self,
        prompt: Any,
        max_new_tokens: int = 256,
        params: SamplingParams | None = None,
        *,
        stop_tokens: Any = (),
        stop_strings: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        on_tokens: Callable[[int, list[int]], object] | None = None,
    ) -> int:
        """Let a request join; its tokens come with the next steps. Returns its id.

        Its prompt is computed now, or at the start of the next step if one is under way.

        Args:
            prompt: token ids, at least one: ints, or an integer tensor or NumPy array `[n]` or `[1, n]`.
            max_new_tokens: >= 1.
            params: default greedy.
            stop_tokens: ids that end the request; the stop token is kept as its last.
            stop_strings: texts that end it, wherever token boundaries lie; the token that completes one is its last.
            decode: token ids to text, for `stop_strings`.
            on_tokens: called with the id and its new tokens after every step that brings some, on the thread of the
                step. It may call `add`, `remove` and `step`.

        If `decode` or `on_tokens` raises, this request ends with "error" and keeps what was raised; others go on.

        Raises:
            TypeError, ValueError: an argument does not fit, no slot is free, or too few pages, or the model has changed
                since the session was made; nothing is written then.
        """
        tokens, stops = self._checked(prompt, max_new_tokens, stop_tokens)
        stop_strings = check_strings("stop_strings", stop_strings)
        if stop_strings and decode is None:
            raise ValueError("decode: expected a function from token ids to text beside stop_strings, got None")
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params: expected a SamplingParams, got {type(params).__name__}")
        for name, function in (("decode", decode), ("on_tokens", on_tokens)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
        self.check_model()
        with held():
            with self._mutex:
                if not self.free_slots:
                    raise ValueError(f"prompt: expected a free slot, got {len(self._slots)} requests running")
                self._check_pages(tokens, max_new_tokens)
                request = Request(
                    self._next_id, tokens, max_new_tokens, params, stops, tuple(stop_strings), decode, on_tokens
                )
                self._next_id += 1
                self.requests[request.id] = request
                self._waiting.append(request)
                self._is_checked = False  # the model may change until the first step
            with self._turn_if_free() as is_ours:
                if is_ours:
                    self._join_waiting()
                    if request.exception is not None and request.finish_reason is None:  # its prompt's: for the caller
                        self._end(request, "error")
                        raise request.exception
            return request.id

    def remove(self, request_id: int) -> Request:
        """Cancel a request: its slot is free at once, its tokens so far are in what is returned and stay as they are.

        What a step under way would have brought it is dropped.

        Raises:
            KeyError: no such request is running. TypeError, ValueError: it is not an int >= 0.
        """
        with held():
            with self._mutex:
                if patterns.check_int("request_id", request_id, 0) not in self.requests:
                    raise KeyError(f"request_id: expected one of {sorted(self.requests)}, got {request_id}")
                request = self.requests[request_id]
                self._end(request, "cancelled")
            with self._turn_if_free() as is_ours:
                if is_ours:
                    self._free_slots_of_ended()
            return request

    def step(self) -> list[Event]:
        """One forward pass for every running request; what it brought, in the order of the slots.

        A step that is under way is waited for. What a cancelled `steps` or an interrupted `step` left undelivered is
        returned first, by itself. After a KeyboardInterrupt the session is whole: go on, or `remove` requests.

        A request whose rows raise, if it takes the step by itself, or whose `decode` or `on_tokens` raises ends with
        "error"; the others' tokens do not change.

        Raises:
            RuntimeError: called from within a step: by the model, or by a `decode`.
            TypeError, ValueError: the model has changed since the session was made; nothing has changed then.
        """
        events = None
        try:
            with held() as interrupts, self._turn_of_a_step(interrupts):
                self._call_callbacks()  # those that an interrupt kept from being called
                events = self._left_undelivered()
                if events is None:
                    events = self._step()
            return events
        except BaseException:
            if events:  # interrupted once it was done
                self._undelivered.appendleft(events)
            raise

    async def steps(self) -> AsyncIterator[list[Event]]:
        """Steps until no request runs, each on a worker thread; requests may be added and removed at any time.

        A step that is under way when the caller is cancelled is completed, and the next call of `steps` or `step`
        delivers its events. Several iterators may run at once: there is one step at a time, and each event goes to one
        of them.
        """
        self._is_checked = False
        while self._undelivered or self._to_deliver or self._under_way or self.requests:
            if not self._undelivered:
                await asyncio.wrap_future(self._step_on_worker())
            events = self._left_undelivered()
            if events is not None:
                yield events

    def replayed(self) -> Callable[[], object]:
        """The step on the device alone, for timing: what `step` runs, with nothing read and no request served."""
        return self._runner.replayed()

    # Whose turn it is.

    @contextmanager
    def _turn_if_free(self) -> Iterator[bool]:
        """Take the turn, unless something is computed, be it by this thread, or a step waits: whether it was taken."""
        if self._steps_waiting or not self._turn.acquire(blocking=False):
            yield False
            return
        try:
            if self._is_computing:
                yield False
            else:
                with self._computing():
                    yield True
        finally:
            self._turn.release()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """In a turn: neither the model nor a `decode` that is called inside may step, or join prompts itself."""
        if self._is_computing:
            raise RuntimeError("step: expected a call from outside, got one from within a step")
        self._is_computing = True
        try:
            yield
        finally:
            self._is_computing = False

    @contextmanager
    def _turn_of_a_step(self, interrupts: held) -> Iterator[None]:
        """Wait for the turn, before all prompts that come meanwhile; callbacks still are within it."""
        with self._mutex:
            self._steps_waiting += 1
        try:
            while not self._turn.acquire(timeout=0.1):
                interrupts.deliver()
        finally:
            with self._mutex:
                self._steps_waiting -= 1
        try:
            yield
        finally:
            self._turn.release()

    def _step_on_worker(self) -> Future[None]:
        """The step that is under way on the worker, or a new one. Its future cannot be cancelled: others may wait."""
        with self._mutex:
            if self._under_way is None:
                if self._worker is None:
                    self._worker = ThreadPoolExecutor(1, thread_name_prefix="tidar-session")
                self._under_way = Future()
                self._under_way.set_running_or_notify_cancel()
                self._worker.submit(contextvars.copy_context().run, self._work, self._under_way)
            return self._under_way

    def _work(self, done: Future[None]) -> None:
        exception = None
        try:
            with held() as interrupts, self._turn_of_a_step(interrupts):
                events = self._step()
                if events:
                    self._undelivered.append(events)
        except BaseException as raised:
            exception = raised
        with self._mutex:
            self._under_way = None
        if exception is None:
            done.set_result(None)
        else:
            done.set_exception(exception)

    def _left_undelivered(self) -> list[Event] | None:
        with self._mutex:
            return self._undelivered.popleft() if self._undelivered else None

    def _after_fork(self) -> None:
        """In a forked process: of all threads only the one that forked is there, and what another held stays held."""
        self._worker, self._under_way, self._steps_waiting = None, None, 0
        if not self._mutex.acquire(blocking=False):
            self._mutex = threading.RLock()
        else:
            self._mutex.release()
        if not self._turn.acquire(blocking=False):
            self._turn, self._is_computing, self._is_torn = threading.RLock(), False, True
        else:
            self._turn.release()

    # What is done in a turn.

    def _step(self) -> list[Event]:
        self._call_callbacks()  # of the step around this one, if one of its callbacks has called it
        with self._computing():
            self._mend()
            self._join_waiting()
            running = [(slot, request) for slot, request in enumerate(self._slots) if request is not None]
            if not running:
                return []
            if not self._is_checked:
                self._start_run()
            started = time.perf_counter()
            taken: list[Taken] = []
            with self._tearing(), let_through():
                results = self._runner.run([slot for slot, request in running if request.error is None])
                for slot, request in running:
                    # No result: its prompt has failed.
                    taken.append(request.taken_of(results[slot].tokens) if slot in results else Taken([]))
            received = [
                self._receive(slot, request, results.get(slot), took)
                for (slot, request), took in zip(running, taken, strict=True)
            ]
            self._free_slots_of_ended()
            self._runner.lengths_known()
            self.seconds += time.perf_counter() - started
        events: list[Event] = []
        self._to_deliver.extend((events, *what) for what in received if what is not None)
        try:
            self._call_callbacks()
        except BaseException:  # Ctrl-C, and no request's failure: nothing is lost
            events += [Event(request.id, tokens, reason) for _, request, tokens, reason in self._to_deliver]
            self._undelivered.append(events)
            # Their callbacks come with the next step; the events are told already.
            self._to_deliver = deque(([], *what[1:]) for what in self._to_deliver)
            raise
        return events

    @contextmanager
    def _tearing(self) -> Iterator[None]:
        """Around what changes the device: if it ends half-way, the next turn mends it."""
        try:
            yield
        except BaseException:
            self._is_torn = True
            raise

    def _mend(self) -> None:
        """Bring the device back to what the requests have received, after a step that ended half-way.

        What was committed stays as it is in the cache. What follows a request's last token is computed again, from that
        token; without one its prompt is.
        """
        if not self._is_torn:
            return
        self._free_slots_of_ended()
        for slot, request in enumerate(self._slots):
            if request is None:
                self._runner.leave(slot)
            elif request.error is None:
                self._compute(slot, request)
        self._runner.lengths_known()
        self._is_torn = False

    def _compute(self, slot: int, request: Request) -> None:
        """A request's tokens so far, up to the first draft after them; what this raises is kept in it."""
        tokens = [*request.prompt, *request.tokens]
        known = len(tokens) - 1 if request.tokens else 0
        try:
            with self._tearing(), let_through():
                has_token = self._runner.join(slot, tokens, request.params, known)
        except Exception as exception:
            request.keep(exception)
            return
        if not has_token:
            where = f"for position {len(tokens)}" if request.tokens else "after the prompt"
            request.error = f"expected finite logits, got NaN, inf or nothing above -inf {where}"

    def _start_run(self) -> None:
        """What is asked once a run, before its first step."""
        self._is_checked = True  # first: a request that joins meanwhile asks for another check
        try:
            self.check_model()
        except BaseException:
            self._is_checked = False
            raise
        self._runner.weights_may_have_moved()

    def _join_waiting(self) -> None:
        """Compute the prompts of requests that wait; what one raises is kept in it."""
        self._free_slots_of_ended()
        for _ in range(len(self._waiting)):  # those that come meanwhile wait for the next step
            with self._mutex:
                self._free_slots_of_ended()
                request = self._waiting[0]
                if request.finish_reason is None:  # else removed before it joined
                    slot = self._slots.index(None)
                    needed = self._tokens_of(request.prompt, request.max_new_tokens)
                    with self._tearing():
                        has_pages = self._runner.reserve(slot, request.prompt, needed)
                    if not has_pages:
                        break  # it was to share pages of one that has ended: it waits until enough are free
                    self._slots[slot] = request
                self._waiting.popleft()
                if request.finish_reason is not None:
                    continue
            started = time.perf_counter()
            try:
                self._compute(slot, request)
            except BaseException:
                self._end(request, "cancelled")
                raise
            self.prefill_seconds += time.perf_counter() - started

    def _receive(
        self, slot: int, request: Request, result: SlotResult | None, taken: Taken
    ) -> tuple[Request, list[int], FinishReason | None] | None:
        """Give a request what its slot accepted: the tokens that it takes, and why it ended, if it did.

        None if it was removed during the step.
        """
        with self._mutex:
            if request.finish_reason is not None:  # removed during the step
                return None
            if result is None:
                self._end(request, "error")
                return request, [], "error"
            request.passes.append(result.forwards)
            request.accepted.append(len(taken.tokens))
            request.tokens += taken.tokens
            self._runner.lengths[slot] = len(request.prompt) + len(request.tokens)
            reason, exception = taken.finish_reason, result.exception or taken.exception
            if exception is not None:
                request.keep(exception)
                reason = "error"
            elif result.is_bad and reason is None:
                position = len(request.prompt) + len(request.tokens)
                request.error = f"expected finite logits, got NaN, inf or nothing above -inf for position {position}"
                reason = "error"
            if reason is not None:
                self._end(request, reason)
            return request, taken.tokens, reason

    def _call_callbacks(self) -> None:
        """Tell requests what they received, each in the order of its tokens; last in a step, when all else is done."""
        while self._to_deliver:
            events, request, tokens, reason = self._to_deliver.popleft()
            try:
                if tokens and request.on_tokens is not None:
                    request.on_tokens(request.id, list(tokens))
            except Exception as exception:
                with self._mutex:
                    if request.finish_reason != "cancelled":
                        request.keep(exception)
                        self._end(request, "error")
                        reason = "error"
            finally:
                events.append(Event(request.id, tokens, reason))

    def _end(self, request: Request, reason: FinishReason) -> None:
        """No request of the session any longer; its slot is freed by the next turn, or in this one."""
        with self._mutex:
            request.finish_reason = reason
            self.requests.pop(request.id, None)

    def _free_slots_of_ended(self) -> None:
        with self._mutex:
            for slot, request in enumerate(self._slots):
                if request is not None and request.finish_reason is not None:
                    self._runner.leave(slot)
                    self._slots[slot] = None


def _after_fork() -> None:
    for session in list(_SESSIONS):
        session._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def __getattr__(name: str) -> Any:
    if name == "Step":
        warnings.warn(f"{__name__}.Step is StepConfig now; its old name goes in the next release", FutureWarning, 2)
        return StepConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
