"""The performance model counts what the launch plan does, and shows a measurement beside its prediction."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import model
from benchmarks.operators.step_attention import Step


def cases() -> list[Step]:
    return [
        Step("a", 32, 8, 128, 4, 8192),
        Step("a", 32, 8, 128, 16, 1000, 3),
        Step("a", 12, 2, 128, 8, 512),
        Step("a", 8, 8, 64, 0, 700, 2),
        Step("a", 4, 2, 64, 4, 40),
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("capacity", [None, 4096, 40960])
def test_live_programs_and_tiles_are_those_of_the_mask(case: Step, capacity: int | None) -> None:
    """Counted again from the dense mask: a split is live if it is split 0, or a row of the tile sees a key there, and a
    program is if there is a live split for it."""
    if capacity is not None and capacity < case.context_len + case.pattern.kv_len:
        pytest.skip("the cache has no room for the case")
    launch = next(
        one for one in model.plan_of(case, model.H200, capacity) if one.kernel.__name__ == "step_attention_kernel"
    )
    block_m, split = launch.options["BLOCK_M"], launch.options["SPLIT"]
    pattern, group = case.pattern, case.num_heads // case.num_kv_heads
    line = pattern.dense(case.context_len).clone()
    for row, (low, high) in enumerate(pattern.own.tolist()):  # own blocks have no place on the line of positions
        line[row, case.context_len + low : case.context_len + high] = False
        lead = pattern.lead[row]
        line[row, case.context_len + int(lead[0]) : case.context_len + int(lead[1])] = True
    line = line.repeat_interleave(group, dim=0)
    live = 0
    for begin in range(0, len(line), block_m):
        keys = line[begin : begin + block_m].any(dim=0).nonzero()
        live += min(launch.grid[1], len({0, *(keys // split).flatten().tolist()}))
    found = model.traffic(case, model.H200, capacity)
    assert found.programs - found.dead == live * case.batch * case.num_kv_heads
    assert found.programs == math.prod(launch.grid)


def test_partial_results_are_those_that_are_allocated() -> None:
    case = Step("a", 32, 8, 128, 4, 8192)
    combine = model.plan_of(case, model.H200)[-1]
    part, part_lse = combine.args[:2]
    found = model.traffic(case)
    assert found.partial_bytes == 2 * 4 * (part.numel() + part_lse.numel())
    assert found.kv_bytes == 2 * 2 * 8 * (8192 + 20) * 128


def test_programs_go_to_the_multiprocessor_that_is_free_first() -> None:
    assert model.busiest_of([], 2) == 0
    assert model.busiest_of([4, 4, 4, 1], 2) == 8
    assert model.busiest_of([4, 1, 1, 1, 1], 2) == 4
    case = Step(
        "a", 32, 8, 128, 4, 8192
    )  # 128 programs of 8 tiles of 64 keys, then the 8 of the split that the step begins
    found = model.traffic(case)
    assert (found.programs, found.busiest) == (136, 9)
    assert found.tiles == 8 * (16 * 8 + 1 + 1)  # of the line, and of own blocks


def test_the_least_partial_results_are_one_a_program() -> None:
    """16 programs for each of 8 row tiles, 2 for each of 64; 80 rows of 128 numbers and their lse, written and read."""
    one = 2 * 4 * 8 * 80 * (128 + 1)
    assert model.least_partial_bytes(Step("a", 32, 8, 128, 4, 8192)) == (16, 16 * one)
    assert model.least_partial_bytes(Step("a", 32, 8, 128, 4, 8192, 8)) == (2, 8 * 2 * one)
    assert model.least_partial_bytes(Step("a", 32, 8, 128, 4, 8192, 64)) == (1, 0)
    for row in model.partial_rows():
        assert row["least"] <= row["partials"]


def test_one_split_has_no_partial_results() -> None:
    found = model.traffic(Step("a", 4, 2, 64, 4, 40))
    assert (found.partial_bytes, found.dead) == (0, 0)
    assert found.launches == 2


def test_predictions_rise_with_work() -> None:
    steps = [model.attention_us(Step("a", 32, 8, 128, block, 8192))["us"] for block in (4, 8, 16)]
    assert steps == sorted(steps)
    eight, many = (Step("a", 32, 8, 128, 4, 8192, batch) for batch in (8, 64))  # both are bound by memory
    moved = model.traffic(many).bytes / model.traffic(eight).bytes
    assert moved > 5
    assert model.attention_us(many)["us"] > 0.9 * moved * model.attention_us(eight)["us"]
    for row in model.step_rows():
        assert row["ratio"] >= 1


def test_it_never_promises_more_than_the_chip_has() -> None:
    for block in (4, 16):
        case = Step("a", 32, 8, 128, block, 32768, 8)
        seconds, moved = model.attention_us(case)["us"] / 1e6, model.traffic(case)
        assert moved.kv_bytes / seconds <= model.H200.bytes_per_s
        pairs = case.pattern.q_len * case.context_len * case.num_heads * case.batch
        assert 4 * pairs * case.head_dim / seconds <= model.H200.flops_per_s


def test_a_measurement_stands_beside_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    from sections import prediction

    row = {"model": "Qwen3-8B", "block_size": 8, "context_len": 8192, "batch": 8, "implementation": "tidar_kernels"}
    part = {"rows": [row | {"implementation": "sdpa", "p50_us": 1.0}, row | {"p50_us": 123.45}]}
    assert prediction.attention_table().count("| 8 | 8192 | 8 |") == 1
    monkeypatch.setattr(prediction, "parts", lambda kind, device: [part] if kind == "step" else [])
    lines = prediction.attention_table().splitlines()
    assert [line for line in lines if "123.5" in line] == [
        line for line in lines if line.startswith("| 8 | 8192 | 8 |")
    ]


def test_launches_are_counted() -> None:
    assert model.launches_of_layer()["ours"] == 2  # rotary_append and step_attention
    assert model.launches_of_layer(True)["torch"] > model.launches_of_layer()["torch"]
