"""Micro-benchmarks of the operators on the CPU, under pytest-benchmark: checked against the eager twin, then timed.

python -m pytest benchmarks --benchmark-json=FILE
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import registry, row, timing, workloads


def selected() -> list[Any]:
    """Every implementation that is here of every case of the table, those of a case beside each other."""
    found = []
    for operator, table in workloads.CPU.items():
        for case in table:
            for name, implementation in registry.OPERATORS[operator].implementations.items():
                compiled = name == "flex_attention" and case not in workloads.FLEX_CPU
                if not compiled and not implementation.absent("cpu"):
                    fields = "-".join(str(value) for value in vars(case).values())
                    found.append(pytest.param(operator, case, name, id=f"{operator}-{fields}-{name}"))
    return found


@pytest.mark.parametrize(("operator", "case", "name"), selected())
def test_row(benchmark: Any, operator: str, case: Any, name: str) -> None:
    benchmark.extra_info["row"] = line = row.head(operator, name, "cpu", torch.float32, vars(case))
    with torch.inference_mode():
        operands = row.operands(operator, case, "cpu", torch.float32)
        calls, error = row.plan(operands, name)  # what fails here has no figures
        line |= {**operands[0].floor(), "relative_error": float(f"{error:.3g}"), "copies": len(operands)}
        benchmark(timing.rotated(calls))
