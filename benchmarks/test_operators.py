"""The operators on this machine's CPU under pytest-benchmark: checked against the eager twin, then timed.

python -m pytest benchmarks --benchmark-json=FILE
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .core import measure, timing
from .registry import OPERATORS, PARTS

ROWS = [
    pytest.param(cls, case, name, id=f"{cls.operator}-{'-'.join(map(str, vars(case).values()))}-{name}")
    for cls in map(OPERATORS.__getitem__, PARTS["step"] + PARTS["operators"])
    for case in cls.cpu
    for name in cls.offered(case, "cpu")
]


@pytest.mark.parametrize(("cls", "case", "name"), ROWS)
def test_row(benchmark: Any, cls: Any, case: Any, name: str) -> None:
    benchmark.extra_info["row"] = line = measure.head(cls.operator, name, "cpu", torch.float32, vars(case))
    with torch.inference_mode(cls.inference):
        sets = measure.operands(cls, case, "cpu", torch.float32)
        calls, error = measure.plan(sets, name)  # what fails here has no figures
        line |= {**sets[0].floor(name), "relative_error": float(f"{error:.3g}"), "copies": len(sets)}
        benchmark(timing.rotated(calls))
