"""CPU paths of `row_invariant_linear` and `gated_lora`, on the library's own matrix product.

A row is computed as one of 8, because libraries take other code for fewer rows. More rows at a time are faster, and
give the same bits with every library that was tried: blocks of up to 64 are used for the shapes of weights for which a
first trial finds that to be so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import Adapter, Gated, Projection

__all__ = ["gated_lora", "gated_lora_backward", "row_invariant_linear"]

# Rows of a projection come in multiples of 8, at most 64 at a time, and results in multiples of 16. MKL splits results
# among threads, and where 1 to 3 are left to one of them, it sums odd and even rows differently.
CHUNK, BLOCK, COLUMNS = 8, 64, 16
_ALIGNMENT = 64  # bytes, of every buffer that PyTorch allocates

# Of each kind of product and number of rows, whether its rows had the bits that they have among 8.
_tried: dict[tuple[object, ...], bool] = {}


def row_invariant_linear(projection: Projection) -> Tensor:
    """`x W^T + bias`, in blocks of rows whose number and place leave a row's bits alone."""
    x, weight, bias = projection
    rows, out_features = x.shape[0], weight.shape[0]
    missing = -rows % CHUNK
    if missing:
        whole = x.new_zeros(rows + missing, x.shape[1])
        whole[:rows] = x
        x = whole
    x = _aligned(x)
    tail = out_features % COLUMNS
    if not tail:
        return _product(x, weight, bias)[:rows]
    # The last columns by themselves, so that the weight is not copied for the sake of a few.
    parts = []
    if out_features > tail:
        columns = slice(0, out_features - tail)
        parts.append(_product(x, weight[columns], None if bias is None else bias[columns]))
    columns, more = slice(out_features - tail, None), COLUMNS - tail
    last_bias = None if bias is None else F.pad(bias[columns], (0, more))
    parts.append(_product(x, F.pad(weight[columns], (0, 0, 0, more)), last_bias)[:, :tail])
    return torch.cat([part[:rows] for part in parts], dim=1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` for a multiple of `CHUNK` rows, block by block."""
    sizes = {min(len(x), BLOCK), len(x) % BLOCK} - {0}
    size = BLOCK if all(_like_chunks(count, weight, bias) for count in sizes) else CHUNK
    parts = [F.linear(_aligned(part), weight, bias) for part in x.split(size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _aligned(x: Tensor) -> Tensor:
    """x where its bits can be read as any other block's are."""
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % _ALIGNMENT else x.contiguous()


def _like_chunks(rows: int, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product of so many rows gives the bits of products of `CHUNK` rows; tried once, on random rows."""
    kind = (rows, weight.dtype, weight.shape, weight.stride(), bias is None, torch.get_num_threads())
    if rows == CHUNK or kind in _tried:
        return rows == CHUNK or _tried[kind]
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator, device="cpu").to(weight.dtype)
    chunks = torch.cat([F.linear(_aligned(chunk), weight, bias) for chunk in x.split(CHUNK)])
    _tried[kind] = torch.equal(F.linear(x, weight, bias), chunks)
    return _tried[kind]


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
