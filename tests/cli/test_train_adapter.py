"""`tidar-kernels train-adapter`: a run from the shell, and input that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.cli.shell import Run, refused
from tests.integrations.transformers.test_convert import saved

QUICK = ("--steps", 3, "--seq-len", 8, "--rank", 2, "--max-new-tokens", 8, "--continuations", 6, "--batch-size", 2)


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = saved(tmp_path / "model")
    capsys.readouterr()
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("the cat\na dog\nthe mat\n")
    return path


def test_a_run_on_the_models_own_text(run: Run, folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run("train-adapter", folder, "--out", out, "--prompts", prompts, *QUICK, "--json")
    found = json.loads(printed)
    assert (code, found["steps"]) == (0, 3)
    assert len(found["before"]["acceptance"]) == len(found["after"]["acceptance"]) == 3
    names = {"adapter_config.json", "adapter_model.safetensors", "documents.json", "state.pt", "training.json"}
    assert {path.name for path in out.iterdir()} == names
    assert len(json.loads((out / "documents.json").read_text())) == 6

    weights = (out / "adapter_model.safetensors").read_bytes()
    code, printed, _ = run("train-adapter", folder, "--out", out, "--prompts", prompts, *QUICK, "--resume")
    assert code == 0
    assert "3 steps" in printed
    assert (out / "adapter_model.safetensors").read_bytes() == weights


def test_what_does_not_fit_is_one_line_and_writes_nothing(
    run: Run, folder: Path, prompts: Path, tmp_path: Path
) -> None:
    def said(*arguments: Any) -> str:
        before = sorted(tmp_path.rglob("*"))
        message = refused(run("train-adapter", folder, "--prompts", prompts, *QUICK, *arguments))
        assert sorted(tmp_path.rglob("*")) == before
        return message

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert said("--out", tmp_path / "full").startswith("--out: expected a new or an empty folder, or --resume")
    assert said("--out", out, "--resume").startswith("--resume: ")
    assert said("--out", out, "--data", tmp_path / "empty").startswith("--data: expected a folder with text")
    assert said("--out", out, "--mask-token-id", 28).startswith("--mask-token-id: expected a token of the model")
    assert said("--out", out, "--data", tmp_path / "model", "--lr", 0).startswith("--lr: expected a number above 0")
    assert said("--out", out, "--block-size", 1).startswith("--block-size: expected a whole number >= 2")
    prompts.write_text("one\n")
    assert said("--out", out).startswith("--prompts: expected at least 2")
    text = tmp_path / "short"
    text.mkdir()
    (text / "a.txt").write_text("abc")
    prompts.write_text("one\ntwo\n")
    assert said("--out", out, "--data", text).startswith("--data: expected at least seq_len = 8 tokens, got 3")
