"""Several sequences, each with a pattern of its own, as the rows of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import check_instances
from .pattern import Pattern
from .rows import intervals, pack_tree_mask, unpack_tree_mask

__all__ = ["packed"]


def packed(patterns: Sequence[Pattern]) -> Pattern:
    """Several sequences, each with its own pattern, as one: rows and keys one after another, none sees another's.

    A batch of different lengths, `[1, heads, total, head_dim]`, costs what its sequences cost: tiles between sequences
    are never visited. Positions restart with every sequence. The clean tokens that `predicts` counts are those of the
    sequences one after another, of each up to the last that it predicts.

    Raises:
        TypeError: an entry is not a `Pattern`. ValueError: there is none.
    """
    patterns = check_instances("patterns", patterns, Pattern)
    lengths = torch.tensor([pattern.kv_len for pattern in patterns], device="cpu")
    rows = torch.tensor([pattern.q_len for pattern in patterns], device="cpu")
    offsets = (lengths.cumsum(0) - lengths).repeat_interleave(rows)
    shifted = []
    for both in (torch.cat([pattern.lead for pattern in patterns]), torch.cat([p.own for p in patterns])):
        lo, hi = both.unbind(1)
        shifted.append(intervals(lo + offsets, hi + offsets, lo < hi))
    predicts, tokens = [], 0
    for pattern in patterns:
        predicts.append(torch.where(pattern.predicts < 0, -1, pattern.predicts + tokens))
        tokens += pattern.num_labels
    reach, keys = None, [pattern.key_positions for pattern in patterns]
    if any(pattern.reach is not None for pattern in patterns):
        everything = torch.iinfo(torch.int32).max
        reach = torch.cat([torch.full_like(p.positions, everything) if p.reach is None else p.reach for p in patterns])
    window_positions = None
    if any(pattern.window_positions is not None for pattern in patterns):
        window_positions = torch.cat(
            [p.positions if p.window_positions is None else p.window_positions for p in patterns]
        )
    tree_mask = None
    if any(pattern.tree_mask is not None for pattern in patterns):
        seen = [
            torch.zeros(p.q_len, p.kv_len, dtype=torch.bool, device="cpu")
            if p.tree_mask is None
            else unpack_tree_mask(p.tree_mask, p.kv_len)
            for p in patterns
        ]
        tree_mask = pack_tree_mask(torch.block_diag(*seen))
    return Pattern(
        shifted[0],
        shifted[1],
        torch.cat([pattern.positions for pattern in patterns]),
        int(lengths.sum()),
        torch.cat([pattern.roles for pattern in patterns]),
        torch.cat(predicts),
        f"packed({', '.join(pattern.name for pattern in patterns)})",
        reach,
        None if any(key is None for key in keys) else torch.cat([key for key in keys if key is not None]),
        tree_mask,
        window_positions,
    )
