"""The eager twins of `tk.verify` and `tk.sample`, which serve small vocabularies on the CPU too: whole sorted rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import noise
from .noise import Stream
from .params import Knob

__all__ = ["sample", "shaped_scores", "verify"]


def shaped_scores(logits: Tensor, knobs: Tensor, history: Tensor | None = None) -> Tensor:
    """What sampling takes the softmax of: penalised, divided by the temperature, -inf where a token is not kept.

    Args:
        logits: `[batch, rows, vocab]`, any float dtype.
        knobs: float32 `[batch, len(Knob)]`, of each sequence; temperature 0 counts as 1 here. Top-k keeps the k
            largest; top-p the fewest of these with at least that share of their mass; min-p what has at least that
            share of the largest probability. Tokens tied at an edge stay.
        history: bool, `[batch, rows, vocab]` or None: tokens that the repetition penalty (Keskar et al. 2019) is for.

    Returns:
        float32 at least, `[batch, rows, vocab]`.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperature, top_k, top_p, min_p, penalty = (knobs.to(x.dtype)[:, knob, None, None] for knob in Knob)
    if history is not None:
        x = torch.where(history, torch.where(x > 0, x / penalty, x * penalty), x)
    x = x * torch.where(temperature > 0, 1.0 / temperature, 1.0)
    plain = (top_k <= 0) & (top_p >= 1) & (min_p <= 0)
    if bool(plain.all()):
        return x
    ordered, vocab_size = x.sort(dim=-1, descending=True).values, x.shape[-1]
    edge = torch.full_like(x[..., :1], -math.inf)
    kth = ordered.gather(-1, (top_k.long().clamp(1, vocab_size) - 1).expand_as(edge))
    edge = torch.where(top_k > 0, kth, edge)
    weight = torch.where(ordered >= edge, (ordered - ordered[..., :1]).exp(), 0.0).double()
    mass = weight.cumsum(-1)
    fewest = (mass < top_p.double() * mass[..., -1:]).sum(-1, keepdim=True).clamp(max=vocab_size - 1)
    edge = torch.where(top_p < 1, torch.maximum(edge, ordered.gather(-1, fewest)), edge)
    edge = torch.where(min_p > 0, torch.maximum(edge, ordered[..., :1] + min_p.log()), edge)
    return x.masked_fill(x < edge, -math.inf)


def _history(seen: Tensor | None, drafts: Tensor | None, rows: int) -> Tensor | None:
    """What each row has seen: the committed tokens, and the drafts up to its own."""
    if seen is None:
        return None
    history = seen[:, None].expand(-1, rows, -1)
    if drafts is None:
        return history
    drafted = torch.nn.functional.one_hot(drafts.clamp(min=0), seen.shape[1]).cumsum(1) > 0
    return history | drafted


def _gumbel(scores: Tensor, seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """Noise of every (sequence, row, token); row i of a sequence is for the position i after its first."""
    position = positions[:, None] + torch.arange(scores.shape[1], device=scores.device)
    return noise.gumbel_of_all(seeds[:, None], scores.shape[-1], position, stream)


def _is_bad(logits: Tensor) -> Tensor:
    """Rows `[batch, rows]` that no token can be taken of: a NaN or +inf, or nothing above -inf."""
    return ~(logits < math.inf).all(-1) | (logits == -math.inf).all(-1)


def sample(
    logits: Tensor,
    positions: Tensor,
    knobs: Tensor,
    seeds: Tensor,
    *,
    seen: Tensor | None = None,
    stream: int = Stream.TOKEN,
) -> Tensor:
    """Eager twin of `tidar_kernels.sample`; same arguments, same results, but bad rows give -1."""
    x = shaped_scores(logits, knobs, _history(seen, None, logits.shape[1]))
    greedy = knobs[:, Knob.TEMPERATURE] <= 0
    token = x.argmax(-1)
    if not bool(greedy.all()):
        token = torch.where(greedy[:, None], token, (x + _gumbel(x, seeds, positions, stream)).argmax(-1))
    return token.masked_fill(_is_bad(logits), -1)


def verify(
    logits: Tensor,
    drafts: Tensor,
    positions: Tensor,
    knobs: Tensor,
    seeds: Tensor,
    *,
    rule: str = "coupled",
    draft_logits: Tensor | None = None,
    mix: Tensor | None = None,
    beta: float = 1.0,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eager twin of `tidar_kernels.verify`; same arguments, but it returns `(accepted, next_tokens, bad_rows)`."""
    rows = logits.shape[1]
    if mix is not None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = beta * logits.to(wide) + (1.0 - beta) * mix.to(wide)
    x = shaped_scores(logits, knobs, _history(seen, drafts, rows))
    greedy, bad = (knobs[:, Knob.TEMPERATURE] <= 0)[:, None], _is_bad(logits)
    following = torch.cat([drafts[:, 1:], torch.full_like(drafts[:, :1], -1)], dim=1)  # row i decides draft i + 1
    token = x.argmax(-1)
    if rule == "coupled":
        if not bool(greedy.all()):
            token = torch.where(greedy, token, (x + _gumbel(x, seeds, positions, Stream.TOKEN)).argmax(-1))
        accept = token == following
    else:
        p, has_draft = x.softmax(-1), following >= 0
        if rule == "rejection":
            if draft_logits is None:
                raise ValueError("draft_logits: expected a tensor for the rejection rule, got None")
            q = shaped_scores(draft_logits, knobs, _history(seen, None, rows)).softmax(-1)
            q_bad = torch.cat([_is_bad(draft_logits)[:, 1:], torch.zeros_like(bad[:, :1])], dim=1)
            bad = bad | q_bad & has_draft & ~greedy
            q = torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], dim=1).masked_fill(~has_draft[..., None], 0.0)
        else:
            q = torch.nn.functional.one_hot(following.clamp(min=0), x.shape[-1]) * has_draft[..., None].to(p.dtype)
        rest = (p - q).clamp(min=0)
        rest = torch.where((rest > 0).any(-1, keepdim=True), rest, p)
        drawn = (rest.log() + _gumbel(x, seeds, positions, Stream.RESIDUAL)).argmax(-1)
        position = positions[:, None] + torch.arange(rows, device=x.device)
        u = noise.uniform(seeds[:, None], position, Stream.ACCEPT)
        p_draft, q_draft = (y.gather(-1, following.clamp(min=0)[..., None])[..., 0] for y in (p, q))
        accept = torch.where(greedy, token == following, has_draft & (u * q_draft < p_draft))
        token = torch.where(greedy, token, drawn)
    accept = accept & ~bad
    last = accept.to(torch.int64).cumprod(1).sum(1).clamp(max=rows - 1)[:, None]
    bad_here = bad.gather(1, last)[:, 0]
    next_tokens = token.gather(1, last)[:, 0].masked_fill(bad_here, -1)
    return last[:, 0] + 1, next_tokens, torch.where(bad_here, last[:, 0], -1)
