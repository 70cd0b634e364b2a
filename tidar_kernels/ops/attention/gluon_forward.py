"""Attention over in-flight keys only, forward, for Hopper: warps that copy and warps that multiply.

Computes what `triton_forward.py` computes without a cap and without sinks, and visits key tiles in the same order.
No GPU has measured it: it runs where an entry of the launch tables asks for it, and none does (`SpecialisedConfig`).

A program takes 128 rows of one head, and has three groups of warps that share its tiles in shared memory:

    load      one warp. Copies each K and V tile into the next of `num_stages` buffers, by TMA.
    attend    two groups of 4 warps, 64 rows each: S = Q K^T and O += P V by wgmma, the softmax between them. They meet
              at no barrier, so one can multiply while the other is in its softmax.

Every buffer has two mbarriers: `full` completes when its copy has arrived, `free` when both groups have read it. Each
completes once a round through the buffers, and a wait names a round by its parity. The loader waits for the round
before its own: in the first round nothing has to be free yet.

TMA fills rows past the end, and columns past the head dim, with 0. It takes rows of contiguous elements that start at
multiples of 16 bytes; other operands are copied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._triton.launch import Launch, block_dim, cdiv, sequence_slices, strided
from .._triton.tables import SpecialisedConfig
from .._triton.tiles import aligned_rows, rows_padded
from ..operands import Keys, Rows, Scores

WARPS_OF_LOAD, REGISTERS = gl.constexpr(1), gl.constexpr((240, 24))  # of a thread that attends, and of one that loads


@gluon.jit
def tiles_of_rows(intervals, row, q_len, kv_len, BLOCK_N: gl.constexpr):
    """`(first, full, full_end, last)` of one kind of interval: `tile_bounds` in tiles.py."""
    in_bounds = row < q_len
    lo = gl.load(intervals + 2 * row, mask=in_bounds, other=0)
    hi = gl.load(intervals + 2 * row + 1, mask=in_bounds, other=0)
    seen = lo < hi
    lo, hi = gl.where(seen, lo, 0), gl.where(seen, hi, 0)
    last = gl.cdiv(gl.max(hi, 0), BLOCK_N)
    first = gl.minimum(gl.min(gl.where(seen, lo, kv_len), 0) // BLOCK_N, last)
    full = gl.minimum(gl.maximum(gl.cdiv(gl.max(lo, 0), BLOCK_N), first), last)
    full_end = gl.min(gl.where(in_bounds, hi, kv_len), 0) // BLOCK_N
    return first, full, gl.minimum(gl.maximum(full_end, full), last), last


@gluon.jit
def tile_of_visit(i, bounds):
    """The key tile of visit `i`: those that every row sees whole, then those before and after them."""
    first, full, full_end, last = bounds
    whole, before = full_end - full, full - first
    beside = i - whole
    return gl.where(i < whole, full + i, gl.where(beside < before, first + beside, full_end + beside - before))


@gluon.jit
def load_keys(k, v, k_tiles, v_tiles, barriers, b, kv_head, lead, own, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """All visits of a program, lead first: K and V of each into the next buffer, as soon as it is free."""
    k_full, k_free, v_full, v_free = barriers
    of_lead = lead[3] - lead[0]
    for i in range(of_lead + own[3] - own[0]):
        n = gl.where(i < of_lead, tile_of_visit(i, lead), tile_of_visit(i - of_lead, own)) * BLOCK_N
        stage, before = i % STAGES, (i // STAGES & 1) ^ 1
        mbarrier.wait(k_free.index(stage), before)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [b, kv_head, n, 0], k_full.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), before)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        tma.async_copy_global_to_shared(v, [b, kv_head, n, 0], v_full.index(stage), v_tiles.index(stage))


@gluon.jit
def attend_tile(
    acc, m, total, q, k_tiles, v_tiles, barriers, visit, unit2, n, lo, hi,
    MASKED: gl.constexpr, ROWS: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of online softmax, as `softmax_update` in softmax.py: `(acc, m, total)`. It gives its buffers back."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    k_full, k_free, v_full, v_free = barriers
    stage, phase = visit % STAGES, visit // STAGES & 1
    mbarrier.wait(k_full.index(stage), phase)
    k = k_tiles.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, of_scores)
    scores = warpgroup_mma_wait(0, [warpgroup_mma(q, k, scores, use_acc=False, is_async=True)])
    mbarrier.arrive(k_free.index(stage))
    if MASKED:
        scores = gl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), scores, float("-inf"))
    m_new = gl.maximum(m, gl.max(scores, 1) * unit2)
    pivot = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(scores * unit2 - pivot[:, None])
    alpha = gl.exp2(m - pivot)
    total = total * alpha + gl.sum(p, 1)
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, of_out))[:, None]
    p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, of_out, 2))
    mbarrier.wait(v_full.index(stage), phase)
    v = v_tiles.index(stage).reshape([BLOCK_N, BLOCK_D])
    acc = warpgroup_mma_wait(0, [warpgroup_mma(p, v, acc, is_async=True)])
    mbarrier.arrive(v_free.index(stage))
    return acc, m_new, total


@gluon.jit
def attend_rows(
    half, q_full, q_tile, k_tiles, v_tiles, barriers, first_row, lead, own, lead_intervals, own_intervals,
    out, out_offset, lse, lse_offset, q_len, unit2,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Out and lse of 64 rows, the first or the second half of the program's."""
    ROWS: gl.constexpr = 64
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row = first_row + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, of_scores))
    in_bounds = row < q_len
    key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, of_scores))
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, of_out)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, of_scores))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, of_scores))
    mbarrier.wait(q_full, 0)
    q = q_tile.reshape([2 * ROWS, BLOCK_D]).slice(half * ROWS, ROWS, 0)
    done = 0
    for kind in gl.static_range(2):
        if kind == 0:
            bounds, intervals = lead, lead_intervals
        else:
            bounds, intervals = own, own_intervals
        whole, visits = bounds[2] - bounds[1], bounds[3] - bounds[0]
        for i in range(whole):
            acc, m, total = attend_tile(
                acc, m, total, q, k_tiles, v_tiles, barriers, done + i, unit2, key, row, row,
                False, ROWS, BLOCK_D, BLOCK_N, STAGES,
            )  # fmt: skip
        lo = gl.load(intervals + 2 * row, mask=in_bounds, other=0)
        hi = gl.load(intervals + 2 * row + 1, mask=in_bounds, other=0)
        for i in range(whole, visits):
            acc, m, total = attend_tile(
                acc, m, total, q, k_tiles, v_tiles, barriers, done + i, unit2, tile_of_visit(i, bounds) * BLOCK_N + key,
                lo, hi, True, ROWS, BLOCK_D, BLOCK_N, STAGES,
            )  # fmt: skip
        done += visits
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    row_lse = gl.where(empty, float("-inf"), m + gl.log2(total)) * 0.6931471805599453
    gl.store(lse + lse_offset + row, row_lse, mask=in_bounds)
    result = acc / gl.convert_layout(total, gl.SliceLayout(1, of_out))[:, None]
    row = first_row + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, of_out))
    dim = gl.arange(0, BLOCK_D, gl.SliceLayout(0, of_out))
    ptrs = out.ptr + out_offset + row.to(gl.int64)[:, None] * out.stride[2] + dim[None, :] * out.stride[3]
    gl.store(ptrs, result.to(out.ptr.dtype.element_ty), mask=(row < q_len)[:, None] & (dim < HEAD_DIM)[None, :])


@gluon.jit
def attention_forward_kernel(
    out, lse, lead, own, q, k, v, q_len, kv_len, num_heads, group, unit2,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """128 rows of one head. `q`, `k` and `v` are TMA descriptors of `[batch, heads, rows, head_dim]`."""
    b = gl.program_id(1) // num_heads
    head = gl.program_id(1) % num_heads
    first_row = (gl.num_programs(0) - 1 - gl.program_id(0)) * BLOCK_M
    q_tile = gl.allocate_shared_memory(q.dtype, [1, 1, BLOCK_M, BLOCK_D], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    mbarrier.expect(q_full, q.block_type.nbytes)
    tma.async_copy_global_to_shared(q, [b, head, first_row, 0], q_full, q_tile)

    row = first_row + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0]))
    lead_tiles = tiles_of_rows(lead, row, q_len, kv_len, BLOCK_N)
    own_tiles = tiles_of_rows(own, row, q_len, kv_len, BLOCK_N)
    out_offset = b.to(gl.int64) * out.stride[0] + head.to(gl.int64) * out.stride[1]
    lse_offset = gl.program_id(1).to(gl.int64) * q_len
    barriers = (k_full, k_free, v_full, v_free)
    gl.warp_specialize(
        [
            (attend_rows, (
                0, q_full, q_tile, k_tiles, v_tiles, barriers, first_row, lead_tiles, own_tiles, lead, own,
                out, out_offset, lse, lse_offset, q_len, unit2, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES,
            )),
            (attend_rows, (
                1, q_full, q_tile, k_tiles, v_tiles, barriers, first_row, lead_tiles, own_tiles, lead, own,
                out, out_offset, lse, lse_offset, q_len, unit2, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES,
            )),
            (load_keys, (
                k, v, k_tiles, v_tiles, barriers, b, head // group, lead_tiles, own_tiles, BLOCK_N, STAGES,
            )),
        ],
        [4, WARPS_OF_LOAD],
        REGISTERS,
    )  # fmt: skip


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """`x [batch, heads, rows, head_dim]` for TMA, in tiles of `rows` x `columns`."""
    layout = gl.NVMMASharedLayout(min(128, 2 * columns), 16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, columns], layout)


def _for_tma(x: Tensor) -> Tensor:
    """`x` as TMA takes it: itself, or a copy; without a row, one that nothing sees."""
    x = aligned_rows(x) if x.shape[2] else x.new_zeros((*x.shape[:2], 1, x.shape[3]))
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    if aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0:
        return x
    return rows_padded(torch.empty_like(x, memory_format=torch.contiguous_format)).copy_(x)


def plan_specialised(
    rows: Rows, keys: Keys, scores: Scores, config: SpecialisedConfig
) -> tuple[list[Launch], Tensor, Tensor]:
    """As `plan_attention`, for a half dtype, without a cap and sinks: `(launches, out, lse)`."""
    batch, num_heads, q_len, head_dim = rows.q.shape
    out = torch.empty_like(rows.q)
    lse = torch.empty(rows.q.shape[:3], dtype=torch.float32, device=rows.q.device)
    q, k, v = map(_for_tma, (rows.q, keys.k, keys.v))
    width = block_dim(head_dim)
    shapes = {"HEAD_DIM": head_dim, "BLOCK_D": width, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
    launches = [
        Launch(
            attention_forward_kernel,
            (cdiv(q_len, config.BLOCK_M), len(lse[some]) * num_heads),
            (
                *(strided(out[some]), lse[some], rows.lead, rows.own, _described(q[some], config.BLOCK_M, width)),
                *(_described(x[some], config.BLOCK_N, width) for x in (k, v)),
                *(q_len, keys.k.shape[2], num_heads, num_heads // k.shape[1], scores.scale * math.log2(math.e)),
            ),
            {**shapes, "STAGES": config.num_stages, "num_warps": config.num_warps},
        )
        for some in sequence_slices(batch, num_heads)
        if len(lse[some])
    ]
    return launches, out, lse
