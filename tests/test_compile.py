"""Every kernel and configuration that ships, compiled for every chip it ships for; the compiler's output is read.

No spilled register, shared memory within the chip's limit, and its tensor-core instruction in the half dtypes: wgmma
(HGMMA) on cc 90, tcgen05 (UTCHMMA) on cc 100. float32 multiplies exactly, on no tensor core.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tidar_kernels import patterns, testing

pytest.importorskip("triton")

from tidar_kernels.kernels import configs, step_attention, verify
from tidar_kernels.kernels.configs import CHIPS, HEAD_DIM_TILES, TileConfig
from tidar_kernels.testing.compilation import (
    SHARED_LIMITS,
    CompileReport,
    compile_append_kv,
    compile_report,
    compile_step_attention,
)

HEAD_DIMS = sorted({*HEAD_DIM_TILES, 80, 96})
TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}
# 32 query heads of 8 kv heads, three sequences, B = 8; 8192 slots make several splits, 256 make one.
CASE = testing.StepCase("compiled", patterns.tidar_step(8), (0, 0, 0), 32, 8, max_len=8192)


def step(cc: int, head_dim: int, dtype: torch.dtype, **changes: Any) -> list[CompileReport]:
    return compile_step_attention(replace(CASE, head_dim=head_dim, dtype=dtype, **changes), cc)


def check(report: CompileReport, dtype: torch.dtype, *, spills: bool = False) -> None:
    assert report.shared_bytes <= SHARED_LIMITS[report.cc]
    assert report.registers <= 255
    if not spills:
        assert (report.stack_bytes, report.local_accesses, report.spill_bytes) == (0, 0, 0)
    multiplies = report.kernel == "step_attention_kernel" and dtype != torch.float32
    assert report.tensor_core == (TENSOR_CORE[report.cc] if multiplies else ())


def test_the_tables_are_covered() -> None:
    assert set(CHIPS) == set(SHARED_LIMITS) == set(TENSOR_CORE)
    assert set(configs._FLOAT32) <= set(HEAD_DIMS)
    assert all(set(table) <= set(HEAD_DIMS) for table in configs._HALF.values())
    assert set(configs._HALF_EXTRAS) == set(configs._FLOAT32_EXTRAS) == set(CHIPS)


@pytest.mark.parametrize(
    ("cc", "head_dim"),
    # Head dims between tiles run the next tile's configuration, masked: seen on one chip.
    [(cc, head_dim) for cc in CHIPS for head_dim in HEAD_DIMS if cc == 90 or head_dim in HEAD_DIM_TILES],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_step_attention(cc: int, head_dim: int, dtype: torch.dtype) -> None:
    """Every entry of the tables, with splits, and the kernel that merges them."""
    attend, combine = step(cc, head_dim, dtype)
    assert (attend.kernel, combine.kernel) == ("step_attention_kernel", "combine_splits_kernel")
    check(attend, dtype)
    check(combine, dtype)


@pytest.mark.parametrize("cc", CHIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_binary_says_what_ptx_says(cc: int, dtype: torch.dtype) -> None:
    """Reports read PTX for tensor cores, and the binary's resource usage for local memory; here the binary itself."""
    case = replace(CASE, head_dim=64, dtype=dtype)
    for from_ptx, from_sass in zip(
        compile_step_attention(case, cc), compile_step_attention(case, cc, read_binary=True), strict=True
    ):
        check(from_sass, dtype)
        assert from_ptx == from_sass


@pytest.mark.parametrize("cc", CHIPS)
def test_step_attention_in_float16(cc: int) -> None:
    """The half dtypes share their table, and their code but for the type of its instructions."""
    for report in step(cc, 64, torch.float16):
        check(report, torch.float16)


FEATURES = {
    "softcap": {"softcap": 50.0},
    "window": {"window": 1024},
    "all": {"softcap": 50.0, "sinks": True, "window": 1024},
}


@pytest.mark.parametrize(
    ("cc", "head_dim", "dtype", "features"),
    [
        *((cc, head_dim, torch.bfloat16, "all") for cc in CHIPS for head_dim in (64, 128, 256)),
        *((cc, 256, torch.bfloat16, "window") for cc in (80, 90)),
        (80, 16, torch.bfloat16, "all"),
        (100, 128, torch.float32, "all"),
        (100, 256, torch.float32, "softcap"),
    ],
)
def test_step_attention_with_more(cc: int, head_dim: int, dtype: torch.dtype, features: str) -> None:
    """A cap, sinks and a window, in their own configurations where the plain ones spill."""
    attend, combine = step(cc, head_dim, dtype, **FEATURES[features])
    check(attend, dtype)
    if "window" in FEATURES[features]:
        check(combine, dtype)


@pytest.mark.parametrize("cc", CHIPS)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16), (128, torch.float32)]
)
def test_step_attention_in_one_split(cc: int, head_dim: int, dtype: torch.dtype) -> None:
    (report,) = step(cc, head_dim, dtype, max_len=256)
    check(report, dtype)


@pytest.mark.parametrize("cc", CHIPS)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"pattern": patterns.causal(1), "lengths_dtype": torch.int64}, id="decode"),
        pytest.param({"num_heads": 28, "num_kv_heads": 4, "max_len": 2**20}, id="group_7_long"),
    ],
)
def test_other_launches_of_the_step(cc: int, changes: dict[str, Any]) -> None:
    """Triton specialises on integers that are 1 or divisible by 16: other numbers, other code."""
    for report in step(cc, 128, torch.bfloat16, **changes):
        check(report, torch.bfloat16)


@pytest.mark.parametrize("cc", CHIPS)
@pytest.mark.parametrize("layout", ["gaps", "bhdn"])
def test_odd_strides_compile(cc: int, layout: str) -> None:
    """Rows that are not aligned to 16 elements, or not contiguous: correct, but they may spill."""
    for report in step(cc, 128, torch.float16, layout=layout, cache_layout=layout, max_len=256):
        check(report, torch.float16, spills=True)


@pytest.mark.parametrize("cc", CHIPS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "layout"),
    [
        (torch.bfloat16, 128, "bnhd"),
        (torch.float16, 80, "bhnd"),
        (torch.float32, 256, "bnhd"),
        (torch.float64, 256, "bhdn"),
        (torch.bfloat16, 256, "gaps"),
        (torch.float16, 16, "bnhd"),
    ],
)
def test_append_kv(cc: int, dtype: torch.dtype, head_dim: int, layout: str) -> None:
    for num_new in (1, 8):
        case = testing.AppendCase("compiled", (0, 0, 0), num_new, 8, head_dim, dtype, 8192, layout, layout)
        for report in compile_append_kv(case, cc):
            check(report, dtype)


@pytest.mark.parametrize("cc", CHIPS)
def test_spills_are_seen(cc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that does not ship, because it spills: the reports can be red."""
    monkeypatch.setattr(step_attention, "step_config", lambda *_: TileConfig(16, 32, 4, 2))
    (report,) = step(cc, 128, torch.float32, max_len=256)
    assert report.stack_bytes > 0
    assert report.local_accesses > 0
    assert report.spill_bytes > 0


@pytest.mark.interpret
def test_interpreted_kernels_do_not_compile() -> None:
    with pytest.raises(RuntimeError, match=r"^TRITON_INTERPRET: expected unset for compiling, got 1$"):
        compile_report(None, 90)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cc", "rule", "extras"),
    [
        *((cc, rule, True) for cc in CHIPS for rule in (verify.COUPLED, verify.REJECTION)),
        *((90, rule, False) for rule in (verify.COUPLED, verify.REJECTION, verify.POINT_MASS)),
    ],
)
def test_verify(cc: int, rule: int, extras: bool) -> None:
    """One binary serves every vocabulary; the dtypes of logits differ in a load."""
    batch, rows, vocab_size = 2, 8, 151_936
    dtype = torch.bfloat16 if cc == 90 else torch.float32
    logits = torch.empty(batch, rows, vocab_size, dtype=dtype, device="meta")
    integers, knobs = torch.empty(batch, dtype=torch.int64, device="meta"), torch.empty(batch, 5, device="meta")
    launches, _ = verify.plan_verify(
        logits,
        torch.empty(batch, rows, dtype=torch.int64, device="meta"),
        integers,
        knobs,
        integers,
        torch.empty(batch, vocab_size, dtype=torch.bool, device="meta") if extras else None,
        logits if rule == verify.REJECTION else None,
        logits if extras else None,
        0.5,
        rule,
        0,
    )
    for launch in launches:
        check(compile_report(launch, cc), torch.float32)
