"""Every operator that is measured, by name: its operands, and what a case of it is."""

from __future__ import annotations

from typing import Any

from . import workloads
from .cases import AppendKV, Operands, Projection, RotaryAppend, StepAttention, Verify
from .compact import CompactKV

OPERATORS: dict[str, type[Operands]] = {
    cls.operator: cls for cls in (StepAttention, AppendKV, CompactKV, RotaryAppend, Verify, Projection)
}
CASES: dict[str, type[Any]] = {
    "step_attention": workloads.Step,
    "append_kv": workloads.Append,
    "compact_kv": workloads.Compact,
    "rotary_append": workloads.RotaryAppend,
    "verify": workloads.Verify,
    "projection": workloads.Projection,
}
