"""CPU path of `tidar_kernels.attention`, forward and backward, on ATen's fused attention; nothing of size q_len^2.

A pattern is cut once into pieces, and every call of the operator is a few calls of ATen's kernel:

    staircases   a run of rows of which row i sees at least the first i + 1 keys from a common one on: one causal call.
                 The clean half of TiDAR training is one, its mask half is one that starts a block later.
    rectangles   CHUNK rows, where there is no staircase, and the keys that all of them see: no mask
    edges        TILE rows and what is left of their intervals, gathered: a small mask

The forward pass merges the pieces of a row by log-sum-exp. The backward pass only adds: given out and lse of the whole
row, a piece yields its exact share of the gradients. Sums run in a fixed order in both. With capped logits, which ATen
does not fuse, there are no staircases and plain PyTorch computes the pieces (`cpu_parts`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .._cpu import (
    LARGEST_FACTOR,
    TensorMemo,
    add_sinks,
    all_below,
    broken_keys,
    capped_attention,
    capped_attention_backward,
    share,
    unit_stride,
    without,
)
from ..operands import Keys, Results, Rows, Scores

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

MIN_STAIRCASE = 256  # rows; shorter runs, packed documents say, are cut into chunks together
MAX_BEHIND = 64  # keys that a staircase may leave of a row; with more, the edges would outgrow it
CHUNK = 256  # rows of a rectangle; ATen's kernel is 15 % slower a pair at 128, and edges grow with it
MIN_RECTANGLE = 64  # keys; fewer are left to the edge
TILE = 32  # rows of an edge tile
EDGE_KEYS = 16  # edges are as wide as a multiple of this, so that many have one shape
GATHERED = 1024  # keys gathered at a time, unless one tile has more; at 4096 page faults cost 5 % of a forward pass
MERGED = 2**17  # elements merged at a time, unless one head has more
KEPT_WIDTH = 1024  # masks of edges up to this width are kept: at most 4 kB a row


@dataclass
class _Piece:
    """Rows over keys: all of them or, with `causal`, row i over the first i + 1. `alone`: the rows see nothing else."""

    rows: slice
    keys: slice
    causal: bool
    alone: bool = False


@dataclass
class _Edges:
    """Tiles of `height` rows over `width` gathered keys each.

    Args:
        starts: int64 `[tiles]`, first row of each.
        rest: int32 `[tiles, height, 4, 2]`, what no piece covers of each row's intervals: half-open intervals.
        spans: int32 `[tiles, 4, 2]`, their hulls: the keys that are gathered; key 0 fills the rest up to `width`.
    """

    starts: Tensor
    rest: Tensor
    spans: Tensor
    width: int
    _kept: tuple[Tensor, Tensor, Tensor | None] | None = None

    @property
    def height(self) -> int:
        return self.rest.shape[1]

    @cached_property
    def rows(self) -> slice | Tensor:
        """The rows of all tiles, as a slice if they follow each other, else int64 `[tiles * height]`."""
        first, last = int(self.starts[0]), int(self.starts[-1]) + self.height
        if last - first == len(self.starts) * self.height:
            return slice(first, last)
        with torch.inference_mode(False):  # it is kept
            return (self.starts[:, None] + torch.arange(self.height, device="cpu")).flatten()

    def keys(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(keys int64 [tiles * width], mask, unseen)`: the keys of all tiles; what to add to their scores, float32
        `[tiles, height, width]`; and rows that see none of them, bool `[tiles, height]`, or None."""
        if self._kept is not None:
            return self._kept
        with torch.inference_mode(False):
            found = self._gathered()
        if self.width <= KEPT_WIDTH:
            self._kept = found
        return found

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor | None]:
        lo, size = self.spans[..., 0], self.spans[..., 1] - self.spans[..., 0]
        column, end = torch.arange(self.width, dtype=torch.int32, device="cpu"), size.cumsum(1, dtype=torch.int32)
        span = (column >= end[:, :, None]).sum(1)
        used, span = span < 4, span.clamp_(max=3)
        keys = torch.where(used, (lo - end + size).gather(1, span) + column, 0)
        first, last = (self.rest[..., side].gather(2, span[:, None].expand(-1, self.height, -1)) for side in (0, 1))
        visible = (first <= keys[:, None]) & (keys[:, None] < last) & used[:, None]
        mask = torch.zeros(visible.shape, dtype=torch.float32, device="cpu").masked_fill_(~visible, -math.inf)
        unseen = ~visible.any(2)
        return keys.long().flatten(), mask, unseen if bool(unseen.any()) else None


@dataclass(frozen=True)
class _Plan:
    pieces: list[_Piece]
    edges: list[_Edges]
    bare: Tensor | None  # rows that are neither in an edge tile nor in an `alone` piece, int64


def _staircases(interval: Tensor) -> Iterator[tuple[slice, int, int]]:
    """`(rows, first key, keys that all of them see besides)` of the staircases in one interval of every row.

    Row i of `rows` sees at least the keys from the first one to `besides + i`, and at most MAX_BEHIND more.
    """
    lo, hi = interval.unbind(1)
    row = torch.arange(len(lo), dtype=torch.int32, device="cpu")
    step = hi[1:] - hi[:-1]
    follows = (lo[1:] == lo[:-1]) & (step >= 0) & (step <= MAX_BEHIND) & (lo[1:] < hi[1:]) & (lo[:-1] < hi[:-1])
    starts = [0, *((~follows).nonzero().flatten() + 1).tolist()]
    for start, stop in zip(starts, [*starts[1:], len(lo)], strict=True):
        if stop - start < MIN_STAIRCASE:
            continue
        key = int(lo[start])
        more = (hi - row)[start:stop] - (key + 1 - start)  # keys that row i sees besides the first i + 1
        late = max(0, -int(more.min()))
        besides = max(0, int(more[late:].min()) + late)
        if int(more[late:].max()) + late - besides <= MAX_BEHIND and late <= MAX_BEHIND:
            yield slice(start + late, stop), key, besides


def _cut_interval(interval: Tensor, rest: Tensor, staircases: bool) -> list[_Piece]:
    """Pieces of one interval of every row; `rest [q_len, 2, 2]` becomes what they leave of it, before and after."""
    pieces = []
    rest[:, 0] = interval
    at = 0
    found = list(_staircases(interval)) if staircases else []
    for rows, key, besides in [*found, (slice(len(interval), len(interval)), 0, 0)]:
        for start in range(at, rows.start, CHUNK):
            stop = min(start + CHUNK, rows.start)
            lo, hi = int(interval[start:stop, 0].max()), int(interval[start:stop, 1].min())
            if hi - lo >= MIN_RECTANGLE:
                pieces.append(_Piece(slice(start, stop), slice(lo, hi), causal=False))
                rest[start:stop, 0, 1], rest[start:stop, 1, 0] = lo, hi
                rest[start:stop, 1, 1] = interval[start:stop, 1]
        at = rows.stop
        if rows.start == rows.stop:
            continue
        if besides < MIN_RECTANGLE:
            besides = 0
        else:
            pieces.append(_Piece(rows, slice(key, key + besides), causal=False))
        length = rows.stop - rows.start
        pieces.append(_Piece(rows, slice(key + besides, key + besides + length), causal=True))
        rest[rows, 0, 0] = torch.arange(key + besides + 1, key + besides + 1 + length, dtype=torch.int32, device="cpu")
    return pieces


def _cut_edges(rest: Tensor) -> list[_Edges]:
    """Edge tiles over `rest [q_len, 4, 2]`, those of one shape together, as many as gather GATHERED keys."""
    edges = []
    whole = len(rest) // TILE * TILE
    for first, part in ((0, rest[:whole].unflatten(0, (-1, TILE))), (whole, rest[None, whole:])):
        if part.numel() == 0:
            continue
        live = part[..., 0] < part[..., 1]
        lo = torch.where(live, part[..., 0], torch.iinfo(torch.int32).max).amin(1)
        hi = torch.where(live, part[..., 1], 0).amax(1)
        spans = torch.stack([torch.minimum(lo, hi), hi], dim=-1)
        widths = -(-(spans[..., 1] - spans[..., 0]).sum(1) // EDGE_KEYS) * EDGE_KEYS
        for width in widths.unique().tolist():
            tiles = (widths == width).nonzero().flatten()
            batches = tiles.split(max(1, GATHERED // width)) if width else ()
            edges += [_Edges(first + some * TILE, part[some], spans[some], width) for some in batches]
    return edges


def _cut(lead: Tensor, own: Tensor, staircases: bool) -> _Plan:
    rest = torch.zeros(len(lead), 4, 2, dtype=torch.int32, device="cpu")
    pieces = _cut_interval(lead, rest[:, :2], staircases) + _cut_interval(own, rest[:, 2:], staircases)
    rest *= (rest[..., :1] < rest[..., 1:]).to(torch.int32)
    edges = _cut_edges(rest)
    sources = (rest[..., 0] < rest[..., 1]).any(1).to(torch.int32)  # of each row: its edge, and its pieces
    for piece in pieces:
        sources[piece.rows] += 1
    written = torch.zeros(len(lead), dtype=torch.bool, device="cpu")
    for part in edges:
        written[part.rows] = True
    for piece in pieces:
        piece.alone = bool((sources[piece.rows] == 1).all())
        if piece.alone:
            written[piece.rows] = True
    bare = (~written).nonzero().flatten()
    return _Plan(pieces, edges, bare if len(bare) else None)


_plans = TensorMemo()  # a pattern is cut once


def _plan_of(lead: Tensor, own: Tensor, staircases: bool = True) -> _Plan:
    return _plans.get(staircases, lambda: _cut(lead, own, staircases), lead, own)


class _Heads:
    """Grouped heads as ATen's kernel takes them, which wants as many K/V heads as query heads.

    With one query head a kv head, a call takes the whole batch. Otherwise a call takes one sequence, with
    [kv_heads, group] in the place of [batch, heads], and K/V expanded without a copy.
    """

    def __init__(self, batch: int, num_heads: int, num_kv_heads: int) -> None:
        self.num_kv_heads, self.group = num_kv_heads, num_heads // num_kv_heads
        self.calls: list[int | slice] = [slice(None)] if self.group == 1 else list(range(batch))

    def rows(self, x: Tensor, call: int | slice, rows: slice) -> Tensor:
        """Rows of `x [batch, heads, q_len, ..]`."""
        part = x[:, :, rows][call]
        return part if self.group == 1 else part.unflatten(0, (self.num_kv_heads, self.group))

    def keys(self, x: Tensor, call: int | slice, keys: slice) -> Tensor:
        """Keys of `x [batch, kv_heads, kv_len, d]`."""
        part = x[:, :, keys][call]
        return part if self.group == 1 else part[:, None].expand(-1, self.group, -1, -1)

    def tile_rows(self, x: Tensor, rows: slice | Tensor, height: int) -> Tensor:
        """Rows of edge tiles, of one sequence `x [heads, q_len, ..]`: `[tiles, kv_heads, group * height, ..]`."""
        tiles = x[:, rows].unflatten(1, (-1, height)).unflatten(0, (self.num_kv_heads, self.group))
        return tiles.transpose(1, 2).transpose(0, 1).flatten(2, 3)

    def untile_rows(self, tiles: Tensor, height: int) -> Tensor:
        """Inverse of `tile_rows`: `[heads, tiles * height, ..]`."""
        return tiles.unflatten(2, (self.group, height)).transpose(0, 1).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def tile_keys(self, x: Tensor, keys: Tensor, width: int) -> Tensor:
        """Keys of edge tiles, of one sequence `x [kv_heads, kv_len, d]`: `[tiles, kv_heads, width, d]`."""
        return x.index_select(1, keys).unflatten(1, (-1, width)).transpose(0, 1)

    def tile_mask(self, mask: Tensor) -> Tensor:
        """`mask [tiles, height, ..]` for the rows of `tile_rows`: `[tiles, 1, group * height, ..]`."""
        return (mask if self.group == 1 else mask.repeat(1, self.group, *[1] * (mask.ndim - 2))).unsqueeze(1)


def _merge(so_far: Tensor, so_far_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add to `so_far [a, b, rows, d]` and its lse, in place, what other keys gave for the same rows."""
    weight = share(part_lse, so_far_lse).unsqueeze(-1)
    # A few heads at a time: temporaries stay in cache, and small enough for the allocator not to give them back.
    size, width = so_far.shape[:2]
    inner = max(1, min(width, MERGED // so_far.shape[2:].numel()))
    outer = max(1, MERGED // (inner * so_far.shape[2:].numel())) if inner >= width else 1
    for a, b in itertools.product(range(0, size, outer), range(0, width, inner)):
        some = slice(a, a + outer), slice(b, b + inner)
        wide = so_far[some].to(weight.dtype).lerp_(part[some].to(weight.dtype), weight[some])
        if wide.dtype != so_far.dtype:
            so_far[some] = wide
    torch.logaddexp(so_far_lse, part_lse, out=so_far_lse)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    if softcap is None:
        return _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return capped_attention(q, k, v, scale, softcap, mask)


def _rows_seeing(broken: Tensor, rows: Rows) -> Tensor:
    """Rows that see a broken key, bool `[batch, heads, q_len]`; broken is bool `[batch, kv_heads, kv_len]`."""
    before = torch.nn.functional.pad(broken.cumsum(-1, dtype=torch.int32), (1, 0))  # broken keys before each
    sees = [
        (before[..., interval[:, 1].long()] > before[..., interval[:, 0].long()]) & (interval[:, 0] < interval[:, 1])
        for interval in (rows.lead, rows.own)
    ]
    return (sees[0] | sees[1]).repeat_interleave(rows.q.shape[1] // broken.shape[1], dim=1)


def _keys_seen(broken: Tensor, rows: Rows, kv_len: int, num_kv_heads: int) -> Tensor:
    """Keys that a broken row sees, bool `[batch, kv_heads, kv_len]`; broken is bool `[batch, heads, q_len]`."""
    change = torch.zeros(
        *broken.shape[:2], kv_len + 1, dtype=torch.int32, device="cpu"
    )  # of the number of rows that see a key
    for lo, hi in (rows.lead.unbind(1), rows.own.unbind(1)):
        counts = (broken & (lo < hi)).to(torch.int32)
        change.index_add_(2, lo.long(), counts).index_add_(2, hi.long(), counts, alpha=-1)
    return (change.cumsum(-1)[..., :-1] > 0).unflatten(1, (num_kv_heads, -1)).any(2)


def attention(rows: Rows, keys: Keys, scores: Scores) -> tuple[Tensor, Tensor]:
    """Forward: `(out, lse [batch, heads, q_len])`; arguments are checked. `out` has the layout of q.

    A row that sees a key that is not finite is NaN, and the others have the bits that they always have.
    """
    broken = broken_keys(keys)
    if broken is None:
        return _attention(rows, keys, scores)
    out, lse = _attention(rows, without(keys, broken), scores)
    seeing = _rows_seeing(broken, rows)
    return out.masked_fill_(seeing.unsqueeze(-1), math.nan), lse.masked_fill_(seeing, math.nan)


def _attention(rows: Rows, keys: Keys, scores: Scores) -> tuple[Tensor, Tensor]:
    (q, lead, own, *_), (k, v), (scale, softcap, sinks) = rows, keys, scores
    plan = _plan_of(lead, own, softcap is None)
    heads = _Heads(q.shape[0], q.shape[1], k.shape[1])
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device="cpu")
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if plan.bare is not None:
        out.index_fill_(2, plan.bare, 0.0)
        lse.index_fill_(2, plan.bare, -math.inf)
    for edges in plan.edges:
        key, mask, unseen = edges.keys()
        mask = heads.tile_mask(mask.to(lse.dtype))
        for b in range(len(q)):
            part, part_lse = _attend(
                heads.tile_rows(q[b], edges.rows, edges.height),
                heads.tile_keys(k[b], key, edges.width),
                heads.tile_keys(v[b], key, edges.width),
                scale,
                softcap,
                mask=mask,
            )
            if unseen is not None:
                part_lse = part_lse.masked_fill(heads.tile_mask(unseen), -math.inf)
            out[b][:, edges.rows] = heads.untile_rows(part, edges.height).to(out.dtype)
            lse[b][:, edges.rows] = heads.untile_rows(part_lse, edges.height)
    for piece in plan.pieces:
        for call in heads.calls:
            q_part, so_far, so_far_lse = (heads.rows(x, call, piece.rows) for x in (q, out, lse))
            k_part, v_part = heads.keys(k, call, piece.keys), heads.keys(v, call, piece.keys)
            part, part_lse = _attend(q_part, k_part, v_part, scale, softcap, causal=piece.causal)
            if piece.alone:
                so_far.copy_(part)
                so_far_lse.copy_(part_lse)
                continue
            _merge(so_far, so_far_lse, part, part_lse)
    if sinks is not None:
        add_sinks(out, lse, sinks)
    return out, lse


def _attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of `(dq, dk, dv)`; `summary` is the rows' `out`, or delta with capped logits."""
    if softcap is None:
        return _flash_backward(grad_out, q, k, v, summary, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return capped_attention_backward(grad_out, summary, q, k, v, lse, scale, softcap, mask)


def attention_backward(rows: Rows, keys: Keys, scores: Scores, results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """Backward: `(dq, dk, dv)`, in the layout of q, k, v.

    A row that is not finite, or whose result or gradient is not, makes NaN of its dQ and of dK and dV of the keys that
    it sees; the other gradients have the bits that they have without it.
    """
    out, lse, grad_out, grad_lse = results
    broken = broken_keys(keys)
    sound = all_below(rows.q) and all_below(out, LARGEST_FACTOR) and all_below(grad_out, LARGEST_FACTOR)
    sound = sound and all(x is None or bool((x < math.inf).all()) for x in (lse, grad_lse))
    if sound and broken is None:
        return _attention_backward(rows, keys, scores, results)
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    row = ~(rows.q.isfinite().all(-1) & grad_out.isfinite().all(-1) & delta.isfinite() & (lse < math.inf))
    if grad_lse is not None:
        row |= ~grad_lse.isfinite()
    if broken is not None:
        row |= _rows_seeing(broken, rows)
        keys = without(keys, broken)
    q, out, grad_out = (x.masked_fill(row.unsqueeze(-1), 0.0) for x in (rows.q, out, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.masked_fill(row, 0.0)
    cut = Results(out, lse.masked_fill(row, -math.inf), grad_out, grad_lse)  # as if broken rows saw nothing
    dq, dk, dv = _attention_backward(rows._replace(q=q), keys, scores, cut)
    seen = _keys_seen(row, rows, keys.k.shape[2], keys.k.shape[1]).unsqueeze(-1)
    return (
        dq.masked_fill_(row.unsqueeze(-1), math.nan),
        dk.masked_fill_(seen, math.nan),
        dv.masked_fill_(seen, math.nan),
    )


def _attention_backward(rows: Rows, keys: Keys, scores: Scores, results: Results) -> tuple[Tensor, Tensor, Tensor]:
    (q, lead, own, *_), (k, v), (scale, softcap, _) = rows, keys, scores
    out, lse, grad_out, grad_lse = results
    if grad_lse is not None and softcap is None:
        # dS gains P * grad_lse. Its product with K is what attention gives for V = K, that with Q is a dV for dO = Q.
        weight = grad_lse.masked_fill(lse == -math.inf, 0.0).mul(scale).unsqueeze(-1)
        average, keys_lse = _attention(rows, Keys(k, k), Scores(scale))
        # What the keys have of the softmax: all of it, but for a sink.
        average *= torch.where(keys_lse == -math.inf, 0.0, (keys_lse - lse).exp()).unsqueeze(-1)
        dq, dk, dv = _attention_backward(rows, keys, scores, Results(out, lse, grad_out))
        weight = weight.to(q.dtype)
        more = attention_backward(rows, keys, scores, Results(out, lse, weight * q))[2]  # in half this may overflow
        return dq.add_(weight * average), dk.add_(more), dv
    plan = _plan_of(lead, own, softcap is None)
    heads = _Heads(q.shape[0], q.shape[1], k.shape[1])
    summary = out
    if softcap is not None:
        summary = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        summary = summary if grad_lse is None else summary - grad_lse
    lse = torch.where(lse == -math.inf, math.inf, lse)  # exp(score - inf) = 0: a row that saw no key has no gradient
    sums = q_sum, k_sum, v_sum = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
    dtypes = [x.dtype for x in (q, k, v)]
    grad_out, q, k, v, summary = map(unit_stride, (grad_out, q, k, v, summary))
    by_row = (grad_out, q, summary, lse)
    for edges in plan.edges:
        key, mask, _ = edges.keys()
        mask = heads.tile_mask(mask.to(lse.dtype))
        for b in range(len(q)):
            # In float32 (float64): on tiles this small ATen's bfloat16 backward takes 2 to 5 times as long.
            grad_part, q_part, summary_part, lse_part = (
                heads.tile_rows(x[b], edges.rows, edges.height).to(lse.dtype) for x in by_row
            )
            k_part, v_part = (heads.tile_keys(x[b], key, edges.width).to(lse.dtype) for x in (k, v))
            q_part, k_part, v_part = _attend_backward(
                grad_part, q_part, k_part, v_part, summary_part, lse_part, scale, softcap, mask=mask
            )
            q_sum[b][:, edges.rows] += heads.untile_rows(q_part, edges.height)
            k_sum[b].index_add_(1, key, k_part.transpose(0, 1).flatten(1, 2))
            v_sum[b].index_add_(1, key, v_part.transpose(0, 1).flatten(1, 2))
    for piece in plan.pieces:
        for call in heads.calls:
            grad_part, q_part, summary_part, lse_part = (heads.rows(x, call, piece.rows) for x in by_row)
            k_part, v_part = heads.keys(k, call, piece.keys), heads.keys(v, call, piece.keys)
            q_part, k_part, v_part = _attend_backward(
                grad_part, q_part, k_part, v_part, summary_part, lse_part, scale, softcap, causal=piece.causal
            )
            heads.rows(q_sum, call, piece.rows).add_(q_part)
            for total, part in ((k_sum, k_part), (v_sum, v_part)):
                part = part if heads.group == 1 else part.sum(1, dtype=lse.dtype)
                total[:, :, piece.keys][call].add_(part)
    dq, dk, dv = (total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True))
    return dq, dk, dv
