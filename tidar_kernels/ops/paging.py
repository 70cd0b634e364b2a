"""Where a key of the cache lies, and what its value is: the reference for pages and quantised caches.

    page = block_table[b, n // page_size],  slot = n % page_size        of key n of sequence b
    value = stored * scale                                              of a float8 cache

A cache without pages is one page a sequence: page = b, slot = n. What slots outside the context hold, and entries of
the table that no key of the context needs, never matters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .operands import Cached, Keys, Rows

__all__ = [
    "Places",
    "as_kept",
    "as_kept_rows",
    "dense",
    "dequantise",
    "locate",
    "of_one_width",
    "of_sequence",
    "plain",
    "quantise",
    "scales_at",
    "slot_scales",
]

# The least normal number of float32: a token of zeros has this scale by slot, so that nothing is divided by zero.
SMALLEST_SCALE = 2.0**-126


class Places(NamedTuple):
    """Where keys lie, `[batch, n]` each.

    Attributes:
        page, slot: int64; 0 where there is no such place.
        exists: bool; the position is in `[0, capacity)`, and the table names one of the pages.
    """

    page: Tensor
    slot: Tensor
    exists: Tensor


def locate(cached: Cached, positions: Tensor, sequence: Tensor | None = None) -> Places:
    """The places of the keys at `positions`, any integers `[batch, n]` on the device of the cache.

    `sequence`, integers of the same shape, says whose keys they are; default those of sequence b in row b.
    """
    pages, page_size = cached.k_cache.shape[0], cached.k_cache.shape[2]
    exists = (positions >= 0) & (positions < cached.capacity)
    positions = torch.where(exists, positions, 0).long()
    if sequence is None:
        sequence = torch.arange(len(positions), device=positions.device)[:, None]
    if cached.block_table is None:
        return Places(torch.where(exists, sequence, 0), positions, exists)
    if not cached.capacity:  # a table without columns
        return Places(positions, positions, exists)
    page = cached.block_table[sequence, positions // page_size].long()
    exists = exists & (page >= 0) & (page < pages)
    return Places(torch.where(exists, page, 0), torch.where(exists, positions % page_size, 0), exists)


def slot_scales(scale: Tensor | None) -> bool:
    """Whether every slot has a scale of its own, which is written with it; else the scale is the caller's."""
    return scale is not None and scale.ndim == 3


def scales_at(scale: Tensor, places: Places, num_kv_heads: int) -> Tensor:
    """The scales of the keys at `places`, float32 `[batch, kv_heads, n]`."""
    batch, n = places.page.shape
    if slot_scales(scale):
        return scale[places.page, :, places.slot].transpose(1, 2)
    return scale.expand(batch, num_kv_heads)[:, :, None].expand(-1, -1, n)


def quantise(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(stored, scale)` of values `[.., head_dim]`: `x / scale`, rounded to the nearest float8, ties to even.

    What is too large becomes the largest number of the dtype, as the instructions of GPUs have it; NaN stays NaN.

    Args:
        scale: float32 `[..]`, positive; or None: that of every token and head, its largest value / the dtype's largest.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
    """
    largest = torch.finfo(dtype).max
    values = x.to(torch.float32)
    if scale is None:
        # of numbers: NaN counts as 0, infinity as the largest number
        scale = (values.abs().nan_to_num().amax(-1) / largest).clamp(min=SMALLEST_SCALE)
    # torch's own conversion makes NaN or infinity of what is too large
    return (values / scale.unsqueeze(-1)).clamp(-largest, largest).to(dtype), scale


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`stored * scale` of values `[.., head_dim]` and scales `[..]`: a product in float32, rounded to `dtype`."""
    return (stored.to(torch.float32) * scale.unsqueeze(-1)).to(dtype)


def dense(cached: Cached, n: int | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values of the context as `[batch, kv_heads, n, head_dim]`: without pages, and dequantised.

    Args:
        n: slots of the result, default the capacity. Those at and past `lengths[b]` are 0.
        dtype: of the result; default that of the cache, float32 of a float8 cache.
    """
    n = cached.capacity if n is None else n
    position = torch.arange(n, device=cached.lengths.device)
    # Outside of the context a position is none, and what is there is never looked at.
    places = locate(cached, torch.where(position < cached.lengths[:, None], position, -1))
    found = []
    for cache, scale in ((cached.k_cache, cached.k_scale), (cached.v_cache, cached.v_scale)):
        values = cache[places.page, :, places.slot].transpose(1, 2)
        if scale is not None:
            values = dequantise(values, scales_at(scale, places, cache.shape[1]))
        values = values if dtype is None else values.to(dtype)
        found.append(values.masked_fill(~places.exists[:, None, :, None], 0))
    return found[0], found[1]


def as_kept(keys: Keys, cached: Cached) -> Keys:
    """Keys in flight as they are seen: beside a float8 cache those that enter it with the values that it will hold."""
    if cached.k_scale is None or cached.kept_len == 0:
        return keys
    kept = Keys(*(x[:, :, : cached.kept_len] for x in keys))
    seen = zip(keys, map(_as_cached, kept, cached[:2], (cached.k_scale, cached.v_scale)), strict=True)
    return Keys(*(torch.cat([held, x[:, :, cached.kept_len :]], dim=2) for x, held in seen))


def as_kept_rows(keys: Keys, cached: Cached, sequence: Tensor, kept: Tensor) -> Keys:
    """`as_kept` of ragged keys `[1, kv_heads, rows, d]`: those of row i are of sequence `sequence[i]`, and enter the
    cache where `kept[i]`."""
    seen = []
    for x, cache, scale in zip(keys, cached[:2], (cached.k_scale, cached.v_scale), strict=True):
        if scale is None or slot_scales(scale):
            of_row = scale
        else:
            of_row = scale.expand(len(cached.lengths), x.shape[1])[sequence]
        # A row is a sequence of one key here, whose scales are those of a sequence.
        held = _as_cached(x[0].transpose(0, 1).unsqueeze(2), cache, of_row).squeeze(2).transpose(0, 1)[None]
        seen.append(torch.where(kept[:, None], held, x))
    return Keys(*seen)


def plain(keys: Keys, cached: Cached, n: int | None = None) -> tuple[Keys, Cached]:
    """The same keys without pages or float8: in flight as the cache will hold them, cached as they are worth.

    Args:
        n: slots of the dense cache; default as many as the longest context needs, for which the lengths are read.
    """
    if cached.block_table is None and cached.k_scale is None:
        return keys, cached
    keys = as_kept(keys, cached)
    if n is None:
        n = min(max(0, *cached.lengths.tolist()), cached.capacity) if len(cached.lengths) else 0
    values = dense(cached, n, keys.k.dtype)
    return keys, Cached(*values, cached.lengths, min(cached.max_context, n))


def of_one_width(rows: Rows, keys: Keys, cached: Cached) -> tuple[Rows, Keys, Cached]:
    """The operands of a step with zeros after the narrower of q, k and v, whose products they leave as they are."""
    width = max(rows.q.shape[3], keys.v.shape[3])

    def widened(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[3]))

    cached = cached._replace(k_cache=widened(cached.k_cache), v_cache=widened(cached.v_cache))
    return rows._replace(q=widened(rows.q)), Keys(*map(widened, keys)), cached


def of_sequence(cached: Cached, b: int) -> Cached:
    """What one sequence has of a cache: a cache of one sequence, over the same pages."""
    one, paged = slice(b, b + 1), cached.block_table is not None

    def scale(x: Tensor | None) -> Tensor | None:
        if x is None or (slot_scales(x) and paged):
            return x
        return x[one] if slot_scales(x) else x.expand(len(cached.lengths), cached.k_cache.shape[1])[one]

    return cached._replace(
        k_cache=cached.k_cache if paged else cached.k_cache[one],
        v_cache=cached.v_cache if paged else cached.v_cache[one],
        lengths=cached.lengths[one],
        block_table=None if cached.block_table is None else cached.block_table[one],
        k_scale=scale(cached.k_scale),
        v_scale=scale(cached.v_scale),
    )


def _as_cached(x: Tensor, cache: Tensor, scale: Tensor | None) -> Tensor:
    """Keys or values `[batch, kv_heads, rows, d]`, quantised as `cache` is and back."""
    by_row = None if scale is None or slot_scales(scale) else scale.expand(x.shape[:2])[:, :, None].expand(x.shape[:3])
    stored, by_row = quantise(x, by_row, cache.dtype)
    return dequantise(stored, by_row, x.dtype)
