"""Plain PyTorch twins of every operator: the oracle. No Triton, any float dtype including float64, autograd throughout.

They are written to be read and believed, not to be fast: the dense mask is built, the keys are concatenated, nothing is
skipped. In a half dtype they do what eager PyTorch models do (matmuls in that dtype, softmax in float32), so their
error in that dtype is the yardstick of the budget rule in `tidar_kernels.testing`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from . import noise
from .eager_linear import gated_lora, row_invariant_linear
from .noise import Stream
from .patterns import Pattern

__all__ = [
    "append_kv",
    "attention",
    "compact_kv",
    "gated_lora",
    "rotary_append",
    "row_invariant_linear",
    "sample",
    "shaped_scores",
    "step_attention",
    "verify",
]


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of `q [.., heads, q_len, d]` over `k, v [.., kv_heads, kv_len, d]` under a boolean mask.

    Returns `(out, lse)`; a row that sees no key gives out = 0 and lse = the head's sink, or -inf without sinks. lse is
    float32 at least.
    """
    num_kv_heads, head_dim = k.shape[-3], q.shape[-1]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    grouped = rearrange(q, "... (kv group) row dim -> ... kv group row dim", kv=num_kv_heads)
    scores = grouped @ rearrange(k, "... kv key dim -> ... kv 1 dim key")
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, rearrange(sinks, "(kv group) -> kv group 1", kv=num_kv_heads).to(lse.dtype))
    probs = (scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
    out = probs.to(v.dtype) @ rearrange(v, "... kv key dim -> ... kv 1 key dim")
    merge = "... kv group row -> ... (kv group) row"
    return rearrange(out, merge.replace("row", "row dim")), rearrange(lse, merge)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Eager twin of `tidar_kernels.attention`; same arguments, same results."""
    out, lse = _masked_attention(q, k, v, pattern.dense().to(q.device), scale, softcap, sinks)
    return (out, lse) if return_lse else out


def step_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Eager twin of `tidar_kernels.step_attention`; same arguments, same results."""
    outs, lses = [], []
    for b, length in enumerate(lengths.tolist()):
        keys = torch.cat([k_cache[b, :, :length], k[b]], dim=1)
        values = torch.cat([v_cache[b, :, :length], v[b]], dim=1)
        mask = pattern.dense(length).to(q.device)
        out, lse = _masked_attention(q[b], keys, values, mask, scale, softcap, sinks)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.stack(outs), torch.stack(lses)
    return (out, lse) if return_lse else out


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """Eager twin of `tidar_kernels.append_kv`; same arguments, same effect. Slots past max_len are dropped."""
    num_new, max_len = k.shape[2], k_cache.shape[2]
    for b, length in enumerate(lengths.tolist()):
        lo, hi = max(length, 0), min(length + num_new, max_len)
        if lo < hi:
            k_cache[b, :, lo:hi] = k[b, :, lo - length : hi - length]
            v_cache[b, :, lo:hi] = v[b, :, lo - length : hi - length]


def compact_kv(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor) -> None:
    """Eager twin of `tidar_kernels.compact_kv`; same arguments, same effect. Slots outside the cache are dropped."""
    max_len = k_cache.shape[2]
    for cache in (k_cache, v_cache):
        before = cache.clone()
        for b, (length, nodes) in enumerate(zip(lengths.tolist(), path.tolist(), strict=True)):
            for i, node in enumerate(nodes):
                if node >= 0 and 0 <= length + i < max_len and 0 <= length + node < max_len:
                    cache[b, :, length + i] = before[b, :, length + node]


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """Eager twin of `tidar_kernels.rotary_append`, with cos and sin `[batch or 1, rows, head_dim]`."""
    half = q.shape[-1] // 2
    q, k = (x * cos[:, None] + torch.roll(x, half, dims=-1) * sin[:, None] for x in (q, k))
    append_kv(k_cache, v_cache, k[:, :, :keep], v[:, :, :keep], lengths)
    return q, k


def shaped_scores(logits: Tensor, knobs: Tensor, history: Tensor | None = None) -> Tensor:
    """What sampling takes the softmax of: penalised, divided by the temperature, -inf where a token is not kept.

    Args:
        logits: `[batch, rows, vocab]`, any float dtype.
        knobs: float32 `[batch, 5]`: temperature (0 counts as 1 here), top-k, top-p, min-p, repetition penalty of each
            sequence. Top-k keeps the k largest; top-p the fewest of these with at least that share of their mass; min-p
            what has at least that share of the largest probability. Tokens tied at an edge stay.
        history: bool, `[batch, rows, vocab]` or None: tokens that the repetition penalty (Keskar et al. 2019) is for.

    Returns:
        float32 at least, `[batch, rows, vocab]`.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperature, top_k, top_p, min_p, penalty = (knob[:, None, None] for knob in knobs.to(x.dtype).unbind(1))
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
    """Noise of every (sequence, row, token); row i of a sequence is for the position i behind its first."""
    token = torch.arange(scores.shape[-1], device=scores.device)
    position = positions[:, None, None] + torch.arange(scores.shape[1], device=scores.device)[:, None]
    return noise.gumbel(seeds[:, None, None], token, position, stream)


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
    stream: Stream = Stream.TOKEN,
) -> Tensor:
    """Eager twin of `tidar_kernels.sample`; same arguments, same results, but bad rows give -1."""
    x = shaped_scores(logits, knobs, _history(seen, None, logits.shape[1]))
    greedy = knobs[:, 0] <= 0
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
    greedy, bad = (knobs[:, 0] <= 0)[:, None], _is_bad(logits)
    behind = torch.cat([drafts[:, 1:], torch.full_like(drafts[:, :1], -1)], dim=1)  # row i decides draft i + 1
    token = x.argmax(-1)
    if rule == "coupled":
        if not bool(greedy.all()):
            token = torch.where(greedy, token, (x + _gumbel(x, seeds, positions, Stream.TOKEN)).argmax(-1))
        accept = token == behind
    else:
        p, has_draft = x.softmax(-1), behind >= 0
        if rule == "rejection":
            if draft_logits is None:
                raise ValueError("draft_logits: expected a tensor for the rejection rule, got None")
            q = shaped_scores(draft_logits, knobs, _history(seen, None, rows)).softmax(-1)
            bad = bad | torch.cat([_is_bad(draft_logits)[:, 1:], torch.zeros_like(bad[:, :1])], dim=1) & has_draft
            q = torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], dim=1).masked_fill(~has_draft[..., None], 0.0)
        else:
            q = torch.nn.functional.one_hot(behind.clamp(min=0), x.shape[-1]) * has_draft[..., None].to(p.dtype)
        rest = (p - q).clamp(min=0)
        rest = torch.where((rest > 0).any(-1, keepdim=True), rest, p)
        drawn = (rest.log() + _gumbel(x, seeds, positions, Stream.RESIDUAL)).argmax(-1)
        position = positions[:, None] + torch.arange(rows, device=x.device)
        u = noise.uniform(seeds[:, None], position, Stream.ACCEPT)
        p_draft, q_draft = (y.gather(-1, behind.clamp(min=0)[..., None])[..., 0] for y in (p, q))
        accept = torch.where(greedy, token == behind, has_draft & (u * q_draft < p_draft))
        token = torch.where(greedy, token, drawn)
    accept = accept & ~bad
    last = accept.to(torch.int64).cumprod(1).sum(1).clamp(max=rows - 1)[:, None]
    bad_here = bad.gather(1, last)[:, 0]
    next_tokens = token.gather(1, last)[:, 0].masked_fill(bad_here, -1)
    return last[:, 0] + 1, next_tokens, torch.where(bad_here, last[:, 0], -1)
