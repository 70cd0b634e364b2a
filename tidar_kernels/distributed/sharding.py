"""Which rows of a pattern are whose: every rank has as many, and as much work.

Rows of training patterns differ in work: a causal row sees all before it. So the rows are cut into runs of equal
length, and runs are dealt in rounds, as many as there are ranks: the longest work of a round goes to the rank that has
least so far. Runs are as long as balance allows, because within a run neighbours see nearly the same keys: tiles of a
kernel stay whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import Pattern

__all__ = ["deal", "excess", "live_pairs"]

# What the fullest rank may have above the mean, in rows and in live pairs, before shorter runs are tried.
TOLERANCE = 0.02
MAX_RUNS = 2**14  # a rank; more are not tried: dealing them takes seconds, and by then nothing is left to balance


def live_pairs(pattern: Pattern) -> Tensor:
    """How many keys each row sees, int64 `[q_len]`."""
    return sum((interval[:, 1] - interval[:, 0]).long() for interval in (pattern.lead, pattern.own))  # type: ignore[return-value]


def excess(shards: list[Tensor], work: Tensor) -> float:
    """By what share the fullest shard is above the mean: of rows or of work, whichever is more."""
    fullest = [0.0]
    for loads in ([len(shard) for shard in shards], [int(work[shard].sum()) for shard in shards]):
        mean = sum(loads) / len(loads)
        fullest.append(max(loads) / mean - 1 if mean else 0.0)
    return max(fullest)


def deal(work: Tensor, ranks: int) -> list[Tensor]:
    """The rows of every rank, int64 and ascending, for the work of each row, int64 `[rows]`.

    The same on every rank, for it depends on the arguments alone. A rank has at least one row.

    Raises:
        ValueError: there are fewer rows than ranks.
    """
    if len(work) < ranks:
        raise ValueError(f"pattern: expected at least a row a rank, {ranks}, got {len(work)}")
    best: list[Tensor] = []
    run = 1
    while 2 * run * ranks <= len(work):
        run *= 2
    while run >= 1 and len(work) <= run * ranks * MAX_RUNS:
        shards = _deal_runs(work, ranks, run)
        if not best or excess(shards, work) < excess(best, work):
            best = shards
        if excess(best, work) <= TOLERANCE:
            break
        run //= 2
    return best


def _deal_runs(work: Tensor, ranks: int, run: int) -> list[Tensor]:
    rows = torch.arange(len(work), device="cpu").split(run)
    loads = torch.stack([work[some].sum() for some in rows])
    order = loads.argsort(descending=True, stable=True).tolist()
    shards: list[list[Tensor]] = [[] for _ in range(ranks)]
    total = [0] * ranks
    for start in range(0, len(order), ranks):
        emptiest = sorted(range(ranks), key=lambda rank: (len(shards[rank]), total[rank]))
        for rank, index in zip(emptiest, order[start : start + ranks], strict=False):
            shards[rank].append(rows[index])
            total[rank] += int(loads[index])
    return [torch.cat(shard).sort().values for shard in shards]
