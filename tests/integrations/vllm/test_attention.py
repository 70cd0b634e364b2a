"""A pass over vLLM's paged cache against dense masks in float64, and what it leaves in the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tidar_kernels import patterns
from tidar_kernels.integrations.vllm.attention import KERNELS, ON_CPU, Buffers, Path, Rows, step
from tidar_kernels.ops.operands import Scores

from .passes import FLOAT8, LAYOUTS, MIX, MOST_REQUESTS, MOST_ROWS, Pass


def check(path: Path, layout: str, dtype: torch.dtype = torch.float32) -> None:
    buffers = Buffers(MOST_REQUESTS, MOST_ROWS, torch.device("cpu"))
    one = Pass(MIX, layout, dtype)
    one.check(one.run(path, one.fill(buffers, one.rows())))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_sees_its_intervals(layout: str) -> None:
    check(ON_CPU, layout)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_its_dequantised_twin(dtype: torch.dtype) -> None:
    check(ON_CPU, "LBHNC", dtype)


@pytest.mark.interpret
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_sees_its_intervals_in_the_kernels(layout: str) -> None:
    check(KERNELS, layout)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_its_dequantised_twin_in_the_kernels(dtype: torch.dtype) -> None:
    check(KERNELS, "LBNHC", dtype)


@pytest.mark.interpret
def test_a_pass_takes_the_place_of_another() -> None:
    """What a graph was captured with serves the next pass, whatever that is made of: no tensor moves."""
    buffers = Buffers(MOST_REQUESTS, MOST_ROWS, torch.device("cpu"))
    captured, later = (
        Pass(tuple(replace(request, pattern=patterns.causal(20)) for request in MIX), "LBHNC"),
        Pass(MIX[::-1], "LBHNC"),
    )
    batch = captured.fill(buffers, None)
    captured.check(captured.run(KERNELS, batch))
    # vLLM's own tensors keep their addresses too.
    for name in ("starts", "seq_lens", "table", "slots"):
        getattr(captured, name).copy_(getattr(later, name))
        setattr(later, name, getattr(captured, name))
    later.fill(buffers, later.rows())
    later.check(later.run(KERNELS, batch))


def test_rows_that_say_nothing_are_causal() -> None:
    one = Pass(tuple(replace(request, pattern=patterns.causal(20)) for request in MIX), "LBHNC")
    buffers = Buffers(MOST_REQUESTS, MOST_ROWS, torch.device("cpu"))
    one.fill(
        buffers, Rows(torch.full((MOST_ROWS,), 3), torch.tensor([[0, 9]]).expand(MOST_ROWS, 2))
    )  # what was there before
    one.check(one.run(ON_CPU, one.fill(buffers, None)))


def test_results_are_written_where_vllm_wants_them() -> None:
    """Not copied there: what attends has the buffer itself, in the order of its rows."""
    one, buffers = Pass(MIX, "LBHNC"), Buffers(MOST_REQUESTS, MOST_ROWS, torch.device("cpu"))

    def attend(rows: Any, *others: Any) -> None:
        rows.into.copy_(torch.arange(rows.into.shape[2])[:, None])

    out = one.run(Path(ON_CPU.append, attend), one.fill(buffers, one.rows()))
    assert torch.equal(out, torch.arange(len(out)).to(out.dtype)[:, None].expand_as(out))


@pytest.mark.thorough
@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *FLOAT8])
def test_launches_compile_and_the_host_reads_nothing(cc: int, dtype: torch.dtype) -> None:
    """On tensors without data, which cannot be read: 16 steps of B = 8 of a model with 32 heads over 8."""
    pytest.importorskip("triton")
    from benchmarks.static.compilation import compile_report
    from benchmarks.static.occupancy import LIMITS
    from tidar_kernels.ops.kv.triton import plan_append_kv
    from tidar_kernels.ops.step_attention.triton import plan_step_attention

    reports: list[Any] = []

    def append(*bundles: Any) -> None:
        reports.append(compile_report(plan_append_kv(*bundles), cc, read_binary=True))

    def attend(*bundles: Any) -> tuple[Tensor, Tensor]:
        launches, out, lse = plan_step_attention(*bundles, cc)
        reports.extend(compile_report(launch, cc, read_binary=True) for launch in launches)
        return out, lse

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    requests, rows, half = 16, 16 * 72, torch.bfloat16
    buffers = Buffers(requests, rows, torch.device("meta"))
    batch = buffers.fill(
        *(meta(requests + 1), meta(requests), meta(requests, 256), meta(rows, dtype=torch.int64)),
        Rows(meta(rows), meta(rows, 2)),
        num_rows=rows,
        max_rows=72,
        max_seq_len=4096,
    )
    cache = meta(1000, 16, 8, 256, dtype=dtype).transpose(1, 2)
    scales = (meta(dtype=torch.float32), meta(dtype=torch.float32)) if dtype in FLOAT8 else None
    q, k, v = (meta(rows, heads, 128, dtype=half) for heads in (32, 8, 8))
    step(Path(append, attend), q, k, v, (cache[..., :128], cache[..., 128:]), batch, Scores(0.1), q.clone(), scales)
    names = [report.kernel for report in reports]
    assert names[:3] == ["append_kv_kernel", "sound_keys_kernel", "step_attention_kernel"]
    for report in reports:
        assert report.shared_bytes <= LIMITS[cc].block_shared
        assert not report.loop.get("local")  # nothing is spilled where keys are multiplied
