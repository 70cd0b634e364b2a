"""`tk.step_attention`: api (checks, schema), reference, cpu, cpu_exact (rows alone), triton, triton_kernels."""

from __future__ import annotations

from .api import operator, step_attention

__all__ = ["operator", "step_attention"]
