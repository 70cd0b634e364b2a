"""What the tests of the command share: a shell, refusals, small models, and what `generate` reports."""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.paths import REPOSITORY
from tests.toys import sharp_model
from tidar_kernels.models import TransformerConfig, save_checkpoint
from tidar_kernels.models.tokenizer import MASK_ID, VOCAB_SIZE

PROMPT = "def mean(values):\n"

Run = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str]) -> str:
    """The one line that a refused command printed: nothing else, and exit code 2."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"tidar-kernels: error: [^\n]+\n", err)
    return err.removeprefix("tidar-kernels: error: ").rstrip("\n")


def save_model(path: Path, **changes: Any) -> Path:
    """A random byte-level model, sharp enough that rounding decides no argmax."""
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "block_size": 4,
        "mask_token_id": MASK_ID,
    }
    save_checkpoint(sharp_model(TransformerConfig(**shape | changes), seed=0), path)
    return path


def in_a_shell(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, text=True, timeout=120, **{"capture_output": True} | options
    )


FIGURES = {
    "mode": str,
    "block_size": int,
    "text": str,
    "tokens": list,
    "forwards": int,
    "tokens_per_forward": float,
    "tokens_per_second": float,
    "seconds": float,
    "accepted": list,
    "prefill_forwards": int,
    "prefill_seconds": float,
}
SETTING = {
    "prompt": dict,
    "drafts": dict,
    "sampling": dict,
    "checkpoint": str,
    "device": str,
    "gpu": type(None),
    "dtype": str,
    "threads": int,
    "versions": dict,
}


def check_figures(figures: dict[str, Any], tokens: int) -> None:
    assert {name: type(value) for name, value in figures.items()} == FIGURES
    assert len(figures["tokens"]) == sum(figures["accepted"]) == tokens
    assert len(figures["accepted"]) == figures["forwards"]
    assert figures["tokens_per_forward"] == pytest.approx(tokens / figures["forwards"])
    assert figures["tokens_per_second"] == pytest.approx(tokens / figures["seconds"])
    assert figures["text"] == bytes(figures["tokens"]).decode("utf-8", errors="replace")


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True
