"""Cases and checks of the projections: `row_invariant_linear` and `gated_lora`, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import gated_lora, row_invariant_linear
from ..ops.linear import reference as eager_linear
from .harness import (
    Guarded,
    ParityResult,
    budget,
    check_case,
    generator_of,
    guarded,
    naming,
    poisoned_allocations,
    result_of,
)

__all__ = ["LINEAR_CASES", "LINEAR_CASES_LARGE", "LinearCase", "check_gated_lora", "check_row_invariant_linear"]


@dataclass(frozen=True)
class LinearCase:
    """One projection.

    Args:
        name: for messages; `id` adds the dtype.
        rows: leading shape of the input.
        in_features, out_features, rank, dtype: of the operands.
        layout: strides of the matrices (`tidar_kernels.testing.LAYOUTS`).
        bias: with one.
        row_invariant: the base product's rows do not depend on each other's number.
    """

    name: str
    rows: tuple[int, ...]
    in_features: int
    out_features: int
    rank: int
    dtype: torch.dtype = torch.float32
    layout: str = "bhnd"
    bias: bool = False
    row_invariant: bool = True

    @property
    def id(self) -> str:
        """Name and dtype."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


_CASES = (
    LinearCase("one_row", (1,), 16, 16, 1),
    LinearCase("batch", (2, 19), 70, 50, 8, bias=True),
    LinearCase("gaps", (37,), 33, 65, 64, layout="gaps", bias=True),
    LinearCase("transposed", (20,), 96, 33, 5, layout="bhdn"),
    LinearCase("rank_256", (3, 6), 48, 40, 256),
)


def _variants(cases: tuple[LinearCase, ...], dtypes: tuple[torch.dtype, ...]) -> tuple[LinearCase, ...]:
    return tuple(
        replace(case, name=case.name + ("" if row_invariant else "_library"), dtype=dtype, row_invariant=row_invariant)
        for case in cases
        for dtype in dtypes
        for row_invariant in (True, False)
    )


LINEAR_CASES = _variants(_CASES, (torch.float32, torch.float16))
# Rows of a decode step and of training, at shapes of Qwen2.5-1.5B and Qwen3-8B.
LINEAR_CASES_LARGE = _variants(
    (
        LinearCase("step_B8", (72,), 1536, 8960, 64),
        LinearCase("step_B4", (1, 20), 8960, 1536, 8),
        LinearCase("large_gaps", (300,), 1537, 259, 33, layout="gaps", bias=True),
        LinearCase("training", (2, 2049), 4096, 1024, 256),
    ),
    (torch.bfloat16, torch.float16, torch.float32),
)


def matrix(values: Tensor, layout: str) -> Guarded:
    """A matrix in one of the layouts of the harness."""
    found = guarded(values[None, None], layout)
    return Guarded(found.tensor[0, 0], found.buffer, found.before)


def random_gate(rows: int, draw: torch.Generator | None = None) -> Tensor:
    """None, some and all rows of a tile: rows 16 to 32 (a tile, interpreted) have no adapter, the next 16 all do."""
    gate = torch.where(
        torch.rand(rows, generator=draw, device="cpu") < 0.5, torch.randn(rows, generator=draw, device="cpu"), 0.0
    )
    gate[16:32], gate[32:48] = 0.0, 1.0
    gate[:1] = 0.5
    return gate


def check_gated_lora(case: LinearCase, device: torch.device | str = "cpu") -> ParityResult:
    """`gated_lora` against its eager twin in float64 by the budget rule: out, dx, dW, dA, dB, dbias.

    Raises:
        ParityError: any of it fails, or an operand was written to.
    """
    check_case(case, LinearCase, device)
    draw, inner, outer = generator_of(case), case.in_features, case.out_features
    rows = torch.Size(case.rows).numel()

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draw, device="cpu") * scale).to(device, case.dtype)

    matrices = {
        "x": matrix(normal(rows, inner), case.layout),
        "weight": matrix(normal(outer, inner, scale=inner**-0.5), case.layout),
        "lora_a": matrix(normal(case.rank, inner, scale=inner**-0.5), case.layout),
        "lora_b": matrix(normal(outer, case.rank), case.layout),
    }
    gate = random_gate(rows, draw).to(device).view(case.rows)
    bias = normal(outer) if case.bias else None
    grad = matrix(normal(rows, outer), case.layout).tensor

    def run(call: Callable[..., Tensor], dtype: torch.dtype, **options: bool) -> dict[str, Tensor]:
        x, w, a, b = (m.tensor.to(dtype).detach().requires_grad_() for m in matrices.values())
        own_bias = None if bias is None else bias.to(dtype).requires_grad_()
        out = call(x.unflatten(0, case.rows), w, a, b, gate, 0.75, own_bias, **options)
        leaves = [x, w, a, b, *([] if own_bias is None else [own_bias])]
        grads = torch.autograd.grad(out, leaves, grad.to(dtype).view_as(out))
        return dict(zip(("out", "dx", "dW", "dA", "dB", "dbias"), (out.detach(), *grads), strict=False))

    with naming("gated_lora", case, device):
        with poisoned_allocations():
            found = run(gated_lora, case.dtype, row_invariant=case.row_invariant)
        expected, plain = run(eager_linear.gated_lora, torch.float64), run(eager_linear.gated_lora, case.dtype)
        measures = [
            budget(value, expected[name], plain[name], name, by_row=name == "out") for name, value in found.items()
        ]
        for name, memory in matrices.items():
            memory.check(name)
    return result_of("gated_lora", case, device, measures)


def check_row_invariant_linear(case: LinearCase, device: torch.device | str = "cpu") -> ParityResult:
    """`row_invariant_linear` against `F.linear` in float64 by the budget rule, row by row.

    Raises:
        ParityError: it fails.
    """
    check_case(case, LinearCase, device)
    draw, inner, outer = generator_of(case), case.in_features, case.out_features
    x = matrix(
        torch.randn(torch.Size(case.rows).numel(), inner, generator=draw, device="cpu").to(device, case.dtype),
        case.layout,
    ).tensor
    weight = (torch.randn(outer, inner, generator=draw, device="cpu") * inner**-0.5).to(device, case.dtype)
    weight = matrix(weight, case.layout).tensor
    bias = torch.randn(outer, generator=draw, device="cpu").to(device, case.dtype) if case.bias else None
    with naming("row_invariant_linear", case, device):
        with poisoned_allocations():
            out = row_invariant_linear(x, weight, bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        measure = budget(out, exact, F.linear(x, weight, bias), by_row=True)
    return result_of("row_invariant_linear", case, device, [measure])
