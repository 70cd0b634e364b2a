"""The attention operators as `torch.library` has them: schemas, fake tensors, gradients, and which code runs where.

`tidar_kernels.ops` checks the arguments and calls these. Further operators add themselves to `library`.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from . import cpu, cpu_attention

__all__ = ["interpreting", "library"]

library = torch.library.Library("tidar_kernels", "DEF")
library.define(
    "step_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor lengths, "
    "Tensor lead, Tensor own, float scale, int max_context, "
    "Tensor? reach=None, float? softcap=None, Tensor? sinks=None, Tensor? bits=None) -> (Tensor, Tensor)"
)
library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor lead, Tensor own, float scale, "
    "float? softcap=None, Tensor? sinks=None) -> (Tensor, Tensor)"
)
library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor lead, Tensor own, float scale, float? softcap=None) -> (Tensor, Tensor, Tensor)"
)
library.define("append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths) -> ()")
library.define("compact_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor path) -> ()")


def interpreting() -> bool:
    """True if Triton kernels run interpreted on the CPU (`TRITON_INTERPRET=1`, read before they are imported)."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, lead: Tensor, own: Tensor, scale: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    launch = _attention_triton if interpreting() else cpu_attention.attention
    return launch(q, k, v, lead, own, scale, softcap, sinks)


def _attention_triton(
    q: Tensor, k: Tensor, v: Tensor, lead: Tensor, own: Tensor, scale: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .kernels.attention_forward import attention as launch

    return launch(q, k, v, lead, own, scale, softcap, sinks)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, lead: Tensor, own: Tensor, scale: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _attention_backward_cpu(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lead: Tensor, own: Tensor, scale: float, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    launch = _attention_backward_triton if interpreting() else cpu_attention.attention_backward
    return launch(grad_out, grad_lse, q, k, v, out, lse, lead, own, scale, softcap)


def _attention_backward_triton(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lead: Tensor, own: Tensor, scale: float, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .kernels.attention_backward import attention_backward as launch

    return launch(grad_out, grad_lse, q, k, v, out, lse, lead, own, scale, softcap)


def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lead: Tensor, own: Tensor, scale: float, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lead, own, scale, softcap, sinks = inputs
    ctx.save_for_backward(q, k, v, *output, lead, own, sinks)
    ctx.scale, ctx.softcap = scale, softcap
    ctx.set_materialize_grads(False)


def _attention_autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad  # of the arguments that were given: the dispatcher drops trailing defaults
    if grad_out is None and grad_lse is None:
        return (None,) * len(needed)
    q, k, v, out, lse, lead, own, sinks = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = torch.ops.tidar_kernels.attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, lead, own, ctx.scale, ctx.softcap
    )
    grad_sinks = None
    if sinks is not None and needed[-1]:
        grad_sinks = _sinks_backward(grad_out, grad_lse, out, lse, sinks)
    return (*grads, None, None, None, None, grad_sinks)[: len(needed)]


def _sinks_backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """A sink takes the share exp(sink - lse) of every row of its head from out, and is that share of what moves lse."""
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    sink = sinks.to(lse.dtype)[:, None]
    weight = torch.where(sink == -math.inf, 0.0, torch.exp(sink - lse))
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)


def _attention_no_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("attention: expected at most first derivatives, got a request for a second one")


def _step_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, lead: Tensor, own: Tensor,
    scale: float, max_context: int, reach: Tensor | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operands = (q, k, v, k_cache, v_cache, lengths, lead, own, scale)
    if interpreting():
        return _step_attention_triton(*operands, max_context, reach, softcap, sinks, bits)
    return cpu.step_attention(*operands, reach, softcap, sinks, bits)


def _step_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, lead: Tensor, own: Tensor,
    scale: float, max_context: int, reach: Tensor | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .kernels.step_attention import step_attention as launch

    return launch(q, k, v, k_cache, v_cache, lengths, lead, own, scale, max_context, reach, softcap, sinks, bits)


def _step_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, lead: Tensor, own: Tensor,
    scale: float, max_context: int, reach: Tensor | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=lse_dtype)


def _append_kv_cpu(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    if interpreting():
        _append_kv_triton(k_cache, v_cache, k, v, lengths)
    else:
        cpu.append_kv(k_cache, v_cache, k, v, lengths)


def _append_kv_triton(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    from .kernels.append_kv import append_kv as launch

    launch(k_cache, v_cache, k, v, lengths)


def _append_kv_fake(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    return None


def _compact_kv_cpu(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor) -> None:
    if interpreting():
        _compact_kv_triton(k_cache, v_cache, lengths, path)
    else:
        cpu.compact_kv(k_cache, v_cache, lengths, path)


def _compact_kv_triton(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor) -> None:
    from .kernels.compact_kv import compact_kv as launch

    launch(k_cache, v_cache, lengths, path)


def _compact_kv_fake(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor) -> None:
    return None


library.impl("attention", _attention_cpu, "CPU")
library.impl("attention", _attention_triton, "CUDA")
library.impl("attention_backward", _attention_backward_cpu, "CPU")
library.impl("attention_backward", _attention_backward_triton, "CUDA")
library.impl("step_attention", _step_attention_cpu, "CPU")
library.impl("step_attention", _step_attention_triton, "CUDA")
library.impl("append_kv", _append_kv_cpu, "CPU")
library.impl("append_kv", _append_kv_triton, "CUDA")
library.impl("compact_kv", _compact_kv_cpu, "CPU")
library.impl("compact_kv", _compact_kv_triton, "CUDA")
torch.library.register_fake("tidar_kernels::attention", _attention_fake, lib=library)
torch.library.register_fake("tidar_kernels::attention_backward", _attention_backward_fake, lib=library)
torch.library.register_autograd(
    "tidar_kernels::attention", _attention_autograd, setup_context=_attention_setup_context, lib=library
)
torch.library.register_autograd("tidar_kernels::attention_backward", _attention_no_double_backward, lib=library)
torch.library.register_fake("tidar_kernels::step_attention", _step_attention_fake, lib=library)
torch.library.register_fake("tidar_kernels::append_kv", _append_kv_fake, lib=library)
torch.library.register_fake("tidar_kernels::compact_kv", _compact_kv_fake, lib=library)
