"""`verify` and `sample` over a large vocabulary on the CPU: row by row, and no work on tokens that cannot win.

The results are those of the twins (`reference.py`). What makes them cheap:

- A row is read only if the rows before it have accepted their drafts.
- Top-p sorts no more than the largest tokens: the tail that it cuts off is found by its mass.
- Gumbel noise lies in a known range, so a token too far below the row's largest score cannot win. Noise is computed for
  the others alone; where these are most of the vocabulary, its bits are, and its logarithms for those near the lead.

A small vocabulary is left to the twins: all rows of it at once cost less than the calls for one row. Where every
sequence is greedy, a maximum of each row is all that it takes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import noise
from .noise import Stream
from .operands import RULES, Drafted, Requests, Target
from .params import Knob

__all__ = ["SMALL", "is_greedy", "sample", "sample_greedy", "verify", "verify_greedy"]

SMALL = 2**14  # tokens: up to here the twins are faster
_COUNTERS = 2**13  # of noise at a time: fewer calls for more, and their words still stay in the cache
_COUPLED = RULES.index("coupled")
_BLOCK = 128  # scores whose largest stands for them in the search for the top k
_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_FACTORS, _BUMP = (np.array(x, np.uint64)[:, None] for x in ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)))


class _Shape(NamedTuple):
    """The knobs of one sequence, in the dtype of its scores."""

    temperature: Tensor
    top_k: int
    top_p: float
    min_p: Tensor
    penalty: Tensor

    @property
    def is_greedy(self) -> bool:
        return bool(self.temperature <= 0)


class _Scores(NamedTuple):
    """One row: what the softmax is taken of, its largest entry, the least that is kept, and where to look for those.

    `tokens` are ascending and hold all that are kept, and maybe others; None for the whole vocabulary.
    """

    x: Tensor
    top: Tensor
    edge: Tensor
    tokens: Tensor | None = None


def _shape_of(knobs: Tensor, dtype: torch.dtype) -> _Shape:
    temperature, top_k, top_p, min_p, penalty = knobs.to(torch.promote_types(dtype, torch.float32))
    return _Shape(temperature, int(top_k), float(top_p), min_p, penalty)


def _at_least(x: Tensor, least: float) -> Tensor:
    """The ascending tokens of scores `x >= least`. NumPy finds them several times as fast as PyTorch."""
    return torch.from_numpy(np.flatnonzero(x.numpy() >= least))


def _words(seed: int, counter: np.ndarray, position: int, stream: int) -> Tensor:
    """`noise.philox` of counters: words `[n, 4]`. NumPy's calls cost less, and these are many small ones."""
    if len(counter) > _COUNTERS:
        parts = np.array_split(counter, -(-len(counter) // _COUNTERS))
        return torch.cat([_words(seed, part, position, stream) for part in parts])
    even, odd, wide = (np.zeros((2, len(counter)), np.uint64) for _ in range(3))
    even[0], even[1], odd[0] = counter, stream, position & _WORD
    key = np.array([seed & _WORD, (seed >> 32) & _WORD], np.uint64)[:, None]
    for _ in range(10):
        np.multiply(even, _FACTORS, out=wide[::-1])
        np.right_shift(wide, _HALF, out=even)
        odd &= _WORD
        even ^= odd
        even ^= key
        odd, wide = wide, odd
        key = (key + _BUMP) & _WORD
    return torch.from_numpy(np.stack([even[0], odd[0] & _WORD, even[1], odd[1] & _WORD], axis=-1).view(np.int64))


def _scores(logits: Tensor, shape: _Shape, history: Tensor | None) -> _Scores | None:
    """One row of `reference.shaped_scores`, with the edge beside it instead of in it; None for a bad row."""
    x = logits.detach().to(shape.temperature.dtype).contiguous()
    if not -math.inf < float(x.amax()) < math.inf:  # NaN is the largest of all
        return None
    if history is not None and shape.penalty != 1:
        x = torch.where(history, torch.where(x > 0, x / shape.penalty, x * shape.penalty), x)
    if shape.is_greedy:
        return _Scores(x, x[0], x[0])
    x = x * (1.0 / shape.temperature)
    top, edge, tokens = x.amax(), torch.full_like(x[0], -math.inf), None
    if shape.top_k > 0:
        edge, tokens = _top_k(x, min(shape.top_k, len(x)))
    if shape.top_p < 1.0:
        edge, among = _top_p(x if tokens is None else x[tokens], top, shape.top_p)
        tokens = among if tokens is None else tokens[among]
    if shape.min_p > 0:
        edge = torch.maximum(edge, top + shape.min_p.log())
    return _Scores(x, top, edge, tokens)


def _top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest score, and the tokens from it on."""
    blocks, least = len(x) // _BLOCK, -math.inf
    if 4 * k < blocks:
        # The k blocks of the largest maxima have k scores from the least of these on.
        least = float(x[: blocks * _BLOCK].view(blocks, _BLOCK).amax(-1).topk(k).values[-1])
    tokens = _at_least(x, least)
    largest = x[tokens]
    edge = largest.topk(k).values[-1]
    return edge, tokens[_at_least(largest, float(edge))]


def _top_p(x: Tensor, top: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The least score of the fewest with at least `top_p` of the mass of all x, and the indices of some from it on."""
    weight = (x - top).exp_()
    total = float(weight.sum(dtype=torch.float64))
    target = top_p * total
    # Scores of weight <= cut have no more than the tail's mass together, so this cut loses none that is kept. Larger
    # ones are tried while that holds beyond the rounding of these sums.
    cut = (1.0 - top_p) * total / len(x)
    while cut < 0.05 and float(torch.threshold(weight, 16.0 * cut, 0.0).sum()) >= target + 1e-4 * total:
        cut *= 16.0
    among = _at_least(weight, cut)
    ordered = torch.from_numpy(np.sort(x[among].numpy())).flip(0)
    mass = (ordered - top).exp_().double().cumsum(0)
    return ordered[min(int((mass < target).sum()), len(ordered) - 1)], among


def _winner(scores: _Scores, seed: Tensor, position: Tensor, stream: int) -> int:
    """`argmax(x + noise)` over the tokens at or above the edge, ties to the lowest."""
    x, top, edge, tokens = scores
    key, at = int(seed), int(position)
    # Scores are rounded when noise is added, to the spacing of floats of their size.
    slack = 1e-3 + 1e-6 * abs(float(top))
    lead = float(top) + noise.LEAST - slack  # the token of the largest score has at least this
    least = max(float(edge), lead - noise.LARGEST)
    tokens = _at_least(x, least) if tokens is None else tokens[_at_least(x[tokens], least)]
    if 4 * len(tokens) <= len(x):
        words = _words(key, tokens.numpy() >> 2, at, stream).gather(1, (tokens & 3)[:, None])[:, 0]
        return int(tokens[(x[tokens] + noise.gumbel_of_words(words)).argmax()])

    best, best_token = -math.inf, -1
    for start in range(0, len(x), 4 * _COUNTERS):
        part = x[start : start + 4 * _COUNTERS]
        counter = np.arange(start // 4, (start + len(part) + 3) // 4)
        words = _words(key, counter, at, stream).flatten()[: len(part)]
        # Noise is at most -log(u), so x + noise >= lead needs u <= exp(x - lead).
        room = (part - (lead - slack)).exp_().sub_(words.to(torch.float32) * 2.0**-32)
        near = _at_least(room.masked_fill_(part < edge, -1.0), 0.0)
        if len(near):
            value = part[near] + noise.gumbel_of_words(words[near])
            first = int(value.argmax())
            if float(value[first]) > best:
                best, best_token = float(value[first]), start + int(near[first])
                lead = max(lead, best)
    return best_token


def _law(scores: _Scores) -> Tensor:
    """The softmax over what is kept."""
    return scores.x.masked_fill(scores.x < scores.edge, -math.inf).softmax(-1)


def _drawn(weights: Tensor, seed: Tensor, position: Tensor, stream: int) -> int:
    """A token drawn in proportion to `weights`, some of which is positive."""
    x = weights.log()
    return _winner(_Scores(x, x.amax(), torch.full_like(x[0], -math.inf)), seed, position, stream)


def _token(scores: _Scores, shape: _Shape, seed: Tensor, position: Tensor, stream: int) -> int:
    return int(scores.x.argmax()) if shape.is_greedy else _winner(scores, seed, position, stream)


def sample(target: Target, requests: Requests, stream: int) -> Tensor:
    """As `reference.sample`."""
    logits, (positions, knobs, seeds, seen) = target.logits, requests
    batch, rows, _ = logits.shape
    tokens = torch.full((batch, rows), -1, dtype=torch.int64, device="cpu")
    for b in range(batch):
        shape = _shape_of(knobs[b], logits.dtype)
        for i in range(rows):
            scores = _scores(logits[b, i], shape, None if seen is None else seen[b])
            if scores is not None:
                tokens[b, i] = _token(scores, shape, seeds[b], positions[b] + i, stream)
    return tokens


def verify(target: Target, drafted: Drafted, requests: Requests) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.verify`."""
    found = [_verify_sequence(target, drafted, requests, b) for b in range(len(target.logits))]
    return _decided(found)


def _decided(found: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `verify` from those of each sequence."""
    accepted, next_tokens, bad_rows = torch.tensor(found, dtype=torch.int64, device="cpu").reshape(-1, 3).unbind(1)
    return accepted.clone(), next_tokens.clone(), bad_rows.clone()


def _verify_sequence(target: Target, drafted: Drafted, requests: Requests, b: int) -> tuple[int, int, int]:
    """`(accepted, next token, bad row)` of sequence b."""
    (logits, mix, beta), (drafts, draft_logits, rule) = target, drafted
    seed, seen = requests.seeds[b], None if requests.seen is None else requests.seen[b]
    shape, history = _shape_of(requests.knobs[b], logits.dtype), seen
    following: list[int] = [*drafts[b, 1:].tolist(), -1]  # row i decides draft i + 1
    positions = requests.positions[b] + torch.arange(len(following), device="cpu")
    i = -1
    while True:  # the last row decides no draft, and returns
        i += 1
        row, draft = logits[b, i], following[i]
        if mix is not None:
            wide = shape.temperature.dtype
            row = beta * row.to(wide) + (1.0 - beta) * mix[b, i].to(wide)
        if history is not None:
            history = history.index_fill(0, drafts[b, i : i + 1].clamp(min=0), True)
        scores = _scores(row, shape, history)
        if scores is None:
            return i + 1, -1, i
        if rule == _COUPLED or shape.is_greedy:
            token = _token(scores, shape, seed, positions[i], Stream.TOKEN)
            if token != draft:
                return i + 1, token, -1
            continue
        p = rest = _law(scores)
        if draft >= 0:
            if draft_logits is None:
                q = torch.zeros_like(p)
                q[draft] = 1.0
            else:
                drawn_from = _scores(draft_logits[b, i + 1], shape, seen)
                if drawn_from is None:
                    return i + 1, -1, i
                q = _law(drawn_from)
            if bool(noise.uniform(seed, positions[i], Stream.ACCEPT) * q[draft] < p[draft]):
                continue
            rest = (p - q).clamp(min=0)
        return i + 1, _drawn(rest if bool((rest > 0).any()) else p, seed, positions[i], Stream.RESIDUAL), -1


def is_greedy(requests: Requests) -> bool:
    """Whether all sequences take the largest logits as they are: other knobs than a penalty leave these the largest."""
    return requests.seen is None and max(requests.knobs[:, Knob.TEMPERATURE].tolist(), default=0.0) <= 0.0


def sample_greedy(logits: Tensor) -> Tensor:
    """As `reference.sample` of greedy sequences."""
    largest, tokens = logits.detach().max(-1)
    return tokens.masked_fill_(~(largest.abs() < math.inf), -1)  # NaN is the largest of all


def verify_greedy(logits: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.verify` of greedy sequences, by any rule."""
    largest, tokens = (x.tolist() for x in logits.detach().max(-1))
    found = []
    for of_rows, taken, (_, *following) in zip(largest, tokens, drafts.tolist(), strict=True):
        row = 0
        while row < len(following) and taken[row] == following[row] and -math.inf < of_rows[row] < math.inf:
            row += 1
        is_good = -math.inf < of_rows[row] < math.inf
        found.append((row + 1, taken[row] if is_good else -1, -1 if is_good else row))
    return _decided(found)
