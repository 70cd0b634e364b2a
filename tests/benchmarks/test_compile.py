"""Compilations that the static report does not hold: other launches of the kernels, and what reading them rests on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tidar_kernels import patterns, testing
from tidar_kernels.patterns import Pattern
from tidar_kernels.testing import LAYOUTS
from tidar_kernels.testing.caches import CacheKind

pytest.importorskip("triton")

from benchmarks.static.compilation import CompileReport, compile_report
from benchmarks.static.occupancy import LIMITS
from tidar_kernels.ops._triton.configs import nearest_chip
from tidar_kernels.ops.attention.triton_backward import plan_attention_backward
from tidar_kernels.ops.attention.triton_forward import plan_attention
from tidar_kernels.ops.kv.triton import plan_append_kv
from tidar_kernels.ops.operands import Cached, Keys, Results, Rows, Scores
from tidar_kernels.ops.step_attention import triton as step_attention

TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}
MULTIPLYING = ("step_attention_kernel", "attention_forward_kernel", "attention_dq_kernel", "attention_dkdv_kernel")
# 32 query heads of 8 kv heads, three sequences, B = 8; 8192 slots make several splits, 256 make one.
CASE = testing.StepCase("compiled", patterns.tidar_step(8), (0, 0, 0), 32, 8, max_len=8192)


def shape_only(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory: compiling reads dtype and strides alone."""
    return torch.empty_strided(shape, LAYOUTS[layout](*shape), dtype=dtype, device="meta")


def compile_step_attention(
    case: testing.StepCase, chip: int | str, *, read_binary: bool = False
) -> list[CompileReport]:
    """The kernels of one step on `chip`, a program a split: attention and, where there are splits, their merge.

    Programs that have several splits are in the static report.
    """
    batch, pattern = len(case.lengths), case.windowed(case.pattern)

    def operand(heads: int, rows: int, layout: str) -> torch.Tensor:
        return shape_only((batch, heads, rows, case.head_dim), layout, case.dtype)

    q = operand(case.num_heads, pattern.q_len, case.layout)
    k = operand(case.num_kv_heads, pattern.kv_len, case.layout)
    cache = operand(case.num_kv_heads, case.cache_len, case.cache_layout)
    lengths = torch.empty(batch, dtype=case.lengths_dtype, device="meta")
    max_context = case.cache_len if case.max_context is None else case.max_context
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    sinks = torch.empty(case.num_heads, dtype=case.dtype, device="meta") if case.sinks else None
    rows, cached = Rows(q, *pattern.rows_on("meta")), Cached(cache, cache, lengths, max_context)
    scores = Scores(scale, case.softcap, sinks)
    with mock.patch.object(step_attention, "programs_of_a_tile", lambda *arguments: arguments[-1]):
        launches, _, _ = step_attention.plan_step_attention(rows, Keys(k, k), cached, scores, nearest_chip(chip))
    return [compile_report(launch, chip, read_binary=read_binary) for launch in launches]


def compile_append_kv(case: testing.AppendCase, chip: int | str) -> list[CompileReport]:
    """The kernel of one append on `chip`."""
    batch, heads = len(case.lengths), case.num_kv_heads
    cache = shape_only((batch, heads, case.max_len, case.head_dim), case.cache.layout, case.dtype)
    new = shape_only((batch, heads, case.num_new, case.head_dim), case.layout, case.dtype)
    lengths = torch.empty(batch, dtype=case.lengths_dtype, device="meta")
    return [compile_report(plan_append_kv(Cached(cache, cache, lengths), Keys(new, new)), chip)]


def step(cc: int, head_dim: int, dtype: torch.dtype, **changes: Any) -> list[CompileReport]:
    return compile_step_attention(replace(CASE, head_dim=head_dim, dtype=dtype, **changes), cc)


def check(report: CompileReport, dtype: torch.dtype, *, spills: bool = False) -> None:
    limits = LIMITS[report.chip]
    assert report.shared_bytes <= limits.block_shared
    assert report.registers <= limits.registers
    if not spills:
        assert (report.stack_bytes, report.local_accesses, report.spill_bytes) == (0, 0, 0)
    multiplies = report.kernel in MULTIPLYING and dtype != torch.float32
    assert report.tensor_core == (TENSOR_CORE[report.chip] if multiplies else ())


@pytest.mark.parametrize("cc", TENSOR_CORE)
def test_the_binary_says_what_ptx_says(cc: int) -> None:
    """Reports read PTX for tensor cores, and the binary's resource usage for local memory; here the binary itself."""
    case = replace(CASE, head_dim=16, dtype=torch.bfloat16, max_len=256)
    _, from_ptx = compile_step_attention(case, cc)  # the first checks the keys in flight
    _, from_sass = compile_step_attention(case, cc, read_binary=True)
    check(from_sass, torch.bfloat16)
    assert from_ptx == from_sass
    assert (from_ptx.loop, from_ptx.copies_ahead) == ({}, None)
    assert from_sass.loop["mma"]
    assert from_sass.copies_ahead


@pytest.mark.parametrize(
    ("cc", "head_dim", "dtype", "changes"),
    [
        pytest.param(
            90, 128, torch.bfloat16, {"pattern": patterns.causal(1), "lengths_dtype": torch.int64}, id="decode"
        ),
        pytest.param(
            90, 128, torch.bfloat16, {"num_heads": 28, "num_kv_heads": 4, "max_len": 2**20}, id="group_7_long"
        ),
        pytest.param(90, 96, torch.bfloat16, {}, id="head_dim_96"),
        pytest.param(90, 80, torch.float32, {"max_len": 256}, id="head_dim_80"),
        pytest.param(80, 64, torch.float16, {"max_len": 256}, id="float16"),
        pytest.param(80, 256, torch.bfloat16, {"window": 1024, "max_len": 256}, id="window"),
    ],
)
def test_other_launches_of_the_step(cc: int, head_dim: int, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    """Triton specialises on integers that are 1 or divisible by 16: other numbers, other code."""
    for report in step(cc, head_dim, dtype, **changes):
        check(report, dtype)


@pytest.mark.parametrize(("cc", "layout"), [(80, "gaps"), (90, "bhdn")])
def test_odd_strides_compile(cc: int, layout: str) -> None:
    """Rows that are not aligned to 16 elements, or not contiguous: correct, but they may spill."""
    for report in step(cc, 128, torch.float16, layout=layout, cache_layout=layout, max_len=256):
        check(report, torch.float16, spills=True)


@pytest.mark.parametrize(
    ("cc", "dtype", "head_dim", "layout"),
    [(90, torch.float64, 256, "bhdn"), (80, torch.float16, 80, "bhnd"), (100, torch.bfloat16, 256, "gaps")],
)
def test_append_kv(cc: int, dtype: torch.dtype, head_dim: int, layout: str) -> None:
    case = testing.AppendCase("compiled", (0, 0, 0), 1, 8, head_dim, dtype, 8192, layout, CacheKind(layout=layout))
    for report in compile_append_kv(case, cc):
        check(report, dtype)


def training(
    cc: int, head_dim: int, pattern: Pattern, heads: tuple[int, int], layout: str, lse_grad: bool
) -> list[CompileReport]:
    """Reports of the three large kernels of one forward and backward pass in float16."""

    def operand(heads: int, rows: int) -> torch.Tensor:
        shape = (2, heads, rows, head_dim)
        return torch.empty_strided(shape, LAYOUTS[layout](*shape), dtype=torch.float16, device="meta")

    q, k = operand(heads[0], pattern.q_len), operand(heads[1], pattern.kv_len)
    rows, keys, scores = Rows(q, *pattern.rows_on("meta")[:2]), Keys(k, k), Scores(0.125)
    forward, out, lse = plan_attention(rows, keys, scores, cc)
    results = Results(out, lse, q, lse if lse_grad else None)
    backward, *_ = plan_attention_backward(rows, keys, scores, results, cc)
    launches = [launch for launch in (*forward, *backward) if launch.kernel.__name__ in MULTIPLYING]
    assert len(launches) == 3
    return [compile_report(launch, cc) for launch in launches]


LONG, ODD = patterns.tidar_training(4096, 16), patterns.tidar_training(1033, 8, [333, 700])


@pytest.mark.parametrize(
    ("cc", "head_dim", "pattern", "heads", "layout"),
    [
        pytest.param(90, 64, LONG, (12, 12), "bnhd", id="90-group_1"),
        pytest.param(80, 128, LONG, (28, 4), "bnhd", id="80-group_7"),
        pytest.param(90, 128, ODD, (32, 8), "bnhd", id="90-odd_lengths"),
        pytest.param(90, 64, LONG, (32, 8), "bhdn", id="90-odd_strides"),
    ],
)
def test_other_launches_of_training(
    cc: int, head_dim: int, pattern: Pattern, heads: tuple[int, int], layout: str
) -> None:
    for report in training(cc, head_dim, pattern, heads, layout, heads == (12, 12)):
        check(report, torch.float16, spills=layout != "bnhd")


@pytest.mark.interpret
def test_interpreted_kernels_do_not_compile() -> None:
    with pytest.raises(RuntimeError, match=r"^TRITON_INTERPRET: expected unset for compiling, got 1$"):
        compile_report(None, 90)  # type: ignore[arg-type]
