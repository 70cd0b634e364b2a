"""Noise by counter: Gumbel and uniform variates that are a function of (seed, position, token, stream) alone.

So what a request samples does not depend on its batch mates, on the block length or on how many drafts were accepted.
The bits are Philox-4x32-10 (Salmon et al., SC 2011), the same as in the kernels (`triton.py` beside this file).
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["LARGEST", "LEAST", "Stream", "gumbel", "gumbel_of_all", "gumbel_of_words", "philox", "uniform"]

_WORD = 0xFFFFFFFF
# All Gumbel variates lie between these: -log(-log(1 - u)) at the largest and the smallest u.
LEAST, LARGEST = -2.82, 22.9


class Stream(IntEnum):
    """What the noise is for: decisions that must be independent of each other draw from different streams."""

    TOKEN = 0  # the token of a position, autoregressively or coupled to that
    DRAFT = 1  # the draft of a position, under the rejection rules
    ACCEPT = 2  # whether that draft stays
    RESIDUAL = 3  # what replaces it


def philox(seed: Tensor, counter: Tensor, position: Tensor, stream: int) -> Tensor:
    """Four words of 32 random bits, int64 in `[0, 2^32)`, `[*shape, 4]`; `shape` is that of the broadcast arguments.

    Philox-4x32-10 with key `seed` and counter `(counter, position, stream, 0)`.
    """
    shape = torch.broadcast_tensors(seed, counter, position)[0].shape
    # Words c0 and c2 lie in `even`, c1 and c3 in `odd`, whose upper halves hold anything.
    even, odd, wide = (torch.zeros(2, *shape, dtype=torch.int64, device=counter.device) for _ in range(3))
    even[0], odd[0], even[1] = counter & _WORD, position & _WORD, stream
    flat = (1,) * (len(shape) - seed.dim())
    words = torch.stack([seed & _WORD, (seed >> 32) & _WORD]).reshape(1, 2, *flat, *seed.shape)
    bump = torch.tensor([0x9E3779B9, 0xBB67AE85], device=seed.device) * torch.arange(10, device=seed.device)[:, None]
    for key in (words + bump.reshape(10, 2, *(1,) * len(shape))) & _WORD:
        # 32 x 32 bit products: int64 wraps around, and the sign that the shift spreads is masked away.
        torch.mul(even[0], 0xD2511F53, out=wide[1])
        torch.mul(even[1], 0xCD9E8D57, out=wide[0])
        torch.bitwise_right_shift(wide, 32, out=even)
        even ^= odd
        even ^= key
        even &= _WORD
        odd, wide = wide, odd
    odd &= _WORD
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1)


def gumbel_of_words(words: Tensor) -> Tensor:
    """Standard Gumbel variates, float32, of words of 32 random bits.

    They are -log of an exponential variate -log(1 - u). The winners have a small u, which keeps its precision as long
    as 1 - u is not rounded: hence the series.
    """
    u = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=0.99999994)
    exponential = torch.where(u < 1e-3, u * (1.0 + u * (0.5 + u / 3.0)), -torch.log(1.0 - u))
    return -torch.log(exponential)


def gumbel(seed: Tensor, token: Tensor, position: Tensor, stream: int) -> Tensor:
    """Gumbel variates of tokens, float32: `argmax(log p + gumbel)` is a sample of p.

    Token t has word `t % 4` of counter `t // 4`.
    """
    words = philox(seed, token >> 2, position, stream)
    return gumbel_of_words(words.gather(-1, (token & 3).expand(words.shape[:-1])[..., None])[..., 0])


def gumbel_of_all(seed: Tensor, vocab_size: int, position: Tensor, stream: int) -> Tensor:
    """`gumbel` of every token of a vocabulary, `[*shape, vocab_size]`; `shape` is that of seed and position."""
    counter = torch.arange((vocab_size + 3) // 4, device=seed.device)
    words = philox(seed[..., None], counter, position[..., None], stream)
    return gumbel_of_words(words.flatten(-2)[..., :vocab_size])


def uniform(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """Uniform variates in (0, 1), float32."""
    bits = philox(seed, torch.zeros_like(position), position, stream)[..., 0]
    return ((bits >> 8).to(torch.float32) + 0.5) * 2.0**-24
