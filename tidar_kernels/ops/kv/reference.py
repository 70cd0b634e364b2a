"""Eager twins of the operators that write into the cache; those of `append_kv` and `rotary_append` serve on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["append_kv", "compact_kv", "rotary_append"]


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
