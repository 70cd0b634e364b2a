"""The public operators: checks, and who runs them (`tidar_kernels.registration`).

    device of the operands            what runs
    CUDA                              the Triton kernels (`tidar_kernels.kernels`)
    CPU, TRITON_INTERPRET=1           the same kernels, interpreted
    CPU                               fused PyTorch paths (`tidar_kernels.cpu`, `tidar_kernels.cpu_attention`)

`backend="triton"` asks for the kernels by name: where they cannot run that is an error, never a silent fallback.
`backend="eager"` runs the oracle (`tidar_kernels.eager`).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import _checks, eager
from .patterns import Pattern
from .registration import interpreting, library

__all__ = ["append_kv", "attention", "compact_kv", "interpreting", "step_attention"]

Backend = Literal["triton", "eager"]
_library = library  # to which `rotary` and `sampling` add their operators


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
        pattern: `pattern.q_len` and `pattern.kv_len` match q and k; with bits, of a token tree, only the twin takes it.
        scale: of the scores, positive; default `1 / sqrt(head_dim)`.
        softcap: cap of the logits, positive: they are `softcap * tanh(scale * q.k / softcap)` (Gemma 2). Default none.
        sinks: `[heads]`, any float dtype: one more logit in the softmax of every row of a head, with no value behind it
            (GPT-OSS); lse has it too. Differentiable. Default none.
        return_lse: also return the log-sum-exp (natural log, float32) of every row, `[batch, heads, q_len]`.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        `[batch, heads, q_len, head_dim]` in the dtype and layout of q; a row that sees no key is 0 with lse = -inf
        (its head's sink, with sinks), and q has no gradient there.

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
    scale, softcap = _checks.scale(scale, q.shape[3]), _checks.softcap(softcap)
    _checks.sinks(sinks, q)
    _check_backend(backend, q.device)
    if backend == "eager":
        return eager.attention(q, k, v, pattern, scale, softcap=softcap, sinks=sinks, return_lse=return_lse)
    if pattern.bits is not None:
        raise ValueError(f'pattern: expected one without bits, or backend="eager", got {pattern.name}')
    # On the pattern's own device without its memo: `torch.compile` would guard on that and compile twice.
    on_device = (pattern.lead, pattern.own) if q.device == pattern.lead.device else pattern.on(q.device)
    out, lse = torch.ops.tidar_kernels.attention(q, k, v, on_device[0], on_device[1], scale, softcap, sinks)
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one decode step: every row sees the cached context, then its pattern's in-flight keys.

    Row q of sequence b sees cache slots `[0, lengths[b])` and the in-flight keys in `lead[q]`, `own[q]` and `bits[q]`
    (TiDAR, arXiv 2511.08923, decode step; `tidar_kernels.patterns`); of a windowed pattern, the last `reach[q]` of
    these slots, and slots that no row reaches cost nothing. The bits of a causal row do not depend on how it
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
        softcap: cap of the logits, positive: they are `softcap * tanh(scale * q.k / softcap)` (Gemma 2). Default none.
        sinks: `[heads]`, any float dtype: one more logit in the softmax of every row of a head, with no value behind it
            (GPT-OSS); lse has it too. Default none.
        return_lse: also return the log-sum-exp (natural log, float32) of every row, `[batch, heads, q_len]`.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        `[batch, heads, q_len, head_dim]` in the dtype of q; a row that sees no key is 0 with lse = -inf
        (its head's sink, with sinks).

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
    scale, softcap = _checks.scale(scale, head_dim), _checks.softcap(softcap)
    _checks.sinks(sinks, q)
    _check_backend(backend, q.device)
    operands = (q, k, v, k_cache, v_cache, lengths)
    if backend == "eager":
        return eager.step_attention(*operands, pattern, scale, softcap=softcap, sinks=sinks, return_lse=return_lse)
    lead, own, _ = pattern.on(q.device)
    out, lse = torch.ops.tidar_kernels.step_attention(
        *operands, lead, own, scale, max_context, pattern.reach_on(q.device), softcap, sinks, pattern.bits_on(q.device)
    )
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


def compact_kv(
    k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor, *, backend: Backend | None = None
) -> None:
    """Move an accepted path of a token tree together, in place: slot `lengths[b] + i` gets that of node `path[b, i]`.

    A step over a tree (`tidar_kernels.patterns.tree`) writes the K/V of node j into slot `lengths[b] + j`. After the
    move those of the path are the first ones there, bit for bit, so that they are committed by length. Every other slot
    keeps its bits. On CUDA, where the host reads neither `lengths` nor `path`, slots outside `[0, max_len)` are left
    out.

    Args:
        k_cache, v_cache: `[batch, kv_heads, max_len, head_dim]`, any float dtype, any strides; written in place.
        lengths: int32 or int64 `[batch]`, on the same device.
        path: int32 or int64 `[batch, n]`, n <= 1024, on the same device: nodes in ascending order, then -1.
        backend: None picks by device; "triton" or "eager" by name.

    Raises:
        TypeError: a non-tensor, or a dtype. ValueError: shapes, devices or lengths do not fit; on the CPU also a path
            that does not ascend, or leaves the cache. Nothing is written then.

    Twin: `tidar_kernels.eager.compact_kv`. Kernel: `tidar_kernels.kernels.compact_kv`.
    """
    _checks.tensor("k_cache", k_cache, 4)
    _checks.tensor("v_cache", v_cache, 4)
    _checks.same_kind(k_cache, v_cache=v_cache)
    batch, max_len = k_cache.shape[0], k_cache.shape[2]
    _checks.shape("v_cache", v_cache, tuple(k_cache.shape))
    _checks.lengths(lengths, batch, k_cache.device, max_len, "max_len")
    _checks.path(path, lengths, k_cache.device, max_len)
    _check_backend(backend, k_cache.device)
    if backend == "eager":
        eager.compact_kv(k_cache, v_cache, lengths, path)
        return
    torch.ops.tidar_kernels.compact_kv(k_cache, v_cache, lengths, path)
