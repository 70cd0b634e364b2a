"""Device functions shared by the attention kernels: tile loads, logits, the softmax update, and the safe epilogue."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_pointers(x, base, rows, BLOCK_D: tl.constexpr):
    """Addresses `[len(rows), BLOCK_D]` in a `[.., row, head_dim]` operand; `base` is the offset of its (batch, head).

    Offsets are int64: 2^20 tokens of 64 heads of 128 do not fit 32 bits.
    """
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    return x.ptr + base + rows.to(tl.int64)[:, None] * x.stride[2] + dim[None, :] * x.stride[3]


@triton.jit
def load_tile(at, seen, HEAD_DIM: tl.constexpr, UPCAST: tl.constexpr):
    """The tile at `row_pointers`; rows outside `seen` (None: all are in) and columns past HEAD_DIM are 0."""
    BLOCK_D: tl.constexpr = at.shape[1]
    in_head = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if seen is None:
        if HEAD_DIM == BLOCK_D:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=in_head, other=0.0)
    else:
        tile = tl.load(at, mask=seen[:, None] & in_head, other=0.0)
    if UPCAST:  # Triton's interpreter multiplies bfloat16 operands wrongly; float32 holds them exactly
        tile = tile.to(tl.float32)
    return tile


def score_units(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """`(scale, inner)` of the kernels, whose logits are `scale * modify_scores(q.k, inner)`."""
    return (scale, None) if softcap is None else (softcap, scale / softcap)


@triton.jit
def modify_scores(scores, inner, EXACT: tl.constexpr):
    """What a model does to q.k before scale and mask: nothing, or with a cap, `tanh(inner * q.k)` (`score_units`).

    By one exp2 and one division. `1 - 2 / (1 + exp(2x))` is within 1.2e-7 of tanh, which times a cap of 50 is far below
    the rounding of half operands. EXACT, for float32, bounds the relative error by 4e-7: where that form cancels, it
    takes the continued fraction of tanh to five terms. Sums of products are explicit fmas: what the compiler contracts
    must not depend on the loop that this is inlined into.
    """
    if inner is not None:
        if EXACT:
            x = scores * inner
            size, square = tl.abs(x), x * x
            decay = tl.exp2(size * -2.8853900817779268)
            near = size < 0.5
            above = tl.where(near, size * tl.fma(square, square + 105.0, 945.0), 1.0 - decay)
            below = tl.where(near, tl.fma(square, tl.fma(square, 15.0, 420.0), 945.0), 1.0 + decay)
            size = above / below
            scores = tl.where(x < 0.0, -size, size)
        else:
            growth = tl.exp2(scores * (inner * 2.8853900817779268))
            scores = tl.fma(1.0 / (growth + 1.0), -2.0, 1.0)
    return scores


@triton.jit
def slope_of_scores(ds, scores, inner):
    """`ds`, the gradient of `modify_scores`' result `scores`, times its derivative but for the factor `inner`."""
    if inner is not None:
        ds *= tl.fma(-scores, scores, 1.0)
    return ds


@triton.jit
def softmax_start(sinks, head, counts, BLOCK_M: tl.constexpr):
    """`(m, l)` of rows that have seen no key: nothing, or in rows where `counts` the sink of the row's head."""
    if sinks is None:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
    else:
        sink = tl.load(sinks.ptr + head * sinks.stride[0], mask=counts, other=float("-inf")).to(tl.float32)
        m = sink * 1.4426950408889634
        l = tl.where(counts, 1.0, 0.0)
    return m, l


@triton.jit
def raw_scores(q, k):
    """q.k of a tile of rows and a tile of keys, in float32: not TF32, whatever the dtype."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def softmax_update(acc, m, l, scores, v, scale, inner, visible):
    """One tile of online softmax: `(acc, m, l)` after keys of these raw `scores` and of values v.

    Exponents are of base 2; m is in units of `scale * score`.

    Three choices make a tile that a row does not see an exact no-op, and a tile that it sees wholly the same bits with
    and without a mask: the mask goes onto the raw scores, so that scaling and subtracting are one explicit fma either
    way; a row that has seen nothing pivots at 0; and a tile without a visible key leaves the maximum, so alpha is 1.
    """
    scores = modify_scores(scores, inner, v.dtype == tl.float32)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(scores, scale, -pivot[:, None]))
    alpha = tl.exp2(m - pivot)
    l = tl.fma(l, alpha, tl.sum(p, 1))
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l


@triton.jit
def attend_whole_tiles(
    acc, m, l, q, k, k_base, v, v_base, start, stop, scale, inner,
    HEAD_DIM: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, SCORES_AHEAD: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [start, stop), whole tiles that every row sees: the loop that takes the time.

    With SCORES_AHEAD the scores of a tile are multiplied while the softmax of the tile before it runs. Tensor cores
    that work on their own (wgmma, tcgen05) then have work during a softmax; the products and their order are the
    same, so the bits are too. It takes registers for a second tile of scores.
    """
    BLOCK_D: tl.constexpr = acc.shape[1]
    key = tl.arange(0, BLOCK_N)
    at_k, at_v = row_pointers(k, k_base, key, BLOCK_D), row_pointers(v, v_base, key, BLOCK_D)
    k_step, v_step = tl.cast(k.stride[2], tl.int64), tl.cast(v.stride[2], tl.int64)
    if SCORES_AHEAD:
        if start < stop:
            scores = raw_scores(q, load_tile(at_k + start * k_step, None, HEAD_DIM, UPCAST))
            for n0 in tl.range(start + BLOCK_N, stop, BLOCK_N):
                k_tile = load_tile(at_k + n0 * k_step, None, HEAD_DIM, UPCAST)
                v_tile = load_tile(at_v + (n0 - BLOCK_N) * v_step, None, HEAD_DIM, UPCAST)
                ahead = raw_scores(q, k_tile)
                acc, m, l = softmax_update(acc, m, l, scores, v_tile, scale, inner, None)
                scores = ahead
            v_tile = load_tile(at_v + (stop - BLOCK_N) * v_step, None, HEAD_DIM, UPCAST)
            acc, m, l = softmax_update(acc, m, l, scores, v_tile, scale, inner, None)
    else:
        for n0 in tl.range(start, stop, BLOCK_N):
            k_tile = load_tile(at_k + n0 * k_step, None, HEAD_DIM, UPCAST)
            v_tile = load_tile(at_v + n0 * v_step, None, HEAD_DIM, UPCAST)
            acc, m, l = softmax_update(acc, m, l, raw_scores(q, k_tile), v_tile, scale, inner, None)
    return acc, m, l


@triton.jit
def softmax_finish(acc, m, l):
    """`(out, lse)` with lse in base 2; a row that saw neither key nor sink gives 0 and -inf, never NaN."""
    empty = l == 0.0
    out = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, l)))
    return out, lse


@triton.jit
def load_interval(intervals, row, live):
    """`(lo, hi)` of each row; empty intervals and dead rows as (0, 0), so that `hi` bounds what is visited."""
    lo = tl.load(intervals + 2 * row, mask=live, other=0)
    hi = tl.load(intervals + 2 * row + 1, mask=live, other=0)
    return tl.where(lo < hi, lo, 0), tl.where(lo < hi, hi, 0)


@triton.jit
def tile_bounds(lo, hi, live, kv_len, BLOCK_N: tl.constexpr):
    """Which key tiles a row tile visits: `(first, full, full_end, last)`, counted in tiles of BLOCK_N keys.

    Some row sees a key of tiles `[first, last)` (their hull, where rows see separate runs); every live row sees all of
    tiles `[full, full_end)`, which lie within. Intervals come from `load_interval`.
    """
    last = tl.cdiv(tl.max(hi, 0), BLOCK_N)
    first = tl.minimum(tl.min(tl.where(lo < hi, lo, kv_len), 0) // BLOCK_N, last)
    full = tl.minimum(tl.maximum(tl.cdiv(tl.max(lo, 0), BLOCK_N), first), last)
    full_end = tl.min(tl.where(live, hi, kv_len), 0) // BLOCK_N
    return first, full, tl.minimum(tl.maximum(full_end, full), last), last
