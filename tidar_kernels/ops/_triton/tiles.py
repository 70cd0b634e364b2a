"""Device functions that find and load tiles: pointers, masked loads, row intervals, and the key tiles that rows visit.

A tile is a block of rows or keys by BLOCK_D columns, the next power of two that holds HEAD_DIM.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def rows_padded(x: Tensor) -> Tensor:
    """`x [.., head_dim]` itself, or if its rows start at any element, room for it in rows of a multiple of 16 elements.

    Triton knows of a stride that it is a multiple of 16, or nothing. Knowing nothing, a kernel loads and stores single
    elements, not 16 bytes at a time or by async copies, and spilled up to 4 kB a thread at head dim 72.
    """
    head_dim = x.shape[-1]
    if head_dim % 16 == 0 or not any(stride % 16 for stride in x.stride()[:-1]):
        return x
    return x.new_empty((*x.shape[:-1], -(-head_dim // 16) * 16))[..., :head_dim]


def aligned_rows(x: Tensor) -> Tensor:
    """`x`, copied if its rows start at any element (`rows_padded`)."""
    room = rows_padded(x)
    return x if room is x else room.copy_(x)


@triton.jit
def row_pointers(x, offset, rows, BLOCK_D: tl.constexpr):
    """Pointers `[len(rows), BLOCK_D]` into an operand `[.., row, head_dim]`; `offset`, in elements, is that of its
    (batch, head).

    Offsets are int64: 2^20 tokens of 64 heads of 128 do not fit 32 bits.
    """
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    return x.ptr + offset + rows.to(tl.int64)[:, None] * x.stride[2] + dim[None, :] * x.stride[3]


@triton.jit
def load_tile(ptrs, in_bounds, HEAD_DIM: tl.constexpr):
    """The tile at `ptrs [rows, BLOCK_D]`; 0 in rows not `in_bounds` (None: all are) and in columns past HEAD_DIM."""
    BLOCK_D: tl.constexpr = ptrs.shape[1]
    in_head = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if in_bounds is None:
        if HEAD_DIM == BLOCK_D:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=in_head, other=0.0)
    else:
        tile = tl.load(ptrs, mask=in_bounds[:, None] & in_head, other=0.0)
    return tile


@triton.jit
def load_interval(intervals, row, in_bounds):
    """`(lo, hi)` of each row, from int32 `[q_len, 2]`: row sees the keys of `[lo, hi)`.

    Empty intervals and rows out of bounds are (0, 0), so that `hi` bounds the keys to visit.
    """
    lo = tl.load(intervals + 2 * row, mask=in_bounds, other=0)
    hi = tl.load(intervals + 2 * row + 1, mask=in_bounds, other=0)
    return tl.where(lo < hi, lo, 0), tl.where(lo < hi, hi, 0)


@triton.jit
def tile_bounds(lo, hi, in_bounds, kv_len, BLOCK_N: tl.constexpr):
    """Which key tiles a row tile visits: `(first, full, full_end, last)`, counted in tiles of BLOCK_N keys.

    Tiles `[first, last)` are the hull of those in which some row sees a key. Every row in bounds sees all keys of tiles
    `[full, full_end)`, which lie within. Intervals come from `load_interval`.
    """
    last = tl.cdiv(tl.max(hi, 0), BLOCK_N)
    first = tl.minimum(tl.min(tl.where(lo < hi, lo, kv_len), 0) // BLOCK_N, last)
    full = tl.minimum(tl.maximum(tl.cdiv(tl.max(lo, 0), BLOCK_N), first), last)
    full_end = tl.min(tl.where(in_bounds, hi, kv_len), 0) // BLOCK_N
    return first, full, tl.minimum(tl.maximum(full_end, full), last), last
