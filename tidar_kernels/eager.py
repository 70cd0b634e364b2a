"""Plain PyTorch twins of every operator: the oracle. No Triton, any float dtype including float64, autograd throughout.

They are written to be read and believed, not to be fast: the dense mask is built, the keys are concatenated, nothing is
skipped. In a half dtype they do what eager PyTorch models do (matmuls in that dtype, softmax in float32), so their
error in that dtype is the yardstick of the budget rule in `tidar_kernels.testing`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .patterns import Pattern

__all__ = ["append_kv", "attention", "step_attention"]


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention of `q [.., heads, q_len, d]` over `k, v [.., kv_heads, kv_len, d]` under a boolean mask.

    Returns `(out, lse)`; a row that sees no key gives out = 0 and lse = -inf. lse is float32 at least.
    """
    num_kv_heads, head_dim = k.shape[-3], q.shape[-1]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    grouped = rearrange(q, "... (kv group) row dim -> ... kv group row dim", kv=num_kv_heads)
    scores = grouped @ rearrange(k, "... kv key dim -> ... kv 1 dim key")
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    probs = (scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
    out = probs.to(v.dtype) @ rearrange(v, "... kv key dim -> ... kv 1 key dim")
    merge = "... kv group row -> ... (kv group) row"
    return rearrange(out, merge.replace("row", "row dim")), rearrange(lse, merge)


def attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float | None = None, *, return_lse: bool = False
) -> Any:
    """Eager twin of `tidar_kernels.attention`; same arguments, same results."""
    out, lse = _masked_attention(q, k, v, pattern.dense().to(q.device), scale)
    return (out, lse) if return_lse else out


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
    return_lse: bool = False,
) -> Any:
    """Eager twin of `tidar_kernels.step_attention`; same arguments, same results."""
    outs, lses = [], []
    for b, length in enumerate(lengths.tolist()):
        keys = torch.cat([k_cache[b, :, :length], k[b]], dim=1)
        values = torch.cat([v_cache[b, :, :length], v[b]], dim=1)
        out, lse = _masked_attention(q[b], keys, values, pattern.dense(length).to(q.device), scale)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.stack(outs), torch.stack(lses)
    return (out, lse) if return_lse else out


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """Eager twin of `tidar_kernels.append_kv`; same arguments, same effect. Slots past max_len are dropped."""
    num_new, max_len = k.shape[2], k_cache.shape[2]
    for b, length in enumerate(lengths.tolist()):
        lo, hi = max(length, 0), min(length + num_new, max_len)
        if lo < hi:
            k_cache[b, :, lo:hi] = k[b, :, lo - length : hi - length]
            v_cache[b, :, lo:hi] = v[b, :, lo - length : hi - length]
