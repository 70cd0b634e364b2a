"""Plainly causal patterns, kept: ordinary calls ask for one in every layer."""

from __future__ import annotations

from functools import lru_cache

from ..patterns import Pattern
from ..patterns import causal as make

__all__ = ["causal"]


@lru_cache(maxsize=64)
def causal(rows: int) -> Pattern:
    """`patterns.causal(rows)`; the copies on devices that it keeps are shared too."""
    return make(rows)
