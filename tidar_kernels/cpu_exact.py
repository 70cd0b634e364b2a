"""Step attention on the CPU whose causal rows have the bits of single-token decoding; see `tidar_kernels.exact`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu

# The in-flight part of a step of one token: it sees itself.
_ITSELF, _NOTHING = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[0, 0]], dtype=torch.int32)


def step_attention(
    causal_rows: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    lead: Tensor,
    own: Tensor,
    scale: float,
    reach: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`. Each of the first `causal_rows` rows is the call that its token would be alone.

    That call has one sequence and one row, and finds its keys in one piece of memory: its bits cannot depend on how the
    token came to be computed. The other rows are one call for all, as in `tidar_kernels.cpu.step_attention`.
    """
    options = (softcap, sinks)
    alone = []
    for b, length in enumerate(lengths.tolist() if causal_rows else []):
        keys = torch.cat([k_cache[b : b + 1, :, :length], k[b : b + 1, :, :causal_rows]], dim=2)
        values = torch.cat([v_cache[b : b + 1, :, :length], v[b : b + 1, :, :causal_rows]], dim=2)
        for m in range(causal_rows):
            # Of a window that ends among the drafts, what it holds of them is context too.
            window = None if reach is None else (reach[m] + m - lead[m, 0])[None]
            at = length + m
            here = (q[b : b + 1, :, m : m + 1], keys[:, :, at : at + 1], values[:, :, at : at + 1])
            alone.append(
                cpu.step_attention(
                    *here, keys, values, torch.tensor([at]), _ITSELF, _NOTHING, scale, window, *options
                )
            )  # fmt: skip
    rows = q.shape[2] - causal_rows
    parts: list[tuple[Tensor, Tensor]] = []
    if alone:  # rows of a sequence one after another, each [1, heads, 1(, d)]
        out, lse = (torch.cat(x).unflatten(0, (len(q), causal_rows)) for x in zip(*alone, strict=True))
        parts.append((out[:, :, :, 0].transpose(1, 2), lse[:, :, :, 0].transpose(1, 2)))
    if rows or not alone:
        lead, own = lead[-rows:], own[-rows:]
        reach, bits = (None if x is None else x[-rows:] for x in (reach, bits))
        q = q[:, :, causal_rows:]
        parts.append(cpu.step_attention(q, k, v, k_cache, v_cache, lengths, lead, own, scale, reach, *options, bits))
    out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out, lse
