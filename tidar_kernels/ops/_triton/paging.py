"""Pages and float8 values in kernels: what `ops/paging.py` defines, on tiles.

float8 values are bytes here, rounded and decoded in integer arithmetic: so every chip can fill and read such a cache,
whatever it can convert or multiply, and all of them write and see the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Cached
from ..paging import slot_scales
from .launch import Strided, strided

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # of paging.py
MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


class Pages(NamedTuple):
    """A block table as a kernel operand: pointer, strides, and the number of pages that its entries may name."""

    ptr: Any
    stride: Any
    num_pages: int


def pages(cached: Cached) -> Pages | None:
    """The block table as a kernel operand; None of a cache without pages, whose kernel knows of none."""
    table = cached.block_table
    return None if table is None else Pages(table, table.stride(), cached.k_cache.shape[0])


def stored(cache: Tensor) -> Strided:
    """A cache as a kernel operand: bytes where it is float8."""
    return strided(cache.view(torch.uint8) if cache.dtype in MANTISSA_BITS else cache)


def scale_operand(scale: Tensor | None, batch: int, num_kv_heads: int) -> Strided | None:
    """Scales as a kernel operand: `[batch, kv_heads]`, with strides of 0 where it broadcasts, or by slot."""
    if scale is None:
        return None
    return strided(scale if scale.ndim == 3 else scale.expand(batch, num_kv_heads))


def stored_as(cached: Cached) -> tuple[int, int, bool]:
    """`(PAGE_SIZE, MANTISSA, SCALE_BY_SLOT)`: what a kernel knows of a cache when it is compiled; 0 for none."""
    page_size = 0 if cached.block_table is None else cached.k_cache.shape[2]
    return page_size, MANTISSA_BITS.get(cached.k_cache.dtype, 0), slot_scales(cached.k_scale)


@triton.jit
def page_of(b, n, in_bounds, pages, PAGE_SIZE: tl.constexpr):
    """`(page, slot, in_bounds)` of keys n of sequence b: entries are read where `in_bounds`, and must name a page."""
    entry = pages.ptr + b * pages.stride[0] + n // PAGE_SIZE * pages.stride[1]
    page = tl.load(entry, mask=in_bounds, other=-1).to(tl.int64)
    return page, n % PAGE_SIZE, in_bounds & (page >= 0) & (page < pages.num_pages)


@triton.jit
def largest_of(MANTISSA: tl.constexpr):
    """The largest number of float8_e4m3fn (3 bits of mantissa) or float8_e5m2 (2)."""
    return 448.0 if MANTISSA == 3 else 57344.0


@triton.jit
def scale_of_rows(x, MANTISSA: tl.constexpr):
    """The scale `[rows]` with which a row's largest value is the largest float8; x `[rows, d]` is 0 out of bounds."""
    x = tl.abs(x.to(tl.float32))
    x = tl.where(x == x, tl.minimum(x, FLOAT32_MAX), 0.0)
    return tl.maximum(tl.div_rn(tl.max(x, axis=1), largest_of(MANTISSA)), SMALLEST_SCALE)


@triton.jit
def quantised(x, scale, MANTISSA: tl.constexpr):
    """`x / scale` as the bytes of float8 numbers: to nearest, ties to even, saturating; NaN stays NaN."""
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    SHIFT: tl.constexpr = 23 - MANTISSA
    value = tl.div_rn(x.to(tl.float32), scale)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(value), largest_of(MANTISSA))
    word = size.to(tl.int32, bitcast=True)
    normal = ((word + (1 << (SHIFT - 1)) - 1 + ((word >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Below the normal numbers float8 has fixed steps: those that float32 has from this number on.
    MAGIC: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    MAGIC_WORD: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    subnormal = (size + MAGIC).to(tl.int32, bitcast=True) - MAGIC_WORD
    code = tl.where(size < 2.0 ** (1 - BIAS), subnormal, normal)
    return (tl.where(value == value, code, 0x7F) | sign).to(tl.uint8)


@triton.jit
def dequantised(code, MANTISSA: tl.constexpr):
    """The values of float8 numbers in float32, from their bytes; of e4m3fn NaN and of e5m2 NaN and infinities too."""
    word = code.to(tl.uint16)
    if MANTISSA == 2:  # the first byte of a float16
        value = (word << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:  # a float16 too, whose exponent counts from 15 and not from 7
        half = ((word & 0x80) << 8) | ((word & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((word & 0x7F) == 0x7F, float("nan"), value)
    return value


@triton.jit
def cached_places(b, n0, context, pages, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """`(page, slot, in_bounds)` of keys [n0, n0 + BLOCK_N) of sequence b: those below `context` whose page exists.

    `page` is one number, or one a key where a tile can span pages. n0 is a multiple of BLOCK_N.
    """
    n = n0 + tl.arange(0, BLOCK_N)
    in_bounds = n < context
    if pages is None:
        page, slot = b, n
    elif PAGE_SIZE % BLOCK_N == 0:
        page, first, exists = page_of(b, n0, n0 < context, pages, PAGE_SIZE)
        slot, in_bounds = first + tl.arange(0, BLOCK_N), in_bounds & exists
    else:
        page, slot, in_bounds = page_of(b, n, in_bounds, pages, PAGE_SIZE)
    return page, slot, in_bounds


@triton.jit
def cached_tile(
    cache, scale, b, h, page, slot, in_bounds, like,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MANTISSA: tl.constexpr, SCALE_BY_SLOT: tl.constexpr,
):  # fmt: skip
    """The keys or values of head h at these places, `[len(slot), BLOCK_D]` in the dtype of `like`; 0 out of bounds.

    Of a float8 cache stored * scale, with the scale of sequence b or of each slot: a product in float32, rounded once.
    """
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    row_offset = page * cache.stride[0] + h * cache.stride[1] + slot.to(tl.int64) * cache.stride[2]
    tile_mask = in_bounds[:, None] & (dim < HEAD_DIM)[None, :]
    ptrs = cache.ptr + row_offset[:, None] + dim[None, :] * cache.stride[3]
    if MANTISSA == 0:
        tile = tl.load(ptrs, mask=tile_mask, other=0.0)
    else:
        value = dequantised(tl.load(ptrs, mask=tile_mask, other=0), MANTISSA)
        if SCALE_BY_SLOT:
            scale_offset = page * scale.stride[0] + h * scale.stride[1] + slot.to(tl.int64) * scale.stride[2]
            value *= tl.load(scale.ptr + scale_offset, mask=in_bounds, other=0.0)[:, None]
        else:
            value *= tl.load(scale.ptr + b * scale.stride[0] + h * scale.stride[1])
        tile = value.to(like.dtype)
    return tile
