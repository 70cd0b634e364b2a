"""Operators that write into the cache: `append_kv`, `compact_kv`, `rotary_append`. None of them commits anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..declaration import Backend, Operator, check_backend
from ..operands import Cached, Keys
from . import cpu, reference
from .operands import Turned

__all__ = ["append_kv", "compact_kv", "rotary_append"]


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    backend: Backend | None = None,
) -> None:
    """Write new keys and values after the committed ones, in place; commits nothing.

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

    Twin: `tidar_kernels.eager.append_kv`. Kernel: `triton.py` beside this file.
    """
    checks.operands(4, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    batch, num_kv_heads, max_len, head_dim = k_cache.shape
    num_new = k.shape[2]
    checks.caches(k_cache, v_cache, batch, num_kv_heads, head_dim)
    checks.shape("k", k, (batch, num_kv_heads, num_new, head_dim))
    checks.shape("v", v, tuple(k.shape))
    lengths = checks.lengths(lengths, batch, k_cache.device, max_len - num_new, f"max_len - {num_new} new tokens")
    check_backend(backend, k_cache.device)
    if backend == "eager":
        reference.append_kv(k_cache, v_cache, k, v, lengths)
        return
    append_operator(Cached(k_cache, v_cache, lengths), Keys(k, v))


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

    Twin: `tidar_kernels.eager.compact_kv`. Kernel: `triton.py` beside this file.
    """
    checks.operands(4, k_cache=k_cache, v_cache=v_cache)
    batch, num_kv_heads, _, head_dim = k_cache.shape
    max_len = checks.caches(k_cache, v_cache, batch, num_kv_heads, head_dim)
    lengths = checks.lengths(lengths, batch, k_cache.device, max_len, "max_len")
    checks.path(path, lengths, k_cache.device, max_len)
    check_backend(backend, k_cache.device)
    if backend == "eager":
        reference.compact_kv(k_cache, v_cache, lengths, path)
        return
    compact_operator(Cached(k_cache, v_cache, lengths), path=path)


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    keep: int,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k, and write the first `keep` rows' k and v after the committed ones; commits nothing.

    What a layer of a decode step does before its attention, in one launch. v goes into the cache bit for bit, as by
    `append_kv`; k with the bits of the rotated k that is returned. It has no gradient: a backward pass through it is a
    RuntimeError; `backend="eager"` has one.

    Args:
        q: `[batch, heads, rows, head_dim]`, any float dtype, any strides, as for all operands.
        k, v: `[batch, kv_heads, rows, head_dim]`.
        rotary: `(cos, sin)` from `RotaryEmbedding`: `[batch, rows, 1, head_dim]`, or without the batch.
        k_cache, v_cache: `[batch, kv_heads, max_len, head_dim]`; written in place.
        lengths: int32 or int64 `[batch]`, on the same device.
        keep: rows to write, 0 .. rows.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        `(rotated q, rotated k)`, in the layout of q and k.

    Raises:
        TypeError: a non-tensor, or mixed dtypes. ValueError: shapes, devices, `keep` or lengths do not fit; on the CPU
            also `lengths[b] + keep > max_len`. Nothing is written then.

    Twin: `tidar_kernels.eager.rotary_append`. Kernel: `triton.py` beside this file.
    """
    cos, sin = (x if x.ndim == 4 else x.unsqueeze(0) for x in rotary)
    checks.operands(4, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, cos=cos, sin=sin)
    batch, num_kv_heads, rows, head_dim = q.shape[0], k.shape[1], q.shape[2], q.shape[3]
    if head_dim % 2:
        raise ValueError(f"q: expected an even head_dim for rotary positions, got {head_dim}")
    checks.heads(q, num_kv_heads)
    checks.shape("k", k, (batch, num_kv_heads, rows, head_dim))
    checks.shape("v", v, tuple(k.shape))
    for name, value in (("cos", cos), ("sin", sin)):
        checks.shape(name, value, (value.shape[0] if value.shape[0] == 1 else batch, rows, 1, head_dim))
    max_len = checks.caches(k_cache, v_cache, batch, num_kv_heads, head_dim)
    if not 0 <= keep <= rows:
        raise ValueError(f"keep: expected 0 <= keep <= {rows} rows, got {keep}")
    lengths = checks.lengths(lengths, batch, q.device, max_len - keep, f"max_len - {keep} new tokens")
    check_backend(backend, q.device)
    cos, sin = cos.squeeze(2), sin.squeeze(2)
    if backend == "eager":
        return reference.rotary_append(q, k, v, cos, sin, k_cache, v_cache, lengths, keep)
    turned: tuple[Tensor, Tensor] = rotary_operator(
        Turned(q, cos, sin), Keys(k, v), Cached(k_cache, v_cache, lengths), keep=keep
    )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        turned = _WithoutGradient.apply(*turned, q, k)
    return turned


class _WithoutGradient(torch.autograd.Function):
    """Results of `rotary_append` under autograd: `torch.library` takes no gradient of an operator that writes."""

    @staticmethod
    def forward(ctx: Any, turned_q: Tensor, turned_k: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return turned_q.view_as(turned_q), turned_k.view_as(turned_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "rotary_append: expected no backward pass through a write into a cache, got one; "
            'apply_rotary is differentiable, and so is backend="eager"'
        )


def _kernels() -> Any:
    from . import triton

    return triton


def _nothing(*bundles: Any, **others: Any) -> None:
    return None


def _rotary_fake(turned: Turned, keys: Keys, cached: Cached, keep: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(turned.q), torch.empty_like(keys.k)


append_operator = Operator(
    "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths) -> ()",
    Cached,
    Keys,
    reference=reference.append_kv,
    kernel=lambda: _kernels().append_kv,
    fake=_nothing,
)
compact_operator = Operator(
    "compact_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor path) -> ()",
    Cached,
    cpu=cpu.compact_kv,
    kernel=lambda: _kernels().compact_kv,
    fake=_nothing,
)
rotary_operator = Operator(
    "rotary_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor lengths, int keep) -> (Tensor, Tensor)",
    Turned,
    Keys,
    Cached,
    reference=reference.rotary_append,
    kernel=lambda: _kernels().rotary_append,
    fake=_rotary_fake,
)
