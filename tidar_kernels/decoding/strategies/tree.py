"""Token trees (Medusa, arXiv 2401.10774; EAGLE, arXiv 2401.15077): several drafts a position, one pass to verify."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import patterns
from ...ops.verify import SamplingTensors, Verified, sample
from ...patterns.arguments import check_ints, check_sequence
from ...patterns.rows import ordinary
from .base import Batch, StepResult, Strategy

__all__ = ["Tree", "tree"]

# How often the draft of each rank is the right one where all before it were: about what the shipped model's are.
_SHARES = (0.75, 0.1, 0.06, 0.03)

Path = tuple[int, ...]


class Tree(Strategy):
    """`[seed, M x depth]` both ways, its K/V dropped; then a tree of its drafts, every node after its own path.

    The mask of depth d gives the candidates of all nodes of that depth: rank r is the r-th best by the scores, with the
    noise of the target where there is any, ties by the lower id. From the seed on, the path goes to the child that is
    its parent's target token, until there is none: the output is that of autoregressive decoding, greedy or by the
    coupled rule. The path's K/V is moved together before it is committed.

    Two forward passes a step. Adapters, where the model has them, are on in the first pass and off in the second.

    Args:
        paths: the nodes but the seed, in any order: the ranks from depth 1 to the node's own. What leads to a node is a
            node too.

    Raises:
        TypeError: a rank is not an int. ValueError: there is no path, a rank is negative, a path is empty or there
            twice, or what leads to one is missing.
    """

    name = "tree"
    title = "token tree"
    rules = ("coupled",)
    can_be_exact = False  # a node's keys are not in one run, so they are not summed as single-token decoding sums them

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        known: dict[Path, int] = {(): 0}
        ways = [_checked(path) for path in check_sequence("paths", paths, "paths")]
        for path in sorted(ways, key=lambda path: (len(path), path)):
            if path in known:
                raise ValueError(f"paths: expected each node once, got {path} twice")
            if path[:-1] not in known:
                raise ValueError(f"paths: expected the node {path[:-1]} that leads to {path}, got none")
            known[path] = len(known)
        if len(known) == 1:
            raise ValueError("paths: expected at least one, got none")
        self.paths = tuple(known)[1:]
        self.drafts = 1 + max(map(len, self.paths))
        self.ranks = 1 + max(max(path) for path in self.paths)
        self.pattern = patterns.tree([-1, *(known[path[:-1]] for path in self.paths)])
        self._draft = patterns.block_step(self.drafts)
        # For each node: where its token is among the candidates, its parent, and the nodes on its path, then -1.
        candidate = [0, *((len(path) - 1) * self.ranks + path[-1] for path in self.paths)]
        parent = [0, *(known[path[:-1]] for path in self.paths)]
        nodes = [[known[path[:n]] for n in range(len(path) + 1)] for path in known]
        padded = [way + [-1] * (self.drafts - len(way)) for way in nodes]
        self._tables = tuple(torch.tensor(x, device="cpu") for x in (candidate, parent, padded))
        self._on_device: dict[torch.device, tuple[Tensor, ...]] = {}

    @property
    def slots(self) -> int:
        return self.pattern.kept_len

    def step(self, batch: Batch) -> StepResult:
        seed = batch.drafts[:, :1]
        is_mask = torch.ones_like(batch.drafts, dtype=torch.bool)
        is_mask[:, 0] = False
        hidden = batch.forward(seed.expand_as(is_mask), self._draft, is_mask)
        device = seed.device
        if device not in self._on_device:
            self._on_device[device] = tuple(ordinary(x, device) for x in self._tables)
        candidate, parent, ways = self._on_device[device]
        tokens = self._candidates(batch, batch.model.logits(hidden[:, 1:])).flatten(1)[:, candidate]
        tokens[:, :1] = seed
        hidden = batch.forward(tokens.clamp(min=0), self.pattern, False)
        targets = self._targets(batch, tokens.clamp(min=0), batch.logits(hidden), ways)

        depth = (ways >= 0).sum(1)  # 1 for the seed
        right = (tokens == targets[:, parent]) & (tokens >= 0)
        right[:, 0] = True
        # A node stays if all on its path are right. Siblings differ, so those that stay are one path.
        stays = (right[:, ways.clamp(min=0)] | (ways < 0)).all(-1)
        accepted, last = (stays * depth).max(1)
        path = ways[last]
        drafts = tokens.gather(1, path.clamp(min=0)).masked_fill(path < 0, -1)
        following = targets.gather(1, last[:, None])[:, 0]
        verified = Verified(accepted, following, torch.where(following < 0, accepted - 1, -1))
        return StepResult(verified, drafts, torch.full_like(drafts[:, 1:], -1), forwards=2, path=path)

    def _candidates(self, batch: Batch, logits: Tensor) -> Tensor:
        """Drafts `[batch, depth, ranks]` from the masks' logits `[batch, depth, vocab]`; -1 where there are no more."""
        found = []
        for _ in range(self.ranks):
            best = batch.draft(logits, batch.cache.lengths + 1)
            logits = logits.scatter(-1, best.clamp(min=0)[..., None], -torch.inf)
            found.append(best)
        return torch.stack(found, dim=-1)

    def _targets(self, batch: Batch, tokens: Tensor, logits: Tensor, ways: Tensor) -> Tensor:
        """What autoregressive decoding would take after every node, `[batch, nodes]`; -1 of bad logits."""
        nodes = tokens.shape[1]
        positions = batch.cache.lengths[:, None] + (ways >= 0).sum(1)
        state = SamplingTensors(*(x.repeat_interleave(nodes, 0) for x in batch.state))
        seen = None
        if batch.seen is not None:  # and the tokens on the path
            on_path = tokens[:, ways.clamp(min=0)].flatten(0, 1)
            seen = batch.seen.repeat_interleave(nodes, 0).scatter(1, on_path, True)
        return sample(logits.flatten(0, 1)[:, None], positions.flatten(), state, seen=seen).view_as(tokens)


def tree(shape: int | Sequence[int] | Sequence[Sequence[int]] = 8) -> Tree:
    """A tree by the most tokens that a step commits, by its widths, or by all of its nodes.

    Args:
        shape: n >= 2, the most tokens a step commits: n - 1 first choices in a row, and as many other nodes again as
            are the most likely to be right. Or the children of each node of depth 0, 1, ..: `(3, 2)` has 1 + 3 + 6
            nodes. Or paths of ranks, see `Tree`: `[(0,), (1,), (0, 0)]`.

    Raises:
        TypeError, ValueError: the shape is none of these, or as `Tree`.
    """
    if isinstance(shape, int):
        return Tree(_likely(patterns.check_int("shape", shape, 2) - 1))
    if not isinstance(shape, Sequence) or not shape:
        raise ValueError(f"shape: expected a number of tokens, widths or paths, got {shape!r}")
    widths = [width for width in shape if isinstance(width, int)]
    if not widths:
        return Tree([path for path in shape if isinstance(path, Sequence)])
    if len(widths) < len(shape):
        raise TypeError(f"shape: expected widths or paths, got both in {shape!r}")
    level: list[Path] = [()]
    paths: list[Path] = []
    for width in widths:
        patterns.check_int("shape", width, 1)
        level = [(*path, rank) for path in level for rank in range(width)]
        paths += level
    return Tree(paths)


def _likely(depth: int) -> list[Path]:
    """First choices down to `depth`, and depth + 1 more nodes, each the most likely that can be added."""
    chain = [(0,) * n for n in range(1, depth + 1)]
    chosen: list[Path] = []
    ahead: list[tuple[float, Path]] = [(-share, (rank,)) for rank, share in enumerate(_SHARES)]
    heapq.heapify(ahead)
    while ahead and len(chosen) <= depth:
        odds, path = heapq.heappop(ahead)
        if any(path):
            chosen.append(path)
        if len(path) < depth:
            for rank, share in enumerate(_SHARES):
                heapq.heappush(ahead, (odds * share, (*path, rank)))
    return chain + chosen


def _checked(path: Any) -> Path:
    ranks = check_ints("paths", path, 0)
    if not ranks:
        raise ValueError(f"paths: expected one rank or more a node, got {path!r}")
    return tuple(ranks)
