"""Kernel parity as a public harness: run it in your CI, at the shapes of your model, on the machine at hand.

    from dataclasses import replace
    from tidar_kernels import testing

    results = testing.run_parity("cuda")                       # or "cpu"; TRITON_INTERPRET=1 runs the kernels there
    assert all(result.passed for result in results)

    case = replace(testing.STEP_CASES[0], name="mine", num_heads=28, num_kv_heads=4, head_dim=128)
    testing.check_step_attention(case, "cuda")                 # raises ParityError, or returns the measured errors

The rule: compare with the eager twin in float64; the error of a kernel is at most twice that of eager PyTorch in the
same dtype, plus 1e-5, relative by norm. Inputs are random, outputs and unused cache slots are poisoned with NaN, and
guard bands lie around every buffer.

A file here is an operator's: its cases and its checks (`step_attention` has its cases in a file of their own). A
further one is a case dataclass, a check that takes a case and a device and raises `ParityError` or returns a
`ParityResult`, and a row in `suites.SUITES`.
"""

from __future__ import annotations

from .append_kv import APPEND_CASES, APPEND_CASES_LARGE, AppendCase, check_append_kv
from .attention import ATTENTION_CASES, ATTENTION_CASES_LARGE, AttentionCase, check_attention, check_attention_repeats
from .builders import irregular_pattern, pairwise, random_tree
from .caches import PAGED_LAYOUTS, CacheKind, GuardedCache, make_cache
from .compact_kv import COMPACT_CASES, COMPACT_CASES_LARGE, CompactCase, check_compact_kv
from .harness import (
    LAYOUTS,
    Guarded,
    Measure,
    ParityError,
    ParityResult,
    bits,
    budget,
    check_equal,
    guarded,
    poisoned_allocations,
    relative_error,
)
from .linear import LINEAR_CASES, LINEAR_CASES_LARGE, LinearCase, check_gated_lora, check_row_invariant_linear
from .rotary_append import ROTARY_CASES, ROTARY_CASES_LARGE, RotaryCase, check_rotary_append
from .sanitizer import Fault, SanitizerError, mark_unwritten, sanitize
from .step_attention import check_launch_bits, check_row_bits, check_step_attention, step_operands
from .step_cases import BITS_CASES, BITS_CASES_LARGE, LAUNCH_CASES, STEP_CASES, STEP_CASES_LARGE, StepCase
from .suites import SUITES, Suite, path_of, run_parity
from .verify import VERIFY_CASES, VERIFY_CASES_LARGE, VerifyCase, check_verify

__all__ = [
    "APPEND_CASES",
    "APPEND_CASES_LARGE",
    "ATTENTION_CASES",
    "ATTENTION_CASES_LARGE",
    "BITS_CASES",
    "BITS_CASES_LARGE",
    "COMPACT_CASES",
    "COMPACT_CASES_LARGE",
    "LAUNCH_CASES",
    "LAYOUTS",
    "LINEAR_CASES",
    "LINEAR_CASES_LARGE",
    "PAGED_LAYOUTS",
    "ROTARY_CASES",
    "ROTARY_CASES_LARGE",
    "STEP_CASES",
    "STEP_CASES_LARGE",
    "SUITES",
    "VERIFY_CASES",
    "VERIFY_CASES_LARGE",
    "AppendCase",
    "AttentionCase",
    "CacheKind",
    "CompactCase",
    "Fault",
    "Guarded",
    "GuardedCache",
    "LinearCase",
    "Measure",
    "ParityError",
    "ParityResult",
    "RotaryCase",
    "SanitizerError",
    "StepCase",
    "Suite",
    "VerifyCase",
    "bits",
    "budget",
    "check_append_kv",
    "check_attention",
    "check_attention_repeats",
    "check_compact_kv",
    "check_equal",
    "check_gated_lora",
    "check_launch_bits",
    "check_rotary_append",
    "check_row_bits",
    "check_row_invariant_linear",
    "check_step_attention",
    "check_verify",
    "guarded",
    "irregular_pattern",
    "make_cache",
    "mark_unwritten",
    "pairwise",
    "path_of",
    "poisoned_allocations",
    "random_tree",
    "relative_error",
    "run_parity",
    "sanitize",
    "step_operands",
]
