"""The search for launch configurations, as far as it goes without a GPU: what compiles, and what is proposed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.core import record
from benchmarks.static import tune
from benchmarks.static.cases import Case
from benchmarks.static.tune import Trial, candidates, case_for, choose, current, source, survivors, timed
from tidar_kernels import cli
from tidar_kernels.cli import bench
from tidar_kernels.ops._triton.configs import CHIPS, ForwardConfig, TileConfig, step_config
from tidar_kernels.ops._triton.linear_tables import LinearConfig
from tidar_kernels.ops.step_attention import triton as step_attention
from tidar_kernels.testing import ParityError

CASE = Case("step_attention", "90", "bfloat16", 128)
OWN, FASTER, CLOSE, WRONG = (
    current(CASE),
    ForwardConfig(128, 128, 8, 2, SCORES_AHEAD=True),
    ForwardConfig(128, 32, 8, 3),
    ForwardConfig(64, 64, 4, 2),
)
TIMES = {OWN: 50.0, FASTER: 40.0, CLOSE: 49.5}


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tidar-kernels bench` starts no process of its own: what is replaced here holds there too."""
    monkeypatch.setattr(bench, "_run_module", lambda name, *arguments, is_json: tune.main(list(arguments)))


def trials(*configs: TileConfig) -> list[Trial]:
    return [Trial(config, 214, 98304, 8) for config in configs]


@pytest.mark.parametrize("name", tune.TUNABLE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_candidates_are_many_and_hold_the_tables_own(name: str, dtype: str) -> None:
    for chip in CHIPS:
        case = case_for(name, str(chip), dtype, 64)
        found = candidates(case)
        assert found[0] == current(case)
        assert len(set(found)) == len(found) > 10


def test_what_spills_or_does_not_fit_is_no_survivor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what does not compile. The others come with most resident warps first."""
    sizes = {"shared_bytes": 1024, "stack_bytes": 0, "spill_bytes": 0, "local_accesses": 0, "registers": 64, "warps": 8}
    reports = {
        OWN: sizes,
        FASTER: sizes | {"warps": 16},
        CLOSE: sizes | {"stack_bytes": 8},
        WRONG: sizes | {"shared_bytes": 228 * 1024},
    }

    def compiled(work: tuple[Case, TileConfig]) -> Any:
        return SimpleNamespace(**reports[work[1]]) if work[1] in reports else None

    monkeypatch.setattr(tune, "_compiled", compiled)
    found = survivors(CASE, [*reports, ForwardConfig(16, 48, 4, 1)])
    assert [trial.config for trial in found] == [FASTER, OWN]


def test_a_dry_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "candidates", lambda case: [current(case), LinearConfig(16, 32, 32, 4, 2)])
    monkeypatch.setattr(tune.os, "cpu_count", lambda: 1)
    assert cli.main(["bench", "--tune", "--dry-run", "--chip", "gfx942", "--kernels", "down"]) == 0
    out = capsys.readouterr().out
    assert "gated_rows gfx942 bfloat16 down: 2 of 2 candidates compile without a spill and fit" in out
    assert out.count(" registers ") == 2
    assert out.count("/32 warps") == 2
    assert "(table)" in out


def fake_timer(case: Case) -> float:
    """By the configuration in force; and it is in force within the module that launches the kernel alone."""
    config = step_attention.step_config(90, torch.bfloat16, 128)
    assert step_config(90, torch.bfloat16, 128) == OWN
    return TIMES[config]


def fake_check(case: Case, device: str) -> None:
    if step_attention.step_config(90, torch.bfloat16, 128) == WRONG:
        raise ParityError("out: expected something else")


def test_a_candidate_that_computes_something_else_has_no_time() -> None:
    found = list(timed(CASE, trials(OWN, WRONG, FASTER), "cuda", fake_check, fake_timer))
    assert [trial.p50_us for trial in found] == [50.0, None, 40.0]
    assert [trial.failure for trial in found] == ["", "ParityError: out: expected something else", ""]
    assert choose(CASE, found[1:2]) is None
    chosen = choose(CASE, found)
    assert chosen is not None
    assert chosen[0].config == FASTER


def test_the_tables_entry_stays_unless_another_gains() -> None:
    chosen = choose(CASE, timed(CASE, trials(CLOSE, OWN), "cuda", fake_check, fake_timer))
    assert chosen is not None
    assert chosen[0].config == OWN
    assert chosen[1] == "50.0 us; 49.5 with 128, 32, 8, 3, the next; 214 registers, 8 warps"


def test_a_proposal_is_source() -> None:
    best = Trial(FASTER, 214, 98304, 8, 40.0)
    wide = Trial(LinearConfig(128, 64, 64, 8, 3), 90, 65536, 16, 12.0)
    text = source(
        [
            (CASE, best, "40.0 us"),
            (Case("step_attention", "90", "bfloat16", 64, "extras"), best, "40.0 us"),
            (Case("linear", "gfx942", "bfloat16", variant="wide"), wide, "12.0 us"),
        ]
    )
    assert text.splitlines() == [
        '# TABLES["step"][90]["half"]',
        "128: ForwardConfig(128, 128, 8, 2, SCORES_AHEAD=True),  # 40.0 us",
        '# TABLES["step"][90]["half extras"]',
        "64: ForwardConfig(128, 128, 8, 2, SCORES_AHEAD=True),  # 40.0 us",
        "# linear_configs.TABLE['gfx942'][\"half\"]",
        '"wide": LinearConfig(128, 64, 64, 8, 3),  # 12.0 us',
    ]
    assert eval(f"{{{text.splitlines()[1]}\n}}", {"ForwardConfig": ForwardConfig}) == {128: FASTER}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that takes the times of `TIMES`."""
    measure = tune.timed

    def faked(case: Case, given: list[Trial], device: str) -> Any:
        return measure(case, given, device, fake_check, fake_timer)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "chip_of", lambda device: 90)
    monkeypatch.setattr(tune, "survivors", lambda case, configs, jobs: trials(OWN, CLOSE, FASTER, WRONG))
    monkeypatch.setattr(tune, "timed", faked)
    monkeypatch.setattr(record, "environment", lambda device: {"machine": {"device": device}, "versions": {}})
    monkeypatch.setattr(record, "clocks", lambda device: {})


def test_the_search(gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--kernels", "step_attention", "--head-dims", "128"]
    assert cli.main(["bench", "--tune", "--out", str(tmp_path), *chosen]) == 1  # one was refuted
    out = capsys.readouterr().out
    assert (
        '# TABLES["step"][90]["half"]\n128: ForwardConfig(128, 128, 8, 2, SCORES_AHEAD=True),  # 40.0 us; 50.0 with'
        in out
    )
    part = json.loads((tmp_path / "tune-90.json").read_text())["parts"]["tune"]
    assert [row["p50_us"] for row in part["rows"]] == [50.0, 49.5, 40.0, None]
    assert [row["in_table"] for row in part["rows"]] == [True, False, False, False]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tune"], 2, "--tune: expected --out DIR and no --chip"),
        (
            ["--tune", "--out", "tuned"],
            1,
            "tune: expected a GPU to time on, got none; --dry-run shows what compiles without one",
        ),
        (["--tune", "operators"], 2, "--tune: expected no PART, got operators"),
        (["--chip", "90"], 2, "expected with --tune alone"),
        (["--dry-run"], 2, "expected with --tune alone"),
        (["--tune", "--dry-run", "--kernels", "append"], 2, "--kernels: expected some of step_attention"),
        (
            ["--tune", "--dry-run", "--head-dims", "x"],
            2,
            "--head-dims: expected whole numbers with commas between them, got 'x'",
        ),
        (["--tune", "--dry-run", "--chip", "91"], 2, "--chip: expected one of 80, "),
    ],
)
def test_bad_arguments(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        found = cli.main(["bench", *arguments])
    except SystemExit as left:
        found = left.code  # type: ignore[assignment]
    assert found == code
    assert message in capsys.readouterr().err
