"""The fast PyTorch paths that the operators take on the CPU, on top of ATen's fused CPU attention.

Same idea as the kernels: the context is one dense call without a mask, the in-flight part is a small masked call, and
the two merge by their log-sum-exp. Query heads of one kv head are packed into rows, so K/V is never repeated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

# lead tensor -> (own tensor, {(kv_len, dtype, group): packed mask}): a pattern's masks are built once.
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def dense_mask(lead: Tensor, own: Tensor, kv_len: int) -> Tensor:
    """The in-flight part of a pattern as booleans `[q_len, kv_len]`, from its interval tensors."""
    key = torch.arange(kv_len, dtype=lead.dtype, device=lead.device)
    return ((lead[:, :1] <= key) & (key < lead[:, 1:])) | ((own[:, :1] <= key) & (key < own[:, 1:]))


def _packed_mask(
    lead: Tensor, own: Tensor, kv_len: int, dtype: torch.dtype, group: int
) -> tuple[Tensor, Tensor | None]:
    """`(additive mask [1, 1, group * q_len, kv_len], rows that see no in-flight key or None)`."""
    found = _masks.get(lead)
    if found is None or found[0] is not own:
        found = _masks[lead] = (own, {})
    key = (kv_len, dtype, group)
    if key not in found[1]:
        mask = dense_mask(lead, own, kv_len).repeat(group, 1)
        empty = ~mask.any(dim=1)
        additive = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)
        found[1][key] = (additive[None, None], empty if bool(empty.any()) else None)
    return found[1][key]


def _unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if its last stride is not 1: ATen's fused attention takes that stride for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def step_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    lead: Tensor,
    own: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """CPU path of `tidar_kernels.step_attention`: `(out, lse)`."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    rows = _unit_stride(q.reshape(batch, num_kv_heads, num_heads // num_kv_heads * q_len, head_dim))
    if rows.numel() == 0 or kv_len == 0:  # ATen divides by zero there
        out, lse = torch.zeros_like(rows), rows.new_full(rows.shape[:-1], -math.inf, dtype=lse_dtype)
    else:
        mask, empty = _packed_mask(lead, own, kv_len, q.dtype, num_heads // num_kv_heads)
        out, lse = _flash(rows, _unit_stride(k), _unit_stride(v), attn_mask=mask, scale=scale)
        if empty is not None:
            lse = lse.masked_fill(empty, -math.inf)
    counts = lengths.tolist()
    # Sequences of one length share a call; a ragged batch takes one call a sequence.
    groups = (
        [(slice(0, batch), counts[0])]
        if len(set(counts)) == 1
        else [(slice(b, b + 1), n) for b, n in enumerate(counts)]
    )
    merged = []
    for at, length in groups:
        if length == 0 or rows.numel() == 0:
            merged.append((out[at], lse[at]))
            continue
        k_ctx, v_ctx = _unit_stride(k_cache[at, :, :length]), _unit_stride(v_cache[at, :, :length])
        ctx, ctx_lse = _flash(rows[at], k_ctx, v_ctx, scale=scale)
        # weights exp(ctx_lse) : exp(lse), as a sigmoid of their difference: no overflow, and exact at -inf
        weight = torch.sigmoid(ctx_lse - lse[at]).unsqueeze(-1)
        # in float32 at least: rounding the product to half would cost as much as the two halves' own rounding
        both = torch.lerp(out[at].to(lse_dtype), ctx.to(lse_dtype), weight).to(q.dtype)
        merged.append((both, torch.logaddexp(ctx_lse, lse[at])))
    if merged:
        out, lse = map(torch.cat, zip(*merged, strict=True)) if len(merged) > 1 else merged[0]
    # contiguous, as the schema's fake tensors are: ATen's results are transposed
    return out.reshape(q.shape).contiguous(), lse.reshape(q.shape[:-1]).contiguous()


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """CPU path of `tidar_kernels.append_kv`: one slice copy a sequence."""
    num_new, max_len = k.shape[2], k_cache.shape[2]
    for b, length in enumerate(lengths.tolist()):
        lo, hi = max(length, 0), min(length + num_new, max_len)
        if lo < hi:
            k_cache[b, :, lo:hi] = k[b, :, lo - length : hi - length]
            v_cache[b, :, lo:hi] = v[b, :, lo - length : hi - length]
