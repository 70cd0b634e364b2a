"""CPU paths of `append_kv` and `rotary_append`; pages, float8 caches and ragged rows are left to the twins.

The same bits as the twins by fewer calls of PyTorch: with the few tokens of a step, calls are what takes the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Cached, Keys
from .operands import Turned, Written

__all__ = ["append_kv", "fits", "rotary_append"]


def fits(cached: Cached, written: Written, tokens: int) -> bool:
    """Whether these paths take the operands: `tokens` more of every sequence, all of which have a slot of their own."""
    if cached.block_table is not None or cached.k_scale is not None or written != (None, None):
        return False
    lengths = cached.lengths.tolist()
    return bool(lengths) and min(lengths) >= 0 and max(lengths) + tokens <= cached.k_cache.shape[2]


def append_kv(cached: Cached, keys: Keys) -> None:
    """As `reference.append_kv`, of operands that fit."""
    lengths, tokens = cached.lengths.tolist(), keys.k.shape[2]
    for cache, new in zip(cached[:2], keys, strict=True):
        if lengths.count(lengths[0]) == len(lengths):
            cache.narrow(2, lengths[0], tokens).copy_(new)
        else:
            for one, of, length in zip(cache.unbind(), new.unbind(), lengths, strict=True):
                one.narrow(1, length, tokens).copy_(of)


def rotary_append(turned: Turned, keys: Keys, cached: Cached, keep: int) -> tuple[Tensor, Tensor]:
    """As `reference.rotary_append`, of operands that fit."""
    cos, sin, half = turned.cos.unsqueeze(1), turned.sin.unsqueeze(1), turned.cos.shape[-1] // 2
    q, k = ((x * cos).add_(torch.roll(x, half, -1).mul_(sin)) for x in (turned.q, keys.k))
    kept = Keys(k, keys.v)
    append_kv(cached, kept if keep == k.shape[2] else Keys(*(x.narrow(2, 0, keep) for x in kept)))
    return q, k
