"""`tk.row_invariant_linear`, `tk.gated_lora`: api (checks, schemas, gradients), reference, cpu, triton."""

from __future__ import annotations

from .api import gated_lora, linear_operator, lora_operator, row_invariant_linear

__all__ = ["gated_lora", "linear_operator", "lora_operator", "row_invariant_linear"]
