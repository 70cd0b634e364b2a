"""Attention over the in-flight keys of a pattern, differentiable: the operator of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...patterns import Pattern
from .. import checks
from ..declaration import Backend, Gradient, Operator, check_backend, no_second_derivative
from ..operands import Keys, Results, Rows, Scores
from . import cpu, reference, sharding

__all__ = ["attention", "backward", "checked", "operator", "sinks_backward"]


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
    backend: Backend | None = None,
) -> Tensor | Any:
    """Attention over the in-flight keys of a pattern, without a cache; differentiable: the operator of training.

    Row q sees the keys in `lead[q]` and `own[q]` (`tidar_kernels.patterns`; TiDAR, arXiv 2511.08923, training). Only
    tiles that some row sees are loaded and computed, forward and backward, and gradients are the same bits in every
    run. Under autocast the operands are cast as PyTorch's own attention casts them. Operands may be DTensors: sequences
    and heads stay where they are, each on its rank.

    A key that a row does not see leaves nothing in its result and gradients, as long as its products stay finite in
    float32. On the CPU and in the twin that is so for NaN and infinities too. The kernels multiply whole tiles, and
    0 * NaN is NaN: there one may reach all rows of a tile in which some row sees the key. `step_attention` keeps them
    out on every path, for the masks of a step may hold anything. Here a check in the loops would cost the overlap of
    softmax and MMAs, and one before them a copy of K and V; and in training one NaN makes the loss NaN anyway.

    Args:
        q: `[batch, heads, q_len, head_dim]`, float32, float16 or bfloat16; any strides, as for all operands.
        k, v: `[batch, kv_heads, kv_len, head_dim]`; `kv_heads` divides `heads`.
        pattern: `pattern.q_len` and `pattern.kv_len` match q and k; with a tree mask only the twin takes it.
        scale: of the scores, positive; default `1 / sqrt(head_dim)`.
        softcap: cap of the logits, positive: they are `softcap * tanh(scale * q.k / softcap)` (Gemma 2). Default none.
        sinks: `[heads]`, any float dtype: one more logit in the softmax of every row of a head, without a value
            (GPT-OSS); lse has it too. Differentiable. Default none.
        return_lse: also return the log-sum-exp (natural log, float32) of every row, `[batch, heads, q_len]`.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        `[batch, heads, q_len, head_dim]` in the dtype and layout of q; a row that sees no key is 0 with lse = -inf
        (its head's sink, with sinks), and q has no gradient there.

    Raises:
        TypeError: a non-tensor, mixed dtypes, or DTensors beside others. ValueError: shapes, devices, meshes or backend
            do not fit; the kernels have no tiles for `head_dim`: above 512, and in the backward pass above 256 in
            float32 on all chips but cc 90 and 100, which alone have the shared memory or registers for it.

    Twin: `tidar_kernels.eager.attention`. Kernels: `triton_forward.py` and `triton_backward.py` beside this file.
    """
    q, k, v, scores = checked(q, k, v, pattern, scale, softcap, sinks, backend)
    if backend == "eager":
        return reference.attention(q, k, v, pattern, scale, softcap=softcap, sinks=sinks, return_lse=return_lse)
    if pattern.tree_mask is not None:
        raise ValueError(f'pattern: expected one without tree mask, or backend="eager", got {pattern.name}')
    # On the pattern's own device without its memo: `torch.compile` would guard on that and compile twice.
    lead, own, *_ = (pattern.lead, pattern.own) if q.device == pattern.lead.device else pattern.on(q.device)
    if sharding.any_dtensor(q, k, v, sinks):
        lead, own = sharding.beside((lead, own), q=q, k=k, v=v, sinks=sinks)
    out, lse = operator(Rows(q, lead, own), Keys(k, v), scores)
    return (out, lse) if return_lse else out


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: Backend | None,
    num_keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Scores]:
    """The operands of `attention`, checked, and cast if there is autocast; k and v have `num_keys` keys, if given."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, value, 4)
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    checks.same_kind(q, k=k, v=v)
    checks.attention_operands(q, k, v, pattern, num_keys)
    scores = Scores(checks.scale(scale, q.shape[3]), checks.softcap(softcap), checks.sinks(sinks, q))
    check_backend(backend, q.device)
    return q, k, v, scores


def _kernel() -> Callable[..., Any]:
    from .triton_forward import attention as launch

    return launch


def _fake(rows: Rows, keys: Keys, scores: Scores) -> tuple[Tensor, Tensor]:
    q = rows.q
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _save(ctx: Any, output: tuple[Tensor, Tensor], rows: Rows, keys: Keys, scores: Scores) -> None:
    ctx.save_for_backward(*rows[:3], *keys, *output, scores.sinks)
    ctx.scores = scores._replace(sinks=None)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, needed: frozenset[str], grad_out: Tensor | None, grad_lse: Tensor | None
) -> dict[str, Tensor | None]:
    if grad_out is None and grad_lse is None:
        return {}
    q, lead, own, k, v, out, lse, sinks = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    results = Results(out, lse, grad_out, grad_lse)
    dq, dk, dv = backward(Rows(q, lead, own), Keys(k, v), ctx.scores, results)
    of_sinks = sinks_backward(results, sinks) if "sinks" in needed else None
    return {"q": dq, "k": dk, "v": dv, "sinks": of_sinks}


def sinks_backward(results: Results, sinks: Tensor) -> Tensor:
    """A sink takes the share exp(sink - lse) of every row of its head from out, and is that share of what moves lse."""
    out, lse, grad_out, grad_lse = results
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    sink = sinks.to(lse.dtype)[:, None]
    weight = torch.where(sink == -math.inf, 0.0, torch.exp(sink - lse))
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)


def _backward_kernel() -> Callable[..., Any]:
    from .triton_backward import attention_backward as launch

    return launch


def _backward_fake(rows: Rows, keys: Keys, scores: Scores, results: Results) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows.q), torch.empty_like(keys.k), torch.empty_like(keys.v)


backward = Operator(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor lead, Tensor own, float scale, float? softcap=None) -> (Tensor, Tensor, Tensor)",
    Rows,
    Keys,
    Scores,
    Results,
    cpu=cpu.attention_backward,
    kernel=_backward_kernel,
    fake=_backward_fake,
    gradient=no_second_derivative("attention"),
)
operator = Operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor lead, Tensor own, float scale, "
    "float? softcap=None, Tensor? sinks=None) -> (Tensor, Tensor)",
    Rows,
    Keys,
    Scores,
    cpu=cpu.attention,
    kernel=_kernel,
    fake=_fake,
    gradient=Gradient(_save, _backward),
)
