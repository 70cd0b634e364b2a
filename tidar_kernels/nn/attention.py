"""The drop-in attention module, and the norm that decoders around it need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..cache import KVCache
from ..distributed import ContextParallel
from ..ops import checks
from ..patterns import Pattern
from ..patterns.arguments import check_bool, check_int, check_number
from .rotary import RotaryEmbedding, apply_rotary

__all__ = ["RMSNorm", "RotaryEmbedding", "TiDARAttention", "apply_rotary"]


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension (Zhang & Sennrich 2019).

    Raises:
        TypeError, ValueError: `dim` is no int >= 1 or `eps` no number >= 0; later, x is no float tensor `[.., dim]`.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = check_number("eps", eps, 0.0)
        self.weight = nn.Parameter(torch.ones(check_int("dim", dim, 1, 2**31)))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        checks.last_dim("x", x, weight.shape[0])
        return F.rms_norm(x, weight.shape, weight, self.eps)


class TiDARAttention(nn.Module):
    """Grouped-query self-attention over a `Pattern`: training without a cache, prefill and decoding with one.

    Parameter names (`q_proj`, `k_proj`, `v_proj`, `o_proj`, `q_norm`, `k_norm`) are those of Llama and Qwen in
    transformers, so their weights load as they are.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key/value heads; must divide `num_heads`. Default `num_heads`.
        head_dim: default `hidden_size // num_heads`.
        qk_norm: RMSNorm on the heads of q and k before the rotation (Qwen3).
        bias: biases on q, k and v (Qwen2).
        layer_idx: which layer of the cache this module owns.

    Raises:
        TypeError, ValueError: a size is not an int >= 1, or `num_kv_heads` does not divide `num_heads`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qk_norm: bool = False,
        bias: bool = False,
        norm_eps: float = 1e-6,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, 1, 2**31)
        check_int("num_heads", num_heads, 1, 2**31)
        num_kv_heads = num_heads if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads, 1)
        head_dim = check_int("head_dim", hidden_size // num_heads if head_dim is None else head_dim, 1, 2**31)
        check_bool("qk_norm", qk_norm)
        check_bool("bias", bias)
        check_number("norm_eps", norm_eps, 0.0)
        check_int("layer_idx", layer_idx, 0)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim, self.layer_idx = num_heads, num_kv_heads, head_dim, layer_idx
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        pattern: Pattern | ContextParallel,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: `[batch, pattern.q_len, hidden_size]`.
            pattern: which rows see what. With a `ContextParallel`, x and rotary are those of this rank's rows, and
                there is no cache.
            rotary: `(cos, sin)` from `RotaryEmbedding`, or None for no rotation.
            cache: with it, rows see the committed context too, and the K/V of the pattern's causal rows, or of a tree's
                nodes, is written after the committed tokens; `cache.commit` decides later how many of them stay. For
                decoding, under `torch.inference_mode()` or `torch.no_grad()`, as in `tidar_kernels.Decoder`.

        Returns:
            `[batch, q_len, hidden_size]`.

        Raises:
            TypeError, ValueError: an argument is of another type, or x has other dimensions; a cache beside a
                `ContextParallel`. RuntimeError: in a backward pass through a call with a cache.
        """
        checks.tensor("x", x, 3)
        if not isinstance(pattern, (Pattern, ContextParallel)):
            raise TypeError(f"pattern: expected a tidar_kernels.Pattern, got {type(pattern).__name__}")
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"cache: expected a tidar_kernels.KVCache, got {type(cache).__name__}")
        batch, rows, _ = x.shape
        # As many heads as the projections give: under tensor parallelism those of this rank.
        q, k, v = (
            project(x).view(batch, rows, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        v = v.transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is None:
            if rotary is not None:
                q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            if isinstance(pattern, ContextParallel):
                out = pattern.attention(q, k, v)
            else:
                out = ops.attention(q, k, v, pattern)
        elif isinstance(pattern, ContextParallel):
            raise TypeError("pattern: expected a tidar_kernels.Pattern beside a cache, got ContextParallel")
        else:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            keep = pattern.kept_len
            if rotary is None:
                cache.append(self.layer_idx, k[:, :, :keep], v[:, :, :keep])
            else:
                q, k = cache.rotary_append(self.layer_idx, q, k, v, rotary, keep)
            k_cache, v_cache = cache.layer(self.layer_idx)
            options = cache.options(self.layer_idx)
            out = ops.step_attention(q, k, v, k_cache, v_cache, cache.context_lengths, pattern, **options)
        return self.o_proj(out.transpose(1, 2).reshape(batch, rows, -1))
