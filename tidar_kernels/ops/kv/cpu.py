"""CPU path of `compact_kv`: the reference copies whole caches, this only the slots that move."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Cached

__all__ = ["compact_kv"]


def compact_kv(cached: Cached, path: Tensor) -> None:
    """One gather a sequence."""
    k_cache, v_cache, lengths = cached.k_cache, cached.v_cache, cached.lengths
    max_len = k_cache.shape[2]
    for b, (length, nodes) in enumerate(zip(lengths.tolist(), path.tolist(), strict=True)):
        moves = [
            (length + i, length + node)
            for i, node in enumerate(nodes)
            if node > i and length + i >= 0 and length + node < max_len
        ]
        if moves:
            to, of = torch.tensor(moves, device="cpu").unbind(1)
            k_cache[b, :, to] = k_cache[b, :, of]  # the right side is a copy
            v_cache[b, :, to] = v_cache[b, :, of]
