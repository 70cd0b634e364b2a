"""The benchmarks themselves, at tiny sizes: rows, refusals, tables, the picture. No figure here means anything."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import breakdown, compare, decoder_step, gpu, plots, record, strategies, timing, training
from tidar_kernels import Decoder, patterns
from tidar_kernels import ops as tk_ops
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.strategies import Profile

ROOT = Path(__file__).resolve().parent.parent
TINY = training.Workload(40, 8, 4, 2, 16)
WITHOUT_FLEX = tuple(name for name in training.ON_CPU if name != "flex_attention")


def once(call: Callable[[], Any]) -> dict[str, float]:
    """A timer that calls once and says one microsecond."""
    call()
    return timing.summary([1e-6])


def by_name(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["implementation"], row["direction"]): row for row in rows if row["operator"] == "attention"}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(training, "compiled_flex_attention", broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [TINY, training.Workload(37, 8, 2, 2, 16, batch=2)], ids=str)
def test_rows_of_the_cpu(case: training.Workload, dtype: torch.dtype, no_compiler: None) -> None:
    rows = training.run_cpu(case, dtype, budget_s=0.0)
    found = by_name(rows)
    assert len(found) == len(rows) == len(training.ON_CPU) * 2
    for (name, direction), row in found.items():
        if name == "flex_attention":
            assert row["not_available"] == "RuntimeError: no C++ compiler"
            continue
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        floor = found["causal_sdpa", direction]["p50_us"]
        assert row["against_floor"] == pytest.approx(row["p50_us"] / floor, abs=1e-3)
        assert row["relative_error"] == 0.0 if name == "causal_sdpa" else 0.0 < row["relative_error"] < 0.05
    dense = int(patterns.tidar_training(case.seq_len, case.block_size).dense().sum())
    per_pair = case.head_dim * case.num_heads * case.batch
    assert found["tidar_kernels", "forward"]["flops"] == 4 * dense * per_pair
    assert found["tidar_kernels", "backward"]["flops"] == 10 * dense * per_pair
    assert found["causal_sdpa", "forward"]["flops"] == 4 * case.seq_len * (case.seq_len + 1) * per_pair


def test_flex_attention_has_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    masks = []
    monkeypatch.setattr(training, "compiled_flex_attention", lambda: None)
    monkeypatch.setattr(training, "create_block_mask", lambda *a, **k: masks.append(a[0]) or create_block_mask(*a, **k))
    operands = training.Operands(training.Workload(37, 8, 1, 1, 16), "cpu", torch.float32)
    training.IMPLEMENTATIONS["flex_attention"](operands)
    row, key = torch.meshgrid(torch.arange(74), torch.arange(74), indexing="ij")
    assert torch.equal(masks[0](torch.tensor(0), torch.tensor(0), row, key), operands.pattern.dense())


def leaking(row: int) -> Callable[..., Any]:
    """An attention in which one row sees what it must not."""

    def attend(q: Any, k: Any, v: Any, pattern: Any, **options: Any) -> Any:
        lead = pattern.lead.clone()
        lead[row, 1] += 1
        wrong = patterns.Pattern(lead, pattern.own, pattern.positions, pattern.kv_len)
        return tk_ops.attention(q, k, v, wrong, backend="eager")

    return attend


@pytest.mark.parametrize("row", [0, TINY.seq_len])
def test_a_wrong_result_has_no_speed(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(training.tk, "attention", leaking(row))
    monkeypatch.setattr(timing, "time_in_turn", lambda *_: timed.append("timed"))
    with pytest.raises(
        training.WrongResultError, match=r"^S40-B8-h4_2-d16-b1: expected a relative error <= .* forward"
    ):
        training.run_cpu(TINY, torch.float32, WITHOUT_FLEX)
    assert not timed


@pytest.mark.parametrize("wrong", ["dq", "dk", "dv", "rows"])
def test_a_wrong_gradient_has_no_speed(wrong: str) -> None:
    operands = training.Operands(training.Workload(70, 8, 1, 1, 16), "cpu", torch.float32)
    ours = training.IMPLEMENTATIONS[training.OURS](operands)

    def compute(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = tuple(leaves)
        if wrong != "rows":
            at = ("dq", "dk", "dv").index(wrong)
            leaves = (*leaves[:at], leaves[at] + 0.01 * (leaves[at] - leaves[at].detach()), *leaves[at + 1 :])
            return ours.compute(*leaves)
        more = (leaves[0] - leaves[0].detach()).mean()
        return (ours.compute(*leaves)[0] + more,)

    calls = training.Calls(compute, ours.leaves)
    assert operands.check(calls, "forward") < 1e-5
    with pytest.raises(training.WrongResultError, match=r"^S70-B8-h1_1-d16-b1: expected"):
        operands.check(calls, "backward")


def test_a_wrong_peer_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(operands: training.Operands) -> training.Calls:
        return training.Calls(lambda q, k, v: (0.5 * q + 0.0 * (k + v).sum(),), operands.leaves)

    monkeypatch.setitem(training.IMPLEMENTATIONS, "sdpa_dense_mask", wrong)
    found = by_name(training.run_cpu(TINY, torch.float32, WITHOUT_FLEX, budget_s=0.0))
    for direction in training.DIRECTIONS:
        assert found["sdpa_dense_mask", direction]["not_available"].startswith("WrongResultError: S40-B8")
        assert "p50_us" in found["tidar_kernels", direction]


def test_what_runs_on_a_gpu_runs(tmp_path: Path, no_compiler: None, capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU, where cuDNN is one of the peers that fail."""
    path = tmp_path / "training.json"
    assert gpu.run_training(path, [TINY, TINY], math.inf, "cpu", once)
    content = json.loads(path.read_text())
    found = by_name(content["rows"])
    assert len(content["rows"]) == 2 * len(training.ON_CUDA) * 2
    assert found["flex_attention", "backward"]["not_available"] == "RuntimeError: no C++ compiler"
    assert "not_available" in found["causal_cudnn", "forward"]
    for name in ("tidar_kernels", "sdpa_dense_mask", "causal_flash"):
        assert found[name, "backward"]["tflops"] > 0.0
    assert len(capsys.readouterr().out.splitlines()) == len(content["rows"])


def test_a_failure_of_ours_ends_nothing_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.tk, "attention", leaking(TINY.seq_len))
    monkeypatch.setattr(training, "ON_CUDA", WITHOUT_FLEX)
    path = tmp_path / "training.json"
    run = training.run_on_device
    monkeypatch.setattr(training, "run_on_device", lambda *a, **k: run(*a, **k, names=WITHOUT_FLEX))
    assert not gpu.run_training(path, [TINY], math.inf, "cpu", once)
    found = by_name(json.loads(path.read_text())["rows"])
    assert found["tidar_kernels", "forward"]["not_available"].startswith("WrongResultError")
    assert "p50_us" in found["sdpa_dense_mask", "forward"]


def test_a_case_without_room_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None, capsys: pytest.CaptureFixture[str]
) -> None:
    class Operands(training.Operands):
        def __init__(self, case: training.Workload, *rest: Any) -> None:
            if case.batch == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
            super().__init__(case, *rest)

    monkeypatch.setattr(training, "Operands", Operands)
    path = tmp_path / "training.json"
    assert not gpu.run_training(path, [dataclasses.replace(TINY, batch=2), TINY], math.inf, "cpu", once)
    assert {row["batch"] for row in json.loads(path.read_text())["rows"]} == {1}
    assert "attention S40-B8-h4_2-d16-b2: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err


def test_past_the_deadline_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = training.run_on_device(TINY, device="cpu", timer=once, deadline=0.0)
    assert all(row["not_available"].endswith("is used up") and not training.failed(row) for row in rows)
    assert gpu.run_training(tmp_path / "training.json", [TINY], 0.0, "cpu", once)
    assert "attention: stopped after 0 of 1 cases" in capsys.readouterr().err


def test_gpu_cases() -> None:
    cases = gpu.training_cases()
    assert len(set(cases)) == len(cases) == 20
    assert {(case.head_dim, case.num_heads // case.num_kv_heads) for case in cases[:8]} == {
        (64, 1), (64, 4), (128, 1), (128, 4)
    }  # fmt: skip
    assert all(case.num_heads * case.head_dim == 2048 for case in cases)
    assert [case.seq_len for case in cases[:5]] == [2048, 4096, 8192, 16384, 32768]


def test_dense_mask_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MAX_DENSE_MASK", 80**2 - 1)
    found = by_name(training.run_cpu(TINY, torch.float32, ("tidar_kernels", "sdpa_dense_mask"), budget_s=0.0))
    assert found["sdpa_dense_mask", "forward"]["not_available"].startswith("MemoryError: the dense mask is left out")
    assert "against_floor" not in found["tidar_kernels", "forward"]


def test_time_in_turn() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}  # type: ignore[misc]
    assert set(timing.time_in_turn(calls, 0.0, at_least=3)) == {"a", "b"}
    assert order == ["a", "b"] * 5
    assert timing.time_in_turn({}, 1.0) == {}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.slow
def test_peak_memory_is_linear() -> None:
    short, long = training.memory_rows({"tidar_kernels": (1024, 4096)})
    assert long["peak_bytes"] > 2**25
    assert 0.7 < long["bytes_per_token"] / short["bytes_per_token"] < 1.3


def test_peak_memory_that_fails_is_recorded() -> None:
    (row,) = training.memory_rows({"nothing": (16,)})
    assert row["not_available"] == "KeyError: 'nothing'"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> Path:
    """A folder of results files that measure TINY."""
    rows = training.run_cpu(TINY, torch.float32, budget_s=0.0)
    memory = {"operator": "attention_memory", "implementation": "tidar_kernels", "dtype": "float32", **vars(TINY)}
    rows.append({**memory, "peak_bytes": 3 * 2**20, "bytes_per_token": 78643})
    record.write(tmp_path / "training-cpu.json", "training", "cpu", rows)
    rows = training.run_on_device(TINY, device="cpu", timer=once)
    record.write(tmp_path / "training-tiny.json", "training", "cpu", rows)
    content = json.loads((tmp_path / "training-tiny.json").read_text())
    content["machine"] |= {"device": "cuda", "gpu": "A GPU"}
    (tmp_path / "training-tiny.json").write_text(json.dumps(content))
    return tmp_path


def sections_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/sections/results.py, reading from `folder`."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.setitem(sys.modules, "sections", None)
    monkeypatch.delitem(sys.modules, "sections")
    specification = importlib.util.spec_from_file_location("results_of_test", ROOT / "docs" / "sections" / "results.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", folder)
    return module


def test_tables(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sections_of(results, monkeypatch)
    lines = module.training_table().splitlines()
    assert [line.split(" | ")[1:3] for line in lines if line.startswith("| float32")] == [
        ["4/2", "forward"],
        ["4/2", "backward"],
    ]
    assert all(line.count("|") == lines[2].count("|") for line in lines if line.startswith("|"))
    assert "No figures for FlexAttention, compiled, forward: RuntimeError: no C++ compiler" in lines
    assert "| tidar_kernels | 40 | 3 | 78,643 |" in module.training_memory_table()
    lines = module.training_gpu_table().splitlines()
    assert all(line.count("|") == lines[0].count("|") for line in lines if line.startswith("|"))
    assert "| 16 | 4/2 | 40 | forward | " in lines[2]
    assert lines[-1].startswith("TFLOP/s on live pairs")
    assert "A GPU" in lines[-1]


def test_tables_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sections_of(tmp_path, monkeypatch)
    assert module.training_gpu_table().startswith("No GPU figures are published yet")
    assert module.training_table().startswith("No figures of training attention")
    assert module.training_memory_table().startswith("No figures")


def test_picture(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    result = json.loads((results / "training-cpu.json").read_text())
    plots.save_training(result, tmp_path / "new" / "training.png")
    with image.open(tmp_path / "new" / "training.png") as picture:
        assert picture.info["Description"] == plots.training_description(result)
    bars = plots.training_bars(result, "backward")["float32, 4/2 heads"]
    assert bars["flex_attention"] is None
    assert bars["tidar_kernels"] == by_name(result["rows"])["tidar_kernels", "backward"]["against_floor"]
    assert f"flex_attention none, sdpa_dense_mask {bars['sdpa_dense_mask']:.2f}" in plots.training_description(result)


def test_without_matplotlib_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(training, "run_cpu", lambda *a, **k: [])
    monkeypatch.setattr(training, "memory_rows", list)
    assert training.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "training-cpu.json").is_file()
    assert capsys.readouterr().err == (
        "no picture of training-cpu.json: matplotlib: needed to draw a PNG; install tidar-kernels[bench]\n"
    )


def test_decoder_steps_and_their_floors() -> None:
    config = TransformerConfig(300, 64, 96, 2, 4, 2, 16)
    shape = decoder_step.Shape("tiny", config, {4: 3.0})
    rates = (1e10, 1e11)
    rows = list(decoder_step.steps(shape, (0, 4), (64,), rates, device="cpu", dtype=torch.float32, timer=once))
    plain, drafted = rows
    parameters = sum(p.numel() for p in Transformer(config).parameters())
    assert plain["bytes"] == 4 * (parameters + 2 * 2 * 2 * 16 * 65)  # weights, and K and V of two layers and two heads
    assert plain["flops"] == 2 * parameters + 4 * 65 * 16 * 4 * 2
    assert (plain["rows"], drafted["rows"]) == (1, 20)
    pairs = 64 * 20 + 4 * 25 // 2 + 64  # anchors: P*B*(B+1) + B*(B+1)^2/2 + B^3
    head = 300 * 64
    assert drafted["flops"] == 2 * (parameters - head) * 20 + 2 * head * 7 + 4 * pairs * 16 * 4 * 2
    for row in rows:
        limit = max(row["bytes"] / rates[0], row["flops"] / rates[1]) * 1e6
        assert row["floor_us"] == pytest.approx(limit, abs=0.01)
        assert row["of_floor"] == pytest.approx(1 / limit, abs=1e-4)
        assert "tiny" in decoder_step.describe(row)
    assert drafted["projected_speedup"] == pytest.approx(3.0)
    assert not list(decoder_step.steps(shape, (0,), (64,), rates, device="cpu", deadline=0.0))
    published = {(s.name, b): n for s in decoder_step.SHAPES for b, n in s.published.items()}
    assert published == {("Qwen2.5-1.5B", 8): 5.69, ("Qwen2.5-1.5B", 16): 7.35, ("Qwen3-8B", 16): 8.36}


def _result(path: Path, **figures: float) -> Path:
    rows = [
        {"operator": "append", "context_len": n, "p50_us": us} for n, us in zip((512, 4096), (10.0, 20.0), strict=True)
    ]
    rows.append({"operator": "decode", "block_size": 8, "tokens_per_second": 100.0})
    for row in rows:
        row |= {name: value for name, value in figures.items() if name in row}
    record.write(path, "mixed", "cpu", rows)
    return path


def test_compare_finds_the_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = _result(tmp_path / "old.json"), _result(tmp_path / "new.json", p50_us=15.0, tokens_per_second=125.0)
    assert compare.main([str(old), str(new)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines == [
        "  1.50 x  p50_us 10.00 -> 15.00  append context_len=512",
        "  0.80 x  tokens_per_second 100.00 -> 125.00  decode block_size=8",
        "  0.75 x  p50_us 20.00 -> 15.00  append context_len=4096",
    ]
    assert compare.main([str(old), str(new), "--fail-over", "1.6"]) == 0
    assert compare.main([str(old), str(new), "--fail-over", "1.4"]) == 1
    assert "regression: 1.50 x, over 1.4: append context_len=512" in capsys.readouterr().err


def test_compare_says_what_has_no_counterpart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = _result(tmp_path / "old.json"), tmp_path / "new.json"
    record.write(
        new, "mixed", "cpu", [{"operator": "append", "context_len": 512, "p50_us": 10.0}, {"operator": "verify"}]
    )
    assert compare.main([str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert "only in old: decode block_size=8" in out
    assert "only in new: verify" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a readable file, got No such file"),
        ("{", "expected JSON, got"),
        ("[]", "expected a results file with rows"),
        ('{"rows": []}', "expected rows that both files have, got none"),
    ],
)
def test_compare_refuses(tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "new.json").write_text(content)
    assert compare.main([str(_result(tmp_path / "old.json")), str(tmp_path / "new.json")]) == 2
    assert message in capsys.readouterr().err


def test_parts_of_a_step_are_found_and_do_not_exceed_it() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(40, 32, 48, 2, 2, 1, 16, mask_token_id=39))
    row = breakdown.breakdown(Decoder(model, 4), [[1, 2, 3], [4]], 12)
    parts = [row[f"{part}_ms"] for part in breakdown.PARTS]
    assert min(parts) > 0.0
    assert row["rest_ms"] == pytest.approx(row["step_ms"] - sum(parts), abs=1e-3)


def test_strategies_take_turns_and_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(40, 32, 48, 2, 2, 1, 16, mask_token_id=39))
    measured = Profile((0.5,) * 15, (1, 272), (1e-3, 2e-3))
    chosen = strategies.candidates(measured)
    assert len({c.label for c in chosen}) == len(chosen) == 15
    rows = strategies.run(model, chosen, [[1, 2, 3], [4, 5, 6]], 10, repeats=1)
    assert [row["name"] for row in rows][:2] == ["autoregressive", "tidar"]
    for row, candidate in zip(rows, chosen, strict=True):
        assert row["identical"] or not row["exact"]
        assert row["tokens_per_forward"] == pytest.approx(20 / row["forwards"], abs=1e-4)
        assert row["rows"] == candidate.rows
    assert not all(row["exact"] for row in rows)
