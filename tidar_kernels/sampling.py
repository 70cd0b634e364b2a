"""Verification rules: which drafts of a step are accepted. On the device, without reading it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accept_greedy"]


def accept_greedy(drafts: Tensor, picks: Tensor) -> Tensor:
    """Longest prefix of the drafts that greedy autoregressive decoding would have produced (TiDAR, step rule).

    The first draft is the model's own pick of the step before, so it is always accepted; draft i is accepted if all
    before it are and it equals the pick of row i - 1.

    Args:
        drafts: int64 `[batch, B]`, the drafts that the step verified.
        picks: int64 `[batch, B]`, the argmax of each draft row's logits.

    Returns:
        int64 `[batch]`, accepted counts in 1..B.
    """
    matches = drafts[:, 1:] == picks[:, :-1]
    return 1 + matches.to(torch.int64).cumprod(dim=1).sum(dim=1)
