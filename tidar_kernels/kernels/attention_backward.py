"""Attention over in-flight keys only, backward: dQ by query tiles, dK and dV by key tiles, without atomics.

Computes (twin: autograd through `tidar_kernels.eager.attention`), with S = scale * Q K^T and P = exp(S - lse):

    dV = P^T dO    dP = dO V^T    dS = P * (dP - delta)    dQ = scale * dS K    dK = scale * dS^T Q
    delta = rowsum(dO * O) - d lse

With a cap on the logits S = softcap * T, T = tanh(scale / softcap * Q K^T), and dS gets the factor 1 - T^2. Sinks need
nothing here: they are in lse.

Every sum runs in a fixed order inside one program, so two runs give the same bits. Five kernels:

    attention_rows        per row -lse / scale (-inf if it saw no key, so that its P is 0) and -delta
    attention_dq          a row tile walks its key tiles, exactly as the forward pass does
    row_tile_bounds       per row tile, the key tiles that it visits: `common.tile_bounds`, written down
    list_row_tiles        that table transposed: per key tile, the row tiles that see all of it and those that see some
    attention_dkdv        a key tile walks these lists for every head that shares its kv head

The lists are made on the device in every call (two launches of microseconds, no host read), so they can be captured
in a CUDA graph and are never stale. They take 4 bytes a pair of tiles: 2 MB for 32k tokens doubled.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    load_interval,
    load_tile,
    modify_scores,
    row_pointers,
    score_units,
    slope_of_scores,
    tile_bounds,
)
from .configs import Chip, attention_config, chip_of
from .launch import INTERPRET, Launch, block_dim, strided


@triton.jit
def attention_rows_kernel(
    grad_out, out, lse, grad_lse, neg_lse, neg_delta, q_len, num_heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head; `grad_lse` may be None. `scale` is the cap, if there is one (`common.score_units`)."""
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < q_len
    at = row_pointers(grad_out, b * grad_out.stride[0] + head * grad_out.stride[1], row, BLOCK_D)
    do_tile = load_tile(at, live, HEAD_DIM, UPCAST).to(tl.float32)
    at = row_pointers(out, b * out.stride[0] + head * out.stride[1], row, BLOCK_D)
    o_tile = load_tile(at, live, HEAD_DIM, UPCAST).to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * q_len + row
    row_lse = tl.load(lse + at, mask=live, other=float("-inf"))
    empty = row_lse == float("-inf")
    minus = -tl.sum(do_tile * o_tile, 1)
    if grad_lse is not None:
        at_grad = b * grad_lse.stride[0] + head * grad_lse.stride[1] + row.to(tl.int64) * grad_lse.stride[2]
        minus += tl.load(grad_lse.ptr + at_grad, mask=live, other=0.0)
    tl.store(neg_lse + at, tl.where(empty, float("-inf"), -row_lse / scale), mask=live)
    tl.store(neg_delta + at, tl.where(empty, 0.0, minus), mask=live)


@triton.jit
def _dq_tile(dq, q_tile, do_tile, k_tile, v_tile, neg_lse2, neg_delta, scale2, inner, visible):
    """`dQ / scale` after one more key tile; `scale2` is scale * log2(e), `neg_lse2` is -lse in base 2."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    scores = modify_scores(scores, inner, q_tile.dtype == tl.float32)
    p = tl.exp2(tl.fma(scores, scale2, neg_lse2[:, None]))
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    ds = p * (tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee") + neg_delta[:, None])
    ds = slope_of_scores(ds, scores, inner)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@triton.jit
def attention_dq_kernel(
    q, k, v, grad_out, lead, own, neg_lse, neg_delta, dq, q_len, kv_len, num_heads, group, scale, inner,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of one row tile of one head."""
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < q_len
    q_tile = load_tile(row_pointers(q, b * q.stride[0] + head * q.stride[1], row, BLOCK_D), live, HEAD_DIM, UPCAST)
    at = row_pointers(grad_out, b * grad_out.stride[0] + head * grad_out.stride[1], row, BLOCK_D)
    do_tile = load_tile(at, live, HEAD_DIM, UPCAST)
    at = tl.program_id(1).to(tl.int64) * q_len + row
    scale2 = scale * 1.4426950408889634
    neg_lse2 = tl.load(neg_lse + at, mask=live, other=float("-inf")) * scale2
    row_delta = tl.load(neg_delta + at, mask=live, other=0.0)
    key = tl.arange(0, BLOCK_N)
    at_k = row_pointers(k, b * k.stride[0] + head // group * k.stride[1], key, BLOCK_D)
    at_v = row_pointers(v, b * v.stride[0] + head // group * v.stride[1], key, BLOCK_D)
    k_step = tl.cast(k.stride[2], tl.int64) * BLOCK_N
    v_step = tl.cast(v.stride[2], tl.int64) * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for intervals in tl.static_range(2):
        lo, hi = load_interval(lead if intervals == 0 else own, row, live)
        first, full, full_end, last = tile_bounds(lo, hi, live, kv_len, BLOCK_N)
        for tile in tl.range(full, full_end):
            k_tile = load_tile(at_k + tile * k_step, None, HEAD_DIM, UPCAST)
            v_tile = load_tile(at_v + tile * v_step, None, HEAD_DIM, UPCAST)
            acc = _dq_tile(acc, q_tile, do_tile, k_tile, v_tile, neg_lse2, row_delta, scale2, inner, None)
        before = full - first
        for i in tl.range(0, before + last - full_end):
            tile = tl.where(i < before, first + i, full_end + i - before)
            n = tile * BLOCK_N + key
            k_tile = load_tile(at_k + tile * k_step, n < kv_len, HEAD_DIM, UPCAST)
            v_tile = load_tile(at_v + tile * v_step, n < kv_len, HEAD_DIM, UPCAST)
            visible = (n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None])
            acc = _dq_tile(acc, q_tile, do_tile, k_tile, v_tile, neg_lse2, row_delta, scale2, inner, visible)

    if inner is not None:
        scale *= inner
    in_head = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    at = row_pointers(dq, b * dq.stride[0] + head * dq.stride[1], row, BLOCK_D)
    tl.store(at, (acc * scale).to(dq.ptr.dtype.element_ty), mask=live[:, None] & in_head)


@triton.jit
def row_tile_bounds_kernel(
    lead, own, bounds, q_len, kv_len, num_row_tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """`bounds` int32 `[2, 4, num_row_tiles]`: first, full, full_end, last of lead, then of own."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < q_len
    at = bounds + tl.program_id(0)
    for intervals in tl.static_range(2):
        lo, hi = load_interval(lead if intervals == 0 else own, row, live)
        first, full, full_end, last = tile_bounds(lo, hi, live, kv_len, BLOCK_N)
        tl.store(at, first)
        tl.store(at + num_row_tiles, full)
        tl.store(at + 2 * num_row_tiles, full_end)
        tl.store(at + 3 * num_row_tiles, last)
        at += 4 * num_row_tiles


@triton.jit
def list_row_tiles_kernel(bounds, tiles, counts, num_row_tiles, num_whole, BLOCK_T: tl.constexpr):
    """One key tile: the row tiles that see all of it, ascending from the left of `tiles[key tile]`, the others that see
    some of it from the right; `counts[key tile]` holds how many of each. Only the `num_whole` first row tiles have all
    their rows; a last one with fewer is never on the left, where loads have no mask."""
    key_tile = tl.program_id(0)
    left = tiles + key_tile.to(tl.int64) * num_row_tiles
    num_full = 0
    num_partial = 0
    for start in range(0, num_row_tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        at = bounds + tile
        visits = tile < 0
        full = tile < 0
        for _ in tl.static_range(2):
            first = tl.load(at, mask=tile < num_row_tiles, other=0)
            full_start = tl.load(at + num_row_tiles, mask=tile < num_row_tiles, other=0)
            full_end = tl.load(at + 2 * num_row_tiles, mask=tile < num_row_tiles, other=0)
            last = tl.load(at + 3 * num_row_tiles, mask=tile < num_row_tiles, other=0)
            visits |= (first <= key_tile) & (key_tile < last)
            full |= (full_start <= key_tile) & (key_tile < full_end)
            at += 4 * num_row_tiles
        full &= tile < num_whole
        partial = visits & ~full
        tl.store(left + num_full + tl.cumsum(full.to(tl.int32), 0) - 1, tile, mask=full)
        right = left + num_row_tiles - num_partial
        tl.store(right - tl.cumsum(partial.to(tl.int32), 0), tile, mask=partial)
        num_full += tl.sum(full.to(tl.int32), 0)
        num_partial += tl.sum(partial.to(tl.int32), 0)
    tl.store(counts + 2 * key_tile, num_full)
    tl.store(counts + 2 * key_tile + 1, num_partial)


@triton.jit
def _dkdv_tile(dk, dv, k_tile, v_tile, q_tile, do_tile, neg_lse, neg_delta, scale2, inner, visible):
    """`(dK / scale, dV)` after one more row tile; everything is transposed, keys are rows.

    What belongs to a row is a column here: each of a thread's values has its own. So lse, delta and the mask go into
    the accumulators before the products. Applied after them, they stay in registers: at head dim 128 on cc 90 that was
    272 bytes of spills against none. Only a cap must come before lse.
    """
    bias = tl.broadcast_to(neg_lse[None, :], (k_tile.shape[0], q_tile.shape[0]))
    if visible is not None:
        bias = tl.where(visible, bias, float("-inf"))
    if inner is None:
        scores = tl.dot(k_tile, tl.trans(q_tile), bias, input_precision="ieee")
        p = tl.exp2(scores * scale2)
    else:
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        scores = modify_scores(scores, inner, q_tile.dtype == tl.float32)
        p = tl.exp2((scores + bias) * scale2)
    dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
    bias = tl.broadcast_to(neg_delta[None, :], (k_tile.shape[0], q_tile.shape[0]))
    ds = slope_of_scores(p * tl.dot(v_tile, tl.trans(do_tile), bias, input_precision="ieee"), scores, inner)
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attention_dkdv_kernel(
    q, k, v, grad_out, lead, own, neg_lse, neg_delta, tiles, counts, dk, dv,
    q_len, kv_len, num_row_tiles, num_kv_heads, group, scale, inner,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key tile of one kv head, summed over the `group` heads that share it."""
    b = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_keys = n < kv_len
    at = row_pointers(k, b * k.stride[0] + kv_head * k.stride[1], n, BLOCK_D)
    k_tile = load_tile(at, in_keys, HEAD_DIM, UPCAST)
    at = row_pointers(v, b * v.stride[0] + kv_head * v.stride[1], n, BLOCK_D)
    v_tile = load_tile(at, in_keys, HEAD_DIM, UPCAST)
    num_full = tl.load(counts + 2 * tl.program_id(0))
    num_partial = tl.load(counts + 2 * tl.program_id(0) + 1)
    full = tiles + tl.program_id(0).to(tl.int64) * num_row_tiles
    partial = full + num_row_tiles - num_partial
    in_tile = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    # Offsets within a tile fit 32 bits (`_short_strides`): 64 would spill 48 bytes at head dim 128 on cc 90.
    in_q = in_tile[:, None] * q.stride[2] + dim[None, :] * q.stride[3]
    in_do = in_tile[:, None] * grad_out.stride[2] + dim[None, :] * grad_out.stride[3]
    q_step = tl.cast(q.stride[2], tl.int64) * BLOCK_M
    do_step = tl.cast(grad_out.stride[2], tl.int64) * BLOCK_M
    scale2 = scale * 1.4426950408889634

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in tl.range(kv_head * group, (kv_head + 1) * group):
        q_head = q.ptr + b * q.stride[0] + head * q.stride[1]
        do_head = grad_out.ptr + b * grad_out.stride[0] + head * grad_out.stride[1]
        at_row = (b * num_kv_heads * group + head) * q_len
        for i in tl.range(0, num_full):
            tile = tl.load(full + i)
            row = tile * BLOCK_M + in_tile
            q_tile = load_tile(q_head + tile * q_step + in_q, None, HEAD_DIM, UPCAST)
            do_tile = load_tile(do_head + tile * do_step + in_do, None, HEAD_DIM, UPCAST)
            row_lse = tl.load(neg_lse + at_row + row)
            row_delta = tl.load(neg_delta + at_row + row)
            dk_acc, dv_acc = _dkdv_tile(
                dk_acc, dv_acc, k_tile, v_tile, q_tile, do_tile, row_lse, row_delta, scale2, inner, None
            )
        for i in tl.range(0, num_partial):
            tile = tl.load(partial + i)
            row = tile * BLOCK_M + in_tile
            live = row < q_len
            q_tile = load_tile(q_head + tile * q_step + in_q, live, HEAD_DIM, UPCAST)
            do_tile = load_tile(do_head + tile * do_step + in_do, live, HEAD_DIM, UPCAST)
            row_lse = tl.load(neg_lse + at_row + row, mask=live, other=float("-inf"))
            row_delta = tl.load(neg_delta + at_row + row, mask=live, other=0.0)
            lo, hi = load_interval(lead, row, live)
            visible = (n[:, None] >= lo[None, :]) & (n[:, None] < hi[None, :])
            lo, hi = load_interval(own, row, live)
            visible |= (n[:, None] >= lo[None, :]) & (n[:, None] < hi[None, :])
            dk_acc, dv_acc = _dkdv_tile(
                dk_acc, dv_acc, k_tile, v_tile, q_tile, do_tile, row_lse, row_delta, scale2, inner, visible
            )

    if inner is not None:
        scale *= inner
    stored = in_keys[:, None] & (dim[None, :] < HEAD_DIM)
    at = row_pointers(dk, b * dk.stride[0] + kv_head * dk.stride[1], n, BLOCK_D)
    tl.store(at, (dk_acc * scale).to(dk.ptr.dtype.element_ty), mask=stored)
    at = row_pointers(dv, b * dv.stride[0] + kv_head * dv.stride[1], n, BLOCK_D)
    tl.store(at, dv_acc.to(dv.ptr.dtype.element_ty), mask=stored)


def _short_strides(x: Tensor) -> Tensor:
    """`x`, copied if a tile of 128 rows and 256 columns spans 2^31 elements."""
    return x if 128 * x.stride(2) + 256 * x.stride(3) < 2**31 else x.contiguous()


def plan_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lead: Tensor,
    own: Tensor,
    scale: float,
    softcap: float | None,
    chip: Chip | None,
) -> tuple[list[Launch], Tensor, Tensor, Tensor]:
    """Allocate gradients and lay out the launches: `(launches, dq, dk, dv)`; gradients have the layout of q, k, v."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    q, grad_out = _short_strides(q), _short_strides(grad_out)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    neg_lse, neg_delta = torch.empty_like(lse), torch.empty_like(lse)
    shapes = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_dim(head_dim),
        "UPCAST": INTERPRET and q.dtype == torch.bfloat16,
    }
    operands = (*map(strided, (q, k, v, grad_out)), lead, own, neg_lse, neg_delta)
    unit, inner = score_units(scale, softcap)

    prepare = Launch(
        attention_rows_kernel,
        (triton.cdiv(q_len, 32), batch * num_heads),
        (
            *(strided(grad_out), strided(out), lse, None if grad_lse is None else strided(grad_lse)),
            *(neg_lse, neg_delta, q_len, num_heads, unit),
        ),
        {**shapes, "BLOCK_M": 32, "num_warps": 4},
    )
    config = attention_config("dq", chip, q.dtype, head_dim, softcap is not None)
    for_dq = Launch(
        attention_dq_kernel,
        (triton.cdiv(q_len, config.BLOCK_M), batch * num_heads),
        (*operands, strided(dq), q_len, kv_len, num_heads, group, unit, inner),
        {**shapes, **asdict(config)},
    )
    config = attention_config("dkdv", chip, q.dtype, head_dim, softcap is not None)
    blocks = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
    row_tiles, key_tiles = triton.cdiv(q_len, config.BLOCK_M), triton.cdiv(kv_len, config.BLOCK_N)
    bounds = torch.empty((2, 4, row_tiles), dtype=torch.int32, device=q.device)
    tiles = torch.empty((key_tiles, row_tiles), dtype=torch.int32, device=q.device)
    counts = torch.empty((key_tiles, 2), dtype=torch.int32, device=q.device)
    note_bounds = Launch(
        row_tile_bounds_kernel,
        (row_tiles,),
        (lead, own, bounds, q_len, kv_len, row_tiles),
        {**blocks, "num_warps": 1},
    )
    list_tiles = Launch(
        list_row_tiles_kernel,
        (key_tiles,),
        (bounds, tiles, counts, row_tiles, q_len // config.BLOCK_M),
        {"BLOCK_T": 128, "num_warps": 4},
    )
    for_dkdv = Launch(
        attention_dkdv_kernel,
        (key_tiles, batch * num_kv_heads),
        (
            *(*operands, tiles, counts, strided(dk), strided(dv)),
            *(q_len, kv_len, row_tiles, num_kv_heads, group, unit, inner),
        ),
        {**shapes, **asdict(config)},
    )
    return [prepare, for_dq, note_bounds, list_tiles, for_dkdv], dq, dk, dv


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lead: Tensor,
    own: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels: `(dq, dk, dv)` from what the forward pass saved; `grad_lse` is None if lse was not used."""
    launches, dq, dk, dv = plan_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, lead, own, scale, softcap, chip_of(q.device)
    )
    for launch in launches:
        launch.run()
    return dq, dk, dv
