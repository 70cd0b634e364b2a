"""The slot budget: which numbers of accepted drafts get a block, from what acceptance and rows cost on this machine.

A block for every acceptance makes `B + B*B` rows a step, and past some number of rows a step takes longer. A level
that is left out costs drafts instead: after a accepted ones the block of the next level l below predicts a - l
positions less. Both are measured (`tidar_kernels.profiling`), and `auto` picks the block length and the levels with the
most expected tokens a second. What is decoded does not depend on the choice.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...patterns.arguments import check_instance, check_int, check_ints, check_number, check_numbers
from .tidar import TiDAR, tidar

__all__ = ["Plan", "Profile", "auto", "plan"]


@dataclass(frozen=True)
class Profile:
    """What a model's drafts are worth, and what rows cost.

    Args:
        acceptance: entry r - 1 is the share of drafts that stay, of those r positions after the first draft whose
            predecessors did; ascending r from 1.
        rows, seconds: latency of a step with that many rows; rows ascending.

    Raises:
        TypeError, ValueError: a share is not a number in [0, 1], the rows are no ints that ascend, or there is not a
            latency > 0 for each.
    """

    acceptance: tuple[float, ...]
    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        check_numbers("acceptance", self.acceptance, 0.0, 1.0)
        rows, latencies = check_ints("rows", self.rows, 1), check_numbers("seconds", self.seconds)
        if not rows or rows != sorted(set(rows)) or len(rows) != len(latencies):
            raise ValueError(f"rows: expected them to ascend, one for each of seconds, got {self.rows}")
        if not all(seconds > 0.0 for seconds in latencies):
            raise ValueError(f"seconds: expected > 0, got {self.seconds}")

    def latency(self, rows: int) -> float:
        """Seconds of a step: between measured points on a line, outside them on the nearest one's."""
        check_number("rows", rows, 0.0)
        if len(self.rows) == 1:
            return self.seconds[0]
        right = min(max(bisect.bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        (x0, x1), (y0, y1) = self.rows[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return max(y0 + (y1 - y0) * (rows - x0) / (x1 - x0), min(self.seconds))


@dataclass(frozen=True)
class Plan:
    """A choice and what is expected of it: tokens a forward pass, and a second."""

    block_size: int
    levels: tuple[int, ...]
    tokens_per_forward: float
    tokens_per_second: float


@functools.lru_cache(maxsize=1024)
def _skips(block_size: int, levels: tuple[int, ...]) -> tuple[int, ...]:
    """For 1 .. `block_size` accepted drafts, how many positions the next ones lie further out than they could."""
    return tuple(n - max(level for level in levels if level <= n) for n in range(1, block_size + 1))


def expected_tokens(acceptance: Sequence[float], block_size: int, levels: Sequence[int]) -> float:
    """Tokens a step, in the long run.

    The state of a step is how many positions its drafts lie further out than they could: s = a - l of the step before.
    Then draft m, of `block_size - s`, is r = s + m positions after what its block had seen. The mean is taken over the
    states' stationary distribution.
    """
    kept = [*acceptance[: block_size - 1], *[0.0] * (block_size - 1 - len(acceptance))]
    skips = _skips(block_size, tuple(levels))
    size = 1 + max(skips)
    move = [[0.0] * size for _ in range(size)]
    tokens = [0.0] * size
    for skipped, to in enumerate(move):
        so_far = 1.0
        for accepted, stays in enumerate([*kept[skipped:], 0.0], start=1):
            ends = so_far * (1.0 - stays)
            to[skips[accepted - 1]] += ends
            tokens[skipped] += ends * accepted
            so_far *= stays
    if size == 1:  # a block for every acceptance
        return tokens[0]
    # The stationary distribution solves p (move - 1) = 0, sum p = 1. State 0 is reached from every other, so it is the
    # only one, and the sum may stand for any one of the equations.
    system = np.array(move).T - np.eye(size)
    system[-1] = 1.0
    right = np.zeros(size)
    right[-1] = 1.0
    return float(np.linalg.solve(system, right) @ np.array(tokens))


def _plans(profile: Profile, block_size: int) -> Iterator[Plan]:
    """Level sets of one block size, from one level to all, each with the next most useful level added."""

    def make(levels: list[int]) -> Plan:
        tokens = expected_tokens(profile.acceptance, block_size, levels)
        return Plan(block_size, tuple(levels), tokens, tokens / profile.latency(block_size * (1 + len(levels))))

    chosen = [1]
    yield make(chosen)
    while len(chosen) < block_size:
        following = [make(sorted([*chosen, level])) for level in range(2, block_size + 1) if level not in chosen]
        best = max(following, key=lambda plan: plan.tokens_per_forward)
        chosen = list(best.levels)
        yield best


def plan(profile: Profile, max_block_size: int = 32) -> Plan:
    """The block size up to `max_block_size`, and its levels, with the most expected tokens a second.

    Raises:
        TypeError, ValueError: `max_block_size` is not an int >= 1.
    """
    check_instance("profile", profile, Profile)
    check_int("max_block_size", max_block_size, 1)
    # Beyond what was measured nothing is known to stay.
    sizes = range(1, min(max_block_size, len(profile.acceptance) + 1) + 1)
    return max((p for size in sizes for p in _plans(profile, size)), key=lambda p: p.tokens_per_second)


def auto(profile: Profile, max_block_size: int = 32) -> TiDAR:
    """The strategy of `plan`."""
    chosen = plan(profile, max_block_size)
    return tidar(chosen.block_size, levels=chosen.levels)


def acceptance_of(accepted: Sequence[int], block_size: int) -> tuple[float, ...]:
    """`Profile.acceptance` from the accepted counts of steps with a block for every acceptance.

    One rejection is added to every share: few steps come far, and those that do must not promise certainty.

    Raises:
        ValueError: a count is not in `[1, block_size]`, or there is none.
    """
    if not accepted or not all(1 <= count <= block_size for count in accepted):
        raise ValueError(f"accepted: expected counts in [1, {block_size}], got {sorted(set(accepted))}")
    reached = [sum(count >= r for count in accepted) for r in range(1, block_size + 1)]
    return tuple(after / (before + 1) for before, after in itertools.pairwise(reached))


def shapes(max_block_size: int) -> list[tuple[int, Sequence[int] | None]]:
    """Block sizes, powers of two and the longest, each with one level, with two and with all, which is None."""
    sizes = sorted({1, 2, 4, 8, 16, 32} & set(range(1, max_block_size + 1)) | {max_block_size})
    return [(b, levels) for b in sizes for levels in ([1], [1, max(2, b // 2)], None) if levels is None or b > 2]
