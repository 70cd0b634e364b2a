"""Noise by counter: Gumbel and uniform variates that are a function of (seed, position, token, stream) alone.

So what a request samples does not depend on its batch mates, on the block length or on how many drafts were accepted.
The bits are Philox-4x32-10 (Salmon et al., SC 2011), the same as in the kernels (`triton.py` beside this file).
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["Stream", "gumbel", "philox", "uniform"]

_WORD = 0xFFFFFFFF


class Stream(IntEnum):
    """What the noise is for: decisions that must be independent of each other draw from different streams."""

    TOKEN = 0  # the token of a position, autoregressively or coupled to that
    DRAFT = 1  # the draft of a position, under the rejection rules
    ACCEPT = 2  # whether that draft stays
    RESIDUAL = 3  # what replaces it


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; int64 wraps around, and its upper bits are masked."""
    wide = a * b
    return (wide >> 32) & _WORD, wide & _WORD


def philox(seed: Tensor, token: Tensor, position: Tensor, stream: int) -> Tensor:
    """32 random bits, int64 in `[0, 2^32)`, of the broadcast shape of the int64 arguments."""
    c0, c1, c2, c3 = (
        x.to(torch.int64) & _WORD for x in torch.broadcast_tensors(token, position, token * 0 + stream, token * 0)
    )
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0


def gumbel(seed: Tensor, token: Tensor, position: Tensor, stream: int) -> Tensor:
    """Standard Gumbel variates, float32: `argmax(log p + gumbel)` is a sample of p.

    They are -log of an exponential variate -log(1 - u). The winners have a small u, which keeps its precision as long
    as 1 - u is not rounded: hence the series.
    """
    u = ((philox(seed, token, position, stream).to(torch.float32) + 0.5) * 2.0**-32).clamp(max=0.99999994)
    exponential = torch.where(u < 1e-3, u * (1.0 + u * (0.5 + u / 3.0)), -torch.log(1.0 - u))
    return -torch.log(exponential)


def uniform(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """Uniform variates in (0, 1), float32."""
    return ((philox(seed, torch.zeros_like(position), position, stream) >> 8).to(torch.float32) + 0.5) * 2.0**-24
