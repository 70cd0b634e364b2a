"""The cost of a call in Python: measured up to the launcher, and a call that never reaches it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.operators import overhead
from tests.paths import REPOSITORY


def test_each_operator_has_a_time_beside_another_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--against", str(REPOSITORY), "--rounds", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["operator"] for row in rows] == [name for name in overhead.OPERATORS for _ in range(2)]
    assert all(0 < row["least_us"] <= row["p50_us"] < 1e5 for row in rows)
    assert ["of_first" in row for row in rows] == [False, True] * len(overhead.OPERATORS)


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tidar_kernels").mkdir()
    (tmp_path / "tidar_kernels" / "__init__.py").write_text("")
    with pytest.raises(RuntimeError, match="expected a checkout that can be measured"):
        overhead.main(["--against", str(tmp_path), "--rounds", "1"])


def test_a_worker_that_ended_before_it_was_asked_is_refused() -> None:
    worker = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker.wait()
    with pytest.raises(RuntimeError, match="expected a checkout that can be measured"):
        overhead.ask(worker, "append_kv")
    worker.communicate()


def test_a_call_that_never_launches_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "calls", lambda: {"append_kv": lambda: None})
    monkeypatch.setattr(overhead, "stub_launcher", lambda launched: None)
    with pytest.raises(RuntimeError, match=r"^append_kv: expected a launch, got a call that ran on the CPU"):
        overhead.work(["append_kv"])
