"""The fast PyTorch paths that the operators take on the CPU, on top of ATen's fused CPU attention.

Same idea as the kernels: the context is one dense call without a mask, the in-flight part is a small masked call, and
the two merge by their log-sum-exp. Query heads of one kv head are packed into rows, so K/V is never repeated. Behind a
sliding window the context is what every row reaches, and a small masked call for what only some do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .cpu_parts import add_sinks, capped_attention, share, unit_stride
from .pattern import unpack_bits

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

# lead tensor -> (own tensor, bits, {(kv_len, dtype, group): packed mask}): a pattern's masks are built once.
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def dense_mask(lead: Tensor, own: Tensor, kv_len: int, bits: Tensor | None = None) -> Tensor:
    """The in-flight part of a pattern as booleans `[q_len, kv_len]`, from its interval tensors and bits."""
    key = torch.arange(kv_len, dtype=lead.dtype, device=lead.device)
    seen = ((lead[:, :1] <= key) & (key < lead[:, 1:])) | ((own[:, :1] <= key) & (key < own[:, 1:]))
    return seen if bits is None else seen | unpack_bits(bits, kv_len)


def _packed_mask(
    lead: Tensor, own: Tensor, bits: Tensor | None, kv_len: int, dtype: torch.dtype, group: int
) -> tuple[Tensor, Tensor | None]:
    """`(additive mask [1, 1, group * q_len, kv_len], rows that see no in-flight key or None)`."""
    found = _masks.get(lead)
    if found is None or found[0] is not own or found[1] is not bits:
        found = _masks[lead] = (own, bits, {})
    key = (kv_len, dtype, group)
    if key not in found[2]:
        found[2][key] = _additive(dense_mask(lead, own, kv_len, bits), dtype, group)
    return found[2][key]


def _additive(visible: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor | None]:
    """`visible [q_len, keys]` as what is added to scores of packed rows, and the rows that see nothing, or None."""
    visible = visible.repeat(group, 1)
    empty = ~visible.any(dim=1)
    additive = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -math.inf)
    return additive[None, None], empty if bool(empty.any()) else None


def _context_parts(
    length: int, reach: Tensor | None, dtype: torch.dtype, group: int
) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
    """`(slots, mask, rows that see none of them)` of one sequence's context, of which not every row may see all."""
    near = far = length
    if reach is not None and reach.numel():
        near, far = min(length, int(reach.min())), min(length, int(reach.max()))
    if near:
        yield slice(length - near, length), None, None
    if far > near and reach is not None:
        slot = torch.arange(length - far, length - near)
        yield slice(length - far, length - near), *_additive(slot >= length - reach[:, None].long(), dtype, group)


def _attend(
    rows: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, mask: Tensor | None, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of packed rows `[batch, kv_heads, rows, d]`; `empty`: the rows that see nothing under the mask."""
    if softcap is not None:
        return capped_attention(rows, k, v, scale, softcap, mask)
    out, lse = _flash(rows, unit_stride(k), unit_stride(v), attn_mask=mask, scale=scale)
    return out, lse if empty is None else lse.masked_fill(empty, -math.inf)


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
    reach: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """CPU path of `tidar_kernels.step_attention`: `(out, lse)`."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    rows = unit_stride(q.reshape(batch, num_kv_heads, group * q_len, head_dim))
    if rows.numel() == 0 or kv_len == 0:  # ATen divides by zero there
        out, lse = torch.zeros_like(rows), rows.new_full(rows.shape[:-1], -math.inf, dtype=lse_dtype)
    else:
        out, lse = _attend(rows, k, v, scale, softcap, *_packed_mask(lead, own, bits, kv_len, q.dtype, group))
    counts = lengths.tolist() if rows.numel() else []
    # Sequences of one length share a call; a ragged batch takes one call a sequence.
    groups = (
        [(slice(0, batch), counts[0])]
        if len(set(counts)) == 1
        else [(slice(b, b + 1), n) for b, n in enumerate(counts)]
    )
    merged = []
    for at, length in groups:
        so_far, so_far_lse = out[at], lse[at]
        for slots, mask, empty in _context_parts(length, reach, q.dtype, group):
            k_ctx, v_ctx = k_cache[at, :, slots], v_cache[at, :, slots]
            ctx, ctx_lse = _attend(rows[at], k_ctx, v_ctx, scale, softcap, mask, empty)
            # A part that every row sees has a finite lse, and needs no care for rows without a key.
            weight = torch.sigmoid(ctx_lse - so_far_lse) if empty is None else share(ctx_lse, so_far_lse)
            # in float32 at least: rounding the product to half would cost as much as the two halves' own rounding
            so_far = torch.lerp(so_far.to(lse_dtype), ctx.to(lse_dtype), weight.unsqueeze(-1))
            so_far_lse = torch.logaddexp(ctx_lse, so_far_lse)
        merged.append((so_far.to(q.dtype), so_far_lse))
    if merged:
        out, lse = map(torch.cat, zip(*merged, strict=True)) if len(merged) > 1 else merged[0]
    # contiguous, as the schema's fake tensors are: ATen's results are transposed
    out, lse = out.reshape(q.shape).contiguous(), lse.reshape(q.shape[:-1]).contiguous()
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return out, lse


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """CPU path of `tidar_kernels.append_kv`: one slice copy a sequence."""
    num_new, max_len = k.shape[2], k_cache.shape[2]
    for b, length in enumerate(lengths.tolist()):
        lo, hi = max(length, 0), min(length + num_new, max_len)
        if lo < hi:
            k_cache[b, :, lo:hi] = k[b, :, lo - length : hi - length]
            v_cache[b, :, lo:hi] = v[b, :, lo - length : hi - length]


def compact_kv(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor) -> None:
    """CPU path of `tidar_kernels.compact_kv`: one gather a sequence, of the slots that move."""
    max_len = k_cache.shape[2]
    for b, (length, nodes) in enumerate(zip(lengths.tolist(), path.tolist(), strict=True)):
        moves = [
            (length + i, length + node)
            for i, node in enumerate(nodes)
            if node > i and length + i >= 0 and length + node < max_len
        ]
        if moves:
            to, of = torch.tensor(moves).unbind(1)
            k_cache[b, :, to] = k_cache[b, :, of]  # the right side is a copy
            v_cache[b, :, to] = v_cache[b, :, of]
