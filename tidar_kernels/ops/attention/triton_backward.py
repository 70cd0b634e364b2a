"""Attention over in-flight keys only, backward: dQ by query tiles, dK and dV by key tiles, without atomics.

Computes (twin: autograd through `tidar_kernels.eager.attention`), with S = scale * Q K^T and P = exp(S - lse):

    dV = P^T dO    dP = dO V^T    dS = P * (dP - delta)    dQ = scale * dS K    dK = scale * dS^T Q
    delta = rowsum(dO * O) - d lse

With a cap on the logits S = softcap * T, T = tanh(scale / softcap * Q K^T), and dS gets the factor 1 - T^2. Sinks need
nothing here: they are in lse.

Every sum runs in a fixed order inside one program, so two runs give the same bits. Five kernels:

    attention_rows        per row -lse / unit (-inf if it saw no key, so that its P is 0) and -delta
    attention_dq          a row tile visits its key tiles, exactly as the forward pass does
    row_tile_bounds       per row tile, which key tiles it visits: a table of `tile_bounds`
    list_row_runs         that table transposed: per key tile, the runs of row tiles that see all of it or some of it
    attention_dkdv        a key tile visits these runs, for every head that shares its kv head

`unit` is the scale, or the cap if there is one (`score_units`). Runs, not lists of row tiles: within a run the address
of the next tile needs no load, so async copies for the next iteration overlap this iteration's MMAs. Runs are found on
the device in every call (two launches of microseconds, no host read), so they can be captured in a CUDA graph and are
never stale. A key tile has at most MOST_RUNS of them, so they take memory linear in the length: at most 2 kB a key
tile, 8 MB for 512k keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.configs import EXTRAS, PLAIN, Chip, attention_config, chip_of, options
from .._triton.launch import Launch, block_dim, cdiv, sequence_slices, strided
from .._triton.softmax import cap_gradient, cap_scores, score_units
from .._triton.tiles import aligned_rows, load_interval, load_tile, row_pointers, rows_padded, tile_bounds
from ..operands import Keys, Results, Rows, Scores

# Runs that a key tile lists. The training patterns have about three; 256 lists every pattern of up to 512 row tiles.
# Where there are more, the last one covers the rest: row tiles in it that see nothing are computed for nothing.
MOST_RUNS = 256


@triton.jit
def attention_rows_kernel(
    grad_out, out, lse, grad_lse, neg_lse, neg_delta, q_len, num_heads, unit,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`neg_lse = -lse / unit` and `neg_delta = -delta`, float32 `[batch, heads, q_len]`, of BLOCK_M rows of one head.

    `grad_lse` may be None. Rows that saw no key have -inf and 0.
    """
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_bounds = row < q_len
    do_ptrs = row_pointers(grad_out, b * grad_out.stride[0] + head * grad_out.stride[1], row, BLOCK_D)
    do_tile = load_tile(do_ptrs, in_bounds, HEAD_DIM).to(tl.float32)
    out_ptrs = row_pointers(out, b * out.stride[0] + head * out.stride[1], row, BLOCK_D)
    out_tile = load_tile(out_ptrs, in_bounds, HEAD_DIM).to(tl.float32)
    row_offset = tl.program_id(1).to(tl.int64) * q_len + row
    row_lse = tl.load(lse + row_offset, mask=in_bounds, other=float("-inf"))
    empty = row_lse == float("-inf")
    row_delta = -tl.sum(do_tile * out_tile, 1)
    if grad_lse is not None:
        grad_offset = b * grad_lse.stride[0] + head * grad_lse.stride[1] + row.to(tl.int64) * grad_lse.stride[2]
        row_delta += tl.load(grad_lse.ptr + grad_offset, mask=in_bounds, other=0.0)
    tl.store(neg_lse + row_offset, tl.where(empty, float("-inf"), -row_lse / unit), mask=in_bounds)
    tl.store(neg_delta + row_offset, tl.where(empty, 0.0, row_delta), mask=in_bounds)


@triton.jit
def _dq_tile(dq, q_tile, do_tile, k_tile, v_tile, neg_lse2, neg_delta, unit2, inner_scale, visible):
    """`dq` after one more key tile: dQ but for its factor, `unit` or with a cap `unit * inner_scale`.

    `neg_lse2` is -lse in base 2; `visible [rows, keys]` is None where every row sees every key.
    """
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    scores = cap_scores(scores, inner_scale, q_tile.dtype == tl.float32)
    p = tl.exp2(tl.fma(scores, unit2, neg_lse2[:, None]))
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    ds = p * (tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee") + neg_delta[:, None])
    ds = cap_gradient(ds, scores, inner_scale)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@triton.jit
def attention_dq_kernel(
    q, k, v, grad_out, lead, own, neg_lse, neg_delta, dq, q_len, kv_len, num_heads, group, unit, inner_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ `[batch, heads, q_len, d]` of one row tile of one head."""
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_bounds = row < q_len
    q_ptrs = row_pointers(q, b * q.stride[0] + head * q.stride[1], row, BLOCK_D)
    q_tile = load_tile(q_ptrs, in_bounds, HEAD_DIM)
    do_ptrs = row_pointers(grad_out, b * grad_out.stride[0] + head * grad_out.stride[1], row, BLOCK_D)
    do_tile = load_tile(do_ptrs, in_bounds, HEAD_DIM)
    row_offset = tl.program_id(1).to(tl.int64) * q_len + row
    unit2 = unit * 1.4426950408889634
    row_lse2 = tl.load(neg_lse + row_offset, mask=in_bounds, other=float("-inf")) * unit2
    row_delta = tl.load(neg_delta + row_offset, mask=in_bounds, other=0.0)
    key = tl.arange(0, BLOCK_N)
    k_ptrs = row_pointers(k, b * k.stride[0] + head // group * k.stride[1], key, BLOCK_D)
    v_ptrs = row_pointers(v, b * v.stride[0] + head // group * v.stride[1], key, BLOCK_D)
    k_step = tl.cast(k.stride[2], tl.int64) * BLOCK_N
    v_step = tl.cast(v.stride[2], tl.int64) * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for intervals in tl.static_range(2):
        lo, hi = load_interval(lead if intervals == 0 else own, row, in_bounds)
        first, full, full_end, last = tile_bounds(lo, hi, in_bounds, kv_len, BLOCK_N)
        for tile in tl.range(full, full_end):
            k_tile = load_tile(k_ptrs + tile * k_step, None, HEAD_DIM)
            v_tile = load_tile(v_ptrs + tile * v_step, None, HEAD_DIM)
            acc = _dq_tile(acc, q_tile, do_tile, k_tile, v_tile, row_lse2, row_delta, unit2, inner_scale, None)
        before = full - first
        for i in tl.range(0, before + last - full_end):
            tile = tl.where(i < before, first + i, full_end + i - before)
            n = tile * BLOCK_N + key
            k_tile = load_tile(k_ptrs + tile * k_step, n < kv_len, HEAD_DIM)
            v_tile = load_tile(v_ptrs + tile * v_step, n < kv_len, HEAD_DIM)
            visible = (n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None])
            acc = _dq_tile(acc, q_tile, do_tile, k_tile, v_tile, row_lse2, row_delta, unit2, inner_scale, visible)

    if inner_scale is not None:
        unit *= inner_scale
    in_head = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    dq_ptrs = row_pointers(dq, b * dq.stride[0] + head * dq.stride[1], row, BLOCK_D)
    tl.store(dq_ptrs, (acc * unit).to(dq.ptr.dtype.element_ty), mask=in_bounds[:, None] & in_head)


@triton.jit
def row_tile_bounds_kernel(
    lead, own, bounds, q_len, kv_len, num_row_tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """`bounds` int32 `[2, 4, num_row_tiles]`: first, full, full_end, last of lead, then of own."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_bounds = row < q_len
    bound_ptr = bounds + tl.program_id(0)
    for intervals in tl.static_range(2):
        lo, hi = load_interval(lead if intervals == 0 else own, row, in_bounds)
        first, full, full_end, last = tile_bounds(lo, hi, in_bounds, kv_len, BLOCK_N)
        tl.store(bound_ptr, first)
        tl.store(bound_ptr + num_row_tiles, full)
        tl.store(bound_ptr + 2 * num_row_tiles, full_end)
        tl.store(bound_ptr + 3 * num_row_tiles, last)
        bound_ptr += 4 * num_row_tiles


@triton.jit
def _row_tiles_seeing(key_tile, tile, end, bounds, num_row_tiles, num_whole):
    """Which of the row tiles `tile` see all keys of a key tile, and which visit it otherwise: `(full, partial)`.

    Tiles outside [0, end) are neither. Only the first `num_whole` row tiles have BLOCK_M rows; the last, if it has
    fewer, is never full: full tiles are loaded without a mask.
    """
    in_bounds = (tile >= 0) & (tile < end)
    bound_ptrs = bounds + tile
    full, visits = in_bounds & ~in_bounds, in_bounds & ~in_bounds
    for _ in tl.static_range(2):
        first = tl.load(bound_ptrs, mask=in_bounds, other=0)
        full_start = tl.load(bound_ptrs + num_row_tiles, mask=in_bounds, other=0)
        full_end = tl.load(bound_ptrs + 2 * num_row_tiles, mask=in_bounds, other=0)
        last = tl.load(bound_ptrs + 3 * num_row_tiles, mask=in_bounds, other=0)
        visits |= (first <= key_tile) & (key_tile < last)
        full |= (full_start <= key_tile) & (key_tile < full_end)
        bound_ptrs += 4 * num_row_tiles
    full &= tile < num_whole
    return full, visits & ~full


@triton.jit
def _store_runs(run_ptr, step, opened, closed, tile, chosen, before, after):
    """Store the runs of `chosen` tiles as `(first, end)`, the next run `step` elements further.

    `before` and `after` say whether the tile before or after each is chosen; `opened` and `closed` count the runs that
    have begun and ended so far. Returns both counts after these tiles.
    """
    opens, closes = (chosen & ~before).to(tl.int32), (chosen & ~after).to(tl.int32)
    tl.store(run_ptr + step * (opened + tl.cumsum(opens, 0) - 1), tile, mask=opens != 0)
    tl.store(run_ptr + step * (closed + tl.cumsum(closes, 0) - 1) + 1, tile + 1, mask=closes != 0)
    return opened + tl.sum(opens, 0), closed + tl.sum(closes, 0)


@triton.jit
def list_row_runs_kernel(bounds, runs, counts, num_row_tiles, num_whole, most_runs, BLOCK_T: tl.constexpr):
    """One key tile: its runs of row tiles `[first, end)`, ascending, in `runs[key tile]`, int32 `[most_runs, 2]`.

    Runs that see all of the key tile fill it from the left, runs that see some of it from the right; `counts[key
    tile]`, int32 `[2]`, says how many of each. If there are more than `most_runs`, the first `most_runs - 1` are listed
    and the last covers all further row tiles up to the last that visits: it counts among those that see some.
    """
    key_tile = tl.program_id(0)
    left = runs + key_tile.to(tl.int64) * 2 * most_runs
    right = left + 2 * most_runs - 2
    # Row tiles below `listed` are listed exactly. All, unless there are too many runs: then those before the last that
    # fits begins.
    listed, opened, last = num_row_tiles, 0, 0
    if num_row_tiles > most_runs:
        for start in range(0, num_row_tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            full, partial = _row_tiles_seeing(key_tile, tile, num_row_tiles, bounds, num_row_tiles, num_whole)
            full_before, partial_before = _row_tiles_seeing(
                key_tile, tile - 1, num_row_tiles, bounds, num_row_tiles, num_whole
            )
            opens = ((full & ~full_before) | (partial & ~partial_before)).to(tl.int32)
            is_last_run = (opens != 0) & (opened + tl.cumsum(opens, 0) == most_runs)
            listed = tl.minimum(listed, tl.min(tl.where(is_last_run, tile, num_row_tiles), 0))
            last = tl.maximum(last, tl.max(tl.where(full | partial, tile + 1, 0), 0))
            opened += tl.sum(opens, 0)
        if opened <= most_runs:
            listed = num_row_tiles
    full_opened, full_closed, partial_opened, partial_closed = 0, 0, 0, 0
    for start in range(0, listed, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        full, partial = _row_tiles_seeing(key_tile, tile, listed, bounds, num_row_tiles, num_whole)
        full_before, partial_before = _row_tiles_seeing(key_tile, tile - 1, listed, bounds, num_row_tiles, num_whole)
        full_after, partial_after = _row_tiles_seeing(key_tile, tile + 1, listed, bounds, num_row_tiles, num_whole)
        full_opened, full_closed = _store_runs(left, 2, full_opened, full_closed, tile, full, full_before, full_after)
        partial_opened, partial_closed = _store_runs(
            right, -2, partial_opened, partial_closed, tile, partial, partial_before, partial_after
        )
    if listed < num_row_tiles:
        tl.store(right - 2 * partial_closed, listed)
        tl.store(right - 2 * partial_closed + 1, last)
        partial_closed += 1
    tl.store(counts + 2 * key_tile, full_closed)
    tl.store(counts + 2 * key_tile + 1, partial_closed)


@triton.jit
def _dkdv_tile(dk, dv, k_tile, v_tile, q_tile, do_tile, neg_lse, neg_delta, unit2, inner_scale, visible):
    """`(dk, dv)` after one more row tile: dV, and dK but for its factor, `unit` or with a cap `unit * inner_scale`.

    Everything is transposed, `visible [keys, rows]` too: keys are the rows of each product, query rows the columns. A
    thread holds many columns, so per-row values cost it a register each. lse, delta and the mask therefore go into the
    accumulators before the products; applied after them they stay in registers, which at head dim 128 on cc 90 was 272
    bytes of spills against none. Only with a cap lse has to wait: the cap comes first.
    """
    bias = tl.broadcast_to(neg_lse[None, :], (k_tile.shape[0], q_tile.shape[0]))
    if visible is not None:
        bias = tl.where(visible, bias, float("-inf"))
    if inner_scale is None:
        scores = tl.dot(k_tile, tl.trans(q_tile), bias, input_precision="ieee")
        p = tl.exp2(scores * unit2)
    else:
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        scores = cap_scores(scores, inner_scale, q_tile.dtype == tl.float32)
        p = tl.exp2((scores + bias) * unit2)
    dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
    bias = tl.broadcast_to(neg_delta[None, :], (k_tile.shape[0], q_tile.shape[0]))
    ds = cap_gradient(p * tl.dot(v_tile, tl.trans(do_tile), bias, input_precision="ieee"), scores, inner_scale)
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attention_dkdv_kernel(
    q, k, v, grad_out, lead, own, neg_lse, neg_delta, runs, counts, dk, dv,
    q_len, kv_len, most_runs, num_kv_heads, group, unit, inner_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS_AHEAD: tl.constexpr = False,
):  # fmt: skip
    """dK and dV `[batch, kv_heads, kv_len, d]` of one key tile of one kv head, summed over the `group` heads of it.

    ROWS_AHEAD: lse and delta of the next row tile are loaded during this tile's products. Without it, wgmma waits for
    them at the start of each iteration, as it starts from them (`_dkdv_tile`). The values are the same.
    """
    b = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_in_bounds = n < kv_len
    k_ptrs = row_pointers(k, b * k.stride[0] + kv_head * k.stride[1], n, BLOCK_D)
    k_tile = load_tile(k_ptrs, key_in_bounds, HEAD_DIM)
    v_ptrs = row_pointers(v, b * v.stride[0] + kv_head * v.stride[1], n, BLOCK_D)
    v_tile = load_tile(v_ptrs, key_in_bounds, HEAD_DIM)
    num_full = tl.load(counts + 2 * tl.program_id(0))
    num_partial = tl.load(counts + 2 * tl.program_id(0) + 1)
    full_runs = runs + tl.program_id(0).to(tl.int64) * 2 * most_runs
    partial_runs = full_runs + 2 * most_runs - 2
    in_tile = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    # Offsets within a tile fit 32 bits (`_short_strides`): 64 would spill 48 bytes at head dim 128 on cc 90.
    q_offset = in_tile[:, None] * q.stride[2] + dim[None, :] * q.stride[3]
    do_offset = in_tile[:, None] * grad_out.stride[2] + dim[None, :] * grad_out.stride[3]
    q_step = tl.cast(q.stride[2], tl.int64) * BLOCK_M
    do_step = tl.cast(grad_out.stride[2], tl.int64) * BLOCK_M
    unit2 = unit * 1.4426950408889634

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in tl.range(kv_head * group, (kv_head + 1) * group):
        q_ptr = q.ptr + b * q.stride[0] + head * q.stride[1]
        do_ptr = grad_out.ptr + b * grad_out.stride[0] + head * grad_out.stride[1]
        row_offset = (b * num_kv_heads * group + head) * q_len
        for i in range(0, num_full):
            start, end = tl.load(full_runs + 2 * i), tl.load(full_runs + 2 * i + 1)
            if ROWS_AHEAD and inner_scale is None:
                lse_ahead = tl.load(neg_lse + row_offset + start * BLOCK_M + in_tile)
                delta_ahead = tl.load(neg_delta + row_offset + start * BLOCK_M + in_tile)
            for tile in tl.range(start, end):
                row = tile * BLOCK_M + in_tile
                q_tile = load_tile(q_ptr + tile * q_step + q_offset, None, HEAD_DIM)
                do_tile = load_tile(do_ptr + tile * do_step + do_offset, None, HEAD_DIM)
                if ROWS_AHEAD and inner_scale is None:
                    row_lse, row_delta = lse_ahead, delta_ahead
                    row = tl.minimum(tile + 1, end - 1) * BLOCK_M + in_tile  # no mask: within the run
                    lse_ahead = tl.load(neg_lse + row_offset + row)
                    delta_ahead = tl.load(neg_delta + row_offset + row)
                else:
                    row_lse = tl.load(neg_lse + row_offset + row)
                    row_delta = tl.load(neg_delta + row_offset + row)
                dk_acc, dv_acc = _dkdv_tile(
                    dk_acc, dv_acc, k_tile, v_tile, q_tile, do_tile, row_lse, row_delta, unit2, inner_scale, None
                )
        for i in range(0, num_partial):
            for tile in tl.range(tl.load(partial_runs - 2 * i), tl.load(partial_runs - 2 * i + 1)):
                row = tile * BLOCK_M + in_tile
                in_bounds = row < q_len
                q_tile = load_tile(q_ptr + tile * q_step + q_offset, in_bounds, HEAD_DIM)
                do_tile = load_tile(do_ptr + tile * do_step + do_offset, in_bounds, HEAD_DIM)
                row_lse = tl.load(neg_lse + row_offset + row, mask=in_bounds, other=float("-inf"))
                row_delta = tl.load(neg_delta + row_offset + row, mask=in_bounds, other=0.0)
                lo, hi = load_interval(lead, row, in_bounds)
                visible = (n[:, None] >= lo[None, :]) & (n[:, None] < hi[None, :])
                lo, hi = load_interval(own, row, in_bounds)
                visible |= (n[:, None] >= lo[None, :]) & (n[:, None] < hi[None, :])
                dk_acc, dv_acc = _dkdv_tile(
                    dk_acc, dv_acc, k_tile, v_tile, q_tile, do_tile, row_lse, row_delta, unit2, inner_scale, visible
                )

    if inner_scale is not None:
        unit *= inner_scale
    mask = key_in_bounds[:, None] & (dim[None, :] < HEAD_DIM)
    dk_ptrs = row_pointers(dk, b * dk.stride[0] + kv_head * dk.stride[1], n, BLOCK_D)
    tl.store(dk_ptrs, (dk_acc * unit).to(dk.ptr.dtype.element_ty), mask=mask)
    dv_ptrs = row_pointers(dv, b * dv.stride[0] + kv_head * dv.stride[1], n, BLOCK_D)
    tl.store(dv_ptrs, dv_acc.to(dv.ptr.dtype.element_ty), mask=mask)


def _short_strides(x: Tensor) -> Tensor:
    """`x`, copied if a tile of 128 rows and 512 columns spans 2^31 elements."""
    return x if 128 * x.stride(2) + 512 * x.stride(3) < 2**31 else x.contiguous()


def plan_attention_backward(
    rows: Rows, keys: Keys, scores: Scores, results: Results, chip: Chip | None
) -> tuple[list[Launch], Tensor, Tensor, Tensor]:
    """Allocate gradients and lay out the launches: `(launches, dq, dk, dv)`.

    Gradients have the layout of q, k, v, but for dk and dv that `rows_padded` moves.
    """
    (q, lead, own, *_), (k, v), (out, lse, grad_out, grad_lse) = rows, keys, results
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    dq, dk, dv = torch.empty_like(q), rows_padded(torch.empty_like(k)), rows_padded(torch.empty_like(v))
    q, k, v, out, grad_out = map(aligned_rows, (q, k, v, out, grad_out))
    q, grad_out = _short_strides(q), _short_strides(grad_out)
    neg_lse, neg_delta = torch.empty_like(lse), torch.empty_like(lse)
    shapes = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_dim(head_dim),
    }
    unit, inner = score_units(scores.scale, scores.softcap)
    kind = PLAIN if scores.softcap is None else EXTRAS
    sequences = sequence_slices(batch, num_heads)

    def operands(some: slice) -> tuple[Any, ...]:
        """What both kernels of gradients read first, for some of the sequences."""
        tensors = (strided(x[some]) for x in (q, k, v, grad_out))
        return (*tensors, lead, own, neg_lse[some], neg_delta[some])

    prepare = [
        Launch(
            attention_rows_kernel,
            (cdiv(q_len, 32), len(lse[some]) * num_heads),
            (
                *(strided(grad_out[some]), strided(out[some]), lse[some]),
                *(None if grad_lse is None else strided(grad_lse[some]), neg_lse[some], neg_delta[some]),
                *(q_len, num_heads, unit),
            ),
            {**shapes, "BLOCK_M": 32, "num_warps": 4},
        )
        for some in sequences
    ]
    config = attention_config("dq", chip, q.dtype, head_dim, kind)
    for_dq = [
        Launch(
            attention_dq_kernel,
            (cdiv(q_len, config.BLOCK_M), len(lse[some]) * num_heads),
            (*operands(some), strided(dq[some]), q_len, kv_len, num_heads, group, unit, inner),
            {**shapes, **options(config)},
        )
        for some in sequences
    ]
    config = attention_config("dkdv", chip, q.dtype, head_dim, kind)
    blocks = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
    row_tiles, key_tiles = cdiv(q_len, config.BLOCK_M), cdiv(kv_len, config.BLOCK_N)
    most_runs = min(row_tiles, MOST_RUNS)
    bounds = torch.empty((2, 4, row_tiles), dtype=torch.int32, device=q.device)
    runs = torch.empty((key_tiles, most_runs, 2), dtype=torch.int32, device=q.device)
    counts = torch.empty((key_tiles, 2), dtype=torch.int32, device=q.device)
    note_bounds = Launch(
        row_tile_bounds_kernel,
        (row_tiles,),
        (lead, own, bounds, q_len, kv_len, row_tiles),
        {**blocks, "num_warps": 1},
    )
    list_runs = Launch(
        list_row_runs_kernel,
        (key_tiles,),
        (bounds, runs, counts, row_tiles, q_len // config.BLOCK_M, most_runs),
        {"BLOCK_T": 128, "num_warps": 4},
    )
    for_dkdv = [
        Launch(
            attention_dkdv_kernel,
            (key_tiles, len(lse[some]) * num_kv_heads),
            (
                *(*operands(some), runs, counts, strided(dk[some]), strided(dv[some])),
                *(q_len, kv_len, most_runs, num_kv_heads, group, unit, inner),
            ),
            {**shapes, **options(config)},
        )
        for some in sequences
    ]
    return [*prepare, *for_dq, note_bounds, list_runs, *for_dkdv], dq, dk, dv


def attention_backward(rows: Rows, keys: Keys, scores: Scores, results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels: `(dq, dk, dv)` from what the forward pass saved."""
    launches, dq, dk, dv = plan_attention_backward(rows, keys, scores, results, chip_of(rows.q.device))
    for launch in launches:
        launch.run()
    if rows.q.shape[3] % 16:  # else nothing was padded
        dk, dv = torch.empty_like(keys.k).copy_(dk), torch.empty_like(keys.v).copy_(dv)
    return dq, dk, dv
