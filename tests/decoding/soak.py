"""A soak of the session: random requests from threads and tasks, each compared with autoregressive decoding alone.

    python -m tests.decoding.soak --steps N [--threads K] [--seed S] [--report N]

Rounds of one session each: a random strategy, number of slots and prefill chunk. Clients on threads of their own add
requests with random prompts, temperatures, seeds, stop tokens and lengths, and cancel some. A driver steps: `step` from
two threads at once, or `steps` on an event loop with iterators that are cancelled half-way. What a request got, by its
callback and by the events, must be what the coupled rule gives it alone, token by token; of a cancelled one, the
beginning. Prints rounds, steps, requests, wrong ones, and steps a second; exit code 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from tests.toys import Learned
from tidar_kernels import SamplingParams, Session
from tidar_kernels.decoding.requests import Event, Request
from tidar_kernels.decoding.runner import StepConfig
from tidar_kernels.decoding.strategies import (
    Profile,
    SelfSpeculation,
    Strategy,
    adaptive,
    autoregressive,
    isd,
    tidar,
    tree,
)

__all__ = ["Found", "References", "main", "soak", "tiny_model"]

VOCAB = 24
LONGEST = 32  # new tokens of a request
PROMPTS = 12
PATIENCE = 60.0  # seconds until a client gives up: a session that hangs is wrong too

STRATEGIES: tuple[Callable[[random.Random], Strategy], ...] = (
    lambda draw: tidar(draw.randint(1, 6), bidirectional=draw.random() < 0.7),
    lambda draw: tidar(6, levels=sorted({1, *draw.sample(range(2, 7), 2)})),
    lambda draw: isd(draw.randint(2, 5), bidirectional=draw.random() < 0.5, shifted=draw.random() < 0.5),
    lambda draw: SelfSpeculation(draw.randint(2, 5)),
    lambda draw: tree(draw.randint(2, 4)),
    lambda draw: autoregressive(),
    # By rows that cost something, so that it changes over as requests come and go.
    lambda draw: adaptive(Profile((), (1, 100), (1.0, draw.uniform(1.0, 20.0))), draw.randint(2, 8)),
)
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(0.8),
    SamplingParams(1.3, top_k=9),
    SamplingParams(1.0, top_p=0.9),
    SamplingParams(0.9, repetition_penalty=1.2),
)
SEEDS = 6


@dataclass
class Found:
    """What a soak saw."""

    rounds: int = 0
    steps: int = 0
    requests: int = 0
    cancelled: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.steps / self.seconds if self.seconds else 0.0
        return (
            f"{self.rounds} rounds, {self.steps} steps, {self.requests} requests ({self.cancelled} cancelled), "
            f"{len(self.wrong)} wrong, {rate:.0f} steps/s"
        )


class References:
    """Autoregressive decoding of every prompt, sampling and seed: by a session of one slot, once each."""

    def __init__(self, model: Learned) -> None:
        self._model = model
        draw = random.Random(0)
        self.prompts = [
            [draw.randrange(VOCAB) for _ in range(length)] for length in (1, 2, 3, 5, 8, 13, 17, 30, 4, 6, 9, 1)
        ]
        self._known: dict[tuple[int, SamplingParams], list[int]] = {}
        self._lock = threading.Lock()

    def tokens(self, prompt: int, params: SamplingParams) -> list[int]:
        """`LONGEST` tokens; a shorter request has the first of them."""
        with self._lock:
            if (prompt, params) not in self._known:
                session = Session(self._model, StepConfig(autoregressive()), 1, len(self.prompts[prompt]) + LONGEST + 1)
                request = session.requests[session.add(self.prompts[prompt], LONGEST, params)]
                while session.requests:
                    session.step()
                self._known[prompt, params] = request.tokens
            return self._known[prompt, params]


@dataclass
class Asked:
    """A request as its client knows it."""

    prompt: int
    params: SamplingParams
    new_tokens: int
    stop: int | None
    called: list[int]
    events: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    removed: Request | None = None


def wrong(asked: Asked, references: References) -> str | None:
    """What is not as it should be with a request that has ended."""
    full = references.tokens(asked.prompt, asked.params)[: asked.new_tokens]
    reason = "length"
    if asked.stop in full:
        at = full.index(asked.stop) + 1
        full, reason = full[:at], "stop"
    what = f"prompt {asked.prompt}, {asked.params}, {asked.new_tokens} tokens: "
    reasons = [reason]
    if asked.removed is not None:
        full, reasons = full[: len(asked.removed.tokens)], []
        if asked.removed.tokens != full:
            return f"{what}expected {full}, got {asked.removed.tokens} when it was removed"
    if asked.called != full:
        return f"{what}expected {full}, got {asked.called}"
    if sorted(asked.events) != sorted(full):  # two threads that step hand theirs on in any order
        return f"{what}expected {full}, got events of {asked.events}"
    if asked.reasons != reasons:
        return f"{what}expected {reasons}, got {asked.reasons}"
    return None


class Round:
    """One session, its clients and its driver."""

    def __init__(self, model: Learned, references: References, seed: int, threads: int, budget: int) -> None:
        draw = random.Random(seed)
        strategy = draw.choice(STRATEGIES)(draw)
        self.references, self.budget, self.seed = references, budget, seed
        self.slots = draw.randint(1, 5)
        config = StepConfig(strategy, VOCAB - 1, prefill_chunk=draw.choice((8, 512)))
        self.session = Session(model, config, self.slots, 30 + LONGEST + strategy.slots)
        self.threads, self.is_async = threads, draw.random() < 0.5
        self.asked: dict[int, Asked] = {}
        self.failures: list[str] = []
        self.steps = 0
        self.is_over = False
        self.clients_left = threads
        self._lock = threading.Lock()

    def run(self) -> None:
        with ThreadPoolExecutor(self.threads + 2) as pool:
            jobs = [pool.submit(self._client, random.Random(self.seed * 31 + i)) for i in range(self.threads)]
            if self.is_async:
                jobs.append(pool.submit(lambda: asyncio.run(self._drive_tasks())))
            else:
                jobs += [pool.submit(self._drive_threads) for _ in range(2)]
            done, _ = wait(jobs, PATIENCE, FIRST_EXCEPTION)
            failed = [job.exception() for job in done if job.exception() is not None]
            if failed or len(done) < len(jobs):
                self.failures += [f"seed {self.seed}: {error!r}" for error in failed] or [f"seed {self.seed}: it hangs"]
                self.is_over = True

    def wrong(self) -> list[str]:
        found = list(self.failures)
        for request_id, asked in self.asked.items():
            what = wrong(asked, self.references)
            if what is not None:
                found.append(
                    f"seed {self.seed}, request {request_id} of {self.session.step_config.strategy.label}: {what}"
                )
        if self.session.requests or self.session.free_slots != self.slots:
            found.append(f"seed {self.seed}: requests are left")
        return found

    @property
    def is_open(self) -> bool:
        return not self.is_over and (self.clients_left > 0 or bool(self.session.requests))

    def _client(self, draw: random.Random) -> None:
        try:
            mine: list[int] = []
            while self.steps < self.budget and not self.is_over:
                if draw.random() < 0.6 and self.session.free_slots:
                    with suppress(ValueError):  # another client took the last slot
                        mine.append(self._add(draw))
                elif mine and draw.random() < 0.02:
                    self._cancel(mine.pop(draw.randrange(len(mine))))
                else:
                    time.sleep(draw.random() * 4e-3)
        finally:
            with self._lock:
                self.clients_left -= 1

    def _add(self, draw: random.Random) -> int:
        prompt, new_tokens = draw.randrange(PROMPTS), draw.randint(2, LONGEST)
        params = replace(draw.choice(SAMPLINGS), seed=draw.randrange(SEEDS))
        stop = draw.randrange(VOCAB) if draw.random() < 0.4 else None
        called: list[int] = []
        with self._lock:  # so that its record is there before anybody sees its tokens
            request_id = self.session.add(
                self.references.prompts[prompt],
                new_tokens,
                params,
                stop_tokens=() if stop is None else [stop],
                on_tokens=lambda _, tokens: called.extend(tokens),
            )
            self.asked[request_id] = Asked(prompt, params, new_tokens, stop, called)
        return request_id

    def _cancel(self, request_id: int) -> None:
        with suppress(KeyError):  # it has ended
            self.asked[request_id].removed = self.session.remove(request_id)

    def _deliver(self, events: list[Event]) -> None:
        with self._lock:
            self.steps += bool(events)
            for event in events:
                asked = self.asked[event.id]
                asked.events += event.tokens
                if event.finish_reason is not None:
                    asked.reasons.append(event.finish_reason)

    def _drive_threads(self) -> None:
        while self.is_open:
            events = self.session.step()
            self._deliver(events)
            if not events:
                time.sleep(1e-4)

    async def _drive_tasks(self) -> None:
        async def consume() -> None:
            async for events in self.session.steps():
                self._deliver(events)

        draw = random.Random(self.seed)
        while self.is_open:
            consumer = asyncio.create_task(consume())
            if draw.random() < 0.7:
                await asyncio.sleep(draw.random() * 0.02)
                consumer.cancel()
            with suppress(asyncio.CancelledError):
                await consumer
            await asyncio.sleep(1e-4)
        await consume()  # what the last cancelled one left


def tiny_model() -> Learned:
    return Learned(30 + LONGEST, VOCAB)


def soak(
    steps: int,
    threads: int = 3,
    seed: int = 0,
    round_steps: int = 200,
    most_wrong: int = 100,
    report: Callable[[str], object] | None = None,
) -> Found:
    """Rounds until there were so many steps, or more than `most_wrong` wrong requests, or one failed or hung.

    `report` gets a line now and then.
    """
    model = tiny_model()
    references, found, started = References(model), Found(), time.perf_counter()
    told = started
    while found.steps < steps:
        one = Round(model, references, seed * 1_000_003 + found.rounds, threads, min(round_steps, steps - found.steps))
        one.run()
        found.rounds += 1
        found.steps += one.steps
        found.requests += len(one.asked)
        found.cancelled += sum(asked.removed is not None for asked in one.asked.values())
        found.wrong += one.wrong()
        found.seconds = time.perf_counter() - started
        if one.failures or len(found.wrong) > most_wrong:
            break
        if report is not None and time.perf_counter() - told > 10.0:
            told = time.perf_counter()
            report(str(found))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.decoding.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="at least so many (default: 2000)")
    parser.add_argument("--threads", type=int, default=3, help="clients of each session (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = soak(options.steps, options.threads, options.seed, report=lambda line: print(line, flush=True))
    print(found)
    for line in found.wrong[:20]:
        print(line)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
