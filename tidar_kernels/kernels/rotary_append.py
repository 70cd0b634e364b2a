"""Rotary positions and append in one launch: q and k rotated, the causal rows' k and v written behind the context.

Computes (twin: `tidar_kernels.eager.rotary_append`), for one layer, with d' = (d + D/2) mod D:

    rotated[d] = x[d] * cos[d] + x[d'] * sin[d]                                  of q and k; sin carries the sign
    k_cache[b, h, lengths[b] + j] = rotated k[b, h, j],  v_cache likewise of v   for j < keep and slots in [0, max_len)

One program takes BLOCK_T rows of one head of q, k or v. Values of v are copied, not computed with: their bits stay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, block_dim, strided

BLOCK_T = 16


@triton.jit
def _addresses(x, b, h, row, dim):
    """Addresses `[rows, dims]` in an operand `[batch, heads, rows, head_dim]`."""
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
    """BLOCK_T rows of one head; heads of q come first, then those of k, then those of v."""
    heads = num_heads + 2 * num_kv_heads
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    slot = tl.load(lengths + b).to(tl.int64) + row
    into_cache = mask & ((row < keep) & (slot >= 0) & (slot < max_len))[:, None]
    if h >= num_heads + num_kv_heads:
        h -= num_heads + num_kv_heads
        value = tl.load(_addresses(v, b, h, row, dim), mask=into_cache)
        tl.store(_addresses(v_cache, b, h, slot, dim), value, mask=into_cache)
    else:
        other = (dim + HEAD_DIM // 2) % HEAD_DIM
        turn = b * cos.stride[0] + row[:, None] * cos.stride[1] + dim[None, :] * cos.stride[2]
        c = tl.load(cos.ptr + turn, mask=mask, other=0.0).to(tl.float32)
        turn = b * sin.stride[0] + row[:, None] * sin.stride[1] + dim[None, :] * sin.stride[2]
        s = tl.load(sin.ptr + turn, mask=mask, other=0.0).to(tl.float32)
        if h < num_heads:
            x = tl.load(_addresses(q, b, h, row, dim), mask=mask, other=0.0).to(tl.float32)
            y = tl.load(_addresses(q, b, h, row, other), mask=mask, other=0.0).to(tl.float32)
            rotated_q = tl.fma(x, c, y * s).to(q_out.ptr.dtype.element_ty)
            tl.store(_addresses(q_out, b, h, row, dim), rotated_q, mask=mask)
        else:
            h -= num_heads
            x = tl.load(_addresses(k, b, h, row, dim), mask=mask, other=0.0).to(tl.float32)
            y = tl.load(_addresses(k, b, h, row, other), mask=mask, other=0.0).to(tl.float32)
            rotated = tl.fma(x, c, y * s).to(k_out.ptr.dtype.element_ty)
            tl.store(_addresses(k_out, b, h, row, dim), rotated, mask=mask)
            tl.store(_addresses(k_cache, b, h, slot, dim), rotated, mask=into_cache)


def plan_rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    keep: int,
) -> tuple[Launch, Tensor, Tensor]:
    """Allocate the results and lay out the launch: `(launch, rotated q, rotated k)`."""
    batch, num_heads, rows, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    cos, sin = (x.expand(batch, rows, head_dim) for x in (cos, sin))
    launch = Launch(
        rotary_append_kernel,
        (batch * (num_heads + 2 * num_kv_heads), triton.cdiv(rows, BLOCK_T)),
        (
            *map(strided, (q, k, v, cos, sin, k_cache, v_cache)),
            *(lengths, strided(q_out), strided(k_out)),
            *(rows, num_heads, num_kv_heads, keep, k_cache.shape[2]),
        ),
        {"HEAD_DIM": head_dim, "BLOCK_D": block_dim(head_dim), "BLOCK_T": BLOCK_T, "num_warps": 4},
    )
    return launch, q_out, k_out


def rotary_append(*args: object) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments, those of the plan, are checked. Returns `(rotated q, rotated k)`."""
    launch, q_out, k_out = plan_rotary_append(*args)  # type: ignore[arg-type]
    launch.run()
    return q_out, k_out
