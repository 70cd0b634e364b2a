"""The bundles of projections and their adapters."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Adapter", "Gated", "Projection"]


class Projection(NamedTuple):
    """`x W^T + bias`: x `[rows, in_features]`, weight `[out_features, in_features]`, bias `[out_features]` or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None


class Adapter(NamedTuple):
    """`scale * ((gate * (x A^T)) B^T)`: A `[rank, in_features]`, B `[out_features, rank]`, gate float `[rows]`."""

    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor
    scale: float


class Gated(NamedTuple):
    """What the backward pass of a gated projection starts from.

    Attributes:
        x: `[rows, in_features]`.
        weight: `[out_features, in_features]`, or None where no gradient of x is wanted.
        grad_out: `[rows, out_features]`.
        h: `[rows, rank]`, `gate * (x A^T)` of the forward pass.
    """

    x: Tensor
    weight: Tensor | None
    grad_out: Tensor
    h: Tensor
