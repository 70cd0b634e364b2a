"""Block diffusion (BD3-LM, SDAR, Fast-dLLM v2, LLaDA 2): a block is filled in over several passes, then committed."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import patterns
from ...ops.verify import Verified
from ...patterns import Pattern
from ...patterns.arguments import check_bool, check_number
from .base import Batch, StepResult, Strategy

__all__ = ["BlockDiffusion"]


class BlockDiffusion(Strategy):
    """Context and a bidirectional block of masks; confident tokens stay, and the full block is committed.

    A pass fixes, in every sequence, each masked token whose probability is above the threshold, and at least the most
    probable one. A step is one block: 1..L passes and one pass that writes its K/V. The block's tokens are the
    diffusion half's own: the output is not that of autoregressive decoding.

    Clean tokens are causal by default, blocks start where the prompt ends, and the first token of each is the
    autoregressive choice (Nemotron-Labs-Diffusion). The others see their whole block:

        SDAR, LLaDA 2     BlockDiffusion(4, 0.85, aligned=True)
        Fast-dLLM v2      BlockDiffusion(32, 0.95, aligned=True, shifted=True, part=8)

    Args:
        length: L >= 1, tokens of a block.
        threshold: in [0, 1]; 1 fixes one token a pass.
        aligned: blocks start at multiples of L, clean tokens see their whole block, and what the prompt has of its last
            block is filled up. No token of a block is the autoregressive choice, unless `shifted`.
        shifted: a row predicts the token after its position, so the last row of a block gives the next one's first.
        part: a block is filled in part by part, of so many tokens each, from left to right; default the whole block.

    Raises:
        TypeError, ValueError: `length` is not an int >= 1, `threshold` not a number in [0, 1], `part` does not divide
            `length`, or `shifted` without `aligned`.
    """

    name = "block_diffusion"
    title = "block diffusion"
    options = ("threshold", "aligned", "shifted", "part")
    equals_autoregression = False
    graphable = False  # how many passes a block takes is read from the device

    def __init__(
        self,
        length: int,
        threshold: float = 0.9,
        *,
        aligned: bool = False,
        shifted: bool = False,
        part: int | None = None,
    ) -> None:
        self.drafts = patterns.check_int("length", length, 1)
        check_number("threshold", threshold, 0.0, 1.0)
        check_bool("aligned", aligned)
        if check_bool("shifted", shifted) and not aligned:
            raise ValueError("shifted: expected aligned=True beside it, got False")
        self.part = length if part is None else patterns.check_int("part", part, 1)
        if length % self.part:
            raise ValueError(f"part: expected a divisor of length {length}, got {part}")
        self.threshold, self.aligned, self.shifted = threshold, aligned, shifted
        self.seeded = shifted or not aligned
        self.can_be_exact = not aligned  # rows that see their whole block are not those of single tokens
        self._denoise = patterns.block_step(length)
        self._commit = patterns.block_causal(length, length) if aligned else patterns.causal(length)

    @property
    def label(self) -> str:
        said = [f"threshold {self.threshold}"]
        said += ["aligned"] if self.aligned else []
        said += ["shifted"] if self.shifted else []
        said += [f"parts of {self.part}"] if self.part < self.drafts else []
        return ", ".join([super().label, *said])

    def kept(self, tokens: int) -> int:
        return tokens // self.drafts * self.drafts if self.aligned else tokens

    def context(self, tokens: int) -> Pattern:
        return patterns.block_causal(tokens, self.drafts) if self.aligned else super().context(tokens)

    @property
    def chunk_unit(self) -> int:
        return self.drafts if self.aligned else 1

    def step(self, batch: Batch) -> StepResult:
        block = batch.drafts.clone()
        if not self.aligned:  # what an autoregressive choice seeds, and nothing else
            block[:, 1:] = -1
        bad = torch.full_like(block[:, 0], -1)
        passes = 0
        for start in range(0, self.drafts, self.part):
            here = slice(start, start + self.part)
            while bool((block[:, here] < 0).any()):
                masked = block < 0
                logits = batch.model.logits(batch.forward(block, self._denoise, masked))
                if self.shifted:
                    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
                open_ = torch.zeros_like(masked)
                open_[:, here] = masked[:, here]
                block, bad = self._fill(batch, block, open_, logits, bad)
                passes += 1
        hidden = batch.forward(block, self._commit, False)
        if self.seeded:
            logits = batch.model.logits(hidden[:, -1:])
            following = batch.draft(logits, batch.cache.lengths + self.drafts)[:, 0]
            bad = torch.where((following < 0) & (bad < 0), self.drafts, bad)  # the block is whole, nothing follows it
        else:
            following = torch.full_like(bad, -1)
        accepted = torch.where(bad < 0, self.drafts, bad.clamp(min=int(self.seeded)))
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
