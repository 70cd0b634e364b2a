"""Row-invariant projections, plain and with an adapter on the mask rows, beside the library's."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from tidar_kernels import ops
from tidar_kernels.ops.linear import reference

from ..core.operands import OURS, Expected, Implementation, Operands, workload

Shape = workload("Shape", num_rows=int, in_features=int, out_features=int, rank=int)


class Projection(Operands):
    """A projection, plain or with an adapter of `rank` on the mask rows."""

    operator = "projection"
    workload = Shape
    implementations: ClassVar = {
        OURS: Implementation("row_invariant_linear", lambda o: lambda: ops.row_invariant_linear(o.x, o.weight)),
        "gated_lora": Implementation(
            "gated_lora", lambda o: lambda: ops.gated_lora(o.x, o.weight, o.lora_a, o.lora_b, o.gate)
        ),
        "library": Implementation("F.linear", lambda o: lambda: F.linear(o.x, o.weight)),
    }
    precise = (OURS, "gated_lora")
    cpu = tuple(Shape(rows, 1536, 1536, 64) for rows in (1, 20, 72))
    cuda = tuple(Shape(rows, 4096, 4096, 64) for rows in (1, 20, 72, 272))
    tiny = (Shape(20, 32, 48, 4),)

    def make(self) -> None:
        case = self.case
        self.x = self.random(case.num_rows, case.in_features)
        self.weight = self.random(case.out_features, case.in_features) * case.in_features**-0.5
        self.lora_a = self.random(case.rank, case.in_features) * case.in_features**-0.5
        self.lora_b = self.random(case.out_features, case.rank) * case.rank**-0.5
        self.gate = torch.arange(case.num_rows, device=self.device) >= case.num_rows // 8

    def expected(self, name: str) -> list[Expected]:
        parts = self.x, self.weight, self.lora_a, self.lora_b
        gate = self.gate if name == "gated_lora" else torch.zeros_like(self.gate)
        x, weight, lora_a, lora_b = (part.double() for part in parts)
        return [Expected(reference.gated_lora(x, weight, lora_a, lora_b, gate), reference.gated_lora(*parts, gate))]

    def floor(self, name: str = OURS) -> dict[str, float]:
        """Of the projection alone; the adapter's part is small beside it."""
        case = self.case
        elements = case.in_features * case.out_features + case.num_rows * (case.in_features + case.out_features)
        flops = 2.0 * case.num_rows * case.in_features * case.out_features
        return {"rows": case.num_rows, "bytes": float(elements * self.dtype.itemsize), "flops": flops}
