"""The eager twin of `tk.step_attention`: a sequence at a time, keys concatenated, the dense mask of its length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...patterns import Pattern
from ..attention.reference import masked_attention
from ..operands import Cached, Keys
from ..paging import plain

__all__ = ["step_attention"]


def step_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Any:
    """Eager twin of `tidar_kernels.step_attention`; same arguments, same results."""
    kept_len = 0 if k_scale is None else pattern.kept_len
    cached = Cached(k_cache, v_cache, lengths, 0, block_table, k_scale, v_scale, kept_len)
    (k, v), (k_cache, v_cache, *_) = plain(Keys(k, v), cached)
    outs, lses = [], []
    for b, length in enumerate(lengths.tolist()):
        keys = torch.cat([k_cache[b, :, :length], k[b]], dim=1)
        values = torch.cat([v_cache[b, :, :length], v[b]], dim=1)
        mask = pattern.dense(length).to(q.device)
        out, lse = masked_attention(q[b], keys, values, mask, scale, softcap, sinks)
        outs.append(out)
        lses.append(lse)
    if outs:
        out, lse = torch.stack(outs), torch.stack(lses)
    else:
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return (out, lse) if return_lse else out
