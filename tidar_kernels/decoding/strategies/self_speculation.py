"""Linear self-speculation: a bidirectional pass drafts, a causal pass verifies."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import patterns
from ...patterns import Pattern
from ...patterns.arguments import check_bool
from .base import Batch, StepResult, Strategy, judge

__all__ = ["SelfSpeculation", "then_verify"]


class SelfSpeculation(Strategy):
    """`[seed, M x (L - 1)]` both ways, its K/V dropped; then `[seed, its drafts]` causally (Nemotron-Labs-Diffusion).

    Two forward passes a step. Adapters, where the model has them, are on in the first pass and off in the second.

    Args:
        length: L >= 2, the most tokens a step commits.
        adapted_seed: in the first pass the seed's row runs the adapter too (Nemotron-Labs-Diffusion); False: mask rows
            alone, for which adapters of this package are trained.

    Raises:
        TypeError, ValueError: `length` is not an int >= 2.
    """

    name = "self_speculation"
    title = "self-speculation"
    options = ("adapted_seed",)

    def __init__(self, length: int, *, adapted_seed: bool = False) -> None:
        self.drafts = patterns.check_int("length", length, 2)
        self._gate = True if check_bool("adapted_seed", adapted_seed) else None
        self._draft, self._verify = patterns.block_step(length), patterns.causal(length)

    def step(self, batch: Batch) -> StepResult:
        seed = batch.drafts[:, :1]
        is_mask = torch.ones_like(batch.drafts, dtype=torch.bool)
        is_mask[:, 0] = False
        hidden = batch.forward(seed.expand_as(is_mask), self._draft, is_mask, self._gate)
        return then_verify(batch, batch.model.logits(hidden[:, 1:]), self._verify, forwards=2)


def then_verify(batch: Batch, logits: Tensor, pattern: Pattern, forwards: int) -> StepResult:
    """The second half of a step whose drafts come from a pass before: tokens of its logits, and a causal pass on them.

    Args:
        logits: `[batch, L - 1, vocab]`, of the drafts after the seed.
        pattern: `causal(L)`.
        forwards: forward passes of the whole step.
    """
    seed = batch.drafts[:, :1]
    drafts = torch.cat([seed, batch.draft(logits, batch.cache.lengths + 1)], dim=1)
    if batch.draft_logits is not None:
        batch.draft_logits[:, 1:] = logits
    hidden = batch.forward(drafts.clamp(min=0), pattern, False)
    verified = judge(batch, batch.logits(hidden), drafts)
    return StepResult(verified, drafts, torch.full_like(drafts[:, 1:], -1), forwards=forwards)
