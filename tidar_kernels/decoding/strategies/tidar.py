"""TiDAR (arXiv 2511.08923): a block of drafts for every acceptance, or for some; and plain autoregression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ... import patterns
from ...patterns import Pattern
from .base import Drafting

__all__ = ["TiDAR", "autoregressive", "tidar"]


@dataclass
class TiDAR(Drafting):
    """`Drafting` whose first drafts come with the prompt's last chunk.

    Args:
        levels: the numbers of accepted drafts that get a block of masks; None: all.
    """

    levels: tuple[int, ...] | None = None

    title = "TiDAR"
    symbol = "B"
    options = ("levels",)

    @property
    def label(self) -> str:
        return super().label + ("" if self.levels is None else f", levels {' '.join(map(str, self.levels))}")

    def first(self, prompt_rows: int) -> tuple[Pattern, list[int]]:
        # Slot 0 is the prompt's own next token, batch 1.. are mask rows 1..: mask row 0 would only guess slot 0.
        return patterns.tidar_prefill(prompt_rows, self.drafts), list(range(prompt_rows + 1, prompt_rows + self.drafts))


def tidar(block_size: int, *, bidirectional: bool = True, levels: Sequence[int] | None = None) -> TiDAR:
    """The step of the paper: B drafts, and a block of masks conditioned on every number of accepted ones.

    With `levels` only those numbers get a block, and the step has `B + len(levels) * B` rows: after a accepted drafts
    the block of the closest level l below predicts from position l on, so that it leaves the last a - l batch of the
    next draft empty. What is decoded stays the same. The papers' bonus form `[last | k drafts | k + 1 blocks]` is
    `block_size = k + 1`: its last token is our first draft.

    Args:
        block_size: B.
        bidirectional: mask rows see their whole block; False for checkpoints trained with causal blocks.
        levels: ascending, the first 1, none above B; default 1..B.

    Raises:
        TypeError, ValueError: `block_size` is not an int >= 1, or `levels` are not as said.
    """
    pattern = patterns.tidar_step(block_size, bidirectional, levels)
    chosen = list(range(1, block_size + 1)) if levels is None else list(levels)
    sources = torch.full((block_size + 1, block_size - 1), -1, device="cpu")
    for accepted in range(1, block_size + 1):
        block = sum(level <= accepted for level in chosen)  # blocks count from 1: rows [0, B) are the drafts
        skipped = accepted - chosen[block - 1]
        known = torch.arange(block * block_size + skipped + 1, (block + 1) * block_size, device="cpu")
        sources[accepted, : len(known)] = known
    mix = torch.arange(block_size, pattern.q_len, block_size, device="cpu") if levels is None else None
    chosen_levels = None if levels is None else tuple(chosen)
    return TiDAR("tidar", pattern, block_size, sources, mix=mix, levels=chosen_levels)


@dataclass
class Autoregressive(Drafting):
    """One token a step."""

    title = "autoregressive"

    @property
    def label(self) -> str:
        return self.title


def autoregressive() -> Drafting:
    """One token a step: one draft row, no mask."""
    return Autoregressive("autoregressive", patterns.causal(1), 1, torch.empty(2, 0, dtype=torch.int64, device="cpu"))
