"""Eager twins of the operators that write into the cache; they serve on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import paging
from ..operands import Cached

__all__ = ["append_kv", "compact_kv", "rotary_append"]


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cu_rows: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Eager twin of `tidar_kernels.append_kv`; same effect. Slots outside the cache are dropped.

    Ragged k and v have a batch of 1 here: `[1, kv_heads, rows, head_dim]`; `kept` is its `keep`.
    """
    if block_table is None and k_scale is None and cu_rows is None and kept is None:
        num_new, max_len = k.shape[2], k_cache.shape[2]
        for b, length in enumerate(lengths.tolist()):
            lo, hi = max(length, 0), min(length + num_new, max_len)
            if lo < hi:
                k_cache[b, :, lo:hi] = k[b, :, lo - length : hi - length]
                v_cache[b, :, lo:hi] = v[b, :, lo - length : hi - length]
        return
    cached, batch = Cached(k_cache, v_cache, lengths, 0, block_table, k_scale, v_scale), len(lengths)
    sequence, token = _rows(k, cu_rows)
    somebodys = sequence < batch
    sequence = torch.where(somebodys, sequence, 0)
    places = paging.locate(cached, lengths[sequence] + token, sequence)
    enters = somebodys & places.exists
    if kept is not None:
        enters = enters & (token < kept[sequence])
    page, slot = places.page[enters], places.slot[enters]
    for cache, x, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        values = x.transpose(1, 2)[enters]  # [rows that enter, kv_heads, head_dim]
        if scale is not None:
            by_slot = paging.slot_scales(scale)
            given = None if by_slot else scale.expand(batch, cache.shape[1])[sequence[enters]]
            values, found = paging.quantise(values, given, cache.dtype)
            if by_slot:
                scale[page, :, slot] = found
        cache[page, :, slot] = values


def _rows(k: Tensor, cu_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(sequence, token)` of each row of k, int64 `[batch, rows]`; rows that are nobody's have a sequence too many."""
    batch, rows = k.shape[0], k.shape[2]
    row = torch.arange(rows, device=k.device)
    if cu_rows is None:
        return torch.arange(batch, device=k.device)[:, None].expand(batch, rows), row.expand(batch, rows)
    sequence = (cu_rows[1:] <= row[:, None]).sum(1)
    return sequence[None], (row - cu_rows[sequence])[None]


def compact_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    path: Tensor,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Eager twin of `tidar_kernels.compact_kv`; same arguments, same effect. Slots outside the cache are dropped."""
    cached = Cached(k_cache, v_cache, lengths, 0, block_table, k_scale, v_scale)
    i = torch.arange(path.shape[1], device=path.device)
    to, of = paging.locate(cached, lengths[:, None] + i), paging.locate(cached, lengths[:, None] + path)
    moves = (path > i) & to.exists & of.exists
    scales = [scale for scale in (k_scale, v_scale) if scale is not None and paging.slot_scales(scale)]
    for x in (k_cache, v_cache, *scales):
        x[to.page[moves], :, to.slot[moves]] = x[of.page[moves], :, of.slot[moves]]  # the right side is a copy


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    keep: int,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cu_rows: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Eager twin of `tidar_kernels.rotary_append`, with cos and sin `[batch or 1, rows, head_dim]`."""
    half = q.shape[-1] // 2
    q, k = (x * cos[:, None] + torch.roll(x, half, dims=-1) * sin[:, None] for x in (q, k))
    new_k, new_v = k, v
    if cu_rows is None:
        new_k, new_v = k[:, :, :keep], v[:, :, :keep]
    elif kept is None:
        kept = torch.full_like(lengths, keep)
    append_kv(k_cache, v_cache, new_k, new_v, lengths, block_table, k_scale, v_scale, cu_rows, kept)
    return q, k
