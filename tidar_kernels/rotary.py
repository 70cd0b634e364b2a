"""Rotary positions (Su et al. 2021): cos and sin of every row, and q, k rotated on the way into the cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks, eager, ops

__all__ = ["RotaryEmbedding", "apply_rotary", "rotary_append"]


class RotaryEmbedding(nn.Module):
    """cos and sin of rotary positions, in the half-split layout of Llama and Qwen."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary positions, got {head_dim}")
        self.register_buffer("inv_freq", theta ** (-torch.arange(0, head_dim, 2) / head_dim), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`positions` int `[..., rows]` -> `(cos, sin)`, each `[..., rows, 1, head_dim]`, for `apply_rotary`.

        The sign of the rotation is folded into `sin`, so that applying it is one roll and no concatenation.
        """
        angle = positions.to(torch.float32).unsqueeze(-1) * self.inv_freq.to(torch.float32)
        cos, sin = angle.cos(), angle.sin()
        return (
            torch.cat([cos, cos], dim=-1).unsqueeze(-2).to(dtype),
            torch.cat([-sin, sin], dim=-1).unsqueeze(-2).to(dtype),
        )


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `x [batch, rows, heads, head_dim]` by `(cos, sin)` from `RotaryEmbedding`."""
    cos, sin = rotary
    return x * cos + torch.roll(x, x.shape[-1] // 2, dims=-1) * sin


ops._library.define(
    "rotary_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor lengths, int keep) -> (Tensor, Tensor)"
)


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
    backend: ops.Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k, and write the first `keep` rows' k and v behind the committed ones; commits nothing.

    What a layer of a decode step does before its attention, in one launch. v goes into the cache bit for bit, as by
    `append_kv`; k with the bits of the rotated k that is returned.

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

    Twin: `tidar_kernels.eager.rotary_append`. Kernel: `tidar_kernels.kernels.rotary_append`.
    """
    for name, value in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.tensor(name, value, 4)
    cos, sin = (x if x.ndim == 4 else x.unsqueeze(0) for x in rotary)
    _checks.same_kind(q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
    batch, num_kv_heads, rows, head_dim = q.shape[0], k.shape[1], q.shape[2], q.shape[3]
    if head_dim % 2:
        raise ValueError(f"q: expected an even head_dim for rotary positions, got {head_dim}")
    _checks.heads(q, num_kv_heads)
    _checks.shape("k", k, (batch, num_kv_heads, rows, head_dim))
    _checks.shape("v", v, tuple(k.shape))
    for name, value in (("cos", cos), ("sin", sin)):
        _checks.shape(name, value, (value.shape[0] if value.shape[0] == 1 else batch, rows, 1, head_dim))
    max_len = k_cache.shape[2]
    _checks.shape("k_cache", k_cache, (batch, num_kv_heads, max_len, head_dim))
    _checks.shape("v_cache", v_cache, tuple(k_cache.shape))
    if not 0 <= keep <= rows:
        raise ValueError(f"keep: expected 0 <= keep <= {rows} rows, got {keep}")
    _checks.lengths(lengths, batch, q.device, max_len - keep, f"max_len - {keep} new tokens")
    ops._check_backend(backend, q.device)
    cos, sin = cos.squeeze(2), sin.squeeze(2)
    if backend == "eager":
        return eager.rotary_append(q, k, v, cos, sin, k_cache, v_cache, lengths, keep)
    turned: tuple[Tensor, Tensor] = torch.ops.tidar_kernels.rotary_append(
        q, k, v, cos, sin, k_cache, v_cache, lengths, keep
    )
    return turned


def _triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .kernels.rotary_append import rotary_append as launch

    return launch(q, k, v, cos, sin, k_cache, v_cache, lengths, keep)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    launch = _triton if ops.interpreting() else eager.rotary_append
    return launch(q, k, v, cos, sin, k_cache, v_cache, lengths, keep)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k)


ops._library.impl("rotary_append", _cpu, "CPU")
ops._library.impl("rotary_append", _triton, "CUDA")
torch.library.register_fake("tidar_kernels::rotary_append", _fake, lib=ops._library)
