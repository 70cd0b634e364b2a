"""DFlash: blocks drafted at anchors of a context that is given as keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import check_int, check_ints
from .halves import of_rows
from .pattern import Pattern
from .rows import intervals

__all__ = ["dflash_training"]


def dflash_training(context_len: int, anchors: Sequence[int], block_size: int) -> Pattern:
    """DFlash: the rows are blocks drafted at anchors; the keys are the context, then the blocks.

    Row m of block j, at position `anchors[j] + m`, sees the context before its anchor and its own block, both ways, and
    predicts the context token at its position, if there is one. There are `len(anchors) * block_size` rows, and as
    many keys after the `context_len` keys of the context.

    Raises:
        TypeError, ValueError: `context_len` is not an int >= 0, `block_size` not an int >= 1, or an anchor not an int
            in `[0, context_len]`.
    """
    n, block = check_int("context_len", context_len, 0), check_int("block_size", block_size, 1)
    anchors = check_ints("anchors", anchors, 0)
    for anchor in anchors:
        if anchor > n:
            raise ValueError(f"anchors: expected <= context_len = {n}, got {anchor}")
    row = torch.arange(len(anchors) * block, device="cpu")
    anchor_of = torch.tensor(anchors, dtype=torch.int64, device="cpu")[row // block]
    noisy, own_start = row >= 0, n + row // block * block
    lead, own = intervals(torch.zeros_like(row), anchor_of, noisy), intervals(own_start, own_start + block, noisy)
    name = f"dflash_training(context_len={n}, {len(anchors)} anchors, block_size={block})"
    positions = anchor_of + row % block
    predicts, keys = torch.where(positions < n, positions, -1), torch.cat([torch.arange(n, device="cpu"), positions])
    return of_rows(lead, own, positions, noisy, predicts, n + len(row), name, keys)
