"""The public operators: checks, `torch.library` schemas, fake tensors, and who runs them.

    device of the operands            what runs
    CUDA                              the Triton kernels (`tidar_kernels.kernels`)
    CPU, TRITON_INTERPRET=1           the same kernels, interpreted
    CPU                               fused PyTorch paths (`tidar_kernels.cpu`, `tidar_kernels.cpu_attention`)

`backend="triton"` asks for the kernels by name: where they cannot run that is an error, never a silent fallback.
`backend="eager"` runs the oracle (`tidar_kernels.eager`).
"""

from __future__ import annotations

import os
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _checks, cpu, cpu_attention, eager
from .patterns import Pattern

__all__ = ["append_kv", "attention", "interpreting", "step_attention"]

Backend = Literal["triton", "eager"]

_library = torch.library.Library("tidar_kernels", "DEF")
_library.define(
    "step_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor lengths, "
    "Tensor lead, Tensor own, float scale, int max_context) -> (Tensor, Tensor)"
)
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor lead, Tensor own, float scale) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor lead, Tensor own, float scale) -> (Tensor, Tensor, Tensor)"
)
_library.define("append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths) -> ()")


def interpreting() -> bool:
    """True if Triton kernels run interpreted on the CPU (`TRITON_INTERPRET=1`, read before they are imported)."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def _check_backend(backend: str | None, device: torch.device) -> None:
    if backend not in (None, "triton", "eager"):
        raise ValueError(f'backend: expected None, "triton" or "eager", got {backend!r}')
    if backend == "triton" and device.type != "cuda" and not interpreting():
        raise ValueError(
            f'backend: expected CUDA tensors (or TRITON_INTERPRET=1) for "triton", got tensors on {device}'
        )


def _check_pattern(pattern: Pattern, q: Tensor, k: Tensor) -> None:
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern: expected a tidar_kernels.Pattern, got {type(pattern).__name__}")
    if q.shape[2] != pattern.q_len:
        raise ValueError(f"q: expected {pattern.q_len} rows for {pattern.name}, got {q.shape[2]}")
    if k.shape[2] != pattern.kv_len:
        raise ValueError(f"k: expected {pattern.kv_len} in-flight keys for {pattern.name}, got {k.shape[2]}")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    *,
    return_lse: Literal[False] = False,
    backend: Backend | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the in-flight keys of a pattern, without a cache; differentiable: the operator of training.

    Row q sees the keys in `lead[q]` and `own[q]` (`tidar_kernels.patterns`; TiDAR, arXiv 2511.08923, training). Only
    tiles that some row sees are loaded and computed, forward and backward, and gradients are the same bits in every
    run. Under autocast the operands are cast as PyTorch's own attention casts them.

    Args:
        q: `[batch, heads, q_len, head_dim]`, float32, float16 or bfloat16; any strides, as for all operands.
        k, v: `[batch, kv_heads, kv_len, head_dim]`; `kv_heads` divides `heads`.
        pattern: `pattern.q_len` and `pattern.kv_len` match q and k.
        scale: of the scores, positive; default `1 / sqrt(head_dim)`.
        return_lse: also return the log-sum-exp (natural log, float32) of every row, `[batch, heads, q_len]`.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        `[batch, heads, q_len, head_dim]` in the dtype and layout of q; a row that sees no key is 0 with lse = -inf,
        and has no gradient.

    Raises:
        TypeError: a non-tensor, or mixed dtypes. ValueError: shapes, devices or backend do not fit.

    Twin: `tidar_kernels.eager.attention`. Kernels: `tidar_kernels.kernels.attention_forward`, `attention_backward`.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(name, value, 4)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _checks.same_kind(q, k=k, v=v)
    _checks.heads(q, k.shape[1])
    _checks.shape("k", k, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]))
    _checks.shape("v", v, tuple(k.shape))
    _check_pattern(pattern, q, k)
    scale = _checks.scale(scale, q.shape[3])
    _check_backend(backend, q.device)
    if backend == "eager":
        return eager.attention(q, k, v, pattern, scale, return_lse=return_lse)
    # On the pattern's own device without its memo: `torch.compile` would guard on that and compile twice.
    on_device = (pattern.lead, pattern.own) if q.device == pattern.lead.device else pattern.on(q.device)
    out, lse = torch.ops.tidar_kernels.attention(q, k, v, on_device[0], on_device[1], scale)
    return (out, lse) if return_lse else out


@overload
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
    max_context: int | None = None,
    return_lse: Literal[False] = False,
    backend: Backend | None = None,
) -> Tensor: ...


@overload
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
    max_context: int | None = None,
    return_lse: Literal[True],
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...


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
    max_context: int | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one decode step: every row sees the cached context, then its pattern's in-flight keys.

    Row q of sequence b sees cache slots `[0, lengths[b])` and the in-flight keys in `lead[q]` and `own[q]`
    (TiDAR, arXiv 2511.08923, decode step; `tidar_kernels.patterns`). The bits of a causal row do not depend on how it
    was launched: draft row m of a step at length P equals single-token decoding at length P + m.

    Args:
        q: `[batch, heads, q_len, head_dim]`, float32, float16 or bfloat16; any strides, as for all operands.
        k, v: `[batch, kv_heads, kv_len, head_dim]`, the in-flight keys and values; `kv_heads` divides `heads`.
        k_cache, v_cache: `[batch, kv_heads, max_len, head_dim]`; slots at and past `lengths[b]` are never read.
        lengths: int32 or int64 `[batch]`, tokens of context in each sequence; stays on the device.
        pattern: `pattern.q_len` and `pattern.kv_len` match q and k.
        scale: of the scores, positive; default `1 / sqrt(head_dim)`.
        max_context: an upper bound of `lengths` that the host happens to know; fewer programs are launched, the bits
            stay. Default `max_len`.
        return_lse: also return the log-sum-exp (natural log, float32) of every row, `[batch, heads, q_len]`.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        `[batch, heads, q_len, head_dim]` in the dtype of q; a row that sees no key is 0 with lse = -inf.

    Raises:
        TypeError: a non-tensor, or mixed dtypes. ValueError: shapes, devices, lengths or backend do not fit.

    Twin: `tidar_kernels.eager.step_attention`. Kernel: `tidar_kernels.kernels.step_attention`.
    """
    for name, value in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.tensor(name, value, 4)
    _checks.same_kind(q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    batch, num_kv_heads, kv_len, head_dim = q.shape[0], k.shape[1], k.shape[2], q.shape[3]
    _checks.heads(q, num_kv_heads)
    _checks.shape("k", k, (batch, num_kv_heads, kv_len, head_dim))
    _checks.shape("v", v, tuple(k.shape))
    max_len = k_cache.shape[2]
    _checks.shape("k_cache", k_cache, (batch, num_kv_heads, max_len, head_dim))
    _checks.shape("v_cache", v_cache, tuple(k_cache.shape))
    _check_pattern(pattern, q, k)
    if max_context is None:
        max_context = max_len
    elif not 0 <= max_context <= max_len:
        raise ValueError(f"max_context: expected 0 <= max_context <= max_len = {max_len}, got {max_context}")
    _checks.lengths(lengths, batch, q.device, max_context, "max_context")
    scale = _checks.scale(scale, head_dim)
    _check_backend(backend, q.device)
    if backend == "eager":
        return eager.step_attention(q, k, v, k_cache, v_cache, lengths, pattern, scale, return_lse=return_lse)
    lead, own, _ = pattern.on(q.device)
    out, lse = torch.ops.tidar_kernels.step_attention(q, k, v, k_cache, v_cache, lengths, lead, own, scale, max_context)
    return (out, lse) if return_lse else out


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    backend: Backend | None = None,
) -> None:
    """Write new keys and values behind the committed ones, in place; commits nothing.

    Token j of sequence b lands in slot `lengths[b] + j`, bit for bit. Every other slot keeps its bits. On CUDA, where
    `lengths` is not read by the host, slots outside `[0, max_len)` are dropped by the kernel; `KVCache` raises first.

    Args:
        k_cache, v_cache: `[batch, kv_heads, max_len, head_dim]`, any float dtype, any strides; written in place.
        k, v: `[batch, kv_heads, n, head_dim]`, same dtype and device.
        lengths: int32 or int64 `[batch]`, on the same device.
        backend: None picks by device; "triton" or "eager" by name.

    Raises:
        TypeError: a non-tensor, or mixed dtypes. ValueError: shapes, devices or lengths do not fit; on the CPU also
            `lengths[b] + n > max_len`. Nothing is written then.

    Twin: `tidar_kernels.eager.append_kv`. Kernel: `tidar_kernels.kernels.append_kv`.
    """
    for name, value in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        _checks.tensor(name, value, 4)
    _checks.same_kind(k_cache, v_cache=v_cache, k=k, v=v)
    batch, num_kv_heads, max_len, head_dim = k_cache.shape
    num_new = k.shape[2]
    _checks.shape("v_cache", v_cache, tuple(k_cache.shape))
    _checks.shape("k", k, (batch, num_kv_heads, num_new, head_dim))
    _checks.shape("v", v, tuple(k.shape))
    _checks.lengths(lengths, batch, k_cache.device, max_len - num_new, f"max_len - {num_new} new tokens")
    _check_backend(backend, k_cache.device)
    if backend == "eager":
        eager.append_kv(k_cache, v_cache, k, v, lengths)
        return
    torch.ops.tidar_kernels.append_kv(k_cache, v_cache, k, v, lengths)


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, lead: Tensor, own: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    launch = _attention_triton if interpreting() else cpu_attention.attention
    return launch(q, k, v, lead, own, scale)


def _attention_triton(
    q: Tensor, k: Tensor, v: Tensor, lead: Tensor, own: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from .kernels.attention_forward import attention as launch

    return launch(q, k, v, lead, own, scale)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, lead: Tensor, own: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _attention_backward_cpu(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lead: Tensor, own: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    launch = _attention_backward_triton if interpreting() else cpu_attention.attention_backward
    return launch(grad_out, grad_lse, q, k, v, out, lse, lead, own, scale)


def _attention_backward_triton(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lead: Tensor, own: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .kernels.attention_backward import attention_backward as launch

    return launch(grad_out, grad_lse, q, k, v, out, lse, lead, own, scale)


def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lead: Tensor, own: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lead, own, scale = inputs
    ctx.save_for_backward(q, k, v, *output, lead, own)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _attention_autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 6
    q, k, v, out, lse, lead, own = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = torch.ops.tidar_kernels.attention_backward(grad_out, grad_lse, q, k, v, out, lse, lead, own, ctx.scale)
    return (*grads, None, None, None)


def _attention_no_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("attention: expected at most first derivatives, got a request for a second one")


def _step_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, lead: Tensor, own: Tensor,
    scale: float, max_context: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if interpreting():
        return _step_attention_triton(q, k, v, k_cache, v_cache, lengths, lead, own, scale, max_context)
    return cpu.step_attention(q, k, v, k_cache, v_cache, lengths, lead, own, scale)


def _step_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, lead: Tensor, own: Tensor,
    scale: float, max_context: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .kernels.step_attention import step_attention as launch

    return launch(q, k, v, k_cache, v_cache, lengths, lead, own, scale, max_context)


def _step_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, lead: Tensor, own: Tensor,
    scale: float, max_context: int,
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


_library.impl("attention", _attention_cpu, "CPU")
_library.impl("attention", _attention_triton, "CUDA")
_library.impl("attention_backward", _attention_backward_cpu, "CPU")
_library.impl("attention_backward", _attention_backward_triton, "CUDA")
_library.impl("step_attention", _step_attention_cpu, "CPU")
_library.impl("step_attention", _step_attention_triton, "CUDA")
_library.impl("append_kv", _append_kv_cpu, "CPU")
_library.impl("append_kv", _append_kv_triton, "CUDA")
torch.library.register_fake("tidar_kernels::attention", _attention_fake, lib=_library)
torch.library.register_fake("tidar_kernels::attention_backward", _attention_backward_fake, lib=_library)
torch.library.register_autograd(
    "tidar_kernels::attention", _attention_autograd, setup_context=_attention_setup_context, lib=_library
)
torch.library.register_autograd("tidar_kernels::attention_backward", _attention_no_double_backward, lib=_library)
torch.library.register_fake("tidar_kernels::step_attention", _step_attention_fake, lib=_library)
torch.library.register_fake("tidar_kernels::append_kv", _append_kv_fake, lib=_library)
