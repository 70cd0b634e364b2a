"""Every argument of the public harness; see tests/test_wrong_arguments.py."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_wrong_arguments import CAUSAL, ints, randn
from tests.wrong_arguments import Call, complaints, defaults, whole
from tidar_kernels import testing
from tidar_kernels.testing import CacheKind


def judged(check: Callable[..., Any]) -> Callable[..., Any]:
    """A check, whose verdict is a result too."""

    def call(**arguments: Any) -> None:
        with contextlib.suppress(testing.ParityError):
            check(**arguments)

    return call


def shallow(case: Any) -> dict[str, Any]:
    return {field.name: getattr(case, field.name) for field in fields(case)}


def guarded_cache() -> testing.GuardedCache:
    draw = torch.Generator().manual_seed(0)
    return testing.make_cache(CacheKind(4, "hnd"), ints(2, 3), [(0, 4), (0, 5)], (2, 8, 16), torch.float32, draw, "cpu")


def listed(**axes: Any) -> list[Any]:
    return list(testing.pairwise(**axes))


APPEND = testing.AppendCase("append", (0, 7), 3, head_dim=16, max_len=12)
ATTENTION = testing.AttentionCase("attention", CAUSAL)
COMPACT = testing.CompactCase("compact", (0, 3), ((0, 2), (1,)), head_dim=16, max_len=12)
LINEAR = testing.LinearCase("linear", (3,), 8, 6, 2)
ROTARY = testing.RotaryCase("rotary", (0, 3), 4, 2, head_dim=16, max_len=12)
STEP = testing.StepCase("step", CAUSAL, (2, 3), head_dim=16)
VERIFY = testing.VerifyCase("verify", 30, 2)
MEASURE = testing.Measure("out", 0.0, 0.0, 0.0)
RESULT = testing.ParityResult("attention", "case", "cpu", "float32", (MEASURE,))

CALLS: dict[str, Callable[[], Call]] = {
    **{
        f"testing.{type(case).__name__}": lambda case=case: (type(case), shallow(case))  # type: ignore[misc]
        for case in (APPEND, ATTENTION, COMPACT, LINEAR, ROTARY, STEP, VERIFY, CacheKind())
    },
    **{
        f"testing.{check.__name__}": lambda check=check, case=case: (check, {"case": case, "device": "cpu"})  # type: ignore[misc]
        for check, case in (
            (testing.check_append_kv, APPEND), (testing.check_attention, ATTENTION),
            (testing.check_attention_repeats, ATTENTION), (testing.check_compact_kv, COMPACT),
            (testing.check_gated_lora, LINEAR), (testing.check_row_invariant_linear, LINEAR),
            (testing.check_rotary_append, ROTARY), (testing.check_step_attention, STEP), (testing.check_verify, VERIFY),
            (testing.step_operands, STEP),
        )
    },
    "testing.StepCase.windowed": lambda: (STEP.windowed, {"pattern": CAUSAL}),
    "testing.bits": lambda: (testing.bits, {"tensor": randn(2)}),
    "testing.budget": lambda: (
        judged(testing.budget),
        defaults(testing.budget, out=randn(2, 3), reference=randn(2, 3).double(), eager=randn(2, 3)),
    ),
    "testing.check_equal": lambda: (
        judged(testing.check_equal), {"got": randn(2), "expected": randn(2), "what": "out"}
    ),
    "testing.guarded": lambda: (testing.guarded, {"values": randn(2, 2, 3, 4), "layout": "gaps"}),
    "testing.irregular_pattern": lambda: (
        testing.irregular_pattern, {"q_len": 3, "kv_len": 4, "seed": 1, "reach": 2, "with_tree_mask": True}
    ),
    "testing.make_cache": lambda: (
        testing.make_cache,
        {
            "kind": CacheKind(4, "hnd"), "lengths": ints(2, 3), "needed": [(0, 4), (0, 5)], "shape": (2, 8, 16),
            "dtype": torch.float32, "draw": torch.Generator().manual_seed(0), "device": "cpu",
        },
    ),
    "testing.mark_unwritten": lambda: (testing.mark_unwritten, {"tensor": randn(2)}),
    "testing.pairwise": lambda: (listed, {"a": [1, 2], "b": (3, 4)}),
    "testing.path_of": lambda: (testing.path_of, {"device": "cpu"}),
    "testing.random_tree": lambda: (testing.random_tree, {"nodes": 4, "seed": 1}),
    "testing.relative_error": lambda: (testing.relative_error, {"value": randn(2), "reference": randn(2)}),
    "testing.run_parity": lambda: (testing.run_parity, {"device": "cpu", "operators": ["append_kv"]}),
    "testing.Guarded.check": lambda: (testing.guarded(randn(2, 3)).check, {"name": "q", "written": False}),
}  # fmt: skip
ELSEWHERE = {
    # Results, and errors that the harness raises.
    *("testing.Fault", "testing.Measure", "testing.ParityError", "testing.ParityResult", "testing.ParityResult.failed"),
    *("testing.SanitizerError", "testing.Guarded"),
    # Made by `make_cache`; a check of the package's own calls the methods.
    "testing.GuardedCache",
    *(f"testing.GuardedCache.{name}" for name in ("expected", "place", "write")),
    # Rows of `SUITES`.
    *("testing.Suite", "testing.Suite.cases_on"),
    # Kernels alone, which no CPU path promises.
    *("testing.check_launch_bits", "testing.check_row_bits"),
    # No arguments.
    *("testing.poisoned_allocations", "testing.sanitize"),
}


@pytest.mark.filterwarnings("ignore")  # names that go in the next release
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, arguments = whole(name, CALLS)
    function(**arguments)
    assert complaints(functools.partial(whole, name, CALLS)) == []
