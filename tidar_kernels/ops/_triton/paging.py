"""Pages and float8 values in kernels: what `ops/paging.py` defines, on tiles.

float8 values are rounded in integer arithmetic and stored as bytes: so every chip can fill such a cache, whatever it
can multiply, and all of them write the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Cached
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
