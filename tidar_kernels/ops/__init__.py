"""The operators: a folder each, and what they share.

    attention/        tk.attention              training, forward and backward
    step_attention/   tk.step_attention         one decode step against a cache
    kv/               tk.append_kv, compact_kv, rotary_append
    linear/           tk.row_invariant_linear, gated_lora
    verify/           tk.verify, sample
    declaration.py    one declaration an operator; who runs what where
    operands.py       the bundles in which operands travel
    checks.py         argument checks
    paging.py         where a key of the cache lies, and what its value is: the reference
    _cpu.py           what CPU paths share
    _triton/          what kernels share: softmax, tiles, launches, chip tables

In a folder, `api.py` has the public function and the declaration, `reference.py` the eager twin, `cpu.py` the CPU path
where the twin does not serve, and `triton.py` the kernels.
"""

from __future__ import annotations

from .attention import attention
from .declaration import Backend, interpreting
from .kv import append_kv, compact_kv, rotary_append
from .linear import gated_lora, row_invariant_linear
from .step_attention import step_attention
from .verify import sample, verify

__all__ = [
    "Backend",
    "append_kv",
    "attention",
    "compact_kv",
    "gated_lora",
    "interpreting",
    "rotary_append",
    "row_invariant_linear",
    "sample",
    "step_attention",
    "verify",
]
