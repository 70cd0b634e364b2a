"""Fixtures of the command's tests: a run in this process, a small checkpoint, a machine in good health."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.shell import Run, save_model
from tidar_kernels import cli, testing
from tidar_kernels.cli import generate
from tidar_kernels.models import ByteTokenizer, load_checkpoint


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in this process: `(exit code, standard output, standard error)`."""
    threads = torch.get_num_threads()

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny.safetensors")


@pytest.fixture
def healthy(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing fails and the self-check takes no time."""
    monkeypatch.setattr("tidar_kernels.models.load_shipped", lambda: (load_checkpoint(checkpoint), ByteTokenizer()))
    monkeypatch.setattr(testing, "SUITES", [s for s in testing.SUITES if s.operator in ("append_kv", "step_attention")])


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autoregressive decoding gets its eighth token wrong."""
    finished = generate._Task.run

    def wrong(task: generate._Task, *watchers: Any) -> generate._Pass:
        done = finished(task, *watchers)
        if done.mode == "autoregressive":
            done.result.tokens[0][7] ^= 1
        return done

    monkeypatch.setattr(generate._Task, "run", wrong)
