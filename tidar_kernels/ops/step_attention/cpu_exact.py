"""Step attention on the CPU whose causal rows have the bits of single-token decoding (`decoding/exact.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Cached, Keys, Rows, Scores
from ..paging import plain
from . import cpu

__all__ = ["step_attention"]

# The in-flight part of a step of one token: it sees itself.
with torch.inference_mode(False):  # whatever the mode in which the operator is first called
    _ITSELF = torch.tensor([[0, 1]], dtype=torch.int32, device="cpu")
    _NOTHING = torch.tensor([[0, 0]], dtype=torch.int32, device="cpu")


def step_attention(
    rows: Rows, keys: Keys, cached: Cached, scores: Scores, *, causal_rows: int
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`. Each of the first `causal_rows` rows is the call that its token would be alone.

    That call has one sequence and one row, and finds its keys in one piece of memory: its bits cannot depend on how the
    token came to be computed. The other rows are one call for all, as in `cpu.step_attention`.

    Raises:
        ValueError: the batch is ragged.
    """
    if rows.cu_rows is not None:
        raise ValueError("pattern: expected a Pattern for exact rows, got a ragged batch")
    keys, cached = plain(keys, cached)
    q, batch = rows.q, len(rows.q)
    alone = []
    for b, length in enumerate(cached.lengths.tolist() if causal_rows else []):
        line = Cached(
            torch.cat([cached.k_cache[b : b + 1, :, :length], keys.k[b : b + 1, :, :causal_rows]], dim=2),
            torch.cat([cached.v_cache[b : b + 1, :, :length], keys.v[b : b + 1, :, :causal_rows]], dim=2),
            cached.lengths,
        )
        for m in range(causal_rows):
            at = slice(length + m, length + m + 1)
            # Of a window that ends among the drafts, what it holds of them is context too.
            window = None if rows.reach is None else (rows.reach[m] + m - rows.lead[m, 0])[None]
            row = Rows(q[b : b + 1, :, m : m + 1], _ITSELF, _NOTHING, window)
            itself = Keys(line.k_cache[:, :, at], line.v_cache[:, :, at])
            here = line._replace(lengths=torch.tensor([length + m], device="cpu"))
            alone.append(cpu.step_attention(row, itself, here, scores))
    parts: list[tuple[Tensor, Tensor]] = []
    if alone:  # rows of a sequence one after another, each [1, heads, 1(, d)]
        out, lse = (torch.cat(x).unflatten(0, (batch, causal_rows)) for x in zip(*alone, strict=True))
        parts.append((out[:, :, :, 0].transpose(1, 2), lse[:, :, :, 0].transpose(1, 2)))
    if q.shape[2] > causal_rows or not alone:
        reach, tree_mask = (None if x is None else x[causal_rows:] for x in (rows.reach, rows.tree_mask))
        rest = Rows(q[:, :, causal_rows:], rows.lead[causal_rows:], rows.own[causal_rows:], reach, tree_mask)
        parts.append(cpu.step_attention(rest, keys, cached, scores))
    out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out, lse
