"""Compaction: the K/V of an accepted path of a token tree moved together, bit for bit, inside the cache.

Computes (twin: `tidar_kernels.eager.compact_kv`), for one layer of the cache `[batch, kv_heads, max_len, head_dim]`:

    k_cache[b, h, lengths[b] + i] = k_cache[b, h, lengths[b] + path[b, i]],  v_cache likewise,  where path[b, i] >= 0

for slots in [0, max_len); nothing else is written. Some slots are both read and written. One program has all moves of
some columns of one kv head: it loads every value, waits for all of its threads, and only then stores, so that none is
lost. Loads and stores only: no value passes through arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, block_dim, strided


@triton.jit(do_not_specialize=["nodes", "num_kv_heads", "max_len"], do_not_specialize_on_alignment=["lengths"])
def compact_kv_kernel(
    k_cache, v_cache, lengths, path, nodes, num_kv_heads, max_len,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All moves of BLOCK_C columns of one kv head of one sequence."""
    b = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    i = tl.arange(0, BLOCK_T).to(tl.int64)
    node = tl.load(path.ptr + b * path.stride[0] + i * path.stride[1], mask=i < nodes, other=-1).to(tl.int64)
    to = tl.load(lengths + b).to(tl.int64) + i
    of = to + node - i
    moves = (node >= 0) & (to >= 0) & (to < max_len) & (of >= 0) & (of < max_len)
    dim = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    mask = moves[:, None] & (dim < HEAD_DIM)
    to, of = to[:, None], of[:, None]
    in_k = k_cache.ptr + b * k_cache.stride[0] + h * k_cache.stride[1] + dim * k_cache.stride[3]
    in_v = v_cache.ptr + b * v_cache.stride[0] + h * v_cache.stride[1] + dim * v_cache.stride[3]
    for_k = tl.load(in_k + of * k_cache.stride[2], mask=mask)
    for_v = tl.load(in_v + of * v_cache.stride[2], mask=mask)
    tl.debug_barrier()
    tl.store(in_k + to * k_cache.stride[2], for_k, mask=mask)
    tl.store(in_v + to * v_cache.stride[2], for_v, mask=mask)


def plan_compact_kv(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor) -> Launch:
    """Lay out the launch of one compaction."""
    batch, num_kv_heads, max_len, head_dim = k_cache.shape
    nodes = path.shape[1]
    slots = triton.next_power_of_2(max(nodes, 1))
    # 4096 values of K and as many of V: at 4 bytes 64 registers a thread.
    columns = min(block_dim(head_dim), max(4, 4096 // slots))
    return Launch(
        compact_kv_kernel,
        (batch * num_kv_heads if nodes else 0, triton.cdiv(head_dim, columns)),
        (*map(strided, (k_cache, v_cache)), lengths, strided(path), nodes, num_kv_heads, max_len),
        {"HEAD_DIM": head_dim, "BLOCK_T": slots, "BLOCK_C": columns, "num_warps": 4},
    )


def compact_kv(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor) -> None:
    """Run the kernel; arguments are checked."""
    plan_compact_kv(k_cache, v_cache, lengths, path).run()
