"""The three paths of every operator, as parameters of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tidar_kernels import testing

REPOSITORY = Path(__file__).resolve().parents[1]
PATHS = (("cpu", "cpu", ()), ("interpreter", "cpu", pytest.mark.interpret), ("triton", "cuda", pytest.mark.cuda))
DEVICES = [pytest.param(device, id=path, marks=marks) for path, device, marks in PATHS]
KERNELS = DEVICES[1:]
HERE = DEVICES[:2]


def on_every_path(operator: str) -> list[Any]:
    """`(device, case)` over the tables of `tidar_kernels.testing`; of the interpreter two in three are `thorough`."""
    (suite,) = (suite for suite in testing.SUITES if suite.operator == operator)
    return [
        pytest.param(
            device,
            case,
            marks=[
                *([marks] if marks else []),
                *([pytest.mark.thorough] if path == "interpreter" and index % 3 else []),
            ],
            id=f"{path}-{case.id}",
        )
        for path, device, marks in PATHS
        for index, case in enumerate(suite.cases_on(path))  # type: ignore[arg-type]
    ]
