"""Plain PyTorch twins of every operator: the oracle. No Triton, any float dtype including float64, autograd throughout.

Each is the `reference.py` of its operator's folder under `tidar_kernels.ops`.
"""

from __future__ import annotations

from .ops.attention.reference import attention
from .ops.kv.reference import append_kv, compact_kv, rotary_append
from .ops.linear.reference import gated_lora, row_invariant_linear
from .ops.step_attention.reference import step_attention
from .ops.verify.reference import sample, shaped_scores, verify

__all__ = [
    "append_kv",
    "attention",
    "compact_kv",
    "gated_lora",
    "rotary_append",
    "row_invariant_linear",
    "sample",
    "shaped_scores",
    "step_attention",
    "verify",
]
