"""Plain causal rows: autoregressive decoding, verification, a chunk of prefill."""

from __future__ import annotations

import torch

from .arguments import check_int
from .pattern import Pattern
from .rows import intervals

__all__ = ["causal"]


def causal(length: int) -> Pattern:
    """Plain causal rows: autoregressive decoding (`length = 1`), verification, or a chunk of prefill.

    Raises:
        TypeError, ValueError: `length` is not an int >= 1.
    """
    row = torch.arange(check_int("length", length, 1), device="cpu")
    live = torch.ones_like(row, dtype=torch.bool)
    return Pattern(
        lead=intervals(torch.zeros_like(row), row + 1, live),
        own=intervals(row, row, ~live),
        positions=row.to(torch.int32),
        kv_len=length,
        name=f"causal(length={length})",
    )
