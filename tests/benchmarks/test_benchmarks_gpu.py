"""What `make gpu` does, at tiny sizes on a CPU: its parts and their time, what is cut, what dies, what is drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks import bits, cpu, gpu, row
from benchmarks.core import measure, rates, record, timing
from benchmarks.core.operands import OURS, Implementation, Operands, Prepared, WrongResultError, listing
from benchmarks.decoding import models
from benchmarks.decoding.decoder_step import DecoderStep, WholeStep
from benchmarks.decoding.slots import Pass, TokenSlots
from benchmarks.operators import attention, flex
from benchmarks.operators.attention import Attention
from benchmarks.operators.step_attention import Step, StepAttention
from benchmarks.registry import OPERATORS, PARTS
from benchmarks.reports import pictures, targets
from tests.benchmarks.benching import RATES, TINY, YARDSTICKS, by_name, leaking, once, part_of, sections_of
from tidar_kernels import testing
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.ops.step_attention import triton as step_kernels

SMALL = PARTS["operators"]


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch) -> gpu.Suite:
    """The suite of a dry run whose clock says one microsecond, FlexAttention left uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    flex.plan.cache_clear()
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: torch.compile(flex_attention, backend="eager"))
    monkeypatch.setattr(rates, "measure", lambda *_, **__: [dict(line) for line in YARDSTICKS])
    return dataclasses.replace(gpu.DRY, timer=once)


def step(rows: record.Rows, names: tuple[str, ...], timer: measure.Timer | None = once) -> bool:
    """Rows of the first tiny step."""
    case = StepAttention.tiny[0]
    return measure.measure(StepAttention, case, rows, RATES, torch.float32, device="cpu", names=names, timer=timer)


def test_the_dry_run_goes_through_every_part(
    dry: gpu.Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def launch(command: list[str], seconds: float) -> int:
        """Parts run in this process, and parity does not run."""
        commands.append(command)
        part = command[command.index("--part") + 1] if "--part" in command else None
        return gpu.run_part(dry, part, tmp_path, seconds) if part else 0

    assert gpu.run_all(dry, tmp_path, 300.0, launch) == 0
    assert commands[0][:5] == ["env", "TRITON_INTERPRET=1", sys.executable, "-m", "benchmarks.bits"]
    assert commands[1][1:5] == ["-m", "pytest", "-m", "cuda"]
    assert set(record.load(next(tmp_path.glob("cpu-*.json")))["parts"]) == {"parity", *PARTS}
    timed = [line for kind in PARTS for line in part_of(tmp_path, kind) if "p50_us" in line]
    assert {line["operator"] for line in timed} == {
        "step_attention", "step_stored", "append_kv", "compact_kv", "rotary_append", "verify", "projection",
        "decoder_step", "token_slots", "attention",
    }  # fmt: skip
    stored = part_of(tmp_path, "stored")
    assert [line["of_plain"] for line in stored if "of_plain" in line] == [1.0] * 3  # all take a microsecond
    assert all(line["command"].startswith("python -m benchmarks.row ") for line in timed)
    absent = {line["implementation"]: line for line in part_of(tmp_path, "step") if line["operator"] == "peer"}
    assert absent["flashinfer"]["absent"]
    assert absent["flashinfer"]["install"] == "pip install flashinfer-python"
    names = {line["implementation"] for line in part_of(tmp_path, "step") if line["operator"] == "step_attention"}
    assert names == {"tidar_kernels", "flex_attention", "sdpa_dense_mask", "sdpa_no_mask"}
    checked = [line for line in part_of(tmp_path, "step") if line.get("implementation") == "flex_attention"]
    assert 0 < checked[-1]["relative_error"] < 1e-5
    assert "exit codes: {'bits': 0, 'parity': 0, 'step': 0" in capsys.readouterr().out
    drawn = pictures.draw_all(tmp_path, tmp_path)
    assert [path.name for path in drawn] == ["step_prefix_cpu.png", "step_roofline_cpu.png", "token_slots_cpu.png"]


def test_each_part_has_its_share_of_the_time_and_dies_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    calls: list[tuple[str, float, bool]] = []

    def launch(command: list[str], seconds: float) -> int | None:
        name = command[command.index("--part") + 1] if "--part" in command else "parity"
        name = "bits" if "benchmarks.bits" in command else name
        calls.append((name, seconds, "--resume" in command))
        now[0] += 100.0 if name == "parity" else 20.0
        return {"parity": None, "step": -11, "operators": 1, "decoder_step": None}.get(name, 0)

    assert gpu.run_all(gpu.DRY, tmp_path, 500.0, launch) == 1
    assert [name for name, _, _ in calls] == [
        "bits", "parity", "step", "step", "step", "stored", "operators", "decoder_step", "token_slots", "training"
    ]  # fmt: skip
    assert [resume for name, _, resume in calls if name == "step"] == [False, True, True]
    assert [seconds for _, seconds, _ in calls[:2]] == [gpu.BITS_SECONDS + gpu.GRACE, gpu.PARITY_SECONDS]
    assert calls[2][1] == pytest.approx((380.0 - gpu.GRACE) * 0.34 + gpu.GRACE)  # 380 are left after parity
    assert calls[-1][1] == pytest.approx(500.0 - 100.0 - 8 * 20.0)  # what the others left
    (parity,) = part_of(tmp_path, "parity")
    assert (parity["stopped"], parity["tests"]) == (True, 0)
    assert "step: ended with -11" in capsys.readouterr().err


@pytest.mark.interpret
def test_bits_of_rows_in_both_sizes_of_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red where a row's bits are not those of single-token decoding, and where nothing was shown."""
    sizes: list[int] = []
    check = testing.check_row_bits

    def differs(case: Any, device: str) -> None:
        raise testing.ParityError("row 1 of out: expected equal bits")

    def noted(case: Any, device: str) -> Any:
        sizes.append(step_kernels.step_config(None, case.dtype, case.head_dim).BLOCK_M)
        return check(case, device)

    monkeypatch.setattr(testing, "check_row_bits", noted)
    arguments = ["--out", str(tmp_path), "--dry-run"]
    assert bits.main(arguments) == 0
    assert sizes == [64, 128]
    found = part_of(tmp_path, "bits")
    assert [line["equal"] for line in found] == [True] * 3
    assert [line.get("tile_rows") for line in found] == [64, 128, None]
    monkeypatch.setattr(testing, "check_row_bits", differs)
    assert bits.main(arguments) == 1
    assert [line["equal"] for line in part_of(tmp_path, "bits")] == [False, False, True]
    assert bits.main([*arguments, "--budget", "-1"]) == 0
    assert all("not_available" in line for line in part_of(tmp_path, "bits"))
    assert [bits.verdict(part_of(tmp_path, "bits"), device) for device in ("cpu", "cuda")] == [0, 1]


def test_a_results_file_of_a_gpu_fills_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, pictures and the log: made-up rows of every workload, none of them left open that a GPU tells."""
    parts = {}
    for kind, operators in PARTS.items():
        rows = []
        for cls in map(OPERATORS.__getitem__, operators):
            for place, case in enumerate(cls.cuda):
                line = measure.head(cls.operator, next(iter(cls.implementations)), "cuda", torch.bfloat16, vars(case))
                figures = {"p50_us": 100.0 + place, "p20_us": 99.0, "p80_us": 120.0, "bytes": 1e6, "flops": 1e9}
                figures |= {"rows": 8, "tflops": 200.0, "gbytes_per_s": 2000.0, "of_floor": 0.5, "relative_error": 0.0}
                rows.append(line | figures)
        parts[kind] = record.content(kind, "cpu", rows)
    parts["bits"] = record.content("bits", "cpu", [
        {"operator": "step_bits", "case": "a", "tile_rows": 64, "equal": True},
        {"operator": "step_bits", "case": "a", "tile_rows": 128, "equal": False},
        {"operator": "tile_bits", "case": "a", "equal": False},
    ])  # fmt: skip
    for part in parts.values():
        part["machine"] |= {"device": "cuda", "gpu": "NVIDIA H200", "capability": "9.0"}
    record.save(tmp_path / "cuda-nvidia-h200-2026-01-02.json", parts)
    log = sections_of(tmp_path, monkeypatch, "log")
    told = {entry.title: entry.told for entry in log.LOG}
    unmeasured = {title for title, text in told.items() if "speed open" in text}
    assert unmeasured == {"step kernel, cc 80, d = 128", "step kernel, float32", "training, d = 72"}
    assert "speed on NVIDIA H200: 1" in told["step kernel"]
    assert told["step kernel"].endswith("cases)")
    assert "50 % of the floor" in told["training forward"]
    assert "in 1 of 2 cases; tiles of 64 and of 128 rows agree in 0 of 1" in log.bits_line()
    assert "| 131072 |" in log.stored_table()
    operators = sections_of(tmp_path, monkeypatch, "operators")
    for name in ("gpu-readme-table", "gpu-table", "gpu-operators-table", "decoder-step-table"):
        assert "NVIDIA H200" in operators.SECTIONS[name](), name
    assert "Qwen3-8B" in operators.SECTIONS["gpu-readme-table"]()
    assert "NVIDIA H200" in sections_of(tmp_path, monkeypatch, "results").training_gpu_table()
    drawn = {path.name for path in pictures.draw_all(tmp_path, tmp_path / "drawn")}
    assert {"step_prefix_cuda.png", "step_roofline_cuda.png"} <= drawn


def test_a_process_is_stopped_at_its_end() -> None:
    assert gpu.run_process([sys.executable, "-c", "raise SystemExit(7)"], 60.0) == 7
    assert gpu.run_process([sys.executable, "-c", "import time; time.sleep(60)"], 0.0) is None


def test_parity_counts_what_failed(tmp_path: Path) -> None:
    case = '<testcase classname="tests.test_a" name="test_{0}">{1}</testcase>'
    cases = [case.format(*pair) for pair in (("x", ""), ("y", "<failure/>"), ("z", "<skipped/>"))]
    report = tmp_path / "parity.xml"

    def launch(command: list[str], seconds: float) -> int:
        report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
        return 0

    assert gpu.run_parity(gpu.DRY, tmp_path, 10.0, launch) == 1
    (line,) = part_of(tmp_path, "parity")
    assert (line["tests"], line["failed"], line["skipped"]) == (3, 1, 1)
    assert line["failures"] == ["tests.test_a::test_y"]


@pytest.mark.parametrize(
    ("code", "cases", "red"),
    [
        (0, "<testcase/>", 0),
        (0, "", 1),  # nothing ran
        (5, "", 1),
        (0, "<testcase><skipped/></testcase>", 1),
        (None, "<testcase/>", 1),  # cut
        (1, "<testcase/>", 1),
        (0, "<testcase/><testcase><error/></testcase>", 1),
    ],
)
def test_parity_on_a_gpu_is_green_if_all_of_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, cases: str, red: int
) -> None:
    commands: list[list[str]] = []

    def launch(command: list[str], seconds: float) -> int | None:
        commands.append(command)
        (tmp_path / "parity.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        return code

    suite = dataclasses.replace(gpu.FULL, timer=once)
    monkeypatch.setattr(record, "add", lambda *given: None)
    assert gpu.run_parity(suite, tmp_path, 10.0, launch) == red
    assert commands[0][-2:] == ["-n", str(os.cpu_count())]


@pytest.mark.parametrize(
    ("device", "code", "cases", "red"),
    [
        ("cuda", 0, "<testcase/>", 0),
        ("cuda", 0, "<testcase><skipped/></testcase>", 1),
        ("cuda", None, "<testcase/>", 1),
        ("cuda", 1, "<testcase/><testcase><failure/></testcase>", 1),
        ("cpu", 0, "<testcase><skipped/></testcase>", 0),  # a dry run
        ("cpu", 2, "", 1),
    ],
)
def test_vllms_part_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, code: int | None, cases: str, red: int
) -> None:
    commands: list[list[str]] = []

    def launch(command: list[str], seconds: float) -> int | None:
        commands.append(command)
        if gpu.VLLM_TESTS in command:
            (tmp_path / "vllm.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
            return code
        return 0

    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu, "SHARES", {})
    monkeypatch.setattr(gpu, "run_sanitizer", lambda *given: 0)
    monkeypatch.setattr(gpu, "run_parity", lambda *given: 0)
    suite = dataclasses.replace(gpu.DRY, device=device)
    added: list[Any] = []
    monkeypatch.setattr(record, "add", lambda *given: added.append(given[1:]))
    assert gpu.run_all(suite, tmp_path, 300.0, launch) == red
    assert sum(gpu.VLLM_TESTS in command for command in commands) == 1
    ((kind, where, (line,)),) = added
    assert (kind, where, line["stopped"]) == ("vllm_tests", device, code is None)
    assert (gpu.ROOT / gpu.VLLM_TESTS).is_file()
    assert f"--ignore={gpu.VLLM_TESTS}" in gpu.FULL.parity  # or parity would start engines side by side


def test_without_vllm_its_part_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(gpu, "SHARES", {})
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "vllm" else object())
    assert gpu.run_all(gpu.DRY, tmp_path, 300.0, lambda command, seconds: commands.append(command) or 0) == 0
    assert not any(gpu.VLLM_TESTS in command for command in commands)
    assert "vllm: not run, no vLLM" in capsys.readouterr().err


@pytest.mark.parametrize(("codes", "red"), [((0, 0), 0), ((0, 9), 1), ((None, 0), 0)])
def test_the_sanitizer_runs_both_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int | None, int], red: int
) -> None:
    left, commands = list(codes), []

    def launch(command: list[str], seconds: float) -> int | None:
        commands.append(command)
        return left.pop(0)

    monkeypatch.setattr(record, "add", lambda *given: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.run_sanitizer(tmp_path, 10.0, launch) == 0
    assert not commands
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/tools/{name}")
    assert gpu.run_sanitizer(tmp_path, 10.0, launch) == red
    assert [command[:3] for command in commands] == [
        ["/tools/compute-sanitizer", "--tool", tool] for tool in ("memcheck", "racecheck")
    ]


@pytest.mark.parametrize("calls", [1, 7, 16, 64, 100])
def test_many_calls_lie_between_two_events(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """On a device that takes 10 us a call and 300 us to start a graph, 64 calls keep the bias below 5 us."""
    fake = MagicMock()
    clock = [0.0]
    capturing: list[int] = []
    fake.graph.return_value.__enter__ = lambda self: capturing.append(0)

    def call() -> None:
        if capturing:
            capturing[0] += 1

    def replay() -> None:
        clock[0] += 0.3 + 0.01 * capturing[0]

    fake.CUDAGraph.return_value.replay = replay

    class Event:
        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    fake.Event = lambda enable_timing: Event()
    monkeypatch.setattr(torch, "cuda", fake)
    found = timing.time_cuda([call] * calls)
    assert capturing[0] >= 64
    assert capturing[0] % calls == 0
    assert 10.0 < found["p50_us"] < 15.0


def test_a_row_that_took_its_process_down_is_not_tried_again(dry: gpu.Suite, tmp_path: Path) -> None:
    rows = record.Rows(tmp_path, "step", "cpu")
    lost = measure.head("step_attention", "sdpa_dense_mask", "cpu", torch.float32, vars(StepAttention.tiny[0]))
    rows.begin(lost)
    rows = record.Rows(tmp_path, "step", "cpu", resume=True)
    names = ("tidar_kernels", "sdpa_dense_mask")
    assert step(rows, names)
    first, second = part_of(tmp_path, "step")
    assert first == lost | {"not_available": "the process ended while this was measured"}
    assert second["p50_us"] == 1.0
    before = list(rows.rows)
    assert step(rows, names)
    assert rows.rows == before


def test_a_wrong_operator_has_no_speed_and_the_run_goes_on(
    dry: gpu.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(operands: StepAttention) -> Prepared:
        keys, values = operands.joined(context_first=True)
        dense = operands.pattern.dense(operands.case.context_len)
        dense[0, -1] = True  # a draft that sees a mask
        attend = torch.nn.functional.scaled_dot_product_attention
        return Prepared(lambda: attend(operands.q, keys, values, attn_mask=dense, enable_gqa=True))

    monkeypatch.setitem(StepAttention.implementations, "tidar_kernels", Implementation("wrong", wrong))
    rows = record.Rows(tmp_path, "step", "cpu")
    assert not gpu.measured(dry, "step", rows, RATES, math.inf)
    mine = [line for line in rows.rows if line.get("implementation") == "tidar_kernels"]
    assert mine[0]["not_available"].startswith("WrongResultError: tidar_kernels of Step(")
    assert "p50_us" not in mine[0]
    assert any("p50_us" in line for line in rows.rows if line.get("implementation") == "sdpa_dense_mask")


@pytest.mark.parametrize("operator", SMALL)
def test_checks_of_the_other_operators_can_fail(operator: str) -> None:
    cls = OPERATORS[operator]
    operands = cls(cls.tiny[0], "cpu", torch.float32)
    prepared = operands.prepare("tidar_kernels")
    assert operands.check("tidar_kernels", prepared) < 1e-5

    def broken() -> Any:
        found = prepared.run()
        if operator in ("append_kv", "compact_kv"):
            return operands.k_cache[0, 0, 0].add_(1.0)  # type: ignore[attr-defined]
        return [x + 1 for x in found] if isinstance(found, tuple) else found + 1

    with pytest.raises(WrongResultError, match=r"^tidar_kernels of "):
        operands.check("tidar_kernels", Prepared(broken))


@pytest.mark.parametrize("case", StepAttention.tiny, ids=str)
def test_floors_count_live_pairs_and_every_byte_once(case: Step) -> None:
    operands = StepAttention(case, "cpu", torch.float32)
    floor, pairs = operands.floor(), int(operands.pattern.dense(case.context_len).sum())
    assert floor["flops"] == 4 * pairs * case.head_dim * case.num_heads * case.batch
    tensors = [operands.q, operands.q, operands.k, operands.v]  # out is as large as q
    tensors += [cache[:, :, : case.context_len] for cache in (operands.k_cache, operands.v_cache)]
    assert floor["bytes"] == sum(x.numel() * 4 for x in tensors)
    line = {**floor, "p50_us": 2.0, "dtype": "float32"}
    limit = max(floor["bytes"] / 1e10, floor["flops"] / 1e11) * 1e6
    assert RATES.against(line) == {"floor_us": round(limit, 3), "of_floor": pytest.approx(limit / 2, abs=1e-4)}


def test_every_row_has_a_command_that_measures_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rates, "measure", lambda *_, **__: [dict(line) for line in YARDSTICKS])
    monkeypatch.setattr(timing, "time_in_turn", lambda calls, budget: {name: once([calls[name]]) for name in calls})
    cases = [*((cls, cls.tiny[0]) for cls in OPERATORS.values()), (OPERATORS["token_slots"], Pass("shipped", 2, 8))]
    cases += [(Attention, dataclasses.replace(TINY, direction="backward")), (DecoderStep, WholeStep("tiny", 4, 24))]
    for cls, case in cases:
        line = measure.head(cls.operator, cls.offered(case, "cpu")[0], "cpu", torch.float32, vars(case))
        arguments = line["command"].split()
        assert arguments[:3] == ["python", "-m", "benchmarks.row"]
        assert row.main(arguments[3:]) == 0, line["command"]
        (printed,) = map(json.loads, capsys.readouterr().out.splitlines())
        assert {name: printed[name] for name in line} == line
        assert printed["p50_us"] == 1.0
    for wrong, said in (
        ("step eager cpu float32", "OPERATOR: expected one of step_attention, "),
        ("verify nobody cpu float32", "IMPLEMENTATION: expected one of tidar_kernels, argmax, got nobody"),
        ("verify tidar_kernels cpu float32 depth=1", "depth=1: expected FIELD=VALUE with a field of model, "),
        ("verify tidar_kernels cpu float32 model=x", "FIELD=VALUE: "),
        ("attention tidar_kernels cpu float32 direction=up seq_len=8", "FIELD=VALUE: "),
        ("step_attention flashinfer cpu float32 block_size=4", "FIELD=VALUE: "),
    ):
        assert row.main(wrong.split()) == 2
        assert said in capsys.readouterr().err


def test_a_failure_of_ours_in_training_ends_nothing_and_is_told(
    dry: gpu.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(operands: Attention) -> Any:
        raise RuntimeError("no such backend")

    monkeypatch.setattr(attention.tk, "attention", leaking(TINY.seq_len))
    monkeypatch.setitem(Attention.implementations, "causal_sdpa", Implementation("broken", broken, ceiling=True))
    rows = record.Rows(tmp_path, "training", "cpu")
    assert not gpu.measured(dry, "training", rows, RATES, math.inf)
    found = by_name(rows.rows)
    assert found["tidar_kernels", "forward"]["not_available"].startswith("WrongResultError")
    assert "p50_us" in found["sdpa_dense_mask", "forward"]
    assert found["causal_sdpa", "forward"]["not_available"] == "RuntimeError: no such backend"


def test_a_case_without_room_ends_nothing(dry: gpu.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Attention.make

    def without_room(operands: Attention) -> None:
        if operands.case.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        make(operands)

    monkeypatch.setattr(Attention, "make", without_room)
    monkeypatch.setattr(Attention, "tiny", [dataclasses.replace(TINY, batch=2), TINY])
    rows = record.Rows(tmp_path, "training", "cpu")
    assert not gpu.measured(dry, "training", rows, RATES, math.inf)
    found = [line for line in rows.rows if line["operator"] == "attention"]
    for line in found:
        if line["batch"] == 2:
            assert line["not_available"].startswith("OutOfMemoryError: CUDA out of memory")
    assert sum("p50_us" in line for line in found if line["batch"] == 1) == 4


def test_past_the_deadline_nothing_starts_and_it_is_said(
    dry: gpu.Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = record.Rows(None, "training", "cpu")
    assert measure.measure(Attention, TINY, held, RATES, torch.float32, device="cpu", timer=once, deadline=0.0)
    assert held.rows
    assert all(line["not_available"].endswith("is used up") and not measure.failed(line) for line in held.rows)
    for name in PARTS:
        held = record.Rows(tmp_path, name, "cpu")
        assert gpu.measured(dry, name, held, RATES, 0.0)
        assert any(line["operator"] == "cut" for line in held.rows)
        assert not any("p50_us" in line for line in held.rows)
    assert "step attention: the time for benchmarks is used up, 2 case(s) not measured" in capsys.readouterr().err


def test_gpu_cases() -> None:
    found = [case for case in Attention.cuda if case.direction == "forward"]
    assert [dataclasses.replace(case, direction="backward") for case in found] == list(Attention.cuda[1::2])
    assert len(set(found)) == len(found) == 20
    assert {(case.head_dim, case.num_heads // case.num_kv_heads) for case in found[:8]} == {
        (64, 1), (64, 4), (128, 1), (128, 4)
    }  # fmt: skip
    assert all(case.num_heads * case.head_dim == 2048 for case in found)
    assert [case.seq_len for case in found[:5]] == [8192, 2048, 4096, 16384, 32768]
    assert [case.batch for case in found[:5]] == [2, 8, 4, 1, 1]
    steps = StepAttention.cuda
    assert len(set(steps)) == len(steps) == 44
    assert set(StepAttention.compiled) <= {*steps, *StepAttention.cpu, *StepAttention.tiny}
    assert set(gpu.SHARES) == set(PARTS)
    assert sorted(name for names in PARTS.values() for name in names) == sorted(OPERATORS)


def test_without_matplotlib_there_are_no_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"operator": "token_slots", "model": "m", "tokens": 1, "context_len": 8, "p50_us": 1.0}
    record.add(tmp_path, "token_slots", "cpu", [line])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert pictures.draw_all(tmp_path, tmp_path) == []
    assert capsys.readouterr().err == ("no pictures: matplotlib: needed to draw a PNG; install tidar-kernels[bench]\n")


def test_tables_of_operators(dry: gpu.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = record.Rows(tmp_path, "operators", "cpu")
    rows.put(*listing(StepAttention, "cpu"))
    for name in ("step", "operators"):
        gpu.measured(dry, name, rows, RATES, math.inf)
    module = sections_of(tmp_path, monkeypatch, "operators")
    for text in (module.step_table("cpu"), module.others_table("cpu"), module.targets_table(), module.peers_table()):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1
    assert "| tiny | AR | 40 x 2 | " in module.step_table("cpu")
    assert "does not run there | not measured yet | `pip install flashinfer-python` |" in module.peers_table()
    assert "| CPU | step attention, SDPA without mask | ≤ 1.3 x | 2 of 2 | 1 x (tiny" in module.targets_table()
    assert module.step_table("cuda").startswith("No GPU figures")


def test_steps_of_a_small_model_in_both_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[type[Operands], Any]] = [(TokenSlots, Pass("tiny", 1, 24))]
    cases += [(DecoderStep, WholeStep("tiny", block, 24, levels)) for block, levels in ((0, 0), (4, 0), (4, 1))]
    monkeypatch.setitem(cpu.KINDS, "steps", (cases, cpu.BOTH, 0.0))
    monkeypatch.setattr(rates, "measure", lambda device, dtypes: [*YARDSTICKS])
    assert cpu.main(["steps", "--out", str(tmp_path)]) == 0
    rows = [row for row in part_of(tmp_path, "steps") if "p50_us" in row]
    assert [(row["dtype"], row["rows"]) for row in rows if row["operator"] == "decoder_step"] == [
        (dtype, count) for dtype in ("float32", "bfloat16") for count in (1, 20, 8)
    ]
    one = {row["dtype"]: row["p50_us"] for row in rows if row["operator"] == "decoder_step" and row["rows"] == 1}
    for line in rows:
        if line["operator"] == "decoder_step":  # by the step of one token in its own dtype
            assert line["of_autoregressive"] == pytest.approx(line["p50_us"] / one[line["dtype"]], abs=1e-3)
    module = sections_of(tmp_path, monkeypatch, "operators")
    text = module.small_steps()
    assert "| bfloat16, B = 4, one level | 8 | " in text
    assert "| float32 | 1 | " in text


def test_targets_of_a_cpu_are_those_of_the_machine_that_was_measured_last(tmp_path: Path) -> None:
    for machine, day, speedup in (("a", "02", 2.0), ("b", "01", 9.0)):
        rows = [{"operator": "strategy", "label": machine, "exact": True, "speedup": speedup}]
        part = record.content("strategies", "cpu", rows) | {"date": f"2026-01-{day}"}
        case = {"operator": "verify", "vocab_size": 151936, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
        times = [case | {"implementation": name, "p50_us": us} for name, us in ((OURS, 11 * speedup), ("argmax", 2.0))]
        times.append({**times[0], "top_k": 50, "p50_us": 1e9})
        operators = record.content("operators", "cpu", times) | {"date": f"2026-01-{day}"}
        record.save(tmp_path / f"cpu-{machine}-2026-01-{day}.json", {"strategies": part, "operators": operators})
    assert targets.lines(tmp_path, "cpu") == [
        "verify with top-p, argmax of the same logits <= 12 x: 1 of 1 cases, the worst 11 x (151936 tokens, top-p)",
        "the shipped model, autoregression >= 2.5 x: 0 of 1 cases, the worst 2 x (a)",
    ]


def test_the_newest_file_of_each_machine_counts(tmp_path: Path) -> None:
    for machine, day, value in (("a", "01", 1), ("a", "02", 2), ("b", "01", 3)):
        part = record.content("decode", "cpu", [{"operator": "decode", "p50_us": value}])
        record.save(
            tmp_path / f"cpu-{machine}-2026-01-{day}.json", {"decode": part} | ({"old": part} if value == 1 else {})
        )
    assert [part["rows"][0]["p50_us"] for part in record.newest(tmp_path, "decode")] == [2, 3]
    assert [part["rows"][0]["p50_us"] for part in record.newest(tmp_path, "old", "cpu")] == [1]
    assert record.newest(tmp_path, "decode", "cuda") == []


def test_decoder_steps_and_their_floors() -> None:
    held, config = record.Rows(None, "decoder_step", "cpu"), models.SHAPES["tiny"].config
    assert config == TransformerConfig(300, 64, 96, 2, 4, 2, 16)
    for block in (0, 4):
        case = WholeStep("tiny", block, 64)
        assert measure.measure(DecoderStep, case, held, RATES, torch.float32, device="cpu", timer=once)
    plain, drafted = held.rows
    parameters = sum(p.numel() for p in Transformer(config).parameters() if p.ndim == 2)
    assert plain["bytes"] == 4 * (parameters + 2 * 2 * 2 * 16 * 65)  # weights, and K and V of two layers and two heads
    assert plain["flops"] == 2 * parameters + 4 * 65 * 16 * 4 * 2
    assert (plain["rows"], drafted["rows"]) == (1, 20)
    pairs = 64 * 20 + 4 * 25 // 2 + 64  # anchors: P*B*(B+1) + B*(B+1)^2/2 + B^3
    head = 300 * 64
    assert drafted["flops"] == 2 * (parameters - head) * 20 + 2 * head * 7 + 4 * pairs * 16 * 4 * 2
    for line in held.rows:
        limit = max(line["bytes"] / 1e10, line["flops"] / 1e11) * 1e6
        assert line["floor_us"] == pytest.approx(limit, abs=0.01)
        assert line["of_floor"] == pytest.approx(limit, abs=1e-4)
        assert line["of_autoregressive"] == 1.0
        assert "tiny" in measure.describe(line)
    assert drafted["projected_speedup"] == pytest.approx(3.0)
    assert "projected_speedup" not in plain
    published = {(name, b): n for name, s in models.SHAPES.items() for b, n in s.published.items() if name != "tiny"}
    assert published == {("Qwen2.5-1.5B", 8): 5.69, ("Qwen2.5-1.5B", 16): 7.35, ("Qwen3-8B", 16): 8.36}
