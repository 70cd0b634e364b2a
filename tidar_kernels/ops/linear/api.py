"""Projections whose rows keep to themselves, and LoRA that applies to some rows (R-ISD, arXiv 2604.11035).

What equals what, bit for bit:

    row_invariant_linear            a row alone = the row in any batch, slot and company
    gated_lora, row_invariant=True  rows with gate 0 = row_invariant_linear
    gated_lora, row_invariant=False rows with gate 0 = torch.nn.functional.linear of all rows at once

On CUDA these hold by construction. On the CPU a row is computed as one of 8, because libraries take other code for
fewer rows, or of up to 64 where a trial finds the same bits; that a row's slot and its neighbours then leave its bits
alone is measured, for one number of threads, not promised by the libraries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...patterns.arguments import FLOAT_DTYPES, check_number
from .. import checks
from ..declaration import Backend, Gradient, Operator, check_backend, no_second_derivative
from . import cpu, reference
from .operands import Adapter, Gated, Projection

__all__ = ["add_lora", "check_linear", "check_lora", "gated_lora", "row_invariant_linear", "rows_of_gate"]


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Types and shapes of a projection."""
    checks.strided("x", x)
    checks.tensor("weight", weight, 2)
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected shape [..., {weight.shape[1]}] for this weight, got {list(x.shape)}")
    checks.same_kind(x, weight=weight)
    if bias is not None:
        checks.tensor("bias", bias, 1)
        checks.shape("bias", bias, (weight.shape[0],))
        checks.same_kind(x, bias=bias)


def _autocast(x: Any, *others: Any) -> tuple[Any, ...]:
    """The operands as autocast wants them: in its dtype, where it is on."""
    operands = (x, *others)
    if not isinstance(x, Tensor) or not torch.amp.is_autocast_available(x.device.type):
        return operands
    if not torch.is_autocast_enabled(x.device.type):
        return operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(o.to(dtype) if isinstance(o, Tensor) else o for o in operands)


def row_invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """`x W^T + bias`, where a row's bits depend on that row and the weights alone.

    Not on how many rows come with it, where it stands, or what its neighbours hold; libraries promise none of these.
    So a verify row of a decode step equals the same row decoded alone. Differentiable (by ordinary matmuls), though
    training has no use for it.

    Args:
        x: `[..., in_features]`, float32, float16 or bfloat16; leading dimensions that do not merge are copied.
        weight: `[out_features, in_features]`, any strides.
        bias: `[out_features]`.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        `[..., out_features]`, contiguous, in the dtype of x.

    Raises:
        TypeError: a non-tensor, or mixed dtypes. ValueError: shapes, devices or backend do not fit.

    Twin: `tidar_kernels.eager.row_invariant_linear`. Kernel: `triton.py` beside this file.
    """
    x, weight, bias = _autocast(x, weight, bias)
    check_linear(x, weight, bias)
    check_backend(backend, x.device)
    if backend == "eager":
        return reference.row_invariant_linear(x, weight, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out: Tensor = linear_operator(Projection(rows, weight, bias))
    return out.view(*x.shape[:-1], weight.shape[0])


def gated_lora(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    row_invariant: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    """`W x + bias + s * ((m * (x A^T)) B^T)`: a frozen projection with an adapter on the rows whose gate m is not 0.

    Rows with m = 0 carry the base projection's bits, whatever the adapter holds, NaN and inf included; no adapter work
    is done for tiles of such rows. The base is `row_invariant_linear` for decoding, and with `row_invariant=False`
    `torch.nn.functional.linear`, which is faster with the thousands of rows of training.

    Differentiable with respect to x, `lora_a` and `lora_b`, and to `weight` and `bias` where they ask for it; not the
    gate. Gradients are the same bits in every run. Gradients of `lora_a` and `lora_b` read gated rows alone.

    Args:
        x: `[..., in_features]`, float32, float16 or bfloat16; leading dimensions that do not merge are copied.
        weight: `[out_features, in_features]`, any strides, as for the adapter.
        lora_a: `[rank, in_features]`, any rank from 1.
        lora_b: `[out_features, rank]`.
        gate: bool or float, broadcast over the leading dimensions of x.
        scale: s, finite.
        bias: `[out_features]`.
        row_invariant: which base: every row's bits its own, or the library's projection of all rows at once.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        `[..., out_features]`, contiguous, in the dtype of x.

    Raises:
        TypeError: a non-tensor, mixed dtypes, or a gate that is neither bool nor float. ValueError: shapes, devices,
            scale or backend do not fit, or the gate asks for a gradient.

    Twin: `tidar_kernels.eager.gated_lora`. Kernels: `triton.py` beside this file.
    """
    x, weight, bias, lora_a, lora_b = _autocast(x, weight, bias, lora_a, lora_b)
    check_linear(x, weight, bias)
    scale = check_lora(x, lora_a, lora_b, scale, weight.shape[0])
    gate = rows_of_gate(gate, x)
    check_backend(backend, x.device)
    if backend == "eager":
        return reference.gated_lora(x, weight, lora_a, lora_b, gate.view(x.shape[:-1]), scale, bias)
    rows = x.reshape(gate.shape[0], x.shape[-1])
    adapter = Adapter(lora_a, lora_b, gate, scale)
    out, _ = lora_operator(Projection(rows, weight, bias), adapter, row_invariant=bool(row_invariant))
    return out.view(*x.shape[:-1], weight.shape[0])


def add_lora(base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, scale: float = 1.0) -> Tensor:
    """`gated_lora` for a base that is more than `x W^T + bias`: the adapter's term added to what it gave, in PyTorch.

    Args:
        base: `[..., out_features]`, any float dtype, kept by the result; rows with gate 0 are its rows, bit for bit.
        x, lora_a, lora_b, gate, scale: as for `gated_lora`.

    Raises:
        TypeError, ValueError: as `gated_lora`, or the base has other rows than x.
    """
    x, lora_a, lora_b = _autocast(x, lora_a, lora_b)
    checks.tensor("lora_a", lora_a, 2)
    checks.last_dim("x", x, lora_a.shape[1])
    if not isinstance(base, Tensor) or not base.is_floating_point():
        got = base.dtype if isinstance(base, Tensor) else type(base).__name__
        raise TypeError(f"base: expected a float tensor, got {got}")
    if base.ndim != x.ndim or base.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"base: expected the rows of x, {list(x.shape[:-1])}, got shape {list(base.shape)}")
    scale = check_lora(x, lora_a, lora_b, scale, base.shape[-1])
    return reference.add_lora(base, x, lora_a, lora_b, rows_of_gate(gate, x).view(x.shape[:-1]), scale)


def check_lora(x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, out_features: int) -> float:
    """Types and shapes of an adapter; returns its scale."""
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        checks.tensor(name, value, 2)
    checks.same_kind(x, lora_a=lora_a, lora_b=lora_b)
    rank = lora_a.shape[0]
    if rank < 1:
        raise ValueError(f"lora_a: expected a rank of at least 1, got shape {list(lora_a.shape)}")
    checks.shape("lora_a", lora_a, (rank, x.shape[-1]))
    checks.shape("lora_b", lora_b, (out_features, rank))
    return check_number("scale", scale)


def rows_of_gate(gate: Tensor, x: Tensor) -> Tensor:
    """The gate, one number a row of x flattened: float32 (float64 beside float64), contiguous."""
    checks.strided("gate", gate)
    if gate.dtype != torch.bool and gate.dtype not in FLOAT_DTYPES:
        raise TypeError(f"gate: expected dtype bool or a float, got {gate.dtype}")
    if gate.device != x.device:
        raise ValueError(f"gate: expected device {x.device} like the other operands, got {gate.device}")
    if gate.requires_grad and torch.is_grad_enabled():
        raise ValueError("gate: expected a tensor without gradient, got requires_grad=True")
    leading = x.shape[:-1]
    fits = gate.ndim <= len(leading) and all(
        size in (1, of) for size, of in zip(reversed(gate.shape), reversed(leading), strict=False)
    )
    if not fits:
        raise ValueError(f"gate: expected a shape that broadcasts to {list(leading)}, got {list(gate.shape)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return gate.to(dtype).expand(leading).reshape(math.prod(leading)).contiguous()


def _kernels() -> Any:
    from . import triton

    return triton


def _linear_fake(projection: Projection) -> Tensor:
    return projection.x.new_empty(projection.x.shape[0], projection.weight.shape[0])


def _linear_save(ctx: Any, output: Tensor, projection: Projection) -> None:
    ctx.save_for_backward(projection.x, projection.weight)


def _linear_backward(ctx: Any, needed: frozenset[str], grad_out: Tensor) -> dict[str, Tensor | None]:
    x, weight = ctx.saved_tensors
    return {
        "x": grad_out @ weight if "x" in needed else None,
        "weight": grad_out.t() @ x if "weight" in needed else None,
        "bias": grad_out.sum(0) if "bias" in needed else None,
    }


def _lora_fake(projection: Projection, adapter: Adapter, row_invariant: bool) -> tuple[Tensor, Tensor]:
    x = projection.x
    return x.new_empty(x.shape[0], projection.weight.shape[0]), x.new_empty(x.shape[0], adapter.lora_a.shape[0])


def _lora_save(
    ctx: Any, output: tuple[Tensor, Tensor], projection: Projection, adapter: Adapter, row_invariant: bool
) -> None:
    out, h = output
    ctx.save_for_backward(projection.x, projection.weight, *adapter[:3], h)
    ctx.scale = adapter.scale
    ctx.mark_non_differentiable(h)


def _lora_backward(
    ctx: Any, needed: frozenset[str], grad_out: Tensor, grad_h: Tensor | None
) -> dict[str, Tensor | None]:
    x, weight, lora_a, lora_b, gate, h = ctx.saved_tensors
    grads: dict[str, Tensor | None] = {}
    if needed & {"x", "lora_a", "lora_b"}:
        # Without the weight there is no dx to compute.
        projection = Gated(x, weight if "x" in needed else None, grad_out, h)
        dx, da, db = lora_backward_operator(projection, Adapter(lora_a, lora_b, gate, ctx.scale))
        grads |= {"x": dx, "lora_a": da, "lora_b": db}
    if "weight" in needed:
        grads["weight"] = grad_out.t() @ x
    if "bias" in needed:
        grads["bias"] = grad_out.sum(0)
    return grads


def _lora_backward_fake(gated: Gated, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    x, rank = gated.x, adapter.lora_a.shape[0]
    grad_x = x.new_empty(0) if gated.weight is None else x.new_empty(x.shape)
    return grad_x, x.new_empty(rank, x.shape[1]), x.new_empty(gated.grad_out.shape[1], rank)


linear_operator = Operator(
    "row_invariant_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    Projection,
    cpu=cpu.row_invariant_linear,
    kernel=lambda: _kernels().row_invariant_linear,
    fake=_linear_fake,
    gradient=Gradient(_linear_save, _linear_backward),
)
lora_operator = Operator(
    "gated_lora(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor gate, float scale, "
    "bool row_invariant) -> (Tensor, Tensor)",
    Projection,
    Adapter,
    cpu=cpu.gated_lora,
    kernel=lambda: _kernels().gated_lora,
    fake=_lora_fake,
    gradient=Gradient(_lora_save, _lora_backward),
)
lora_backward_operator = Operator(
    "gated_lora_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor gate, "
    "Tensor h, float scale) -> (Tensor, Tensor, Tensor)",
    Gated,
    Adapter,
    cpu=cpu.gated_lora_backward,
    kernel=lambda: _kernels().gated_lora_backward,
    fake=_lora_backward_fake,
    gradient=no_second_derivative("gated_lora"),
)
