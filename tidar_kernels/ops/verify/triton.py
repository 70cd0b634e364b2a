"""Verification: every draft row's verdict and token from its logits, vocabulary tile by tile, no copy of the logits.

Computes, for each row of logits (twin: `tidar_kernels.eager.verify`; TiDAR, arXiv 2511.08923, step rule):

    x        logits (mixed with the block's own by beta), repetition penalty, divided by the temperature
    kept     tokens with x >= the largest of the top-k, top-p and min-p thresholds; ties at it are kept
    p, q     softmax over the kept x of the row, and of the row that its draft d was drawn from
    greedy, coupled      token = argmax(x [+ G]);        accept the draft if it is that token
    rejection            token = argmax(log(p - q)+ + G); accept with probability min(1, p(d) / q(d))
    point mass           the same with q = 1 at the draft

G is Gumbel noise, a function of (seed, position, token, stream) alone. One program takes one row and reads its logits
once per pass, a vocabulary tile at a time; a second, tiny kernel counts the accepted rows of each sequence. Thresholds
are found by bisection on the bits of x: any vocabulary, any ties, no sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.launch import INTERPRET, Launch, Strided, next_power_of_2, strided
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
_REJECTION, _POINT_MASS = tl.constexpr(REJECTION), tl.constexpr(POINT_MASS)
# One shape for every vocabulary. The interpreter pays by the operation, not by the element.
BLOCK_V, NUM_WARPS = (2**16 if INTERPRET else 2048), 8
# Pipeline stages of the loops over logits: Triton pipelines a loop without products only if it says num_stages.
STAGES = tl.constexpr(8)


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
    """A uniform variate in (0, 1)."""
    zero = tl.zeros([1], tl.int32)
    bits, _, _, _ = tl.philox(seed, zero, zero + position, zero + stream, zero)
    return tl.max(((bits >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.960464477539063e-08, 0)


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
def _bisect(
    row, vocab_size, scores, floor, top, target,
    BLOCK_V: tl.constexpr, HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The largest threshold t between floor and top, as `_order`, whose kept tokens x >= t reach `target`.

    COUNT: in number; otherwise in mass, the sum of exp(x - top).
    """
    lo, hi = floor.to(tl.int64), _order(top).to(tl.int64)
    while lo < hi:
        middle = lo + (hi - lo + 1) // 2
        measure = tl.zeros([BLOCK_V], tl.float32)
        for start in tl.range(0, vocab_size, BLOCK_V, num_stages=STAGES):
            x = _scores(row, start + tl.arange(0, BLOCK_V), vocab_size, scores, HAS_MIX, HAS_SEEN)
            weight = tl.full([BLOCK_V], 1.0, tl.float32) if COUNT else tl.exp(x - top)
            measure += tl.where(_order(x) >= middle, weight, 0.0)
        enough = tl.sum(measure, 0) >= target
        lo, hi = tl.where(enough, middle, lo), tl.where(enough, hi, middle - 1)
    return lo.to(tl.int32)


@triton.jit
def _mass(row, vocab_size, scores, floor, top, BLOCK_V: tl.constexpr, HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr):
    """Sum of exp(x - top) over the kept tokens, x >= floor."""
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, vocab_size, BLOCK_V, num_stages=STAGES):
        x = _scores(row, start + tl.arange(0, BLOCK_V), vocab_size, scores, HAS_MIX, HAS_SEEN)
        total += tl.where(_order(x) >= floor, tl.exp(x - top), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _top(row, vocab_size, scores, BLOCK_V: tl.constexpr, HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr):
    """`(max, argmax, whether a logit is NaN or +inf)`."""
    best, best_token = tl.full([BLOCK_V], float("-inf"), tl.float32), tl.full([BLOCK_V], -1, tl.int32)
    bad = tl.zeros([BLOCK_V], tl.int32)
    for start in tl.range(0, vocab_size, BLOCK_V, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_V)
        x = _scores(row, token, vocab_size, scores, HAS_MIX, HAS_SEEN)
        broken = (x != x) | (x == float("inf"))
        bad |= broken.to(tl.int32)
        best, best_token = _take(best, best_token, tl.where(broken, float("-inf"), x), token)
    top, token = _winner(best, best_token)
    return top, token, tl.max(bad, 0)


@triton.jit
def _threshold(
    row, vocab_size, scores, top, top_k, top_p, min_p,
    BLOCK_V: tl.constexpr, HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """The least kept x, as `_order`: by top-k, then top-p of what that keeps, then min-p."""
    floor = _order(tl.full([1], -3.4028234663852886e38, tl.float32))
    floor = tl.min(floor, 0)  # -inf is never kept
    if (top_k > 0) & (top_k < vocab_size):
        floor = _bisect(row, vocab_size, scores, floor, top, top_k, BLOCK_V, HAS_MIX, HAS_SEEN, True)
    if top_p < 1.0:
        target = top_p * _mass(row, vocab_size, scores, floor, top, BLOCK_V, HAS_MIX, HAS_SEEN)
        floor = _bisect(row, vocab_size, scores, floor, top, target, BLOCK_V, HAS_MIX, HAS_SEEN, False)
    if min_p > 0.0:
        floor = tl.maximum(floor, _order(top + tl.log(min_p)))
    return floor


# `vocab_size` is specialised: that it is a multiple of 16 is what lets a masked load take 16 bytes at a time.
@triton.jit(do_not_specialize=["num_rows", "stream"])
def verify_rows_kernel(
    logits, mix, draft_logits, drafts, seen, knobs, seeds, positions, tokens, verdicts,
    num_rows, vocab_size, beta, stream,
    RULE: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_DRAFTS: tl.constexpr,
):  # fmt: skip
    """One row: its token, and its verdict on the next draft: 1 accepted, 0 replaced by the token, -1 for a bad row.

    logits and mix `[batch, rows, vocab]`, draft_logits likewise, drafts `[batch, rows]`, seen `[batch, vocab]`; tokens
    int64 and verdicts int32 `[batch, rows]`. A row is bad if a logit is NaN or +inf, or none is above -inf.
    """
    b, i = (tl.program_id(0) // num_rows).to(tl.int64), tl.program_id(0) % num_rows
    knob_ptr = knobs + _KNOBS * b
    temperature, top_k = tl.load(knob_ptr + _TEMPERATURE), tl.load(knob_ptr + _TOP_K)
    top_p, min_p = tl.load(knob_ptr + _TOP_P), tl.load(knob_ptr + _MIN_P)
    penalty = tl.load(knob_ptr + _REPETITION_PENALTY)
    seed, position = tl.load(seeds + b), (tl.load(positions + b) + i).to(tl.int32)
    is_greedy = temperature <= 0.0
    inverse = 1.0 / tl.where(is_greedy, 1.0, temperature)
    row_drafts = (drafts.ptr + b * drafts.stride[0], drafts.stride[1])
    row_seen = (seen.ptr + b * seen.stride[0], seen.stride[1])
    row = (
        logits.ptr + b * logits.stride[0] + i.to(tl.int64) * logits.stride[1], logits.stride[2],
        mix.ptr + b * mix.stride[0] + i.to(tl.int64) * mix.stride[1], mix.stride[2],
    )  # fmt: skip
    scores = (beta, penalty, inverse, row_seen, row_drafts, i + 1 if HAS_DRAFTS else 0)
    has_draft = False
    draft = -1
    if HAS_DRAFTS:
        draft = tl.load(row_drafts[0] + (i + 1) * row_drafts[1], mask=i + 1 < num_rows, other=-1).to(tl.int32)
        has_draft = draft >= 0

    top, token, bad = _top(row, vocab_size, scores, BLOCK_V, HAS_MIX, HAS_SEEN)
    bad = (bad > 0) | (token < 0)
    accept = token == draft
    if (is_greedy == 0) & (bad == 0):
        floor = _threshold(row, vocab_size, scores, top, top_k, top_p, min_p, BLOCK_V, HAS_MIX, HAS_SEEN)
        best, best_token = tl.full([BLOCK_V], float("-inf"), tl.float32), tl.full([BLOCK_V], -1, tl.int32)
        if RULE == 0:
            for start in tl.range(0, vocab_size, BLOCK_V, num_stages=STAGES):
                candidate = start + tl.arange(0, BLOCK_V)
                x = _scores(row, candidate, vocab_size, scores, HAS_MIX, HAS_SEEN)
                value = tl.where(_order(x) >= floor, x + _gumbel(seed, start, position, stream, BLOCK_V), float("-inf"))
                best, best_token = _take(best, best_token, value, candidate)
            _, token = _winner(best, best_token)
            accept = token == draft
        else:
            p_total = _mass(row, vocab_size, scores, floor, top, BLOCK_V, HAS_MIX, HAS_SEEN)
            q_row, q_scores = row, scores
            q_top, q_floor, q_total = top, floor, p_total
            if RULE == _REJECTION:
                q_ptr = draft_logits.ptr + b * draft_logits.stride[0] + (i + 1).to(tl.int64) * draft_logits.stride[1]
                q_row = (q_ptr, draft_logits.stride[2], row[2], row[3])
                q_scores = (beta, penalty, inverse, row_seen, row_drafts, 0)
                if has_draft:
                    q_top, _, q_bad = _top(q_row, vocab_size, q_scores, BLOCK_V, False, HAS_SEEN)
                    bad = q_bad > 0
                    q_floor = _threshold(
                        q_row, vocab_size, q_scores, q_top, top_k, top_p, min_p, BLOCK_V, False, HAS_SEEN
                    )
                    q_total = _mass(q_row, vocab_size, q_scores, q_floor, q_top, BLOCK_V, False, HAS_SEEN)
            second, second_token = best, best_token
            p_draft, q_draft = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
            for start in tl.range(0, vocab_size, BLOCK_V, num_stages=STAGES):
                candidate = start + tl.arange(0, BLOCK_V)
                x = _scores(row, candidate, vocab_size, scores, HAS_MIX, HAS_SEEN)
                p = tl.where(_order(x) >= floor, tl.exp(x - top), 0.0) / p_total
                q = tl.where(candidate == draft, 1.0, 0.0)
                if RULE == _REJECTION:
                    q = tl.zeros_like(p)
                    if has_draft:
                        y = _scores(q_row, candidate, vocab_size, q_scores, False, HAS_SEEN)
                        q = tl.where(_order(y) >= q_floor, tl.exp(y - q_top), 0.0) / q_total
                noise = _gumbel(seed, start, position, _RESIDUAL, BLOCK_V)
                rest = p - q
                value = tl.where(rest > 0, tl.log(tl.where(rest > 0, rest, 1.0)) + noise, float("-inf"))
                best, best_token = _take(best, best_token, value, candidate)
                value = tl.where(p > 0, tl.log(tl.where(p > 0, p, 1.0)) + noise, float("-inf"))
                second, second_token = _take(second, second_token, value, candidate)
                p_draft += tl.where(candidate == draft, p, 0.0)
                q_draft += tl.where(candidate == draft, q, 0.0)
            _, token = _winner(best, best_token)
            _, second_token = _winner(second, second_token)
            # Nothing is left of p only where p = q up to rounding: then either serves.
            token = tl.where(token < 0, second_token, token)
            accept = _uniform(seed, position, _ACCEPT) * tl.sum(q_draft, 0) < tl.sum(p_draft, 0)
    tl.store(tokens + tl.program_id(0), tl.where(bad, -1, token).to(tl.int64))
    verdict = tl.where(bad, -1, tl.where(accept & has_draft, 1, 0))
    tl.store(verdicts + tl.program_id(0), verdict.to(tl.int32))


@triton.jit(do_not_specialize=["num_rows"])
def count_accepted_kernel(tokens, verdicts, accepted, next_tokens, bad_rows, num_rows, BLOCK_B: tl.constexpr):
    """One sequence: `accepted` counts its rows up to the first that does not accept; that row's token comes next."""
    b, i = tl.program_id(0), tl.arange(0, BLOCK_B)
    verdict = tl.load(verdicts + b * num_rows + i, mask=i < num_rows, other=0)
    last = tl.min(tl.where((verdict != 1) & (i < num_rows), i, num_rows), 0)
    tl.store(accepted + b, (last + 1).to(tl.int64))
    tl.store(next_tokens + b, tl.load(tokens + b * num_rows + last))
    bad = tl.load(verdicts + b * num_rows + last) < 0
    tl.store(bad_rows + b, tl.where(bad, last, -1).to(tl.int64))


def plan_verify(
    target: Target, drafted: Drafted | None, requests: Requests, stream: int
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Lay out the launches: `(launches, (accepted, next_tokens, bad_rows, tokens))`; without drafts only tokens."""
    (logits, mix, beta), (positions, knobs, seeds, seen) = target, requests
    drafts, draft_logits, rule = (None, None, COUPLED) if drafted is None else drafted
    batch, num_rows, vocab_size = logits.shape
    tokens = torch.empty(batch, num_rows, dtype=torch.int64, device=logits.device)
    verdicts = torch.empty(batch, num_rows, dtype=torch.int32, device=logits.device)
    accepted, next_tokens, bad_rows = (torch.empty(batch, dtype=torch.int64, device=logits.device) for _ in range(3))

    def operand(x: Tensor | None, rank: int) -> Strided:
        return strided(x) if x is not None else Strided(logits, (0,) * rank)  # never read

    rows = Launch(
        verify_rows_kernel,
        (batch * num_rows,),
        (
            *(strided(logits), operand(mix, 3), operand(draft_logits, 3), operand(drafts, 2), operand(seen, 2)),
            *(knobs, seeds, positions, tokens, verdicts, num_rows, vocab_size, beta, stream),
        ),
        {
            "RULE": rule,
            "BLOCK_V": min(BLOCK_V, max(4, next_power_of_2(vocab_size))) if INTERPRET else BLOCK_V,
            "HAS_MIX": mix is not None,
            "HAS_SEEN": seen is not None,
            "HAS_DRAFTS": drafts is not None,
            "num_warps": NUM_WARPS,
            "maxnreg": 255,  # left alone, the compiler spills a few scalars to fit more programs on a multiprocessor
        },
    )
    count = Launch(
        count_accepted_kernel,
        (batch,),
        (tokens, verdicts, accepted, next_tokens, bad_rows, num_rows),
        {"BLOCK_B": next_power_of_2(num_rows), "num_warps": 1},
    )
    return ([rows] if drafts is None else [rows, count]), (accepted, next_tokens, bad_rows, tokens)


def verify(target: Target, drafted: Drafted, requests: Requests) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels: `(accepted, next_tokens, bad_rows)`, each int64 `[batch]`; arguments are checked."""
    launches, (accepted, next_tokens, bad_rows, _) = plan_verify(target, drafted, requests, int(Stream.TOKEN))
    for launch in launches:
        launch.run()
    return accepted, next_tokens, bad_rows


def sample(target: Target, requests: Requests, stream: int) -> Tensor:
    """Run the row kernel alone: a token of every row, int64 `[batch, rows]`, -1 where the logits are bad."""
    launches, results = plan_verify(target, None, requests, stream)
    launches[0].run()
    return results[3]
