"""Engines start slowly: each configuration's is started once, and what vLLM answers without drafts is asked once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import engines


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .checkpoints import shipped

    return shipped(tmp_path_factory.mktemp("vllm") / "shipped")


@pytest.fixture(scope="session")
def autoregressive(checkpoint: Path) -> dict[str, list[Any]]:
    """What vLLM itself answers to every case."""
    with engines.running(**engines.plain(checkpoint), max_num_batched_tokens=512) as llm:
        return {name: engines.answers(llm, asked) for name, asked in engines.cases().items()}


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[engines.Record]:
    with engines.recorded(monkeypatch) as found:
        yield found
