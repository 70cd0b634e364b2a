"""Introspective strided decoding (I-DLM, arXiv 2604.11035) and FLARE-style rows: masks after the drafts, one chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ... import patterns
from .base import Drafting

__all__ = ["FLARE", "ISD", "acceptance_of", "expected_tokens", "isd"]


@dataclass
class ISD(Drafting):
    """Masks after the drafts, each sees the masks before it."""

    title = "ISD"
    symbol = "N"


@dataclass
class FLARE(ISD):
    """The same with masks that see each other both ways."""

    title = "FLARE rows"


def isd(stride: int, *, bidirectional: bool = False, shifted: bool = True) -> Drafting:
    """`[pending, s_0 .. s_{N-2} | masks]`: N rows verify, and the masks after them draft for full acceptance alone.

    If all N drafts stay, the masks have given the next ones. If not, they conditioned on a token that is gone, and the
    next step is cold: `[t_0 | masks]`, which commits one token and drafts anew. Masks see the masks before them; with
    `bidirectional` (FLARE, HybridDiffusion) they all see each other, in cold steps only those after the drafts' rows.

    Args:
        stride: N >= 2, the most tokens a step commits.
        bidirectional: the mask rows after the drafts see each other both ways.
        shifted: a mask row predicts the token after its own position (I-DLM); False: the token at it (TiDAR).

    Raises:
        TypeError, ValueError: `stride` is not an int >= 2.
    """
    pattern = patterns.isd_step(stride, bidirectional=bidirectional, shifted=shifted)
    shift = 0 if shifted else 1
    after = torch.arange(stride + shift, pattern.q_len, device="cpu")  # conditioned on all drafts
    sources = torch.full((stride + 1, stride - 1), -1, device="cpu")
    sources[stride] = after
    cold = torch.arange(1 + shift, stride + shift, device="cpu")  # the rows of the missing drafts
    if bidirectional:
        return FLARE("flare", pattern, stride, sources, cold)
    return ISD("isd", pattern, stride, sources, cold)


def expected_tokens(acceptance: float, stride: int) -> float:
    """Tokens a forward pass where each draft stays with probability p: `(2 + p + .. + p^(N-2)) / (2 - p^(N-1))`.

    (I-DLM, arXiv 2604.11035.) A verifying pass commits `1 + p + .. + p^(N-1)` tokens, and a cold pass of one token
    follows unless all its drafts stay.
    """
    return sum((2.0, *(acceptance**i for i in range(1, stride - 1)))) / (2.0 - acceptance ** (stride - 1))


def acceptance_of(accepted: Sequence[int], stride: int) -> float:
    """Which share of a request's judged drafts stayed, from the accepted counts of its passes (`Request.accepted`).

    The first pass is cold, and so is every pass after one that did not commit N tokens; cold passes judge no draft.

    Raises:
        ValueError: no draft was judged.
    """
    kept, judged, cold = 0, 0, True
    for count in accepted:
        if not cold:
            kept, judged = kept + count - 1, judged + min(count, stride - 1)
        cold = not cold and count < stride
    if not judged:
        raise ValueError(f"accepted: expected passes that judge drafts, got {list(accepted)}")
    return kept / judged
