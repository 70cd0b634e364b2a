"""The bundles of the operators that write into the cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Turned", "Written"]


class Turned(NamedTuple):
    """Query rows and their rotation.

    Attributes:
        q: `[batch, heads, rows, head_dim]`.
        cos, sin: `[batch or 1, rows, head_dim]`; sin carries the sign of the half-split layout.
    """

    q: Tensor
    cos: Tensor
    sin: Tensor


class Written(NamedTuple):
    """Which rows of k and v enter the cache. Without `cu_rows` they are `[batch, kv_heads, rows, head_dim]`.

    Attributes:
        cu_rows: int32 `[batch + 1]`, or None. Where given, k, v, q, cos and sin have a batch of 1, and the rows
            `[cu_rows[b], cu_rows[b + 1])` of it are those of sequence b. Rows at and past the last entry are nobody's.
        kept: int32 `[batch]`, rows of each sequence that are written; None for all.
    """

    cu_rows: Tensor | None = None
    kept: Tensor | None = None
