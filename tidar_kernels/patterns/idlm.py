"""I-DLM (arXiv 2604.11035) and its relatives FLARE and HybridDiffusion: the training mask, and the strided step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import check_int
from .halves import of_rows
from .pattern import Pattern
from .rows import Role, check_documents, intervals

__all__ = ["idlm_training", "isd_step"]


def idlm_training(seq_len: int, block_size: int, document_lengths: Sequence[int] | None = None) -> Pattern:
    """I-DLM (arXiv 2604.11035), `[x_t | x_0]`: noisy rows are causal in their block and see earlier clean blocks.

    Clean rows are causal and never see noisy ones. Both halves predict the next token.

    With `document_lengths` the sequence holds documents that do not see each other: blocks and positions restart at
    each, and the last token of each predicts nothing.

    Args:
        seq_len: S, clean tokens.
        block_size: B.
        document_lengths: tokens of each document, S in all; default one document.

    Raises:
        TypeError, ValueError: `seq_len`, `block_size` or a document's length is not an int >= 1, or the lengths do not
            sum to `seq_len`.
    """
    s, block = check_int("seq_len", seq_len, 1), check_int("block_size", block_size, 1)
    lengths = check_documents(s, document_lengths)
    row = torch.arange(2 * s, device="cpu")
    token, noisy = row % s, row < s
    end = lengths.cumsum(0).repeat_interleave(lengths)[token]  # of its document
    first = end - lengths.repeat_interleave(lengths)[token]
    start = token - (token - first) % block
    lo, hi = s + first, s + torch.where(noisy, start, token + 1)
    lead, own = intervals(lo, hi, token >= 0), intervals(start, token + 1, noisy)
    predicts = torch.where(token + 1 < end, token + 1, -1)
    options = "" if document_lengths is None else f", {len(lengths)} documents"
    name = f"idlm_training(seq_len={s}, block_size={block}{options})"
    return of_rows(lead, own, token - first, noisy, predicts, 2 * s, name)


def isd_step(stride: int, *, bidirectional: bool = False, shifted: bool = True) -> Pattern:
    """One step of introspective strided decoding (I-DLM, arXiv 2604.11035): `[pending, s_0 .. s_{N-2} | masks]`.

    All rows are causal, at consecutive positions: masks see the drafts and the masks before them. With `bidirectional`
    (FLARE, HybridDiffusion) the masks see the drafts and each other.

    Args:
        stride: N, rows that verify.
        bidirectional: of the masks.
        shifted: masks predict the token after their position, and N - 1 of them draft; False: the token at it, and
            there is one more mask, whose own prediction is not used: that of the last draft row is better.

    Raises:
        TypeError, ValueError: `stride` is not an int >= 2, or an option is not a bool.
    """
    n = check_int("stride", stride, 2)
    for name, value in (("bidirectional", bidirectional), ("shifted", shifted)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    row = torch.arange(2 * n - 1 if shifted else 2 * n, device="cpu")
    is_mask, zero = row >= n, torch.zeros_like(row)
    apart = is_mask & bidirectional
    options = f"{', bidirectional=True' if bidirectional else ''}{'' if shifted else ', shifted=False'}"
    return Pattern(
        lead=intervals(zero, torch.where(apart, n, row + 1), row >= 0),
        own=intervals(zero + n, zero + len(row), apart),
        positions=row.to(torch.int32),
        kv_len=len(row),
        roles=torch.where(is_mask, int(Role.MASK), int(Role.DRAFT)).to(torch.int8),
        name=f"isd_step(stride={n}{options})",
    )
