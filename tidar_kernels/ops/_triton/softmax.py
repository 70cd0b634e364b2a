"""Device functions of the softmax: scores and their cap, the online update, the loop over whole tiles, the epilogue.

A *score* is q.k. A *logit* is what the softmax takes: `scale * q.k`, or with a cap `softcap * tanh(scale * q.k /
softcap)`. Kernels hold it as `unit * capped(q.k)`, see `score_units`. Exponents are of base 2: `unit2` is
`unit * log2(e)`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_tile, row_pointers


def score_units(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """`(unit, inner_scale)`: a logit is `unit * cap_scores(q.k, inner_scale)`; without a cap inner_scale is None.

    Without a cap the unit is the scale. With one it is the cap, and the scale moves inside the tanh.
    """
    return (scale, None) if softcap is None else (softcap, scale / softcap)


@triton.jit
def cap_scores(scores, inner_scale, EXACT: tl.constexpr):
    """`tanh(inner_scale * q.k)` from scores q.k, or the scores as they are if `inner_scale` is None.

    By one exp2 and one division. `1 - 2 / (1 + exp(2x))` is within 1.2e-7 of tanh, which times a cap of 50 is far below
    the rounding of half operands. EXACT, for float32, bounds the relative error by 4e-7: where that form cancels, it
    takes the continued fraction of tanh to five terms. Sums of products are explicit fmas: what the compiler contracts
    must not depend on the loop that this is inlined into.
    """
    if inner_scale is not None:
        if EXACT:
            x = scores * inner_scale
            size, square = tl.abs(x), x * x
            decay = tl.exp2(size * -2.8853900817779268)
            near = size < 0.5
            above = tl.where(near, size * tl.fma(square, square + 105.0, 945.0), 1.0 - decay)
            below = tl.where(near, tl.fma(square, tl.fma(square, 15.0, 420.0), 945.0), 1.0 + decay)
            size = above / below
            scores = tl.where(x < 0.0, -size, size)
        else:
            growth = tl.exp2(scores * (inner_scale * 2.8853900817779268))
            scores = tl.fma(1.0 / (growth + 1.0), -2.0, 1.0)
    return scores


@triton.jit
def cap_gradient(ds, capped, inner_scale):
    """The gradient of the scores but for the factor `inner_scale`, from `ds`, that of `capped = cap_scores(scores)`."""
    if inner_scale is not None:
        ds *= tl.fma(-capped, capped, 1.0)
    return ds


@triton.jit
def softmax_start(sinks, head, counts, BLOCK_M: tl.constexpr):
    """`(m, l)` of rows before their first key: (-inf, 0), or in rows where `counts` the sink of the row's head."""
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
    """float32 `[rows, keys]`: q.k of a row tile and a key tile; float32 operands are not rounded to TF32."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def softmax_update(acc, m, l, scores, v, unit2, inner_scale, visible):
    """One tile of online softmax: `(acc, m, l)` after keys with these raw `scores` and values `v`.

    `acc [rows, d]` is the weighted sum of values so far, `l [rows]` the sum of weights, `m [rows]` the largest logit
    times log2(e); weights are relative to `2^m`. `visible [rows, keys]` is None where every row sees every key.

    Three choices make a tile that a row does not see an exact no-op, and a tile that it sees wholly the same bits with
    and without a mask: the mask goes onto the raw scores, so that scaling and subtracting are one explicit fma either
    way; a row that has seen nothing pivots at 0; and a tile without a visible key leaves the maximum, so alpha is 1.
    """
    scores = cap_scores(scores, inner_scale, v.dtype == tl.float32)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * unit2)
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(scores, unit2, -pivot[:, None]))
    alpha = tl.exp2(m - pivot)
    l = tl.fma(l, alpha, tl.sum(p, 1))
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l


@triton.jit
def attend_whole_tiles(
    acc, m, l, q, k, k_offset, v, v_offset, start, stop, unit2, inner_scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, SCORES_AHEAD: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [start, stop), whole tiles that every row sees: the loop that takes the time.

    `q` is a tile; `k` and `v` are operands, `k_offset` and `v_offset` those of their (batch, head).

    With SCORES_AHEAD each iteration issues the score product of its tile before the softmax of the previous tile.
    Tensor cores that run asynchronously (wgmma, tcgen05) then multiply during the softmax; the products and their order
    are the same, so the bits are too. It takes registers for a second tile of scores.
    """
    BLOCK_D: tl.constexpr = acc.shape[1]
    key = tl.arange(0, BLOCK_N)
    k_ptrs, v_ptrs = row_pointers(k, k_offset, key, BLOCK_D), row_pointers(v, v_offset, key, BLOCK_D)
    k_stride, v_stride = tl.cast(k.stride[2], tl.int64), tl.cast(v.stride[2], tl.int64)
    if SCORES_AHEAD:
        if start < stop:
            scores = raw_scores(q, load_tile(k_ptrs + start * k_stride, None, HEAD_DIM))
            for n0 in tl.range(start + BLOCK_N, stop, BLOCK_N):
                k_tile = load_tile(k_ptrs + n0 * k_stride, None, HEAD_DIM)
                v_tile = load_tile(v_ptrs + (n0 - BLOCK_N) * v_stride, None, HEAD_DIM)
                ahead = raw_scores(q, k_tile)
                acc, m, l = softmax_update(acc, m, l, scores, v_tile, unit2, inner_scale, None)
                scores = ahead
            v_tile = load_tile(v_ptrs + (stop - BLOCK_N) * v_stride, None, HEAD_DIM)
            acc, m, l = softmax_update(acc, m, l, scores, v_tile, unit2, inner_scale, None)
    else:
        for n0 in tl.range(start, stop, BLOCK_N):
            k_tile = load_tile(k_ptrs + n0 * k_stride, None, HEAD_DIM)
            v_tile = load_tile(v_ptrs + n0 * v_stride, None, HEAD_DIM)
            acc, m, l = softmax_update(acc, m, l, raw_scores(q, k_tile), v_tile, unit2, inner_scale, None)
    return acc, m, l


@triton.jit
def softmax_finish(acc, m, l):
    """`(out, lse)` with lse in base 2; a row that saw neither key nor sink gives 0 and -inf, never NaN."""
    empty = l == 0.0
    out = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, l)))
    return out, lse
