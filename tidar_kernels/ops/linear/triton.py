"""Row-invariant projections, and LoRA whose adapter applies to some rows: forward and backward.

Computes (twins: `reference.py`), with m = gate of a row and s = scale:

    y = x W^T + bias                                             row_invariant_linear
    h = m * (x A^T),   y += s * h B^T   on rows with m != 0      gated_lora (R-ISD, arXiv 2604.11035)
    u = s * m * (g B), dx = g W + u A,  dA = u^T x,  dB = s * g^T h   over rows with m != 0; g = dL/dy

x `[rows, in_features]`, W `[out_features, in_features]`, A `[rank, in_features]`, B `[out_features, rank]`, any
strides; h and u `[rows, rank]` in the dtype of x; sums in float32.

Each output row depends only on its input row, bit for bit: the tile is chosen by the weights' shape, not by the number
of rows, and one program sums all of the inner dimension in ascending order. The adapter's term has an accumulator of
its own and is selected row by row, so a row with gate 0 has the bits of a launch without adapter, whatever the adapter
holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.configs import Chip, chip_of
from .._triton.launch import Launch, block_dim, cdiv, strided
from .._triton.linear_tables import LinearConfig, linear_config
from .operands import Adapter, Gated, Projection


@triton.jit
def product(x, w, gate, row, column, rows, columns, depth, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """float32 `[len(row), len(column)]`: the sum of `x[row, k] * w[column, k]` over ascending k in `[0, depth)`.

    With a gate, `[depth]`, the sum is over k whose gate is not 0, and no other k is read. EVEN: BLOCK_K divides depth.
    """
    k = tl.arange(0, BLOCK_K)
    k_wide = k.to(tl.int64)
    x_ptrs = x.ptr + row.to(tl.int64)[:, None] * x.stride[0] + k_wide[None, :] * x.stride[1]
    w_ptrs = w.ptr + column.to(tl.int64)[None, :] * w.stride[0] + k_wide[:, None] * w.stride[1]
    x_in_bounds, w_in_bounds = (row < rows)[:, None], (column < columns)[None, :]
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if gate is not None:
            gated = tl.load(gate + start + k, mask=start + k < depth, other=0.0) != 0.0
            x_tile = tl.load(x_ptrs, mask=x_in_bounds & gated[None, :], other=0.0)
            w_tile = tl.load(w_ptrs, mask=w_in_bounds & gated[:, None], other=0.0)
        elif EVEN:
            x_tile = tl.load(x_ptrs, mask=x_in_bounds, other=0.0)
            w_tile = tl.load(w_ptrs, mask=w_in_bounds, other=0.0)
        else:
            in_depth = start + k < depth
            x_tile = tl.load(x_ptrs, mask=x_in_bounds & in_depth[None, :], other=0.0)
            w_tile = tl.load(w_ptrs, mask=w_in_bounds & in_depth[:, None], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * x.stride[1]
        w_ptrs += BLOCK_K * w.stride[1]
    return acc


@triton.jit
def _tile(columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column indices of this program's tile of the result: `[BLOCK_M]`, `[BLOCK_N]`."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _pointers(out, row, column):
    """Pointers `[len(row), len(column)]` into a matrix."""
    return out.ptr + row.to(tl.int64)[:, None] * out.stride[0] + column.to(tl.int64)[None, :] * out.stride[1]


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, weight, bias, gate, h, lora_b, out, rows, in_features, out_features, rank, scale,
    EVEN: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`x W^T + bias`, and with h (else None) `+ s * h B^T` on the rows whose gate is not 0."""
    row, column = _tile(out_features, BLOCK_M, BLOCK_N)
    acc = product(x, weight, None, row, column, rows, out_features, in_features, EVEN, BLOCK_K)
    if bias is not None:
        bias_ptrs = bias.ptr + column.to(tl.int64) * bias.stride[0]
        acc += tl.load(bias_ptrs, mask=column < out_features, other=0.0).to(tl.float32)[None, :]
    if h is not None:
        gated = tl.load(gate + row, mask=row < rows, other=0.0) != 0.0
        if tl.max(gated.to(tl.int32), 0) != 0:
            term = product(h, lora_b, None, row, column, rows, out_features, rank, EVEN_R, BLOCK_R)
            acc = tl.where(gated[:, None], acc + scale * term, acc)
    mask = (row < rows)[:, None] & (column < out_features)[None, :]
    tl.store(_pointers(out, row, column), acc.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gated_rows_kernel(
    x, weight, gate, out, rows, in_features, out_features, scale,
    ADD: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows with m != 0: `s * m * (x W^T)`, the others 0. With ADD, `out += s * (x W^T)` on rows with m != 0 only."""
    row, column = _tile(out_features, BLOCK_M, BLOCK_N)
    m = tl.load(gate + row, mask=row < rows, other=0.0)
    gated = m != 0.0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if tl.max(gated.to(tl.int32), 0) != 0:
        acc = scale * product(x, weight, None, row, column, rows, out_features, in_features, EVEN, BLOCK_K)
    mask = (row < rows)[:, None] & (column < out_features)[None, :]
    out_ptrs = _pointers(out, row, column)
    if ADD:
        mask = mask & gated[:, None]
        acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        acc = tl.where(gated[:, None], acc * m[:, None], 0.0)
    tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gated_sum_kernel(
    a, b, gate, out, rows, a_columns, b_columns, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`s * a b^T`, summed over the rows whose gate is not 0, of transposed operands: a `[a_columns, rows]`, b
    `[b_columns, rows]`, the result `[a_columns, b_columns]`."""
    i, j = _tile(b_columns, BLOCK_M, BLOCK_N)
    acc = scale * product(a, b, gate, i, j, a_columns, b_columns, rows, False, BLOCK_K)
    mask = (i < a_columns)[:, None] & (j < b_columns)[None, :]
    tl.store(_pointers(out, i, j), acc.to(out.ptr.dtype.element_ty), mask=mask)


def _block(config: LinearConfig, depth: int) -> int:
    """The tile along an inner dimension: no wider than it takes. A rank may be 1."""
    return min(config.BLOCK_K, block_dim(depth))


def plan_linear(
    projection: Projection, chip: Chip | None, adapter: Adapter | None = None, h: Tensor | None = None
) -> tuple[Launch, Tensor]:
    """Allocate y and lay out the row-invariant projection: `(launch, y)`; `h` is the adapter's `gate * (x A^T)`."""
    x, weight, bias = projection
    rows, in_features = x.shape
    out_features = weight.shape[0]
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    config = linear_config("base", chip, x.dtype, out_features)
    gate, lora_b, scale = (None, None, 0.0) if adapter is None else (adapter.gate, adapter.lora_b, adapter.scale)
    rank = 1 if h is None else h.shape[1]
    block_r = _block(config, rank)
    launch = Launch(
        linear_kernel,
        (cdiv(rows, config.BLOCK_M), cdiv(out_features, config.BLOCK_N)),
        (
            *(strided(x), strided(weight), None if bias is None else strided(bias), gate),
            *(None if h is None else strided(h), None if lora_b is None else strided(lora_b), strided(out)),
            *(rows, in_features, out_features, rank, scale),
        ),
        {
            "EVEN": in_features % config.BLOCK_K == 0,
            "EVEN_R": rank % block_r == 0,
            **vars(config),
            "BLOCK_R": block_r,
        },
    )
    return launch, out


def plan_gated_rows(
    role: str, x: Tensor, weight: Tensor, gate: Tensor, scale: float, chip: Chip | None, add_to: Tensor | None = None
) -> tuple[Launch, Tensor]:
    """Lay out `s * m * (x W^T)` of gated rows, or with `add_to` its rows `+= s * (x W^T)`: `(launch, result)`."""
    rows, in_features = x.shape
    out_features = weight.shape[0]
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device) if add_to is None else add_to
    config = linear_config(role, chip, x.dtype, out_features)
    block_k = _block(config, in_features)
    launch = Launch(
        gated_rows_kernel,
        (cdiv(rows, config.BLOCK_M), cdiv(out_features, config.BLOCK_N)),
        (strided(x), strided(weight), gate, strided(out), rows, in_features, out_features, scale),
        {
            "ADD": add_to is not None,
            "EVEN": in_features % block_k == 0,
            **vars(config),
            "BLOCK_K": block_k,
        },
    )
    return launch, out


def plan_gated_sum(a: Tensor, b: Tensor, gate: Tensor, scale: float, chip: Chip | None) -> tuple[Launch, Tensor]:
    """Lay out `s * a^T b` over gated rows, a `[rows, a_columns]`, b `[rows, b_columns]`: `(launch, result)`."""
    out = torch.empty(a.shape[1], b.shape[1], dtype=a.dtype, device=a.device)
    config = linear_config("sum", chip, a.dtype, b.shape[1])
    launch = Launch(
        gated_sum_kernel,
        (cdiv(out.shape[0], config.BLOCK_M), cdiv(out.shape[1], config.BLOCK_N)),
        (strided(a.t()), strided(b.t()), gate, strided(out), a.shape[0], *out.shape, scale),
        {**vars(config)},
    )
    return launch, out


def _run(plan: tuple[Launch, Tensor]) -> Tensor:
    plan[0].run()
    return plan[1]


def _chip(x: Tensor) -> Chip | None:
    """The chip whose tables serve x.

    Raises:
        TypeError: float64, which only the eager twin and the CPU path compute.
    """
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, float16 or bfloat16 for the Triton kernels, got torch.float64")
    return chip_of(x.device)


def row_invariant_linear(projection: Projection) -> Tensor:
    """Run the projection; arguments are checked, x is `[rows, in_features]`."""
    return _run(plan_linear(projection, _chip(projection.x)))


def gated_lora(projection: Projection, adapter: Adapter, row_invariant: bool) -> tuple[Tensor, Tensor]:
    """Run the forward kernels: `(y [rows, out_features], h [rows, rank])`; gate float32 `[rows]`, contiguous.

    With `row_invariant` the projection and the adapter's term are one kernel; else the base is PyTorch's own
    projection, which is faster with thousands of rows, and the term is added to the rows that have it.
    """
    x, (lora_a, lora_b, gate, scale) = projection.x, adapter
    chip = _chip(x)
    h = _run(plan_gated_rows("down" if row_invariant else "train_down", x, lora_a, gate, 1.0, chip))
    if row_invariant:
        return _run(plan_linear(projection, chip, adapter, h)), h
    base = torch.nn.functional.linear(*projection)
    return _run(plan_gated_rows("add", h, lora_b, gate, scale, chip, base)), h


def gated_lora_backward(gated: Gated, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels: `(dx, dA, dB)`; dx is empty without a weight. Deterministic: no atomics."""
    (x, weight, grad_out, h), (lora_a, lora_b, gate, scale) = gated, adapter
    chip = _chip(x)
    u = _run(plan_gated_rows("train_down", grad_out, lora_b.t(), gate, scale, chip))
    grad_a = _run(plan_gated_sum(u, x, gate, 1.0, chip))
    grad_b = _run(plan_gated_sum(grad_out, h, gate, scale, chip))
    if weight is None:
        return x.new_empty(0), grad_a, grad_b
    grad_x = _run(plan_gated_rows("add", u, lora_a.t(), gate, 1.0, chip, grad_out @ weight))
    return grad_x, grad_a, grad_b
