"""What a machine can do at best, measured in the same run as the rows that are held against it: copying, multiplying.

The floor of a case is the time that its bytes take at the copy bandwidth, or its FLOPs at the matmul rate, whichever is
longer. No implementation that starts from cold memory goes below it; one that finds its operands in a cache can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import timing

COPY_BYTES = {"cuda": 2**30, "cpu": 2**29}
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True)
class Rates:
    """Bytes per second read and written by `copy_`, and FLOPs per second of a matrix product, by dtype."""

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def floor_us(self, bytes_moved: float, flops: float, dtype: str) -> float:
        """Microseconds that a case takes at the very least; 0 where nothing was measured for `dtype`."""
        rate = self.flops_per_s.get(dtype)
        return max(bytes_moved / self.bytes_per_s, flops / rate) * 1e6 if rate else 0.0

    def against(self, row: dict[str, Any]) -> dict[str, float]:
        """`floor_us` and `of_floor`, the share of the floor's speed that a row with `p50_us` reaches."""
        limit = self.floor_us(row["bytes"], row["flops"], row["dtype"])
        return {"floor_us": round(limit, 3), "of_floor": round(limit / row["p50_us"], 4)} if limit else {}


def measure(device: str, dtypes: tuple[torch.dtype, ...], *, small: bool = False) -> list[dict[str, Any]]:
    """One row for copying and one a dtype for multiplying, of random numbers; `small` is for dry runs."""
    size = 64 if small else MATMUL_SIZE[device]
    source = torch.randn((2**16 if small else COPY_BYTES[device]) // 4, device=device)
    target = torch.empty_like(source)

    def timed(call: Callable[[], Any]) -> dict[str, float]:
        return timing.time_cuda([call]) if device == "cuda" else timing.time_cpu(call, 0.0 if small else 1.0)

    measured, moved = timed(partial(target.copy_, source)), 2 * source.nbytes
    rate = round(moved / measured["p50_us"] / 1e3, 2)
    rows = [{"operator": "copy", "bytes": moved, **measured, "gbytes_per_s": rate}]
    del source, target
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        measured, flops = timed(partial(torch.matmul, a, b)), 2.0 * size**3
        row = {"operator": "matmul", "dtype": str(dtype).removeprefix("torch."), "size": size, "flops": flops}
        rows.append({**row, **measured, "tflops": round(flops / measured["p50_us"] / 1e6, 3)})
    return [row | {"device": device} for row in rows]


def of(rows: list[dict[str, Any]]) -> Rates:
    """The rates among rows of a results file.

    Raises:
        ValueError: there is no `copy` row.
    """
    copies = [row["gbytes_per_s"] * 1e9 for row in rows if row["operator"] == "copy"]
    if not copies:
        raise ValueError("rows: expected one of operator 'copy', got none")
    return Rates(copies[0], {row["dtype"]: row["tflops"] * 1e12 for row in rows if row["operator"] == "matmul"})
