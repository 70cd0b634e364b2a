"""Projections whose rows keep to themselves, and LoRA that applies to some rows (R-ISD, arXiv 2604.11035).

What equals what, bit for bit:

    row_invariant_linear            a row alone = the row in any batch, slot and company
    gated_lora, row_invariant=True  rows with gate 0 = row_invariant_linear
    gated_lora, row_invariant=False rows with gate 0 = torch.nn.functional.linear of all rows at once

On CUDA these hold by construction. On the CPU a row is computed among 8 rows, always, because libraries take other code
for other numbers of rows; that a row's slot and its neighbours then leave its bits alone is measured, for one number of
threads, not promised by the libraries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, eager_linear, ops

__all__ = ["gated_lora", "row_invariant_linear"]

# What a CPU projection takes at a time: 8 rows, and results in multiples of 16. MKL splits results among threads, and
# where 1 to 3 are left to one of them, it sums odd and even rows differently.
CHUNK, COLUMNS = 8, 16

ops._library.define("row_invariant_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
ops._library.define(
    "gated_lora(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor gate, float scale, "
    "bool row_invariant) -> (Tensor, Tensor)"
)
ops._library.define(
    "gated_lora_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor gate, "
    "Tensor h, float scale) -> (Tensor, Tensor, Tensor)"
)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Types and shapes of a projection."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    _checks.tensor("weight", weight, 2)
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected shape [..., {weight.shape[1]}] for this weight, got {list(x.shape)}")
    _checks.same_kind(x, weight=weight)
    if bias is not None:
        _checks.tensor("bias", bias, 1)
        _checks.shape("bias", bias, (weight.shape[0],))
        _checks.same_kind(x, bias=bias)


def _autocast(x: Any, *others: Any) -> tuple[Any, ...]:
    """The operands as autocast wants them: in its dtype, where it is on."""
    operands = (x, *others)
    if not isinstance(x, Tensor) or not torch.is_autocast_enabled(x.device.type):
        return operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(o.to(dtype) if isinstance(o, Tensor) else o for o in operands)


def row_invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: ops.Backend | None = None
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

    Twin: `tidar_kernels.eager.row_invariant_linear`. Kernel: `tidar_kernels.kernels.linear`.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check_linear(x, weight, bias)
    ops._check_backend(backend, x.device)
    if backend == "eager":
        return eager_linear.row_invariant_linear(x, weight, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out: Tensor = torch.ops.tidar_kernels.row_invariant_linear(rows, weight, bias)
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
    backend: ops.Backend | None = None,
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

    Twin: `tidar_kernels.eager.gated_lora`. Kernels: `tidar_kernels.kernels.linear`.
    """
    x, weight, bias, lora_a, lora_b = _autocast(x, weight, bias, lora_a, lora_b)
    _check_linear(x, weight, bias)
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        _checks.tensor(name, value, 2)
    _checks.same_kind(x, lora_a=lora_a, lora_b=lora_b)
    rank = lora_a.shape[0]
    if rank < 1:
        raise ValueError(f"lora_a: expected a rank of at least 1, got shape {list(lora_a.shape)}")
    _checks.shape("lora_a", lora_a, (rank, weight.shape[1]))
    _checks.shape("lora_b", lora_b, (weight.shape[0], rank))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    gate = _rows_of_gate(gate, x)
    ops._check_backend(backend, x.device)
    if backend == "eager":
        return eager_linear.gated_lora(x, weight, lora_a, lora_b, gate.view(x.shape[:-1]), scale, bias)
    rows = x.reshape(gate.shape[0], x.shape[-1])
    out, _ = torch.ops.tidar_kernels.gated_lora(rows, weight, bias, lora_a, lora_b, gate, float(scale), row_invariant)
    return out.view(*x.shape[:-1], weight.shape[0])


def _rows_of_gate(gate: Tensor, x: Tensor) -> Tensor:
    """The gate, one number a row of x flattened: float32 (float64 beside float64), contiguous."""
    if not isinstance(gate, Tensor):
        raise TypeError(f"gate: expected a torch.Tensor, got {type(gate).__name__}")
    if gate.dtype != torch.bool and gate.dtype not in _checks.FLOAT_DTYPES:
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


def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if ops.interpreting():
        return _linear_triton(x, weight, bias)
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


def _linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from .kernels.linear import row_invariant_linear as launch

    return launch(x, weight, bias)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _linear_autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (
        grad_out @ weight if ctx.needs_input_grad[0] else None,
        grad_out.t() @ x if ctx.needs_input_grad[1] else None,
        grad_out.sum(0) if ctx.needs_input_grad[2] else None,
    )


def _lora_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, scale: float,
    row_invariant: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if ops.interpreting():
        return _lora_triton(x, weight, bias, lora_a, lora_b, gate, scale, row_invariant)
    linear = _linear_cpu if row_invariant else F.linear
    out = linear(x, weight, bias)
    h = x.new_zeros(x.shape[0], lora_a.shape[0])
    rows = gate.nonzero().squeeze(1)
    if len(rows):
        down = linear(x.index_select(0, rows), lora_a, None)
        down.mul_(gate.index_select(0, rows).unsqueeze(1).to(x.dtype))
        h.index_copy_(0, rows, down)
        out.index_add_(0, rows, linear(down, lora_b, None), alpha=scale)
    return out, h


def _lora_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, scale: float,
    row_invariant: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .kernels.linear import gated_lora as launch

    return launch(x, weight, bias, lora_a, lora_b, gate, scale, row_invariant)


def _lora_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, scale: float,
    row_invariant: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


def _lora_backward_cpu(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, h: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if ops.interpreting():
        return _lora_backward_triton(grad_out, x, weight, lora_a, lora_b, gate, h, scale)
    rows = gate.nonzero().squeeze(1)
    grad = grad_out[rows]
    up = (grad @ lora_b) * (scale * gate[rows]).unsqueeze(1).to(x.dtype)
    grad_a, grad_b = up.t() @ x[rows], grad.t() @ h[rows] * scale
    grad_x = x.new_empty(0) if weight is None else (grad_out @ weight).index_add_(0, rows, up @ lora_a)
    return grad_x, grad_a, grad_b


def _lora_backward_triton(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, h: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .kernels.linear import gated_lora_backward as launch

    return launch(grad_out, x, weight, lora_a, lora_b, gate, h, scale)


def _lora_backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, h: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rank = lora_a.shape[0]
    grad_x = x.new_empty(0) if weight is None else x.new_empty(x.shape)
    return grad_x, x.new_empty(rank, x.shape[1]), x.new_empty(grad_out.shape[1], rank)


def _lora_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, gate, ctx.scale, _ = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, gate, output[1])
    ctx.mark_non_differentiable(output[1])


def _lora_autograd(ctx: Any, grad_out: Tensor, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, gate, h = ctx.saved_tensors
    for_x, for_weight, for_bias, for_a, for_b, *_ = ctx.needs_input_grad
    grad_x = grad_a = grad_b = None
    if for_x or for_a or for_b:
        grad_x, grad_a, grad_b = torch.ops.tidar_kernels.gated_lora_backward(
            grad_out, x, weight if for_x else None, lora_a, lora_b, gate, h, ctx.scale
        )
    return (
        grad_x if for_x else None,
        grad_out.t() @ x if for_weight else None,
        grad_out.sum(0) if for_bias else None,
        grad_a if for_a else None,
        grad_b if for_b else None,
        *(None, None, None),
    )


def _lora_no_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("gated_lora: expected at most first derivatives, got a request for a second one")


ops._library.impl("row_invariant_linear", _linear_cpu, "CPU")
ops._library.impl("row_invariant_linear", _linear_triton, "CUDA")
ops._library.impl("gated_lora", _lora_cpu, "CPU")
ops._library.impl("gated_lora", _lora_triton, "CUDA")
ops._library.impl("gated_lora_backward", _lora_backward_cpu, "CPU")
ops._library.impl("gated_lora_backward", _lora_backward_triton, "CUDA")
torch.library.register_fake("tidar_kernels::row_invariant_linear", _linear_fake, lib=ops._library)
torch.library.register_fake("tidar_kernels::gated_lora", _lora_fake, lib=ops._library)
torch.library.register_fake("tidar_kernels::gated_lora_backward", _lora_backward_fake, lib=ops._library)
torch.library.register_autograd(
    "tidar_kernels::row_invariant_linear",
    _linear_autograd,
    setup_context=_linear_setup_context,
    lib=ops._library,
)
torch.library.register_autograd(
    "tidar_kernels::gated_lora", _lora_autograd, setup_context=_lora_setup_context, lib=ops._library
)
torch.library.register_autograd("tidar_kernels::gated_lora_backward", _lora_no_double_backward, lib=ops._library)
