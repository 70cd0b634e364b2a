"""`tk.row_invariant_linear`, `tk.gated_lora`: api (checks, schemas, gradients), reference, cpu, triton."""

from __future__ import annotations

from .api import add_lora, gated_lora, linear_operator, lora_operator, row_invariant_linear

__all__ = ["add_lora", "gated_lora", "linear_operator", "lora_operator", "row_invariant_linear"]
