"""Decode steps of TiDAR's relatives, as patterns; their training masks are in `tidar_kernels.families`."""

from __future__ import annotations

import torch

from .pattern import Pattern, Role, check_int, intervals

__all__ = ["block_step", "isd_step"]


def isd_step(stride: int, *, bidirectional: bool = False, shifted: bool = True) -> Pattern:
    """One step of introspective strided decoding (I-DLM, arXiv 2604.11035): `[pending, s_0 .. s_{N-2} | masks]`.

    All rows are causal, at consecutive positions: masks see the drafts and the masks before them. With `bidirectional`
    (FLARE, HybridDiffusion) the masks see the drafts and each other.

    Args:
        stride: N, rows that verify.
        bidirectional: of the masks.
        shifted: masks predict the token behind their position, and N - 1 of them draft; False: the token at it, and
            there is one more, whose own prediction the last draft row makes better.

    Raises:
        TypeError, ValueError: `stride` is not an int >= 2, or an option is not a bool.
    """
    n = check_int("stride", stride, 2)
    for name, value in (("bidirectional", bidirectional), ("shifted", shifted)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    row = torch.arange(2 * n - 1 if shifted else 2 * n)
    is_mask, zero = row >= n, torch.zeros_like(row)
    apart = is_mask & bidirectional
    options = f"{', bidirectional=True' if bidirectional else ''}{'' if shifted else ', shifted=False'}"
    return Pattern(
        lead=intervals(zero, torch.where(apart, n, row + 1), row >= 0),
        own=intervals(zero + n, zero + len(row), apart),
        positions=row.to(torch.int32),
        kv_len=len(row),
        roles=torch.where(is_mask, int(Role.MASK), int(Role.DRAFT)).to(torch.int8),
        name=f"isd_step(stride={n}{options})",
    )


def block_step(length: int) -> Pattern:
    """A bidirectional block behind the context: a denoising pass of block diffusion, or self-speculation's draft pass.

    No row is causal, not even of a block of one: nothing of it enters the cache.

    Raises:
        TypeError, ValueError: `length` is not an int >= 1.
    """
    row = torch.arange(check_int("length", length, 1))
    zero = torch.zeros_like(row)
    return Pattern(
        lead=intervals(zero, zero, row < 0),
        own=intervals(zero, zero + length, row >= 0),
        positions=row.to(torch.int32),
        kv_len=length,
        roles=torch.full((length,), int(Role.MASK), dtype=torch.int8),
        name=f"block_step(length={length})",
    )
