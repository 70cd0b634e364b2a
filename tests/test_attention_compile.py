"""The training kernels, every configuration, compiled for every chip; the compiler's output is read.

No spilled register, shared memory within the chip's limit, and its tensor-core instruction in the half dtypes: wgmma
(HGMMA) on cc 90, tcgen05 (UTCHMMA) on cc 100. float32 multiplies exactly, on no tensor core.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tidar_kernels import patterns
from tidar_kernels.patterns import Pattern
from tidar_kernels.testing import LAYOUTS

pytest.importorskip("triton")

from tidar_kernels.kernels import attention_backward, configs
from tidar_kernels.kernels.attention_backward import plan_attention_backward
from tidar_kernels.kernels.attention_forward import plan_attention
from tidar_kernels.kernels.configs import CHIPS, HEAD_DIM_TILES, TileConfig
from tidar_kernels.testing.compilation import SHARED_LIMITS, CompileReport, compile_report

TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}
MULTIPLYING = ("attention_forward_kernel", "attention_dq_kernel", "attention_dkdv_kernel")
KERNELS = (
    "attention_forward_kernel",
    "attention_rows_kernel",
    "attention_dq_kernel",
    "row_tile_bounds_kernel",
    "list_row_tiles_kernel",
    "attention_dkdv_kernel",
)


def compiled(
    cc: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    pattern: Pattern | None = None,
    heads: tuple[int, int] = (32, 8),
    layout: str = "bnhd",
    lse_grad: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
    only: tuple[str, ...] = KERNELS,
) -> list[CompileReport]:
    """Reports of the launches of one forward and backward pass, of S = 4096 tokens unless a pattern is given."""
    pattern = patterns.tidar_training(4096, 16) if pattern is None else pattern

    def operand(heads: int, rows: int) -> torch.Tensor:
        shape = (2, heads, rows, head_dim)
        return torch.empty_strided(shape, LAYOUTS[layout](*shape), dtype=dtype, device="meta")

    q, k = operand(heads[0], pattern.q_len), operand(heads[1], pattern.kv_len)
    lead, own, _ = pattern.on("meta")
    sink = torch.empty(heads[0], dtype=dtype, device="meta") if sinks else None
    forward, out, lse = plan_attention(q, k, k, lead, own, 0.125, softcap, sink, cc)
    grads = (q, lse if lse_grad else None)
    backward, *_ = plan_attention_backward(*grads, q, k, k, out, lse, lead, own, 0.125, softcap, cc)
    launches = [launch for launch in (forward, *backward) if launch.kernel.__name__ in only]
    return [compile_report(launch, cc) for launch in launches]


def check(report: CompileReport, dtype: torch.dtype, *, spills: bool = False) -> None:
    assert report.shared_bytes <= SHARED_LIMITS[report.cc]
    if not spills:
        assert (report.stack_bytes, report.local_accesses, report.spill_bytes) == (0, 0, 0), report
    expected = TENSOR_CORE[report.cc] if report.kernel in MULTIPLYING and dtype != torch.float32 else ()
    if expected and (report.kernel, report.cc, report.options["BLOCK_D"]) == ("attention_dkdv_kernel", 100, 256):
        expected = ("HMMA",)  # its tiles have fewer rows than tcgen05 takes; those that it takes spill
    assert report.tensor_core == expected, report


def test_the_tables_are_covered() -> None:
    for table in configs._ATTENTION_HALF.values():
        assert set(table) == set(CHIPS) == set(SHARED_LIMITS)
        assert all(set(tiles) >= set(HEAD_DIM_TILES) for tiles in table.values())
    assert all(set(tiles) == set(HEAD_DIM_TILES) for tiles in configs._ATTENTION_FLOAT32.values())


@pytest.mark.parametrize("cc", CHIPS)
@pytest.mark.parametrize("head_dim", HEAD_DIM_TILES)
def test_half_dtypes(cc: int, head_dim: int) -> None:
    """Every entry of the tables, and the small kernels around them at head dim 128."""
    wanted = KERNELS if head_dim == 128 else MULTIPLYING
    reports = compiled(cc, head_dim, torch.bfloat16, only=wanted)
    assert tuple(report.kernel for report in reports) == wanted
    for report in reports:
        check(report, torch.bfloat16)


FORWARD, DQ, DKDV = MULTIPLYING


@pytest.mark.parametrize(
    ("cc", "head_dim", "dtype", "kernels"),
    [
        *((90, head_dim, torch.bfloat16, MULTIPLYING) for head_dim in (64, 128, 256)),
        *((cc, 128, torch.bfloat16, MULTIPLYING) for cc in (80, 100)),
        (80, 256, torch.bfloat16, (DKDV,)),
        (100, 64, torch.bfloat16, (FORWARD,)),
        (100, 256, torch.bfloat16, (DQ,)),
        (80, 32, torch.bfloat16, (FORWARD,)),
        (90, 96, torch.bfloat16, (DKDV,)),
        (90, 16, torch.float32, (DKDV,)),
        (90, 64, torch.float32, (FORWARD,)),
    ],
)
def test_a_cap_and_sinks(cc: int, head_dim: int, dtype: torch.dtype, kernels: tuple[str, ...]) -> None:
    """In their own configurations where the plain ones spill."""
    for report in compiled(cc, head_dim, dtype, softcap=50.0, sinks=True, only=kernels):
        check(report, dtype)


@pytest.mark.parametrize(("cc", "head_dim"), [(90, 32), (90, 64), (90, 128), (90, 256), (80, 64), (100, 256)])
def test_float32(cc: int, head_dim: int) -> None:
    for report in compiled(cc, head_dim, torch.float32, only=MULTIPLYING):
        check(report, torch.float32)


@pytest.mark.parametrize(
    ("cc", "head_dim", "changes"),
    [
        pytest.param(90, 64, {"heads": (12, 12), "lse_grad": True}, id="90-d64-group_1"),
        pytest.param(80, 128, {"heads": (28, 4)}, id="80-d128-group_7"),
        pytest.param(90, 96, {}, id="90-d96"),
        pytest.param(90, 128, {"pattern": patterns.tidar_training(1033, 8, [333, 700])}, id="90-d128-odd_lengths"),
        pytest.param(100, 64, {"pattern": patterns.tidar_training(1033, 8, [333, 700])}, id="100-d64-odd_lengths"),
    ],
)
def test_other_launches(cc: int, head_dim: int, changes: dict[str, Any]) -> None:
    """float16; and Triton specialises on integers that are 1 or divisible by 16: other numbers, other code."""
    for report in compiled(cc, head_dim, torch.float16, only=MULTIPLYING, **changes):
        check(report, torch.float16)


@pytest.mark.parametrize("layout", ["gaps", "bhdn"])
def test_odd_strides_compile(layout: str) -> None:
    """Rows that are not aligned to 16 elements, or not contiguous: correct, but they may spill."""
    for report in compiled(90, 64, torch.float16, layout=layout, only=MULTIPLYING):
        check(report, torch.float16, spills=True)


def test_spills_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that does not ship, because it spills: the check can be red."""
    monkeypatch.setattr(attention_backward, "attention_config", lambda *_: TileConfig(128, 128, 8, 2))
    (report,) = compiled(90, 128, torch.bfloat16, only=("attention_dkdv_kernel",))
    with pytest.raises(AssertionError):
        check(report, torch.bfloat16)
