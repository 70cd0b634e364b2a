"""The bundle of `rotary_append`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Turned"]


class Turned(NamedTuple):
    """Query rows and their rotation.

    Attributes:
        q: `[batch, heads, rows, head_dim]`.
        cos, sin: `[batch or 1, rows, head_dim]`; sin carries the sign of the half-split layout.
    """

    q: Tensor
    cos: Tensor
    sin: Tensor
