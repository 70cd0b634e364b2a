"""The fast PyTorch paths that the operators take on the CPU, on top of ATen's fused CPU attention.

Same idea as the kernels: the context is one dense call without a mask, the in-flight part is a small masked call, and
the two merge by their log-sum-exp. Query heads of one kv head are packed into rows, so K/V is never repeated. Behind a
sliding window the context is what every row reaches, and a small masked call for what only some do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...patterns.rows import unpack_tree_mask
from .._cpu import TensorMemo, add_sinks, broken_keys, capped_attention, share, unit_stride, without
from ..operands import Cached, Keys, Rows, Scores, results_of
from ..paging import of_one_width, of_sequence, plain

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

_masks = TensorMemo()  # a pattern's masks are built once


def dense_mask(lead: Tensor, own: Tensor, kv_len: int, tree_mask: Tensor | None = None) -> Tensor:
    """The in-flight part of a pattern as booleans `[q_len, kv_len]`, from its interval tensors and tree mask."""
    key = torch.arange(kv_len, dtype=lead.dtype, device=lead.device)
    seen = ((lead[:, :1] <= key) & (key < lead[:, 1:])) | ((own[:, :1] <= key) & (key < own[:, 1:]))
    return seen if tree_mask is None else seen | unpack_tree_mask(tree_mask, kv_len)


def _packed_mask(
    lead: Tensor, own: Tensor, tree_mask: Tensor | None, kv_len: int, dtype: torch.dtype, group: int
) -> tuple[Tensor, Tensor | None]:
    """`(additive mask [1, 1, group * q_len, kv_len], rows that see no in-flight key or None)`."""

    def build() -> tuple[Tensor, Tensor | None]:
        return _additive(dense_mask(lead, own, kv_len, tree_mask), dtype, group)

    return _masks.get((kv_len, dtype, group), build, lead, own, tree_mask)


def _additive(visible: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor | None]:
    """`visible [q_len, keys]` as what is added to scores of packed rows, and the rows that see nothing, or None."""
    visible = visible.repeat(group, 1)
    empty = ~visible.any(dim=1)
    additive = torch.zeros(visible.shape, dtype=dtype, device="cpu").masked_fill_(~visible, -math.inf)
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
        slot = torch.arange(length - far, length - near, device="cpu")
        yield slice(length - far, length - near), *_additive(slot >= length - reach[:, None].long(), dtype, group)


def _attend(
    rows: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, mask: Tensor | None, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of packed rows `[batch, kv_heads, rows, d]`; `empty`: the rows that see nothing under the mask."""
    if softcap is not None:
        return capped_attention(rows, k, v, scale, softcap, mask)
    out, lse = _flash(rows, unit_stride(k), unit_stride(v), attn_mask=mask, scale=scale)
    return out, lse if empty is None else lse.masked_fill(empty, -math.inf)


def _requests(rows: Rows) -> Iterator[tuple[int, slice, Rows]]:
    """`(request, its rows, what they are alone)` of each request of a ragged batch; idle ones are left out."""
    ends, kinds, offsets = (x.tolist() for x in (rows.cu_rows, rows.kinds, rows.offsets) if x is not None)
    for request, (first, end) in enumerate(itertools.pairwise(ends)):
        if first < end:
            at, count = slice(offsets[kinds[request]], offsets[kinds[request]] + end - first), end - first
            lead, own = (x[at].clamp(max=count) for x in (rows.lead, rows.own))
            reach, tree_mask = (None if x is None else x[at] for x in (rows.reach, rows.tree_mask))
            if tree_mask is not None:  # wide enough for the widest tree, not for longer patterns
                tree_mask = torch.nn.functional.pad(tree_mask, (0, max(0, -(-count // 32) - tree_mask.shape[1])))
            yield request, slice(first, end), Rows(rows.q[:, :, first:end], lead, own, reach, tree_mask)


def _each_alone(rows: Rows, keys: Keys, cached: Cached, scores: Scores) -> tuple[Tensor, Tensor]:
    """`step_attention` of a ragged batch: a call a request, so that its bits are those that it has alone."""
    out = results_of(rows, keys.v.shape[3]).zero_()
    lse = out.new_full(rows.q.shape[:3], -math.inf, dtype=torch.promote_types(out.dtype, torch.float32))
    if scores.sinks is not None:
        lse.copy_(scores.sinks[:, None].expand_as(lse))
    for request, at, alone in _requests(rows):
        new = Keys(*(x[:, :, at] for x in keys))
        out[:, :, at], lse[:, :, at] = step_attention(alone, new, of_sequence(cached, request), scores)
    return out, lse


def _one_token(rows: Rows, keys: Keys, cached: Cached, scores: Scores, length: int) -> tuple[Tensor, Tensor] | None:
    """A step of one row a sequence that sees `length` tokens of context and its own key; None where it is another step.

    The softmax over one key is that key's value, so that no part in flight is computed and no other row's key needs a
    mask: about half of the calls of the general way, which counts where the context is short.
    """
    (q, lead, _, reach, *_), (k, v), (scale, softcap, sinks) = rows, keys, scores
    if length == 0 or softcap is not None or reach is not None or lead.tolist() != [[0, 1]]:
        return None
    batch, num_heads, _, head_dim = q.shape
    packed = unit_stride(q.reshape(batch, k.shape[1], -1, head_dim))
    k_ctx, v_ctx = cached.k_cache.narrow(2, 0, length), cached.v_cache.narrow(2, 0, length)
    ctx, ctx_lse = _flash(packed, unit_stride(k_ctx), unit_stride(v_ctx), scale=scale)
    is_wide = ctx.dtype == ctx_lse.dtype
    if not is_wide:
        packed, ctx, v = (x.to(ctx_lse.dtype) for x in (packed, ctx, v))
    own_lse = (packed * k).sum(-1).mul_(scale)
    lse = torch.logaddexp(own_lse, ctx_lse)
    # Its share of the softmax: NaN where the key is broken or its score overflows, and with it the row.
    out = torch.lerp(ctx, v, own_lse.sub_(lse).exp_().unsqueeze(-1))
    out, lse = out.reshape(batch, num_heads, 1, head_dim), lse.reshape(batch, num_heads, 1)
    out = out if is_wide else out.to(q.dtype)
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return out, lse


def step_attention(rows: Rows, keys: Keys, cached: Cached, scores: Scores) -> tuple[Tensor, Tensor]:
    """CPU path of `tidar_kernels.step_attention`: `(out, lse)`."""
    if rows.cu_rows is not None:
        return _each_alone(rows, keys, cached, scores)
    keys, cached = plain(keys, cached)
    head_dim, head_dim_v = rows.q.shape[3], keys.v.shape[3]
    if head_dim != head_dim_v:  # ATen knows one width
        rows, keys, cached = of_one_width(rows, keys, cached)
        out, lse = step_attention(rows, keys, cached, scores)
        return out[..., :head_dim_v].contiguous(), lse
    counts = cached.lengths.tolist() if rows.q.numel() else []
    if rows.q.shape[2] == keys.k.shape[2] == 1 and counts:
        if len(set(counts)) > 1:  # which way a sequence takes must not depend on the lengths of others
            parts = [
                step_attention(
                    rows._replace(q=rows.q[b : b + 1], into=None),
                    Keys(keys.k[b : b + 1], keys.v[b : b + 1]),
                    of_sequence(cached, b),
                    scores,
                )
                for b in range(len(counts))
            ]
            out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
            return out, lse
        found = _one_token(rows, keys, cached, scores, counts[0])
        if found is not None:
            return found
    broken = broken_keys(keys)
    if broken is not None:
        out, lse = step_attention(rows, without(keys, broken), cached, scores)
        visible = dense_mask(rows.lead, rows.own, keys.k.shape[2], rows.tree_mask)
        # A row that sees a broken key is NaN, and the others have the bits that they always have.
        seeing = (visible & broken.unsqueeze(2)).any(-1).repeat_interleave(out.shape[1] // broken.shape[1], dim=1)
        return out.masked_fill(seeing.unsqueeze(-1), math.nan), lse.masked_fill(seeing, math.nan)
    (q, lead, own, reach, tree_mask, *_), (k, v), (scale, softcap, sinks) = rows, keys, scores
    k_cache, v_cache = cached.k_cache, cached.v_cache
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    packed = unit_stride(q.reshape(batch, num_kv_heads, group * q_len, head_dim))
    if packed.numel() == 0 or kv_len == 0:  # ATen divides by zero there
        out, lse = torch.zeros_like(packed), packed.new_full(packed.shape[:-1], -math.inf, dtype=lse_dtype)
    else:
        out, lse = _attend(packed, k, v, scale, softcap, *_packed_mask(lead, own, tree_mask, kv_len, q.dtype, group))
    # Sequences of one length share a call; a ragged batch takes one call a sequence.
    one_call = len(set(counts)) == 1
    calls = (
        [(counts[0], packed, out, lse, k_cache, v_cache)]
        if one_call
        else [
            (length, *(x[b : b + 1] for x in (packed, out, lse, k_cache, v_cache))) for b, length in enumerate(counts)
        ]
    )
    merged = []
    for length, of_rows, so_far, so_far_lse, k_all, v_all in calls:
        for slots, mask, empty in _context_parts(length, reach, q.dtype, group):
            ctx, ctx_lse = _attend(of_rows, k_all[:, :, slots], v_all[:, :, slots], scale, softcap, mask, empty)
            # A part that every row sees has a finite lse, and needs no care for rows without a key.
            weight = (ctx_lse - so_far_lse).sigmoid_() if empty is None else share(ctx_lse, so_far_lse)
            if so_far.dtype != lse_dtype:
                # in float32 at least: rounding the product to half would cost as much as the two halves' own rounding
                so_far = so_far.to(lse_dtype)
            so_far = torch.lerp(so_far, ctx if ctx.dtype == lse_dtype else ctx.to(lse_dtype), weight.unsqueeze(-1))
            so_far_lse = torch.logaddexp(ctx_lse, so_far_lse)
        merged.append((so_far if so_far.dtype == q.dtype else so_far.to(q.dtype), so_far_lse))
    if merged:
        out, lse = map(torch.cat, zip(*merged, strict=True)) if len(merged) > 1 else merged[0]
    # contiguous, as the schema's fake tensors are: ATen's results are transposed
    out, lse = out.reshape(q.shape).contiguous(), lse.reshape(q.shape[:-1]).contiguous()
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return out, lse
