"""The eager twin of `tk.step_attention`: a sequence at a time, keys concatenated, the dense mask of its length."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ...patterns import Pattern, PatternBatch
from ..attention.reference import masked_attention
from ..operands import Cached, Keys
from ..paging import of_sequence, plain

__all__ = ["step_attention"]


def step_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    pattern: Pattern | PatternBatch,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Any:
    """Eager twin of `tidar_kernels.step_attention`; same arguments, same results."""
    if out is not None:
        found, lse = step_attention(
            *(q, k, v, k_cache, v_cache, lengths, pattern, scale),
            softcap=softcap,
            sinks=sinks,
            return_lse=True,
            block_table=block_table,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return (out.copy_(found), lse) if return_lse else out.copy_(found)
    cached = Cached(k_cache, v_cache, lengths, 0, block_table, k_scale, v_scale)

    def attend(q: Tensor, keys: Keys, cached: Cached, pattern: Pattern, kept_len: int) -> tuple[Tensor, Tensor]:
        """Of sequences of one pattern: `(out [batch, heads, rows, d], lse)`."""
        kept_len = 0 if k_scale is None else kept_len
        (k, v), (k_cache, v_cache, lengths, *_) = plain(keys, cached._replace(kept_len=kept_len))
        outs, lses = [], []
        for b, length in enumerate(lengths.tolist()):
            line, values = (torch.cat([x[b, :, :length], new[b]], dim=1) for x, new in ((k_cache, k), (v_cache, v)))
            mask = pattern.dense(length).to(q.device)
            out, lse = masked_attention(q[b], line, values, mask, scale, softcap, sinks)
            outs.append(out)
            lses.append(lse)
        if outs:
            return torch.stack(outs), torch.stack(lses)
        return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))

    if isinstance(pattern, Pattern):
        out, lse = attend(q, Keys(k, v), cached, pattern, pattern.kept_len)
        return (out, lse) if return_lse else out
    kept, ends, parts = pattern.kept.tolist(), pattern.cu_rows.tolist(), []
    for request, (first, end) in enumerate(itertools.pairwise(ends)):
        one, *new = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
        alone = of_sequence(cached, request), pattern.pattern(request), kept[request]
        parts.append(attend(one, Keys(*new), *alone))
    # Rows that are nobody's see no key.
    rest, no_keys, no_values = q[ends[-1] :].transpose(0, 1), k[:0].transpose(0, 1), v[:0].transpose(0, 1)
    mask = torch.zeros(rest.shape[1], 0, dtype=torch.bool, device=q.device)
    out, lse = masked_attention(rest, no_keys, no_values, mask, scale, softcap, sinks)
    parts.append((out[None], lse[None]))
    out, lse = (torch.cat(x, dim=2)[0].transpose(0, 1) for x in zip(*parts, strict=True))
    return (out, lse) if return_lse else out
