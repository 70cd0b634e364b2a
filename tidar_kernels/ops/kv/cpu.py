"""CPU paths of `append_kv` and `rotary_append`; pages, float8 caches and ragged rows are left to the twins.

The same bits as the twins by fewer calls of PyTorch: with the few tokens of a step, calls are what takes the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Cached, Keys
from . import reference
from .operands import Turned, Written

__all__ = ["append_kv", "rotary_append"]


def append_kv(cached: Cached, keys: Keys, written: Written) -> None:
    """As `reference.append_kv`."""
    lengths, count = cached.lengths.tolist(), keys.k.shape[2]
    if not _is_plain(cached, written) or not all(0 <= length <= cached.capacity - count for length in lengths):
        reference.append_kv(
            *(cached.k_cache, cached.v_cache, *keys, cached.lengths),
            *(cached.block_table, cached.k_scale, cached.v_scale, *written),
        )
    elif lengths.count(lengths[0]) == len(lengths):
        for cache, new in zip(cached[:2], keys, strict=True):
            cache.narrow(2, lengths[0], count).copy_(new)
    else:
        for cache, new in zip(cached[:2], keys, strict=True):
            for one, of, length in zip(cache.unbind(), new.unbind(), lengths, strict=True):
                one.narrow(1, length, count).copy_(of)


def _is_plain(cached: Cached, written: Written) -> bool:
    return (
        cached.block_table is None
        and cached.k_scale is None
        and written.cu_rows is None
        and written.kept is None
        and len(cached.lengths) > 0
    )


def rotary_append(turned: Turned, keys: Keys, cached: Cached, written: Written, keep: int) -> tuple[Tensor, Tensor]:
    """As `reference.rotary_append`."""
    if not _is_plain(cached, written):
        return reference.rotary_append(
            *(turned.q, *keys, turned.cos, turned.sin, cached.k_cache, cached.v_cache, cached.lengths, keep),
            *(cached.block_table, cached.k_scale, cached.v_scale, *written),
        )
    cos, sin, half = turned.cos.unsqueeze(1), turned.sin.unsqueeze(1), turned.cos.shape[-1] // 2
    q, k = ((x * cos).add_(torch.roll(x, half, -1).mul_(sin)) for x in (turned.q, keys.k))
    rows = k.shape[2]
    kept = Keys(k, keys.v) if keep == rows else Keys(k.narrow(2, 0, keep), keys.v.narrow(2, 0, keep))
    append_kv(cached, kept, written)
    return q, k
