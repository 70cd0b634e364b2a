"""Timing: medians with their spread, of calls whose operands are cold in L2 where that can be arranged."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

CAPTURED = 64  # calls between two events, at least


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in microseconds."""
    quantiles = torch.quantile(
        torch.tensor(seconds, dtype=torch.float64), torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    return dict(zip(("p50_us", "p20_us", "p80_us"), (quantiles * 1e6).round(decimals=2).tolist(), strict=True))


def copies(operand_bytes: float, cache_bytes: float, at_most: int = 16) -> int:
    """How many sets of operands to rotate over, so that twice the cache passes by before one comes up again."""
    return max(2, min(at_most, int(2 * cache_bytes / operand_bytes) + 1))


def rotated(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A call that makes the next of `calls`, round and round."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


def time_cpu(call: Callable[[], Any], budget_s: float = 0.5) -> dict[str, float]:
    """Time `call` on the host for about `budget_s` seconds, at least five times, after two warm-up calls."""
    return time_in_turn({"": call}, budget_s)[""]


def time_cuda(calls: Sequence[Callable[[], Any]], budget_s: float = 0.15) -> dict[str, float]:
    """Time calls on the current CUDA stream, taking them in turn.

    The calls do the same work on different memory; together their operands should exceed L2, so that each finds its
    own cold. They are captured in one CUDA graph, so that what is timed is the device and not Python; at least
    `CAPTURED` of them, so that starting the graph on an idle device is spread over many.
    """
    turns = -(-CAPTURED // len(calls))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in [*calls] * turns:
            call()
    seconds: list[float] = []
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    while len(seconds) < 7 or sum(seconds) * len(calls) * turns < budget_s:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / (len(calls) * turns))
    return summary(seconds)


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]], budget_s: float, at_least: int = 5
) -> dict[str, dict[str, float]]:
    """Time calls on the host, one of each after the other, so that load on the machine meets all of them alike.

    Takes about `budget_s` seconds, at least `at_least` rounds, after two warm-up rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds, spent = -2, 0.0
    while calls and (rounds < at_least or spent < budget_s):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
            spent += seconds[name][-1] if rounds >= 0 else 0.0
        rounds += 1
    return {name: summary(values[2:]) for name, values in seconds.items()}


def time_stream(calls: Sequence[Callable[[], Any]], budget_s: float = 0.2) -> dict[str, float]:
    """Time calls on the current CUDA stream, taking them in turn, without a graph: those of a millisecond and more.

    They are queued one after another with an event in between, so that the host stays ahead of the device.
    """
    call = rotated(calls)
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(5, min(50, int(budget_s / (time.perf_counter() - started))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 2)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    # The first interval holds the host's own time: the device was idle when it began.
    pairs = itertools.pairwise(events[1:])
    return summary([begin.elapsed_time(end) / 1e3 for begin, end in pairs])
