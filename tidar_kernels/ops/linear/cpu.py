"""CPU paths of `row_invariant_linear` and `gated_lora`, on the library's own matrix product.

A row is computed among 8 rows, always, because libraries take other code for other numbers of rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .operands import Adapter, Gated, Projection

__all__ = ["gated_lora", "gated_lora_backward", "row_invariant_linear"]

# What a CPU projection takes at a time: 8 rows, and results in multiples of 16. MKL splits results among threads, and
# where 1 to 3 are left to one of them, it sums odd and even rows differently.
CHUNK, COLUMNS = 8, 16


def row_invariant_linear(projection: Projection) -> Tensor:
    """`x W^T + bias`, 8 rows at a time."""
    x, weight, bias = projection
    rows, (out_features, in_features) = x.shape[0], weight.shape
    out = x.new_empty(rows, out_features)
    whole = out_features - out_features % COLUMNS
    parts = [(slice(0, whole), weight[:whole], None if bias is None else bias[:whole])]
    if whole < out_features:
        missing = -out_features % COLUMNS
        tail = F.pad(weight[whole:], (0, 0, 0, missing))
        parts.append((slice(whole, None), tail, None if bias is None else F.pad(bias[whole:], (0, missing))))
    chunk = x.new_zeros(CHUNK, in_features)  # one buffer, so that every row is read from memory that is aligned alike
    for start in range(0, rows, CHUNK):
        held = min(CHUNK, rows - start)
        chunk[:held] = x[start : start + held]
        for columns, part, part_bias in parts:
            into = out[start : start + held, columns]
            into.copy_(F.linear(chunk, part, part_bias)[:held, : into.shape[1]])
    return out


def gated_lora(projection: Projection, adapter: Adapter, row_invariant: bool) -> tuple[Tensor, Tensor]:
    """`(y, h)`: the adapter's products for the gated rows alone, added to the rows that have it."""
    x, (lora_a, lora_b, gate, scale) = projection.x, adapter

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return row_invariant_linear(Projection(x, weight, bias)) if row_invariant else F.linear(x, weight, bias)

    out = linear(*projection)
    h = x.new_zeros(x.shape[0], lora_a.shape[0])
    rows = gate.nonzero().squeeze(1)
    if len(rows):
        down = linear(x.index_select(0, rows), lora_a)
        down.mul_(gate.index_select(0, rows).unsqueeze(1).to(x.dtype))
        h.index_copy_(0, rows, down)
        out.index_add_(0, rows, linear(down, lora_b), alpha=scale)
    return out, h


def gated_lora_backward(gated: Gated, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """`(dx, dA, dB)` over gated rows; dx is empty without a weight."""
    (x, weight, grad_out, h), (lora_a, lora_b, gate, scale) = gated, adapter
    rows = gate.nonzero().squeeze(1)
    grad = grad_out[rows]
    up = (grad @ lora_b) * (scale * gate[rows]).unsqueeze(1).to(x.dtype)
    grad_a, grad_b = up.t() @ x[rows], grad.t() @ h[rows] * scale
    grad_x = x.new_empty(0) if weight is None else (grad_out @ weight).index_add_(0, rows, up @ lora_a)
    return grad_x, grad_a, grad_b
