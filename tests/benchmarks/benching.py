"""What the tests of the benchmarks share: tiny cases, clocks that do not tick, a leak in the mask."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.core import rates, record, timing
from benchmarks.operators.attention import Training
from tests.paths import REPOSITORY
from tidar_kernels import ops as tk_ops
from tidar_kernels import patterns

ROOT = REPOSITORY
TINY = Training("forward", 40, 8, 4, 2, 16)
RATES = rates.Rates(1e10, {"float32": 1e11, "bfloat16": 1e11})
YARDSTICKS = (
    {"operator": "copy", "gbytes_per_s": 10.0},
    {"operator": "matmul", "dtype": "float32", "tflops": 0.1},
)  # fmt: skip


def once(calls: Sequence[Callable[[], Any]]) -> dict[str, float]:
    """A timer that makes the first call once and says one microsecond."""
    calls[0]()
    return timing.summary([1e-6])


def by_name(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["implementation"], row["direction"]): row for row in rows if row["operator"] == "attention"}


def part_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    (part,) = record.newest(folder, kind)
    rows: list[dict[str, Any]] = part["rows"]
    return rows


def leaking(row: int) -> Callable[..., Any]:
    """An attention in which one row sees what it must not."""

    def attend(q: Any, k: Any, v: Any, pattern: Any, **options: Any) -> Any:
        lead = pattern.lead.clone()
        lead[row, 1] += 1
        wrong = patterns.Pattern(lead, pattern.own, pattern.positions, pattern.kv_len)
        return tk_ops.attention(q, k, v, wrong, backend="eager")

    return attend


def sections_of(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "results") -> ModuleType:
    """A module of docs/sections/, reading from `folder`."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    for module in ("sections", "sections.measured", f"sections.{name}"):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(importlib.import_module("sections.measured"), "RESULTS", folder)
    return importlib.import_module(f"sections.{name}")
