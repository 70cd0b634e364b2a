"""Attention over in-flight keys only, forward: the training kernel.

Computes, for every row of every head (twin: `tidar_kernels.eager.attention`):

    out = softmax(scale * q K^T) V,   lse = log sum exp(scale * q K^T)   over the keys in lead and own of the row

or with a cap on the logits, and with one more logit a head, its sink, under both sums.

q, out `[batch, heads, q_len, d]`, k, v `[batch, kv_heads, kv_len, d]`, lse `[batch, heads, q_len]` in natural log. A
program takes BLOCK_M rows of one head. For lead, then for own, it visits the key tiles that all of its rows see whole,
without a mask, and then the others that some row sees in part, masked (`tile_bounds`). Other tiles are never loaded.
Later rows see more keys, so they start first and the last programs are short ones.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.configs import EXTRAS, PLAIN, Chip, SpecialisedConfig, attention_config, chip_of, options
from .._triton.launch import Launch, block_dim, cdiv, sequence_slices, strided
from .._triton.softmax import (
    attend_whole_tiles,
    raw_scores,
    score_units,
    softmax_finish,
    softmax_start,
    softmax_update,
)
from .._triton.tiles import aligned_rows, load_interval, load_tile, row_pointers, tile_bounds
from ..operands import Keys, Rows, Scores


@triton.jit
def attention_forward_kernel(
    q, k, v, lead, own, sinks, out, lse, q_len, kv_len, num_heads, group, unit2, inner_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCORES_AHEAD: tl.constexpr,
):  # fmt: skip
    """One row tile of one head. `inner_scale` is None without a cap (`score_units`), `sinks` without sinks."""
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_bounds = row < q_len
    q_ptrs = row_pointers(q, b * q.stride[0] + head * q.stride[1], row, BLOCK_D)
    q_tile = load_tile(q_ptrs, in_bounds, HEAD_DIM)
    key = tl.arange(0, BLOCK_N)
    k_offset = b * k.stride[0] + head // group * k.stride[1]
    v_offset = b * v.stride[0] + head // group * v.stride[1]

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m, l = softmax_start(sinks, head + tl.zeros([BLOCK_M], tl.int64), in_bounds, BLOCK_M)
    # Unrolled: as a loop it is half the code, but at head dim 128 on cc 100 it spills 160 bytes.
    for intervals in tl.static_range(2):
        lo, hi = load_interval(lead if intervals == 0 else own, row, in_bounds)
        first, full, full_end, last = tile_bounds(lo, hi, in_bounds, kv_len, BLOCK_N)
        acc, m, l = attend_whole_tiles(
            acc, m, l, q_tile, k, k_offset, v, v_offset, full * BLOCK_N, full_end * BLOCK_N, unit2, inner_scale,
            HEAD_DIM, BLOCK_N, SCORES_AHEAD,
        )  # fmt: skip
        before = full - first
        for i in tl.range(0, before + last - full_end):
            tile = tl.where(i < before, first + i, full_end + i - before)
            n = tile * BLOCK_N + key
            k_tile = load_tile(row_pointers(k, k_offset, n, BLOCK_D), n < kv_len, HEAD_DIM)
            v_tile = load_tile(row_pointers(v, v_offset, n, BLOCK_D), n < kv_len, HEAD_DIM)
            visible = (n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None])
            acc, m, l = softmax_update(acc, m, l, raw_scores(q_tile, k_tile), v_tile, unit2, inner_scale, visible)

    result, lse2 = softmax_finish(acc, m, l)
    tl.store(lse + tl.program_id(1).to(tl.int64) * q_len + row, lse2 * 0.6931471805599453, mask=in_bounds)
    in_head = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    out_ptrs = row_pointers(out, b * out.stride[0] + head * out.stride[1], row, BLOCK_D)
    tl.store(out_ptrs, result.to(out.ptr.dtype.element_ty), mask=in_bounds[:, None] & in_head)


def plan_attention(rows: Rows, keys: Keys, scores: Scores, chip: Chip | None) -> tuple[list[Launch], Tensor, Tensor]:
    """Allocate results and lay out the launches, one but for huge batches: `(launches, out, lse)`.

    Raises:
        TypeError, ValueError: a dtype or head dim that the kernels have no tiles for (`attention_config`).
    """
    q, k, v, sinks = rows.q, keys.k, keys.v, scores.sinks
    batch, num_heads, q_len, head_dim = q.shape
    kind = PLAIN if scores.softcap is None and sinks is None else EXTRAS
    config = attention_config("forward", chip, q.dtype, head_dim, kind)
    if isinstance(config, SpecialisedConfig):
        from .gluon_forward import plan_specialised

        return plan_specialised(rows, keys, scores, config)
    unit, inner = score_units(scores.scale, scores.softcap)
    out = torch.empty_like(q)
    q, k, v = map(aligned_rows, (q, k, v))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    shapes = {"HEAD_DIM": head_dim, "BLOCK_D": block_dim(head_dim)}
    launches = [
        Launch(
            attention_forward_kernel,
            (cdiv(q_len, config.BLOCK_M), len(lse[some]) * num_heads),
            (
                *(*map(strided, (q[some], k[some], v[some])), rows.lead, rows.own),
                *(None if sinks is None else strided(sinks), strided(out[some]), lse[some]),
                *(q_len, k.shape[2], num_heads, num_heads // k.shape[1], unit * math.log2(math.e), inner),
            ),
            {**shapes, **options(config)},
        )
        for some in sequence_slices(batch, num_heads)
    ]
    return launches, out, lse


def attention(rows: Rows, keys: Keys, scores: Scores) -> tuple[Tensor, Tensor]:
    """Run the kernel: `(out, lse [batch, heads, q_len])`; arguments are checked. `out` has the layout of q."""
    launches, out, lse = plan_attention(rows, keys, scores, chip_of(rows.q.device))
    for launch in launches:
        launch.run()
    return out, lse
