"""Kernels that write into the cache of one layer, `[batch, kv_heads, max_len, head_dim]`, for slots in [0, max_len).

append_kv        k_cache[b, h, lengths[b] + j] = k[b, h, j],  v_cache likewise
compact_kv       k_cache[b, h, lengths[b] + i] = k_cache[b, h, lengths[b] + path[b, i]],  v_cache likewise,
                 where path[b, i] >= 0
rotary_append    rotated[d] = x[d] * cos[d] + x[d'] * sin[d]  of q and k, with d' = (d + D/2) mod D; sin carries the
                 sign. Then append_kv of rotated k, and of v, for j < keep

Twins: `reference.py`. Values are copied bit for bit. Every slot not named above is left as it was.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.launch import Launch, block_dim, cdiv, next_power_of_2, strided
from ..operands import Cached, Keys
from .operands import Turned

BLOCK_T = 16  # a step appends B = 4..32 tokens: one or two programs a head


@triton.jit(do_not_specialize=["num_new", "num_kv_heads", "max_len"], do_not_specialize_on_alignment=["lengths"])
def append_kv_kernel(
    k_cache, v_cache, k, v, lengths, num_new, num_kv_heads, max_len,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Copies BLOCK_T tokens of k, v `[batch, kv_heads, num_new, d]` into the caches: one kv head of one sequence."""
    b = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(lengths + b).to(tl.int64) + token
    dim = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    mask = ((token < num_new) & (slot >= 0) & (slot < max_len))[:, None] & (dim < HEAD_DIM)
    token, slot = token[:, None], slot[:, None]
    k_tile = tl.load(k.ptr + b * k.stride[0] + h * k.stride[1] + token * k.stride[2] + dim * k.stride[3], mask=mask)
    v_tile = tl.load(v.ptr + b * v.stride[0] + h * v.stride[1] + token * v.stride[2] + dim * v.stride[3], mask=mask)
    k_offset = b * k_cache.stride[0] + h * k_cache.stride[1] + slot * k_cache.stride[2] + dim * k_cache.stride[3]
    v_offset = b * v_cache.stride[0] + h * v_cache.stride[1] + slot * v_cache.stride[2] + dim * v_cache.stride[3]
    tl.store(k_cache.ptr + k_offset, k_tile, mask=mask)
    tl.store(v_cache.ptr + v_offset, v_tile, mask=mask)


def plan_append_kv(cached: Cached, keys: Keys) -> Launch:
    """Lay out the launch of one append: a program copies BLOCK_T tokens of K and V of one kv head."""
    batch, num_kv_heads, max_len, head_dim = cached.k_cache.shape
    num_new = keys.k.shape[2]
    return Launch(
        append_kv_kernel,
        (batch * num_kv_heads, cdiv(num_new, BLOCK_T)),
        (
            *map(strided, (cached.k_cache, cached.v_cache, *keys)),
            *(cached.lengths, num_new, num_kv_heads, max_len),
        ),
        {"HEAD_DIM": head_dim, "BLOCK_D": block_dim(head_dim), "BLOCK_T": BLOCK_T, "num_warps": 4},
    )


def append_kv(cached: Cached, keys: Keys) -> None:
    """Run the kernel; arguments are checked."""
    plan_append_kv(cached, keys).run()


@triton.jit(do_not_specialize=["nodes", "num_kv_heads", "max_len"], do_not_specialize_on_alignment=["lengths"])
def compact_kv_kernel(
    k_cache, v_cache, lengths, path, nodes, num_kv_heads, max_len,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
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
    dim = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    mask = moves[:, None] & (dim < HEAD_DIM)
    target, source = target[:, None], source[:, None]
    k_ptrs = k_cache.ptr + b * k_cache.stride[0] + h * k_cache.stride[1] + dim * k_cache.stride[3]
    v_ptrs = v_cache.ptr + b * v_cache.stride[0] + h * v_cache.stride[1] + dim * v_cache.stride[3]
    k_tile = tl.load(k_ptrs + source * k_cache.stride[2], mask=mask)
    v_tile = tl.load(v_ptrs + source * v_cache.stride[2], mask=mask)
    tl.debug_barrier()
    tl.store(k_ptrs + target * k_cache.stride[2], k_tile, mask=mask)
    tl.store(v_ptrs + target * v_cache.stride[2], v_tile, mask=mask)


def plan_compact_kv(cached: Cached, path: Tensor) -> Launch:
    """Lay out the launch of one compaction."""
    batch, num_kv_heads, max_len, head_dim = cached.k_cache.shape
    nodes = path.shape[1]
    slots = next_power_of_2(max(nodes, 1))
    # 4096 values of K and as many of V: at 4 bytes 64 registers a thread.
    columns = min(block_dim(head_dim), max(4, 4096 // slots))
    return Launch(
        compact_kv_kernel,
        (batch * num_kv_heads if nodes else 0, cdiv(head_dim, columns)),
        (
            *map(strided, (cached.k_cache, cached.v_cache)),
            *(cached.lengths, strided(path), nodes, num_kv_heads, max_len),
        ),
        {"HEAD_DIM": head_dim, "BLOCK_T": slots, "BLOCK_C": columns, "num_warps": 4},
    )


def compact_kv(cached: Cached, path: Tensor) -> None:
    """Run the kernel; arguments are checked."""
    plan_compact_kv(cached, path).run()


@triton.jit
def _pointers(x, b, h, row, dim):
    """Pointers `[len(row), len(dim)]` into head h of sequence b of an operand `[batch, heads, rows, head_dim]`."""
    return x.ptr + b * x.stride[0] + h * x.stride[1] + row[:, None] * x.stride[2] + dim[None, :] * x.stride[3]


@triton.jit(
    do_not_specialize=["rows", "num_heads", "num_kv_heads", "keep", "max_len"],
    do_not_specialize_on_alignment=["lengths"],
)
def rotary_append_kernel(
    q, k, v, cos, sin, k_cache, v_cache, lengths, q_out, k_out,
    rows, num_heads, num_kv_heads, keep, max_len,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of one head: the heads of q, then those of k, then those of v.

    `q_out`, `k_out` have the shapes of q and k; cos, sin are `[batch, rows, head_dim]`. A product and sum in float32 is
    rounded once.
    """
    heads = num_heads + 2 * num_kv_heads
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    slot = tl.load(lengths + b).to(tl.int64) + row
    cached = mask & ((row < keep) & (slot >= 0) & (slot < max_len))[:, None]
    if h >= num_heads + num_kv_heads:
        h -= num_heads + num_kv_heads
        value = tl.load(_pointers(v, b, h, row, dim), mask=cached)
        tl.store(_pointers(v_cache, b, h, slot, dim), value, mask=cached)
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
            tl.store(_pointers(k_cache, b, h, slot, dim), rotated, mask=cached)


def plan_rotary_append(turned: Turned, keys: Keys, cached: Cached, keep: int) -> tuple[Launch, Tensor, Tensor]:
    """Allocate the results and lay out the launch: `(launch, rotated q, rotated k)`."""
    q, k = turned.q, keys.k
    batch, num_heads, rows, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    cos, sin = (x.expand(batch, rows, head_dim) for x in (turned.cos, turned.sin))
    launch = Launch(
        rotary_append_kernel,
        (batch * (num_heads + 2 * num_kv_heads), cdiv(rows, BLOCK_T)),
        (
            *map(strided, (q, *keys, cos, sin, cached.k_cache, cached.v_cache)),
            *(cached.lengths, strided(q_out), strided(k_out)),
            *(rows, num_heads, num_kv_heads, keep, cached.k_cache.shape[2]),
        ),
        {"HEAD_DIM": head_dim, "BLOCK_D": block_dim(head_dim), "BLOCK_T": BLOCK_T, "num_warps": 4},
    )
    return launch, q_out, k_out


def rotary_append(turned: Turned, keys: Keys, cached: Cached, keep: int) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments are checked. Returns `(rotated q, rotated k)`."""
    launch, q_out, k_out = plan_rotary_append(turned, keys, cached, keep)
    launch.run()
    return q_out, k_out
