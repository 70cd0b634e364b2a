"""Kernels that write into the cache of one layer, `[batch, kv_heads, max_len, head_dim]`, for slots in [0, max_len).

append_kv        k_cache[b, h, lengths[b] + j] = k[b, h, j],  v_cache likewise
compact_kv       k_cache[b, h, lengths[b] + i] = k_cache[b, h, lengths[b] + path[b, i]],  v_cache likewise,
                 where path[b, i] >= 0
rotary_append    rotated[d] = x[d] * cos[d] + x[d'] * sin[d]  of q and k, with d' = (d + D/2) mod D; sin carries the
                 sign. Then append_kv of rotated k, and of v, for j < keep

With a block table slot n of sequence b is slot n % page_size of page block_table[b, n // page_size]; entries that name
no page are skipped. Into a float8 cache goes x / scale, rounded (`_triton/paging.py`). With scales by slot an append
also writes the scale of each token and head, and a compaction moves it.

Twins: `reference.py`. Values are copied bit for bit. Every slot not named above is left as it was.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.launch import Launch, block_dim, cdiv, next_power_of_2, strided
from .._triton.paging import MANTISSA_BITS, page_of, pages, quantised, scale_of_rows, scale_operand, stored
from .._triton.ragged import Ragged, sequence_of
from ..operands import Cached, Keys
from .operands import Turned, Written

EVERY_ROW = Written()
BLOCK_T = 16  # a step appends B = 4..32 tokens: one or two programs a head


@functools.lru_cache(maxsize=1024)
def _options(head_dim: int, head_dim_v: int, cache_dtype: torch.dtype, page_size: int, by_slot: bool) -> dict[str, Any]:
    """Options of the kernels that append; kept, since every layer of every step asks for the same ones."""
    return {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": block_dim(head_dim),
        "BLOCK_DV": block_dim(head_dim_v),
        "BLOCK_T": BLOCK_T,
        "PAGE_SIZE": page_size,
        "MANTISSA": MANTISSA_BITS.get(cache_dtype, 0),
        "SCALE_BY_SLOT": by_slot,
        "num_warps": 4 if max(head_dim, head_dim_v) <= 256 else 8,  # 4 warps spill rotated float32 rows of 512
    }


def _targets(cached: Cached, written: Written) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands that say where rows go, `pages .. kept` of the kernels below, and the kernels' options."""
    k_cache, v_cache, lengths, _, block_table, k_scale, v_scale, _ = cached
    _, num_kv_heads, slots, head_dim = k_cache.shape
    cu_rows, kept = written
    page_size, by_slot = 0 if block_table is None else slots, k_scale is not None and k_scale.ndim == 3
    constants = _options(head_dim, v_cache.shape[3], k_cache.dtype, page_size, by_slot)
    if block_table is k_scale is cu_rows is None:
        return (None, None, None, None, kept), constants
    batch = len(lengths)
    scales = (scale_operand(scale, batch, num_kv_heads) for scale in (k_scale, v_scale))
    return (pages(cached), *scales, None if cu_rows is None else Ragged(cu_rows, batch), kept), constants


@triton.jit
def _pointers(x, b, h, row, dim):
    """Pointers `[len(row), len(dim)]` into head h of sequence b of an operand `[batch, heads, rows, head_dim]`.

    b is a number, or a column `[len(row), 1]`: the page of each row.
    """
    return x.ptr + b * x.stride[0] + h * x.stride[1] + row[:, None] * x.stride[2] + dim[None, :] * x.stride[3]


@triton.jit
def _target(row, b, keep, lengths, max_len, pages, ragged, kept, PAGE_SIZE: tl.constexpr):
    """Where the first `keep` rows of a sequence, and no more than `kept`, go: `(sequence, page, slot, written)`."""
    if ragged is None:
        sequence, token = b, row
        written = token < keep
        length = tl.load(lengths + sequence).to(tl.int64)
    else:
        sequence, token = sequence_of(row, ragged)
        written = (sequence < ragged.batch) & (token < keep)
        length = tl.load(lengths + sequence, mask=written, other=0).to(tl.int64)
    if kept is not None:
        if ragged is None:
            written = written & (token < tl.load(kept + sequence))
        else:
            written = written & (token < tl.load(kept + sequence, mask=written, other=0))
    slot = length + token
    written = written & (slot >= 0) & (slot < max_len)
    page = sequence
    if pages is not None:
        page, slot, written = page_of(sequence, slot, written, pages, PAGE_SIZE)
    if pages is not None or ragged is not None:
        page = page[:, None]
    return sequence, page, slot, written


@triton.jit
def _store(
    cache, scale, x, sequence, page, h, slot, dim, written, in_bounds, ragged,
    MANTISSA: tl.constexpr, SCALE_BY_SLOT: tl.constexpr,
):  # fmt: skip
    """Rows x `[len(slot), len(dim)]` of one head into the cache, as it holds them, where `written` and `in_bounds`."""
    if SCALE_BY_SLOT:
        factor = scale_of_rows(x, MANTISSA)
        by_row = tl.reshape(page * scale.stride[0] + h * scale.stride[1] + slot[:, None] * scale.stride[2], slot.shape)
        tl.store(scale.ptr + by_row, factor, mask=written)
        x = quantised(x, factor[:, None], MANTISSA)
    elif scale is not None:
        if ragged is None:
            factor = tl.load(scale.ptr + sequence * scale.stride[0] + h * scale.stride[1])
            x = quantised(x, factor, MANTISSA)
        else:
            of_row = scale.ptr + sequence * scale.stride[0] + h * scale.stride[1]
            x = quantised(x, tl.load(of_row, mask=written, other=1.0)[:, None], MANTISSA)
    tl.store(_pointers(cache, page, h, slot, dim), x, mask=written[:, None] & in_bounds)


@triton.jit(do_not_specialize=["rows", "num_kv_heads", "max_len"], do_not_specialize_on_alignment=["lengths", "kept"])
def append_kv_kernel(
    k_cache, v_cache, k, v, lengths, rows, num_kv_heads, max_len, pages, k_scale, v_scale, ragged, kept,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, PAGE_SIZE: tl.constexpr, MANTISSA: tl.constexpr, SCALE_BY_SLOT: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_T rows of k, v `[batch, kv_heads, rows, d]` into the caches: one kv head."""
    b = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    sequence, page, slot, written = _target(row, b, rows, lengths, max_len, pages, ragged, kept, PAGE_SIZE)
    dim, dim_v = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_DV).to(tl.int64)
    in_k, in_v = (dim < HEAD_DIM)[None, :], (dim_v < HEAD_DIM_V)[None, :]
    # Where the scale is that of the whole row, what is out of bounds must be 0.
    other: tl.constexpr = 0.0 if SCALE_BY_SLOT else None
    k_tile = tl.load(_pointers(k, b, h, row, dim), mask=written[:, None] & in_k, other=other)
    v_tile = tl.load(_pointers(v, b, h, row, dim_v), mask=written[:, None] & in_v, other=other)
    _store(k_cache, k_scale, k_tile, sequence, page, h, slot, dim, written, in_k, ragged, MANTISSA, SCALE_BY_SLOT)
    _store(v_cache, v_scale, v_tile, sequence, page, h, slot, dim_v, written, in_v, ragged, MANTISSA, SCALE_BY_SLOT)


def plan_append_kv(cached: Cached, keys: Keys, written: Written = EVERY_ROW) -> Launch:
    """Lay out the launch of one append: a program copies BLOCK_T rows of K and V of one kv head."""
    batch, num_kv_heads, rows, _ = keys.k.shape
    targets, constants = _targets(cached, written)
    return Launch(
        append_kv_kernel,
        (batch * num_kv_heads, cdiv(rows, BLOCK_T)),
        (
            *(stored(cached.k_cache), stored(cached.v_cache), strided(keys.k), strided(keys.v)),
            *(cached.lengths, rows, num_kv_heads, cached.capacity, *targets),
        ),
        constants,
    )


def append_kv(cached: Cached, keys: Keys, written: Written) -> None:
    """Run the kernel; arguments are checked."""
    plan_append_kv(cached, keys, written).run()


@triton.jit
def _columns(x, page, h, dim):
    """Pointers to columns `dim [1, columns]` of a head's slots 0: a row of them, or where page is a column a tile."""
    return x.ptr + page * x.stride[0] + h * x.stride[1] + dim * x.stride[3]


@triton.jit(do_not_specialize=["nodes", "num_kv_heads", "max_len"], do_not_specialize_on_alignment=["lengths"])
def compact_kv_kernel(
    k_cache, v_cache, lengths, path, nodes, num_kv_heads, max_len, pages, k_scale, v_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SCALE_BY_SLOT: tl.constexpr,
):  # fmt: skip
    """All moves of BLOCK_C columns of one kv head of one sequence; BLOCK_T holds the `nodes` of `path [batch, nodes]`.

    Some slots are both read and written. So a program loads every value of its columns, waits for all of its threads,
    and only then stores.
    """
    b = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    i = tl.arange(0, BLOCK_T).to(tl.int64)
    node = tl.load(path.ptr + b * path.stride[0] + i * path.stride[1], mask=i < nodes, other=-1).to(tl.int64)
    target = tl.load(lengths + b).to(tl.int64) + i
    source = target + node - i
    moves = (node >= 0) & (target >= 0) & (target < max_len) & (source >= 0) & (source < max_len)
    to, of = b, b
    if pages is not None:
        to, target, moves = page_of(b, target, moves, pages, PAGE_SIZE)
        of, source, moves = page_of(b, source, moves, pages, PAGE_SIZE)
        to, of = to[:, None], of[:, None]
    dim = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    source, target = source[:, None], target[:, None]
    k_mask, v_mask = moves[:, None] & (dim < HEAD_DIM), moves[:, None] & (dim < HEAD_DIM_V)
    k_tile = tl.load(_columns(k_cache, of, h, dim) + source * k_cache.stride[2], mask=k_mask)
    v_tile = tl.load(_columns(v_cache, of, h, dim) + source * v_cache.stride[2], mask=v_mask)
    if SCALE_BY_SLOT:
        first = moves[:, None] & (dim == 0)  # one column of one program moves the scales
        k_factor = tl.load(_columns(k_scale, of, h, dim) + source * k_scale.stride[2], mask=first)
        v_factor = tl.load(_columns(v_scale, of, h, dim) + source * v_scale.stride[2], mask=first)
    tl.debug_barrier()
    tl.store(_columns(k_cache, to, h, dim) + target * k_cache.stride[2], k_tile, mask=k_mask)
    tl.store(_columns(v_cache, to, h, dim) + target * v_cache.stride[2], v_tile, mask=v_mask)
    if SCALE_BY_SLOT:
        tl.store(_columns(k_scale, to, h, dim) + target * k_scale.stride[2], k_factor, mask=first)
        tl.store(_columns(v_scale, to, h, dim) + target * v_scale.stride[2], v_factor, mask=first)


def plan_compact_kv(cached: Cached, path: Tensor) -> Launch:
    """Lay out the launch of one compaction."""
    num_kv_heads, head_dim, head_dim_v = cached.k_cache.shape[1], cached.k_cache.shape[3], cached.v_cache.shape[3]
    batch, nodes = path.shape
    slots = next_power_of_2(max(nodes, 1))
    # 4096 values of K and as many of V: at 4 bytes 64 registers a thread.
    columns = min(block_dim(max(head_dim, head_dim_v)), max(4, 4096 // slots))
    by_slot = cached.k_scale is not None and cached.k_scale.ndim == 3
    # Scales of another kind stay where they are. A scale by slot is moved as a row of one column.
    scales = (strided(x.unsqueeze(-1)) if by_slot and x is not None else None for x in (cached.k_scale, cached.v_scale))
    return Launch(
        compact_kv_kernel,
        (batch * num_kv_heads if nodes else 0, cdiv(max(head_dim, head_dim_v), columns)),
        (
            *(stored(cached.k_cache), stored(cached.v_cache), cached.lengths, strided(path)),
            *(nodes, num_kv_heads, cached.capacity, pages(cached), *scales),
        ),
        {
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "BLOCK_T": slots,
            "BLOCK_C": columns,
            "PAGE_SIZE": 0 if cached.block_table is None else cached.k_cache.shape[2],
            "SCALE_BY_SLOT": by_slot,
            "num_warps": 4,
        },
    )


def compact_kv(cached: Cached, path: Tensor) -> None:
    """Run the kernel; arguments are checked."""
    plan_compact_kv(cached, path).run()


@triton.jit(
    do_not_specialize=["rows", "num_heads", "num_kv_heads", "keep", "max_len"],
    do_not_specialize_on_alignment=["lengths", "kept"],
)
def rotary_append_kernel(
    q, k, v, cos, sin, k_cache, v_cache, lengths, q_out, k_out,
    rows, num_heads, num_kv_heads, keep, max_len, pages, k_scale, v_scale, ragged, kept,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, PAGE_SIZE: tl.constexpr, MANTISSA: tl.constexpr, SCALE_BY_SLOT: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of one head: the heads of q, then those of k, then those of v.

    `q_out`, `k_out` have the shapes of q and k; cos, sin are `[batch, rows, head_dim]`. A product and sum in float32 is
    rounded once.
    """
    heads = num_heads + 2 * num_kv_heads
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    in_bounds = (dim < HEAD_DIM)[None, :]
    mask = (row < rows)[:, None] & in_bounds
    sequence, page, slot, written = _target(row, b, keep, lengths, max_len, pages, ragged, kept, PAGE_SIZE)
    if h >= num_heads + num_kv_heads:
        h -= num_heads + num_kv_heads
        dim_v = tl.arange(0, BLOCK_DV).to(tl.int64)
        in_v = (dim_v < HEAD_DIM_V)[None, :]
        other_v: tl.constexpr = 0.0 if SCALE_BY_SLOT else None
        value = tl.load(_pointers(v, b, h, row, dim_v), mask=written[:, None] & in_v, other=other_v)
        _store(v_cache, v_scale, value, sequence, page, h, slot, dim_v, written, in_v, ragged, MANTISSA, SCALE_BY_SLOT)
    else:
        other = (dim + HEAD_DIM // 2) % HEAD_DIM
        offset = b * cos.stride[0] + row[:, None] * cos.stride[1] + dim[None, :] * cos.stride[2]
        c = tl.load(cos.ptr + offset, mask=mask, other=0.0).to(tl.float32)
        offset = b * sin.stride[0] + row[:, None] * sin.stride[1] + dim[None, :] * sin.stride[2]
        s = tl.load(sin.ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if h < num_heads:
            x = tl.load(_pointers(q, b, h, row, dim), mask=mask, other=0.0).to(tl.float32)
            y = tl.load(_pointers(q, b, h, row, other), mask=mask, other=0.0).to(tl.float32)
            rotated_q = tl.fma(x, c, y * s).to(q_out.ptr.dtype.element_ty)
            tl.store(_pointers(q_out, b, h, row, dim), rotated_q, mask=mask)
        else:
            h -= num_heads
            x = tl.load(_pointers(k, b, h, row, dim), mask=mask, other=0.0).to(tl.float32)
            y = tl.load(_pointers(k, b, h, row, other), mask=mask, other=0.0).to(tl.float32)
            rotated = tl.fma(x, c, y * s).to(k_out.ptr.dtype.element_ty)
            tl.store(_pointers(k_out, b, h, row, dim), rotated, mask=mask)
            _store(
                k_cache, k_scale, rotated, sequence, page, h, slot, dim, written, in_bounds, ragged,
                MANTISSA, SCALE_BY_SLOT,
            )  # fmt: skip


def plan_rotary_append(
    turned: Turned, keys: Keys, cached: Cached, keep: int, written: Written = EVERY_ROW
) -> tuple[Launch, Tensor, Tensor]:
    """Allocate the results and lay out the launch: `(launch, rotated q, rotated k)`."""
    q, k = turned.q, keys.k
    batch, num_heads, rows, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    cos, sin = turned.cos, turned.sin
    if cos.shape[0] != batch:
        cos = cos.expand(batch, rows, head_dim)
    if sin.shape[0] != batch:
        sin = sin.expand(batch, rows, head_dim)
    targets, constants = _targets(cached, written)
    launch = Launch(
        rotary_append_kernel,
        (batch * (num_heads + 2 * num_kv_heads), cdiv(rows, BLOCK_T)),
        (
            *(strided(q), strided(k), strided(keys.v), strided(cos), strided(sin)),
            *(stored(cached.k_cache), stored(cached.v_cache), cached.lengths, strided(q_out), strided(k_out)),
            *(rows, num_heads, num_kv_heads, keep, cached.capacity, *targets),
        ),
        constants,
    )
    return launch, q_out, k_out


def rotary_append(turned: Turned, keys: Keys, cached: Cached, written: Written, *, keep: int) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments are checked. Returns `(rotated q, rotated k)`."""
    launch, q_out, k_out = plan_rotary_append(turned, keys, cached, keep, written)
    launch.run()
    return q_out, k_out
