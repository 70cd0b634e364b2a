"""The benchmarks themselves, at tiny sizes: rows, refusals, tables, the picture. No figure here means anything."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.core import measure, record, timing
from benchmarks.core.operands import OURS, Implementation, WrongResultError
from benchmarks.decoding import breakdown, strategies
from benchmarks.operators import attention, flex, memory
from benchmarks.operators.attention import DIRECTIONS, Attention, Calls, Training
from benchmarks.reports import compare, pictures
from tests.benchmarks.benching import RATES, TINY, by_name, leaking, once, sections_of
from tests.paths import REPOSITORY
from tidar_kernels import Decoder, cli, patterns
from tidar_kernels.decoding.strategies import Profile
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.nn.adapters import add_gated_lora

ON_CPU = tuple(Attention.offered(TINY, "cpu"))
WITHOUT_FLEX = tuple(name for name in ON_CPU if name != "flex_attention")


def measured(
    case: Training, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ON_CPU, **options: Any
) -> list[dict[str, Any]]:
    """Rows of training attention in both directions, on the CPU, the implementations taking turns."""
    rows = record.Rows(None, "training", "cpu")
    for direction in DIRECTIONS:
        options = {"budget_s": 0.0, **options}
        at = dataclasses.replace(case, direction=direction)
        measure.measure(Attention, at, rows, RATES, dtype, device="cpu", names=names, **options)
    return rows.rows


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no C++ compiler\nand a long story")

    flex.plan.cache_clear()
    monkeypatch.setattr(flex, "compiled_flex_attention", broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [TINY, Training("forward", 37, 8, 2, 2, 16, batch=2)], ids=str)
def test_rows_of_the_cpu(case: Training, dtype: torch.dtype, no_compiler: None) -> None:
    rows = measured(case, dtype)
    found = by_name(rows)
    assert len(found) == len(rows) == len(ON_CPU) * 2
    for (name, direction), line in found.items():
        if name == "flex_attention":
            assert line["not_available"] == "RuntimeError: no C++ compiler"
            continue
        assert line["p20_us"] <= line["p50_us"] <= line["p80_us"]
        floor = found["causal_sdpa", direction]["p50_us"]
        assert line["against_floor"] == pytest.approx(line["p50_us"] / floor, abs=1e-3)
        assert line["relative_error"] == 0.0 if name == "causal_sdpa" else 0.0 < line["relative_error"] < 0.05
    dense = int(patterns.tidar_training(case.seq_len, case.block_size).dense().sum())
    per_pair = case.head_dim * case.num_heads * case.batch
    assert found["tidar_kernels", "forward"]["flops"] == 4 * dense * per_pair
    assert found["tidar_kernels", "backward"]["flops"] == 10 * dense * per_pair
    assert found["causal_sdpa", "forward"]["flops"] == 4 * case.seq_len * (case.seq_len + 1) * per_pair


def test_flex_attention_has_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    masks = []
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: None)
    monkeypatch.setattr(flex, "create_block_mask", lambda *a, **k: masks.append(a[0]) or create_block_mask(*a, **k))
    operands = Attention(Training("forward", 37, 8, 1, 1, 16), "cpu", torch.float32)
    flex.plan.cache_clear()
    operands.prepare("flex_attention")
    row, key = torch.meshgrid(torch.arange(74), torch.arange(74), indexing="ij")
    assert torch.equal(masks[0](torch.tensor(0), torch.tensor(0), row, key), operands.pattern.dense())


@pytest.mark.parametrize("row", [0, TINY.seq_len])
def test_a_wrong_result_has_no_speed(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(attention.tk, "attention", leaking(row))
    monkeypatch.setattr(timing, "time_in_turn", lambda calls, budget: timed.extend(calls) or {})
    line, _ = measured(TINY, names=(OURS,))
    said = "WrongResultError: tidar_kernels of S40-B8-h4_2-d16-b1 forward: expected a relative error <= "
    assert line["not_available"].startswith(said)
    assert "p50_us" not in line
    assert not timed


@pytest.mark.parametrize("wrong", ["dq", "dk", "dv", "rows"])
def test_a_wrong_gradient_has_no_speed(wrong: str) -> None:
    forward, backward = (
        Attention(Training(direction, 70, 8, 1, 1, 16), "cpu", torch.float32) for direction in DIRECTIONS
    )

    def calls(operands: Attention) -> Calls:
        ours = Attention.implementations[OURS].prepare(operands)

        def compute(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
            leaves = tuple(leaves)
            if wrong != "rows":
                at = ("dq", "dk", "dv").index(wrong)
                leaves = (*leaves[:at], leaves[at] + 0.01 * (leaves[at] - leaves[at].detach()), *leaves[at + 1 :])
                return ours.compute(*leaves)
            more = (leaves[0] - leaves[0].detach()).mean()
            return (ours.compute(*leaves)[0] + more,)

        return Calls(compute, ours.leaves)

    assert forward.check(OURS, forward.prepared(calls(forward))) < 1e-5
    with pytest.raises(WrongResultError, match=r" of S70-B8-h1_1-d16-b1 backward: expected"):
        backward.check(OURS, backward.prepared(calls(backward)))


def test_a_wrong_peer_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(operands: Attention) -> Calls:
        return Calls(lambda q, k, v: (0.5 * q + 0.0 * (k + v).sum(),), operands.leaves)

    monkeypatch.setitem(Attention.implementations, "sdpa_dense_mask", Implementation("wrong", wrong))
    found = by_name(measured(TINY, names=WITHOUT_FLEX))
    for direction in DIRECTIONS:
        assert found["sdpa_dense_mask", direction]["not_available"].startswith(
            "WrongResultError: sdpa_dense_mask of S40"
        )
        assert "p50_us" in found["tidar_kernels", direction]


def test_dense_mask_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_DENSE_MASK", 80**2 - 1)
    found = by_name(measured(TINY, names=("tidar_kernels", "sdpa_dense_mask")))
    assert found["sdpa_dense_mask", "forward"]["not_available"].startswith("MemoryError: the dense mask is left out")
    assert "against_floor" not in found["tidar_kernels", "forward"]


def test_time_in_turn() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}  # type: ignore[misc]
    assert set(timing.time_in_turn(calls, 0.0, at_least=3)) == {"a", "b"}
    assert order == ["a", "b"] * 5
    assert timing.time_in_turn({}, 1.0) == {}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.thorough
def test_peak_memory_is_linear() -> None:
    short, long = memory.rows({"tidar_kernels": (1024, 4096)})
    assert long["peak_bytes"] > 2**25
    assert 0.7 < long["bytes_per_token"] / short["bytes_per_token"] < 1.3


def test_peak_memory_that_fails_is_recorded() -> None:
    (row,) = memory.rows({"nothing": (16,)})
    assert row["not_available"] == "KeyError: 'nothing'"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> Path:
    """A folder of results files that measure TINY."""
    rows = measured(TINY)
    peak = {"operator": "attention_memory", "implementation": "tidar_kernels", "dtype": "float32", **vars(TINY)}
    rows.append({**peak, "peak_bytes": 3 * 2**20, "bytes_per_token": 78643})
    record.add(tmp_path, "training", "cpu", rows)
    part = record.content("training", "cpu", measured(TINY, timer=once))
    part["machine"] |= {"device": "cuda", "gpu": "A GPU"}
    part["rows"].append({"operator": "cut", "what": "training attention", "left": 3})
    record.save(tmp_path / "cuda-a-gpu-2026-01-02.json", {"training": part})
    return tmp_path


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
    assert lines[-1].endswith("The time limit cut 3 case(s) of training attention.")


def test_tables_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sections_of(tmp_path, monkeypatch)
    assert module.training_gpu_table().startswith("No GPU figures are published yet")
    assert module.training_table().startswith("No figures of training attention")
    assert module.training_memory_table().startswith("No figures")


def test_picture(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    (result,) = record.newest(results, "training", "cpu")
    pictures.save("training", result, tmp_path / "new" / "training.png")
    with image.open(tmp_path / "new" / "training.png") as picture:
        assert picture.info["Description"] == pictures.description("training", result)
    bars = pictures.training_bars(result, "backward")["float32, 4/2 heads"]
    assert bars["flex_attention"] is None
    assert bars["tidar_kernels"] == by_name(result["rows"])["tidar_kernels", "backward"]["against_floor"]
    assert f"flex_attention none, sdpa_dense_mask {bars['sdpa_dense_mask']:.2f}" in pictures.description(
        "training", result
    )


def _result(path: Path, **figures: float) -> Path:
    rows = [
        {"operator": "append", "context_len": n, "p50_us": us} for n, us in zip((512, 4096), (10.0, 20.0), strict=True)
    ]
    rows.append({"operator": "decode", "block_size": 8, "tokens_per_second": 100.0})
    for line in rows:
        line |= {name: value for name, value in figures.items() if name in line}
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


def test_the_command_compares(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old, new = (str(_result(tmp_path / f"{us}.json", p50_us=us)) for us in (10.0, 15.0))
    assert cli.main(["bench", "compare", old, new, "--fail-over", "1.6"]) == 0
    assert "1.50 x  p50_us 10.00 -> 15.00" in capfd.readouterr().out
    assert cli.main(["bench", "compare", old, new, "--fail-over", "1.4", "--json"]) == 1
    assert json.loads(capfd.readouterr().out) == {"parts": {"compare": 1}, "files": []}
    for arguments, said in (
        (["compare", old], "compare: expected two results files, OLD.json NEW.json, got 1"),
        (["decode", "--out", str(tmp_path), "--fail-over", "2"], "--fail-over: expected with compare alone"),
        (["decoding"], "PART: expected some of operators, training, decode, "),
    ):
        assert cli.main(["bench", *arguments]) == 2
        assert said in capfd.readouterr().err


def test_a_slower_peer_is_no_regression(tmp_path: Path) -> None:
    files = []
    for us in (10.0, 30.0):
        rows = [{"operator": "append_kv", "implementation": name, "p50_us": us} for name in ("indexed", "copy")]
        rows += [{"operator": "copy", "p50_us": us}]
        rows += [{"operator": "append_kv", "implementation": "tidar_kernels", "p50_us": 10.0}]
        files.append(str(tmp_path / f"{us}.json"))
        record.write(Path(files[-1]), "operators", "cpu", rows)
    assert compare.main([*files, "--fail-over", "1.05"]) == 0


@pytest.mark.parametrize(
    "path",
    sorted((REPOSITORY / "benchmarks" / "results").glob("*-20*.json")),
    ids=lambda path: path.stem,
)
def test_what_is_committed_compares_with_itself(path: Path) -> None:
    content = record.load(path)
    found, gone, come = compare.changes(content, content)
    is_timed = any("p50_us" in row for part in content["parts"].values() for row in part["rows"])
    assert {change.factor for change in found} == ({1.0} if is_timed else set())
    assert gone == come == []


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
        ("[]", "expected a results file with parts"),
        ('{"rows": []}', "expected a results file with parts"),
        ('{"parts": {}}', "expected rows that both files have, got none"),
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
    line = breakdown.breakdown(Decoder(model, 4), [[1, 2, 3], [4]], 12)
    parts = [line[f"{part}_ms"] for part in breakdown.PARTS]
    assert min(parts) > 0.0
    assert line["rest_ms"] == pytest.approx(line["step_ms"] - sum(parts), abs=1e-3)


def test_strategies_take_turns_and_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(40, 32, 48, 2, 2, 1, 16, mask_token_id=39))
    measured = Profile((0.5,) * 15, (1, 272), (1e-3, 2e-3))
    chosen = strategies.candidates(measured)
    assert len({c.label for c in chosen}) == len(chosen) >= 15
    adapted = copy.deepcopy(model)
    add_gated_lora(adapted, 2, 4.0)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter)
    rows = strategies.run(model, adapted, chosen, [[1, 2, 3], [4, 5, 6]], 10, repeats=1)
    assert [row["name"] for row in rows][:2] == ["autoregressive", "tidar"]
    for line, candidate in zip(rows, chosen, strict=True):
        assert line["identical"] or not line["exact"]
        assert line["tokens_per_forward"] == pytest.approx(20 / line["forwards"], abs=1e-4)
        assert line["rows"] == candidate.rows
    assert not all(row["exact"] for row in rows)
    assert [(row["name"], row["exact"]) for row in rows if row["rows"] is None] == [("adaptive", True)]
