"""What rows cost: the seconds of a step by its number of rows, on this machine, for this many sequences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .session import DecoderModel, Session, StepConfig
from .strategies import Drafting

__all__ = ["row_costs"]

WARM_UP = 2  # calls before the first that counts


def row_costs(
    model: DecoderModel,
    step: StepConfig,
    strategies: Sequence[Drafting],
    batch_size: int,
    context_len: int,
    repeats: int,
    cuda_graph: bool | None = None,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """`Profile.rows` and `Profile.seconds`: median times of one step of each strategy, which take turns.

    Args:
        model: timed on its device.
        step: how it decodes, but for the strategy.
        strategies: of those with equally many rows the last is timed.
        batch_size: sequences a step.
        context_len: committed tokens of each sequence.
        repeats: of each timing.
        cuda_graph: steps are captured; default on CUDA.
    """
    calls = {
        strategy.pattern.q_len: _step(
            model, replace(step, strategy=strategy, beta=1.0), batch_size, context_len, cuda_graph
        )
        for strategy in strategies
    }
    on_gpu = next(iter(model.parameters())).device.type == "cuda"
    seconds: dict[int, list[float]] = {rows: [] for rows in calls}
    for repeat in range(repeats + WARM_UP):
        for rows, call in calls.items():
            if on_gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize()
            if repeat >= WARM_UP:
                seconds[rows].append(time.perf_counter() - started)
    ordered = sorted(calls)
    return tuple(ordered), tuple(statistics.median(seconds[rows]) for rows in ordered)


def _step(
    model: DecoderModel, step: StepConfig, batch_size: int, context_len: int, cuda_graph: bool | None
) -> Callable[[], object]:
    """One step of a session of its own, over a context of random K/V."""
    session = Session(model, step, batch_size, context_len + step.slots, cuda_graph=cuda_graph)
    session.cache.k.normal_()
    session.cache.v.normal_()
    session.cache.lengths.fill_(context_len)
    session.cache.lengths_known([context_len] * batch_size)
    run = session.replayed()

    def call() -> None:
        with torch.inference_mode():
            run()

    return call
