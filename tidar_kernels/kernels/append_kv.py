"""Append: new keys and values into the cache behind each sequence's committed tokens, bit for bit.

Computes (twin: `tidar_kernels.eager.append_kv`), for one layer of the cache `[batch, kv_heads, max_len, head_dim]`:

    k_cache[b, h, lengths[b] + j] = k[b, h, j],  v_cache likewise,  for slots in [0, max_len); nothing else is written

One program copies BLOCK_T tokens of K and V of one kv head. Loads and stores only: no value passes through arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, block_dim, strided

BLOCK_T = 16  # a step appends B = 4..32 tokens: one or two programs a head


@triton.jit(do_not_specialize=["num_new", "num_kv_heads", "max_len"], do_not_specialize_on_alignment=["lengths"])
def append_kv_kernel(
    k_cache, v_cache, k, v, lengths, num_new, num_kv_heads, max_len,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one kv head of one sequence."""
    b = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(lengths + b).to(tl.int64) + token
    dim = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    mask = ((token < num_new) & (slot >= 0) & (slot < max_len))[:, None] & (dim < HEAD_DIM)
    token, slot = token[:, None], slot[:, None]
    for_k = tl.load(k.ptr + b * k.stride[0] + h * k.stride[1] + token * k.stride[2] + dim * k.stride[3], mask=mask)
    for_v = tl.load(v.ptr + b * v.stride[0] + h * v.stride[1] + token * v.stride[2] + dim * v.stride[3], mask=mask)
    at_k = b * k_cache.stride[0] + h * k_cache.stride[1] + slot * k_cache.stride[2] + dim * k_cache.stride[3]
    at_v = b * v_cache.stride[0] + h * v_cache.stride[1] + slot * v_cache.stride[2] + dim * v_cache.stride[3]
    tl.store(k_cache.ptr + at_k, for_k, mask=mask)
    tl.store(v_cache.ptr + at_v, for_v, mask=mask)


def plan_append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Launch:
    """Lay out the launch of one append."""
    batch, num_kv_heads, max_len, head_dim = k_cache.shape
    num_new = k.shape[2]
    return Launch(
        append_kv_kernel,
        (batch * num_kv_heads, triton.cdiv(num_new, BLOCK_T)),
        (*map(strided, (k_cache, v_cache, k, v)), lengths, num_new, num_kv_heads, max_len),
        {"HEAD_DIM": head_dim, "BLOCK_D": block_dim(head_dim), "BLOCK_T": BLOCK_T, "num_warps": 4},
    )


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """Run the kernel; arguments are checked."""
    plan_append_kv(k_cache, v_cache, k, v, lengths).run()
