"""The eager twin of `tk.attention`, and the masked softmax that it shares with the twin of `tk.step_attention`.

Written to be read and believed, not to be fast: the dense mask is built, nothing is skipped. In a half dtype it does
what eager PyTorch models do (matmuls in that dtype, softmax in float32), so its error in that dtype is the yardstick of
the budget rule in `tidar_kernels.testing`. Any float dtype including float64; autograd throughout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...patterns import Pattern

__all__ = ["attention", "masked_attention"]


def _split_defects(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [.., d]` with 0 for NaN and infinities; and of each vector 0, or NaN if it had one, `[..]`."""
    finite = x.isfinite()
    return x.masked_fill(~finite, 0.0), torch.zeros(x.shape[:-1], device=x.device).masked_fill(
        ~finite.all(-1), math.nan
    )


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of `q [.., heads, q_len, d]` over `k, v [.., kv_heads, kv_len, d]` under a mask.

    The mask broadcasts against the scores `[.., kv_heads, group, q_len, kv_len]`: booleans, True for what is visible,
    or floats, which are added, -inf for what is not.

    Returns `(out, lse)`; a row that sees no key gives out = 0 and lse = the head's sink, or -inf without sinks. lse is
    float32 at least.

    A key that a row does not see leaves nothing in its result and gradients, whatever it holds: what is not finite is
    left out of every product (0 * NaN is NaN) and makes the scores of its row or key NaN, before the mask.
    """
    num_kv_heads, head_dim = k.shape[-3], q.shape[-1]
    visible = mask if mask.dtype == torch.bool else mask != -math.inf
    (q, row_defect), (k, key_defect), (v, value_defect) = map(_split_defects, (q, k, v))
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)  # a large int is not one of PyTorch's
    grouped = rearrange(q, "... (kv group) row dim -> ... kv group row dim", kv=num_kv_heads)
    scores = grouped @ rearrange(k, "... kv key dim -> ... kv 1 dim key")
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = scores + rearrange(row_defect, "... (kv group) row -> ... kv group row 1", kv=num_kv_heads)
    scores = scores + rearrange(key_defect + value_defect, "... kv key -> ... kv 1 1 key")
    scores = scores.masked_fill(~visible, 0.0)  # so that nothing but 0 comes back through what follows
    if softcap is not None:
        scores = float(softcap) * torch.tanh(scores / float(softcap))
    scores = scores.masked_fill(~visible, -math.inf) if visible is mask else scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, rearrange(sinks, "(kv group) -> kv group 1", kv=num_kv_heads).to(lse.dtype))
    probs = (scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp().masked_fill(~visible, 0.0)
    out = probs.to(v.dtype) @ rearrange(v, "... kv key dim -> ... kv 1 key dim")
    out = out.masked_fill(lse.isnan().unsqueeze(-1), math.nan)  # so that no gradient of such a row enters that product
    merge = "... kv group row -> ... (kv group) row"
    return rearrange(out, merge.replace("row", "row dim")), rearrange(lse, merge)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Eager twin of `tidar_kernels.attention`; same arguments, same results."""
    out, lse = masked_attention(q, k, v, pattern.dense().to(q.device), scale, softcap, sinks)
    return (out, lse) if return_lse else out
