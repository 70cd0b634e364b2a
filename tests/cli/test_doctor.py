"""`tidar-kernels doctor`: what it says of a machine, and what it finds wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cli.shell import Run
from tests.paths import REPOSITORY
from tidar_kernels import testing
from tidar_kernels.cli import common, doctor
from tidar_kernels.ops.kv.api import append_operator
from tidar_kernels.ops.step_attention import operator as step_operator

REPORT = {
    "ok": bool,
    "checks": list,
    "versions": dict,
    "device": str,
    "path": str,
    "gpu": type(None),
    "cpu": str,
    "threads": int,
    "operators": dict,
    "launch_configurations": list,
    "parity": list,
}


def test_doctor_json(run: Run, healthy: None) -> None:
    code, out, err = run("doctor", "--device", "cpu", "--json")
    report = json.loads(out)
    assert (code, err, report["ok"]) == (0, "", True)
    assert {name: type(report[name]) for name in REPORT} == REPORT
    assert set(report) - set(REPORT) == {"cuda", "triton_interpret"}
    assert (report["device"], report["path"], report["launch_configurations"]) == ("cpu", "cpu", [])
    assert report["versions"] == common.versions()
    assert set(report["operators"]) >= {"step_attention", "append_kv", "attention"}
    assert {check["name"]: check["ok"] for check in report["checks"]} == dict.fromkeys(
        ["python", "torch", "triton", "vllm", "shipped model", "append_kv on cpu", "step_attention on cpu"], True
    )
    assert {result["operator"] for result in report["parity"]} == {"append_kv", "step_attention"}
    assert all(result["passed"] and result["device"] == "cpu" for result in report["parity"])


def test_doctor_text(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, err = run("doctor", "--device", "cpu")
    assert (code, err) == (0, "")
    titles = ["versions", "machine", "operators", "launch configurations", "checks"]
    assert [line for line in out.splitlines() if line in titles] == titles
    assert f"\n  torch          {torch.__version__}\n" in out
    assert "\n  TRITON_INTERPRET  not set\n" in out
    assert re.search(r"\n  step_attention +PyTorch, .+\n  attention +PyTorch, .+\n  append_kv +PyTorch, ", out)
    assert "\n  none: no kernel is launched on this device\n" in out
    assert re.search(r"\n  ok  step_attention on cpu  6 cases, at most \d+% of the error budget, \d+\.\d s\n", out)
    assert out.endswith("\nall 7 checks passed\n")


def test_doctor_names_the_path_that_runs(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it says PyTorch, the operators do call their CPU paths."""
    called = set()

    def recording(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*bundles: Any, **operands: Any) -> Any:
            called.add(name)
            return real(*bundles, **operands)

        return call

    monkeypatch.setattr(step_operator, "cpu", recording("step_attention", step_operator.cpu))
    monkeypatch.setattr(append_operator, "cpu", recording("append_kv", append_operator.cpu))
    testing.run_parity("cpu")
    assert called == {"step_attention", "append_kv"}
    assert all(path.startswith("PyTorch") for path in doctor.operator_paths(torch.device("cpu")).values())


@pytest.mark.interpret
def test_doctor_in_the_interpreter(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from tidar_kernels.ops._triton import configs

    monkeypatch.setattr(testing, "run_parity", lambda *arguments, **options: [])
    report = json.loads(run("doctor", "--device", "cpu", "--json")[1])
    assert (report["path"], report["triton_interpret"]) == ("interpreter", "1")
    assert report["operators"]["step_attention"] == report["operators"]["append_kv"] == "Triton kernel, interpreted"
    assert [row["head_dim"] for row in report["launch_configurations"]] == [*configs.HEAD_DIM_TILES] * 2
    for row in report["launch_configurations"]:
        dtype = torch.float32 if row["dtype"] == "float32" else torch.bfloat16
        assert row.items() >= vars(configs.step_config(None, dtype, row["head_dim"])).items()


def test_doctor_on_a_gpu(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of a GPU, as far as that can be told without one."""
    configs = pytest.importorskip("tidar_kernels.ops._triton.configs")
    gpu = SimpleNamespace(name="Some GPU", major=7, minor=5, multi_processor_count=40, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(configs, "chip_of", lambda device: 90)
    asked = []
    monkeypatch.setattr(testing, "run_parity", lambda *asked_for, **options: asked.append((*asked_for, options)) or [])
    code, out, _ = run("doctor", "--device", "cuda:1", "--parity", "--json")
    report = json.loads(out)
    assert (code, report["device"], report["path"]) == (1, "cuda:1", "triton")
    assert report["gpu"] == {"name": "Some GPU", "capability": "7.5", "multiprocessors": 40, "memory_gib": 16.0}
    assert report["operators"]["step_attention"] == "Triton kernel"
    assert [(where, options["quick"]) for where, options in asked] == [("cuda:1", False)] * 2 + [("cpu", True)] * 2
    assert [row["BLOCK_M"] for row in report["launch_configurations"]] == [
        configs.step_config(90, dtype, head_dim).BLOCK_M
        for dtype in (torch.float16, torch.float32)
        for head_dim in configs.HEAD_DIM_TILES
    ]
    assert [check for check in report["checks"] if not check["ok"]] == [
        {"name": "GPU", "ok": False, "detail": "expected compute capability >= 8.0, got 7.5"}
    ]


def test_doctor_parity_runs_every_case(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(device: str, **options: Any) -> list[Any]:
        asked.append((device, options))
        return []

    monkeypatch.setattr(testing, "run_parity", record)
    assert run("doctor", "--device", "cpu", "--parity")[0] == 0
    expected = [{"quick": False, "operators": [suite.operator]} for suite in testing.SUITES]
    assert asked == [("cpu", options) for options in expected]


def test_doctor_finds_a_wrong_operator(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_operator.cpu
    monkeypatch.setattr(step_operator, "cpu", lambda *bundles: (right(*bundles)[0] * 1.01, right(*bundles)[1]))
    code, out, err = run("doctor", "--device", "cpu")
    assert (code, err) == (1, "")
    assert re.search(
        r"\n  FAILED  step_attention on cpu  \d of 6 cases; step_attention, case .+ expected .+ got .+\n", out
    )
    assert out.endswith("\n1 of 7 checks failed\n")


def test_doctor_names_what_crashes(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*bundles: Any) -> None:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(append_operator, "cpu", broken)
    report = json.loads(run("doctor", "--device", "cpu", "--json")[1])
    assert not report["ok"]
    assert [check for check in report["checks"] if not check["ok"]] == [
        {"name": "append_kv on cpu", "ok": False, "detail": "RuntimeError: no such instruction"}
    ]


def test_doctor_finds_a_missing_model(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FileNotFoundError("path: expected a checkpoint file, got none")

    monkeypatch.setattr("tidar_kernels.models.load_shipped", missing)
    code, out, _ = run("doctor", "--device", "cpu")
    assert code == 1
    assert re.search(r"\n  FAILED  shipped model +path: expected a checkpoint file, got none\n", out)


@pytest.mark.parametrize(
    ("installed", "needs_triton", "failed"),
    [
        ({}, True, {}),
        ({"triton": None}, False, {}),
        ({"triton": None}, True, {"triton": "expected >= 3.6, got none"}),
        ({"torch": "2.10.1+cu128"}, False, {"torch": "expected >= 2.11, got 2.10.1+cu128"}),
        ({"torch": "3.0.0a0"}, False, {}),
        ({"python": "3.9.18"}, False, {"python": "expected >= 3.10, < 3.14, got 3.9.18"}),
        ({"python": "3.14.0"}, False, {"python": "expected >= 3.10, < 3.14, got 3.14.0"}),
    ],
)
def test_versions_that_are_supported(
    installed: dict[str, str | None], needs_triton: bool, failed: dict[str, str]
) -> None:
    good: dict[str, str | None] = {"python": "3.10.0", "torch": "2.11.0", "triton": "3.6.0"}
    checks = doctor.check_versions(good | installed, needs_triton)
    assert {check.name: check.detail for check in checks if not check.ok} == failed


def test_supported_versions_are_those_of_the_project() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=(\d+)\.(\d+),<(\d+)\.(\d+)"', project)
    assert python
    assert doctor.SUPPORTED["python"] == (tuple(map(int, python.groups()[:2])), tuple(map(int, python.groups()[2:])))
    for name in ("torch", "triton"):
        least = re.search(rf'"{name}>=(\d+)\.(\d+)', project)
        assert least
        assert doctor.SUPPORTED[name] == (tuple(map(int, least.groups())), None)
