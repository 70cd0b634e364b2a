"""Timing: medians with their spread, of calls whose operands are cold in L2 where that can be arranged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in microseconds."""
    quantiles = torch.quantile(
        torch.tensor(seconds, dtype=torch.float64), torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    return dict(zip(("p50_us", "p20_us", "p80_us"), (quantiles * 1e6).round(decimals=2).tolist(), strict=True))


def time_cpu(call: Callable[[], Any], budget_s: float = 0.5) -> dict[str, float]:
    """Time `call` on the host for about `budget_s` seconds, at least five times, after two warm-up calls."""
    call()
    call()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < budget_s:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return summary(seconds)


def time_cuda(calls: Sequence[Callable[[], Any]], budget_s: float = 0.15) -> dict[str, float]:
    """Time calls on the current CUDA stream, taking them in turn.

    The calls do the same work on different memory; together their operands should exceed L2, so that each finds its
    own cold. They are captured in one CUDA graph, so that what is timed is the device and not Python.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    seconds: list[float] = []
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    while len(seconds) < 7 or sum(seconds) * len(calls) < budget_s:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return summary(seconds)
