"""Verification: every draft row's verdict and token from its logits, a chunk of the vocabulary a program.

Computes, for each row of logits (twin: `tidar_kernels.eager.verify`; TiDAR, arXiv 2511.08923, step rule):

    x        logits (mixed with the block's own by beta), repetition penalty, divided by the temperature
    kept     tokens with x >= the largest of the top-k, top-p and min-p thresholds; ties at it are kept
    p, q     softmax over the kept x of the row, and of the row that its draft d was drawn from
    greedy, coupled      token = argmax(x [+ G]);        accept the draft if it is that token
    rejection            token = argmax(log(p - q)+ + G); accept with probability min(1, p(d) / q(d))
    point mass           the same with q = 1 at the draft

G is Gumbel noise, a function of (seed, position, token, stream) alone. The kernels, in their order:

    scan_chunks      (row, chunk)   largest x, its token, whether a logit is NaN or +inf
    count_chunks     (row, chunk)   how many x lie how far below the row's largest, in bins; sum of exp(x - top)
    gather_chunks    (row, chunk)   the x above a cut that loses no kept token, into a list of the row
    select_rows      (row)          the threshold, found in that list, and the sum of exp over what is kept
    race_chunks      (row, chunk)   the largest score with its noise
    decide           (sequence)     verdicts, accepted drafts, the token that follows

Programs of rows that need none of a pass leave at once: greedy rows all but the first, rows without top-k and top-p the
lists. Chunks have one size for every vocabulary, and what they found is combined in their order, so that results do not
depend on how many programs run at once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.launch import INTERPRET, Launch, Strided, cdiv, next_power_of_2, strided
from .noise import Stream
from .operands import Drafted, Requests, Target
from .params import Knob

# Streams of noise: the noise that drew a draft must not be the one that judges it.
_ACCEPT, _RESIDUAL = tl.constexpr(int(Stream.ACCEPT)), tl.constexpr(int(Stream.RESIDUAL))
# Columns of the sampling parameters.
_KNOBS = tl.constexpr(len(Knob))
_TEMPERATURE, _TOP_K = tl.constexpr(int(Knob.TEMPERATURE)), tl.constexpr(int(Knob.TOP_K))
_TOP_P, _MIN_P = tl.constexpr(int(Knob.TOP_P)), tl.constexpr(int(Knob.MIN_P))
_REPETITION_PENALTY = tl.constexpr(int(Knob.REPETITION_PENALTY))
COUPLED, REJECTION, POINT_MASS = 0, 1, 2
_COUPLED, _REJECTION = tl.constexpr(COUPLED), tl.constexpr(REJECTION)
# Tokens of a program, and of a tile. The interpreter pays by the operation, not by the element.
CHUNK, BLOCK_V, NUM_WARPS = (2**16, 2**16, 1) if INTERPRET else (8192, 2048, 8)
BLOCK_L = 512  # entries of a row's list at a time
# Pipeline stages of the loops over logits: Triton pipelines a loop without products only if it says num_stages.
STAGES = tl.constexpr(4)
# Bins of the distance below the largest x: 32 an octave, from 1/16 on; the last is for -inf, and past the vocabulary.
BINS = tl.constexpr(512)
_FIRST_BIN, _BIN_SHIFT = tl.constexpr(0x3D800000), tl.constexpr(18)  # the bits of 1/16; 5 bits of mantissa stay
WAYS = tl.constexpr(16)  # thresholds that are tried at once
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # -inf is never kept


@triton.jit
def _gumbel(seed, start, position, stream, BLOCK_V: tl.constexpr):
    """Gumbel noise of tokens start .. start + BLOCK_V: -log E, with E = -log(1 - u) exponential; a series for small u.

    All four words of Philox-4x32-10 are used: token t has word t % 4 of counter t // 4; `start` is a multiple of 4.
    """
    counter = start // 4 + tl.arange(0, BLOCK_V // 4)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + position, zero + stream, zero)
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_V])
    # From halves: an unsigned 32-bit integer does not convert to float the same way everywhere.
    u = (bits >> 16).to(tl.int32).to(tl.float32) * 65536.0 + (bits & 0xFFFF).to(tl.int32).to(tl.float32) + 0.5
    u = tl.minimum(u * 2.3283064365386963e-10, 0.99999994)
    exponential = tl.where(u < 1e-3, u * (1.0 + u * (0.5 + u * 0.3333333333333333)), -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def _uniform(seed, position, stream):
    """Uniform variates in (0, 1), one a position."""
    zero = tl.zeros_like(position)
    bits, _, _, _ = tl.philox(seed, zero, position, zero + stream, zero)
    return ((bits >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.960464477539063e-08


@triton.jit
def _scores(row, token, vocab_size, scores, HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr):
    """float32 x of a tile of tokens, -inf outside the vocabulary.

    `row` is the pointer to the row's logits and their stride, then the same of the mixed logits. `scores` is (beta,
    penalty, 1 / temperature, (pointer, stride) of the tokens seen, (pointer, stride) of the drafts, how many of the
    drafts the row has seen).
    """
    beta, penalty, inverse_temperature, seen, drafts, num_drafts = scores
    in_bounds = token < vocab_size
    x = tl.load(row[0] + token.to(tl.int64) * row[1], mask=in_bounds, other=float("-inf")).to(tl.float32)
    if HAS_MIX:
        mix = tl.load(row[2] + token.to(tl.int64) * row[3], mask=in_bounds, other=float("-inf")).to(tl.float32)
        x = tl.where(in_bounds, beta * x + (1.0 - beta) * mix, x)
    if HAS_SEEN:
        hit = tl.load(seen[0] + token.to(tl.int64) * seen[1], mask=in_bounds, other=0) != 0
        for i in range(0, num_drafts):
            hit = hit | (token == tl.load(drafts[0] + i * drafts[1]).to(tl.int32))
        x = tl.where(hit, tl.where(x > 0, x / penalty, x * penalty), x)
    return x * inverse_temperature


@triton.jit
def _take(best, best_token, value, token):
    """Running maximum and its token, lane by lane; `_winner` reduces the lanes. Ties go to the lowest token."""
    better = value > best
    return tl.where(better, value, best), tl.where(better, token, best_token)


@triton.jit
def _winner(best, best_token):
    """`(max, argmax)` over the lanes; -inf and -1 if no lane has a token."""
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, best_token, 2147483647), 0)


@triton.jit
def _order(x):
    """The bits of x as int32 that sort as the floats do."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _row(logits, mix, drafts, seen, knobs, num_rows, beta, HAS_DRAFTS: tl.constexpr):
    """`(sequence, its row, row and scores as `_scores` takes them)` of this program."""
    b, i = (tl.program_id(0) // num_rows).to(tl.int64), tl.program_id(0) % num_rows
    temperature = tl.load(knobs + _KNOBS * b + _TEMPERATURE)
    inverse = 1.0 / tl.where(temperature <= 0.0, 1.0, temperature)
    row = (
        logits.ptr + b * logits.stride[0] + i.to(tl.int64) * logits.stride[1], logits.stride[2],
        mix.ptr + b * mix.stride[0] + i.to(tl.int64) * mix.stride[1], mix.stride[2],
    )  # fmt: skip
    row_seen = (seen.ptr + b * seen.stride[0], seen.stride[1])
    row_drafts = (drafts.ptr + b * drafts.stride[0], drafts.stride[1])
    penalty = tl.load(knobs + _KNOBS * b + _REPETITION_PENALTY)
    return b, i, row, (beta, penalty, inverse, row_seen, row_drafts, i + 1 if HAS_DRAFTS else 0)


@triton.jit
def _top(found, r, num_chunks, CHUNKS: tl.constexpr):
    """`(largest x, its token or -1, whether the row is bad)` of row r, from its chunks."""
    c = tl.arange(0, CHUNKS)
    at = r * num_chunks + c
    tops = tl.load(found[0] + at, mask=c < num_chunks, other=float("-inf"))
    tokens = tl.load(found[1] + at, mask=c < num_chunks, other=-1)
    bad = tl.max(tl.load(found[2] + at, mask=c < num_chunks, other=0), 0)
    top, token = _winner(tops, tokens)
    return top, token, (bad > 0) | (token < 0)


@triton.jit
def _filters(knobs, b, vocab_size):
    """`(temperature, top_k, top_p, min_p, whether the row's threshold is searched)`; top_k is 0 if it keeps all."""
    knob_ptr = knobs + _KNOBS * b
    top_k, top_p = tl.load(knob_ptr + _TOP_K), tl.load(knob_ptr + _TOP_P)
    top_k = tl.where(top_k < vocab_size, top_k, 0.0)
    return tl.load(knob_ptr + _TEMPERATURE), top_k, top_p, tl.load(knob_ptr + _MIN_P), (top_k > 0) | (top_p < 1.0)


@triton.jit
def _bin(x, top):
    """The bin of x: the larger, the further below the top."""
    steps = ((top - x).to(tl.int32, bitcast=True) - _FIRST_BIN) >> _BIN_SHIFT
    return tl.where(x == float("-inf"), BINS - 1, tl.minimum(tl.maximum(steps, 0), BINS - 2))


# `vocab_size` is specialised: that it is a multiple of 16 is what lets a masked load take 16 bytes at a time.
@triton.jit(do_not_specialize=["num_rows"])
def scan_chunks_kernel(
    logits, mix, drafts, seen, knobs, found, num_rows, vocab_size, beta,
    CHUNK: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_DRAFTS: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: `found`, each `[batch * rows, chunks]`, gets its largest x, that token, and 1 if it is bad.

    logits and mix `[batch, rows, vocab]`, drafts `[batch, rows]`, seen `[batch, vocab]`.
    """
    _, _, row, scores = _row(logits, mix, drafts, seen, knobs, num_rows, beta, HAS_DRAFTS)
    best, best_token = tl.full([BLOCK_V], float("-inf"), tl.float32), tl.full([BLOCK_V], -1, tl.int32)
    bad = tl.zeros([BLOCK_V], tl.int32)
    first = tl.program_id(1) * CHUNK
    for start in tl.range(first, tl.minimum(first + CHUNK, vocab_size), BLOCK_V, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_V)
        x = _scores(row, token, vocab_size, scores, HAS_MIX, HAS_SEEN)
        broken = (x != x) | (x == float("inf"))
        bad |= broken.to(tl.int32)
        best, best_token = _take(best, best_token, tl.where(broken, float("-inf"), x), token)
    top, token = _winner(best, best_token)
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(found[0] + at, top)
    tl.store(found[1] + at, token)
    tl.store(found[2] + at, tl.max(bad, 0))


@triton.jit(do_not_specialize=["num_rows"])
def count_chunks_kernel(
    logits, mix, drafts, seen, knobs, found, bins, masses, num_rows, vocab_size, beta,
    CHUNK: tl.constexpr, BLOCK_V: tl.constexpr, CHUNKS: tl.constexpr, NEEDS_MASS: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_DRAFTS: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: `bins [batch * rows, chunks, BINS]`, its tokens by `_bin`; `masses`, its sum of exp(x - top).

    Where no threshold is searched, only the sum is used, and only of what min-p keeps.
    """
    b, _, row, scores = _row(logits, mix, drafts, seen, knobs, num_rows, beta, HAS_DRAFTS)
    temperature, _, _, min_p, is_searched = _filters(knobs, b, vocab_size)
    top, _, bad = _top(found, tl.program_id(0), tl.num_programs(1), CHUNKS)
    if (temperature > 0) & (bad == 0) & (is_searched | NEEDS_MASS):
        lowest = tl.where(is_searched | (min_p <= 0), _LOWEST, top + tl.log(tl.where(min_p > 0, min_p, 1.0)))
        counts, mass = tl.zeros([BINS], tl.int32), tl.zeros([BLOCK_V], tl.float32)
        first = tl.program_id(1) * CHUNK
        for start in tl.range(first, tl.minimum(first + CHUNK, vocab_size), BLOCK_V, num_stages=STAGES):
            x = _scores(row, start + tl.arange(0, BLOCK_V), vocab_size, scores, HAS_MIX, HAS_SEEN)
            if is_searched:
                counts += tl.histogram(_bin(x, top), BINS)
            mass += tl.where(x >= lowest, tl.exp(x - top), 0.0)
        at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(masses + at, tl.sum(mass, 0))
        if is_searched:
            tl.store(bins + at * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _mass(masses, num_chunks, CHUNKS: tl.constexpr):
    """The sum of this program's row over its chunks."""
    c = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(masses + tl.program_id(0) * num_chunks + c, mask=c < num_chunks, other=0.0), 0)


@triton.jit(do_not_specialize=["num_rows"])
def gather_chunks_kernel(
    logits, mix, drafts, seen, knobs, found, bins, masses, listed, counts, num_rows, vocab_size, beta,
    CHUNK: tl.constexpr, BLOCK_V: tl.constexpr, CHUNKS: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_DRAFTS: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: its x in the bins that may be kept, into `listed [batch * rows, vocab]` in their order.

    For top-k these are the bins up to the one with the k-th largest x. For top-p the others have together, even if all
    their tokens lay at the upper ends of their bins, less than the tail that may go. Chunk 0 stores the list's length.
    """
    b, _, row, scores = _row(logits, mix, drafts, seen, knobs, num_rows, beta, HAS_DRAFTS)
    temperature, top_k, top_p, _, is_searched = _filters(knobs, b, vocab_size)
    chunk, num_chunks, r = tl.program_id(1), tl.num_programs(1), tl.program_id(0).to(tl.int64)
    top, _, bad = _top(found, r, num_chunks, CHUNKS)
    if (temperature > 0) & (bad == 0) & is_searched:
        c, j = tl.arange(0, CHUNKS), tl.arange(0, BINS)
        at = (r * num_chunks + c[:, None]) * BINS + j[None, :]
        tally = tl.load(bins + at, mask=(c[:, None] < num_chunks) & (j[None, :] < BINS - 1), other=0)
        per_bin = tl.sum(tally, 0)
        nearest = ((j << _BIN_SHIFT) + _FIRST_BIN).to(tl.float32, bitcast=True)
        most = per_bin.to(tl.float32) * tl.where(j > 0, tl.exp(-nearest), 1.0)
        tail = (1.0 - top_p) * _mass(masses, num_chunks, CHUNKS) * 0.999  # sums are rounded
        is_listed = tl.cumsum(most, 0, reverse=True) > tail
        if top_k > 0:
            is_listed = tl.cumsum(per_bin, 0) - per_bin < top_k
        last = tl.max(tl.where(is_listed & (j < BINS - 1), j, 0), 0)
        listed_here = tl.sum(tl.where(j[None, :] <= last, tally, 0), 1)
        if chunk == 0:
            tl.store(counts + r, tl.sum(listed_here, 0))
        place = r * vocab_size + tl.sum(tl.where(c < chunk, listed_here, 0), 0)
        first = chunk * CHUNK
        for start in tl.range(first, tl.minimum(first + CHUNK, vocab_size), BLOCK_V, num_stages=STAGES):
            x = _scores(row, start + tl.arange(0, BLOCK_V), vocab_size, scores, HAS_MIX, HAS_SEEN)
            is_in = (_bin(x, top) <= last).to(tl.int32)
            tl.store(listed + place + tl.cumsum(is_in, 0) - 1, x, mask=is_in > 0)
            place += tl.sum(is_in, 0)


@triton.jit
def _search(listed, count, floor, top, target, BLOCK_L: tl.constexpr, BY_COUNT: tl.constexpr):
    """The largest threshold t between floor and top, as `_order`, whose kept entries x >= t reach `target`.

    BY_COUNT: in number; otherwise in mass, the sum of exp(x - top). Each pass tries WAYS - 1 thresholds.
    """
    lo, hi = floor.to(tl.int64), _order(top).to(tl.int64)
    way = tl.arange(0, WAYS)
    while lo < hi:
        step = (hi - lo + WAYS) // WAYS
        tried = lo + step * way
        measure = tl.zeros([BLOCK_L, WAYS], tl.float32)
        for start in range(0, count, BLOCK_L):
            entry = start + tl.arange(0, BLOCK_L)
            x = tl.load(listed + entry, mask=entry < count, other=float("-inf"))
            weight = tl.full([BLOCK_L], 1.0, tl.float32) if BY_COUNT else tl.exp(x - top)
            measure += tl.where(_order(x)[:, None] >= tried[None, :], weight[:, None], 0.0)
        enough = (way == 0) | ((tl.sum(measure, 0) >= target) & (tried <= hi))
        lo += step * (tl.sum(enough.to(tl.int32), 0) - 1)
        hi = tl.minimum(hi, lo + step - 1)
    return lo.to(tl.int32)


@triton.jit
def _listed_mass(listed, count, floor, top, BLOCK_L: tl.constexpr):
    """Sum of exp(x - top) over the list's kept entries, x >= floor."""
    total = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, count, BLOCK_L):
        entry = start + tl.arange(0, BLOCK_L)
        x = tl.load(listed + entry, mask=entry < count, other=float("-inf"))
        total += tl.where(_order(x) >= floor, tl.exp(x - top), 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["num_rows"])
def select_rows_kernel(
    knobs, found, masses, listed, counts, floors, totals, num_rows, vocab_size, num_chunks,
    CHUNKS: tl.constexpr, BLOCK_L: tl.constexpr, NEEDS_MASS: tl.constexpr,
):  # fmt: skip
    """One row: `floors`, its least kept x as `_order`, by top-k, then top-p of what that keeps, then min-p.

    `totals` is the sum of exp(x - top) over what is kept; both `[batch * rows]`.
    """
    r = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p, min_p, is_searched = _filters(knobs, r // num_rows, vocab_size)
    top, _, bad = _top(found, r, num_chunks, CHUNKS)
    if (temperature > 0) & (bad == 0):
        floor = tl.min(_order(tl.full([1], _LOWEST, tl.float32)), 0)
        total = _mass(masses, num_chunks, CHUNKS) if NEEDS_MASS else 0.0
        if is_searched:
            row, count = listed + r * vocab_size, tl.load(counts + r)
            if top_k > 0:
                floor = _search(row, count, floor, top, top_k, BLOCK_L, True)
            if top_p < 1.0:
                mass = _mass(masses, num_chunks, CHUNKS)
                if top_k > 0:
                    mass = _listed_mass(row, count, floor, top, BLOCK_L)
                floor = _search(row, count, floor, top, top_p * mass, BLOCK_L, False)
        if min_p > 0.0:
            floor = tl.maximum(floor, _order(top + tl.log(min_p)))
        if NEEDS_MASS:
            if is_searched:
                total = _listed_mass(listed + r * vocab_size, tl.load(counts + r), floor, top, BLOCK_L)
            tl.store(totals + r, total)
        tl.store(floors + r, floor)


@triton.jit(do_not_specialize=["num_rows", "stream"])
def race_chunks_kernel(
    logits, mix, draft_logits, drafts, seen, knobs, seeds, positions, target, drawn_from, raced,
    num_rows, vocab_size, beta, stream,
    RULE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_V: tl.constexpr, CHUNKS: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_DRAFTS: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: its largest score with noise and that token, in `raced[0:2]`, each `[batch * rows, chunks]`.

    `target` and `drawn_from` are `(found, floors, totals)` of the logits and of `draft_logits`, whose row i is what
    draft i + 1 was drawn from: `[batch, rows - 1, vocab]`. The rejection rules score log(p - q), and log p in
    `raced[2:4]`; `raced[4:6]`, each `[batch * rows]`, get p and q of the row's draft.
    """
    b, i, row, scores = _row(logits, mix, drafts, seen, knobs, num_rows, beta, HAS_DRAFTS)
    r, num_chunks = tl.program_id(0), tl.num_programs(1)
    top, _, bad = _top(target[0], r, num_chunks, CHUNKS)
    if (tl.load(knobs + _KNOBS * b + _TEMPERATURE) > 0) & (bad == 0):
        seed, position, floor = tl.load(seeds + b), (tl.load(positions + b) + i).to(tl.int32), tl.load(target[1] + r)
        best, best_token = tl.full([BLOCK_V], float("-inf"), tl.float32), tl.full([BLOCK_V], -1, tl.int32)
        second, second_token = best, best_token
        first = tl.program_id(1) * CHUNK
        end = tl.minimum(first + CHUNK, vocab_size)
        if RULE == _COUPLED:
            for start in tl.range(first, end, BLOCK_V, num_stages=STAGES):
                token = start + tl.arange(0, BLOCK_V)
                x = _scores(row, token, vocab_size, scores, HAS_MIX, HAS_SEEN)
                noise = _gumbel(seed, start, position, stream, BLOCK_V)
                best, best_token = _take(
                    best, best_token, tl.where(_order(x) >= floor, x + noise, float("-inf")), token
                )
        else:
            draft = tl.load(drafts.ptr + b * drafts.stride[0] + (i + 1) * drafts.stride[1],
                            mask=i + 1 < num_rows, other=-1).to(tl.int32)  # fmt: skip
            total = tl.load(target[2] + r)
            q_row, q_scores, q_top, q_floor, q_total = row, scores, top, floor, total
            if RULE == _REJECTION:
                q_ptr = draft_logits.ptr + b * draft_logits.stride[0] + i.to(tl.int64) * draft_logits.stride[1]
                q_row = (q_ptr, draft_logits.stride[2], row[2], row[3])
                q_scores = (beta, scores[1], scores[2], scores[3], scores[4], 0)
                if draft >= 0:
                    q_r = r - r // num_rows  # a row less a sequence
                    q_top, _token, _bad = _top(drawn_from[0], q_r, num_chunks, CHUNKS)
                    q_floor, q_total = tl.load(drawn_from[1] + q_r), tl.load(drawn_from[2] + q_r)
            p_draft, q_draft = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
            for start in tl.range(first, end, BLOCK_V, num_stages=STAGES):
                token = start + tl.arange(0, BLOCK_V)
                x = _scores(row, token, vocab_size, scores, HAS_MIX, HAS_SEEN)
                p = tl.where(_order(x) >= floor, tl.exp(x - top), 0.0) / total
                q = tl.where(token == draft, 1.0, 0.0)
                if RULE == _REJECTION:
                    q = tl.zeros_like(p)
                    if draft >= 0:
                        y = _scores(q_row, token, vocab_size, q_scores, False, HAS_SEEN)
                        q = tl.where(_order(y) >= q_floor, tl.exp(y - q_top), 0.0) / q_total
                noise, rest = _gumbel(seed, start, position, _RESIDUAL, BLOCK_V), p - q
                value = tl.where(rest > 0, tl.log(tl.where(rest > 0, rest, 1.0)) + noise, float("-inf"))
                best, best_token = _take(best, best_token, value, token)
                value = tl.where(p > 0, tl.log(tl.where(p > 0, p, 1.0)) + noise, float("-inf"))
                second, second_token = _take(second, second_token, value, token)
                p_draft += tl.where(token == draft, p, 0.0)
                q_draft += tl.where(token == draft, q, 0.0)
            if (draft >= first) & (draft < end):
                tl.store(raced[4] + r, tl.sum(p_draft, 0))
                tl.store(raced[5] + r, tl.sum(q_draft, 0))
        at = r * num_chunks + tl.program_id(1)
        value, token = _winner(best, best_token)
        tl.store(raced[0] + at, value)
        tl.store(raced[1] + at, token)
        if RULE != _COUPLED:
            value, token = _winner(second, second_token)
            tl.store(raced[2] + at, value)
            tl.store(raced[3] + at, token)


@triton.jit
def _row_winners(values, tokens, at, in_bounds):
    """The token of the largest value of each row of a tile `[rows, chunks]`, the lowest of ties; -1 for none."""
    value = tl.load(values + at, mask=in_bounds, other=float("-inf"))
    token = tl.load(tokens + at, mask=in_bounds, other=-1)
    token = tl.where(token < 0, 2147483647, token)
    first = tl.min(tl.where(value == tl.max(value, 1)[:, None], token, 2147483647), 1)
    return tl.where(first == 2147483647, -1, first)


@triton.jit(do_not_specialize=["num_rows"])
def decide_kernel(
    drafts, knobs, seeds, positions, target, drawn_from, raced, decided, num_rows, num_chunks,
    RULE: tl.constexpr, BLOCK_B: tl.constexpr, CHUNKS: tl.constexpr, HAS_DRAFTS: tl.constexpr,
):  # fmt: skip
    """One sequence: the token of each of its rows; and up to the first row that accepts no draft, what was decided.

    `decided` is int64 `(accepted, next_tokens, bad_rows)`, each `[batch]`, and `tokens [batch, rows]`, -1 for bad rows.
    """
    b, i, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_B), tl.arange(0, CHUNKS)
    is_row = i < num_rows
    r = b * num_rows + i
    at, in_bounds = r[:, None] * num_chunks + c[None, :], is_row[:, None] & (c[None, :] < num_chunks)
    is_greedy = tl.load(knobs + _KNOBS * b + _TEMPERATURE) <= 0.0
    token = _row_winners(target[0][0], target[0][1], at, in_bounds)
    bad = (tl.max(tl.load(target[0][2] + at, mask=in_bounds, other=0), 1) > 0) | (token < 0)
    draft = tl.full([BLOCK_B], -1, tl.int32)
    if HAS_DRAFTS:
        row_drafts = drafts.ptr + b * drafts.stride[0] + (i + 1) * drafts.stride[1]
        draft = tl.load(row_drafts, mask=i + 1 < num_rows, other=-1).to(tl.int32)
    accept = token == draft
    if is_greedy == 0:
        if RULE == _REJECTION:
            q_at, has_q = at - b * num_chunks, in_bounds & (draft >= 0)[:, None]  # a row less a sequence
            q_bad = tl.max(tl.load(drawn_from[0][2] + q_at, mask=has_q, other=0), 1) > 0
            q_bad |= _row_winners(drawn_from[0][0], drawn_from[0][1], q_at, has_q) < 0
            bad |= q_bad & (draft >= 0)
        good = in_bounds & (bad == 0)[:, None]
        token = _row_winners(raced[0], raced[1], at, good)
        accept = token == draft
        if RULE != _COUPLED:
            # Nothing is left of p only where p = q up to rounding: then either serves.
            token = tl.where(token < 0, _row_winners(raced[2], raced[3], at, good), token)
            has_odds = is_row & (bad == 0) & (draft >= 0)
            p_draft = tl.load(raced[4] + r, mask=has_odds, other=0.0)
            q_draft = tl.load(raced[5] + r, mask=has_odds, other=1.0)
            position = (tl.load(positions + b) + i).to(tl.int32)
            accept = _uniform(tl.load(seeds + b), position, _ACCEPT) * q_draft < p_draft
    token = tl.where(bad, -1, token).to(tl.int64)
    tl.store(decided[3] + r, token, mask=is_row)
    if HAS_DRAFTS:
        stays = accept & (draft >= 0) & (bad == 0)
        last = tl.min(tl.where(stays | (i >= num_rows), num_rows, i), 0)
        last = tl.minimum(last, num_rows - 1)
        here = i == last
        tl.store(decided[0] + b, (last + 1).to(tl.int64))
        tl.store(decided[1] + b, tl.sum(tl.where(here, token, 0), 0))
        tl.store(decided[2] + b, tl.max(tl.where(here & bad, i, -1), 0).to(tl.int64))


_Found = tuple[tuple[Tensor, ...], Tensor, Tensor]  # of every chunk its best; of every row its floor and its total


class _Options(NamedTuple):
    """Options of every kernel, in the order of their launches."""

    scan_chunks: dict[str, Any]
    count_chunks: dict[str, Any]
    gather_chunks: dict[str, Any]
    select_rows: dict[str, Any]
    race_chunks: dict[str, Any]
    decide: dict[str, Any]


@functools.lru_cache(maxsize=256)
def _options(
    num_rows: int, vocab_size: int, rule: int, needs_mass: bool, has_mix: bool, has_seen: bool, has_drafts: bool
) -> _Options:
    """Kept, since every step asks for the same ones."""
    block = min(BLOCK_V, CHUNK, max(4, next_power_of_2(vocab_size))) if INTERPRET else BLOCK_V
    tiles = {"CHUNK": CHUNK, "BLOCK_V": block, "num_warps": NUM_WARPS, "HAS_MIX": has_mix, "HAS_SEEN": has_seen}
    chunks, mass = {"CHUNKS": next_power_of_2(cdiv(vocab_size, CHUNK))}, {"NEEDS_MASS": needs_mass}
    drafts, rules = {"HAS_DRAFTS": has_drafts}, {"RULE": rule}
    # Left alone, the compiler spills two scalars to fit more programs on a multiprocessor.
    most_registers = {"maxnreg": 255} if rule == REJECTION else {}
    return _Options(
        scan_chunks={**tiles, **drafts},
        count_chunks={**tiles, **drafts, **chunks, **mass},
        gather_chunks={**tiles, **drafts, **chunks},
        select_rows={**chunks, **mass, "BLOCK_L": BLOCK_L, "num_warps": NUM_WARPS},
        race_chunks={**tiles, **drafts, **chunks, **rules, **most_registers},
        decide={**chunks, **drafts, **rules, "BLOCK_B": next_power_of_2(num_rows), "num_warps": 4},
    )


def _plan_rows(
    target: Target, operands: tuple[Strided, ...], knobs: Tensor, options: _Options
) -> tuple[list[Launch], _Found]:
    """The largest scores of all rows, and what their filters keep: launches, and the tensors that they fill.

    `operands` are logits, mix, drafts and seen.
    """
    logits, _, beta = target
    batch, num_rows, vocab_size = logits.shape
    rows, num_chunks = batch * num_rows, cdiv(vocab_size, CHUNK)
    tops = logits.new_empty(rows, num_chunks, dtype=torch.float32)
    top_tokens = logits.new_empty(rows, num_chunks, dtype=torch.int32)
    found = (tops, top_tokens, torch.empty_like(top_tokens))
    bins = logits.new_empty(rows, num_chunks, BINS.value, dtype=torch.int32)
    listed, masses = logits.new_empty(rows, vocab_size, dtype=torch.float32), torch.empty_like(tops)
    counts, totals = logits.new_empty(rows, dtype=torch.int32), logits.new_empty(rows, dtype=torch.float32)
    floors = torch.empty_like(counts)
    scored, sizes, grid = (*operands, knobs, found), (num_rows, vocab_size, beta), (rows, num_chunks)
    selected = (knobs, found, masses, listed, counts, floors, totals, num_rows, vocab_size, num_chunks)
    launches = [
        Launch(scan_chunks_kernel, grid, (*scored, *sizes), options.scan_chunks),
        Launch(count_chunks_kernel, grid, (*scored, bins, masses, *sizes), options.count_chunks),
        Launch(gather_chunks_kernel, grid, (*scored, bins, masses, listed, counts, *sizes), options.gather_chunks),
        Launch(select_rows_kernel, (rows,), selected, options.select_rows),
    ]
    return launches, (found, floors, totals)


def plan_verify(
    target: Target, drafted: Drafted | None, requests: Requests, stream: int
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Lay out the launches: `(launches, (accepted, next_tokens, bad_rows, tokens))`; without drafts only tokens."""
    (logits, mix, beta), (positions, knobs, seeds, seen) = target, requests
    drafts, draft_logits, rule = (None, None, COUPLED) if drafted is None else drafted
    batch, num_rows, vocab_size = logits.shape
    rows, num_chunks = batch * num_rows, cdiv(vocab_size, CHUNK)
    tokens = logits.new_empty(batch, num_rows, dtype=torch.int64)
    accepted = next_tokens = bad_rows = tokens  # without drafts never written
    if drafted is not None:
        accepted, next_tokens, bad_rows = tokens.new_empty(batch), tokens.new_empty(batch), tokens.new_empty(batch)

    options = _options(
        num_rows, vocab_size, rule, rule != COUPLED, mix is not None, seen is not None, drafts is not None
    )
    no_logits, no_drafts = Strided(logits, (0, 0, 0)), Strided(logits, (0, 0))  # never read
    mix_operand = no_logits if mix is None else strided(mix)
    drafts_operand = no_drafts if drafts is None else strided(drafts)
    seen_operand = no_drafts if seen is None else strided(seen)
    operands = (strided(logits), mix_operand, drafts_operand, seen_operand)
    launches, target_rows = _plan_rows(target, operands, knobs, options)
    draft_operand, drawn_from = no_logits, target_rows
    if draft_logits is not None:
        draft_logits = draft_logits[:, 1:]  # row i decides draft i + 1
        draft_operand = strided(draft_logits)
        plain = _options(num_rows, vocab_size, COUPLED, True, False, seen is not None, False)
        draft_operands = (draft_operand, no_logits, no_drafts, seen_operand)
        more, drawn_from = _plan_rows(Target(draft_logits), draft_operands, knobs, plain)
        launches += more
    (tops, top_tokens, _), _, totals = target_rows
    raced: tuple[Tensor, ...] = (torch.empty_like(tops), torch.empty_like(top_tokens))
    if rule == COUPLED:
        raced += (tops, top_tokens, totals, totals)  # never touched
    else:
        raced += (*map(torch.empty_like, raced), torch.empty_like(totals), torch.empty_like(totals))
    given = (knobs, seeds, positions, target_rows, drawn_from, raced)
    compared = (operands[0], mix_operand, draft_operand, drafts_operand, seen_operand)
    raced_by = (*compared, *given, num_rows, vocab_size, beta, stream)
    decided = (accepted, next_tokens, bad_rows, tokens)
    launches += [
        Launch(race_chunks_kernel, (rows, num_chunks), raced_by, options.race_chunks),
        Launch(decide_kernel, (batch,), (drafts_operand, *given, decided, num_rows, num_chunks), options.decide),
    ]
    return launches, decided


def verify(target: Target, drafted: Drafted, requests: Requests) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels: `(accepted, next_tokens, bad_rows)`, each int64 `[batch]`; arguments are checked."""
    launches, (accepted, next_tokens, bad_rows, _) = plan_verify(target, drafted, requests, int(Stream.TOKEN))
    for launch in launches:
        launch.run()
    return accepted, next_tokens, bad_rows


def sample(target: Target, requests: Requests, stream: int) -> Tensor:
    """Run the kernels without drafts: a token of every row, int64 `[batch, rows]`, -1 where the logits are bad."""
    launches, results = plan_verify(target, None, requests, stream)
    for launch in launches:
        launch.run()
    return results[3]
