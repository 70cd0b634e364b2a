"""Plain PyTorch twins of `tidar_kernels.linear`: the oracle, in any float dtype, differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_lora", "gated_lora", "row_invariant_linear"]


def row_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Eager twin of `tidar_kernels.row_invariant_linear`; same arguments, same results up to rounding."""
    return F.linear(x, weight, bias)


def gated_lora(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Eager twin of `tidar_kernels.gated_lora`; same arguments, same results up to rounding."""
    return add_lora(F.linear(x, weight, bias), x, lora_a, lora_b, gate, scale)


def add_lora(base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, scale: float) -> Tensor:
    """`base [..., out_features]`, on rows whose gate is not 0 plus `scale * ((gate * (x A^T)) B^T)`, in its dtype.

    The term is chosen, not multiplied, away from rows with gate 0: 0 * inf is not 0.
    """
    gate = gate.expand(x.shape[:-1]).unsqueeze(-1)
    # Both branches of a `where` have a gradient, so garbage must not enter the one that is not taken either.
    chosen = torch.where(gate != 0, x, 0.0)
    term = F.linear(F.linear(chosen, lora_a) * gate.to(x.dtype), lora_b) * float(scale)
    return torch.where(gate != 0, base + term.to(base.dtype), base)
