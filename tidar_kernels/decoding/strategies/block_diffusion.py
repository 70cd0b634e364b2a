"""Block diffusion (BD3-LM, SDAR, Fast-dLLM v2, LLaDA 2): a block is filled in over several passes, then committed."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import patterns
from ...ops.verify import Verified
from .base import Batch, StepResult, Strategy

__all__ = ["BlockDiffusion"]


class BlockDiffusion(Strategy):
    """Context and a bidirectional block of masks; confident tokens stay, and the full block is committed causally.

    A pass fixes, in every sequence, each masked token whose probability is above the threshold, and at least the most
    probable one. A step is one block: 1..L passes and one causal pass that writes its K/V. The block's tokens are the
    diffusion half's own: the output is not that of autoregressive decoding.

    Args:
        length: L >= 1, tokens of a block.
        threshold: in [0, 1]; 1 fixes one token a pass.

    Raises:
        TypeError, ValueError: `length` is not an int >= 1, or `threshold` not a number in [0, 1].
    """

    name = "block_diffusion"
    title = "block diffusion"
    options = ("threshold",)
    equals_autoregression = False
    graphable = False  # how many passes a block takes is read from the device

    def __init__(self, length: int, threshold: float = 0.9) -> None:
        self.drafts = patterns.check_int("length", length, 1)
        if not isinstance(threshold, (int, float)) or isinstance(threshold, bool):
            raise TypeError(f"threshold: expected a number, got {type(threshold).__name__}")
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
        self.threshold = threshold
        self._denoise, self._commit = patterns.block_step(length), patterns.causal(length)

    @property
    def label(self) -> str:
        return f"{super().label}, threshold {self.threshold}"

    def step(self, batch: Batch) -> StepResult:
        # The first token is known: it is the autoregressive choice after the last commit.
        block = torch.cat([batch.drafts[:, :1], torch.full_like(batch.drafts[:, 1:], -1)], dim=1)
        bad = torch.full_like(block[:, 0], -1)
        passes = 0
        while bool((block < 0).any()):
            masked = block < 0
            logits = batch.model.logits(batch.forward(block, self._denoise, masked))
            block, bad = self._fill(batch, block, masked, logits, bad)
            passes += 1
        hidden = batch.forward(block, self._commit, False)
        following = batch.draft(batch.model.logits(hidden[:, -1:]), batch.cache.lengths + self.drafts)[:, 0]
        bad = torch.where((following < 0) & (bad < 0), self.drafts, bad)  # the block is whole, and nothing follows it
        accepted = torch.where(bad < 0, self.drafts, bad.clamp(min=1))
        verified = Verified(accepted, following, bad)
        return StepResult(verified, block, torch.full_like(block[:, 1:], -1), forwards=passes + 1)

    def _fill(self, batch: Batch, block: Tensor, masked: Tensor, logits: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Fix the confident ones of the masked tokens: `(block, first bad row of every sequence or -1)`."""
        tokens = batch.draft(logits, batch.cache.lengths)
        broken = masked & (tokens < 0)
        bad = torch.where(broken.any(1) & (bad < 0), broken.to(torch.int64).argmax(1), bad)
        tokens = tokens.clamp(min=0)
        confidence = logits.float().softmax(-1).gather(-1, tokens[..., None])[..., 0].nan_to_num(0.0)
        confidence = confidence.masked_fill(~masked, -1.0)
        best = torch.nn.functional.one_hot(confidence.argmax(1), block.shape[1]).bool()
        return torch.where(masked & ((confidence > self.threshold) | best | broken), tokens, block), bad
