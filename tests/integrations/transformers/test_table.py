"""The table of docs/transformers.md: recorded for the models that the tests run, and measured by one command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.paths import REPOSITORY

pytest.importorskip("transformers")

from benchmarks.core import record
from tests.integrations.transformers import compatibility

RESULTS = REPOSITORY / "benchmarks" / "results"


def test_what_is_recorded_is_of_these_models() -> None:
    (part,) = record.newest(RESULTS, "compatibility")
    rows = part["rows"]
    expected = [(m.name, f"{m.family}ForCausalLM", m.special, m.baseline) for m in compatibility.MODELS]
    assert [(row["model"], row["class"], row["special"], row["baseline"]) for row in rows] == expected
    assert all(row[check] is True for row in rows for check in compatibility.CHECKS)


def test_the_command_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "MODELS", compatibility.MODELS[:1])
    said: list[str] = []
    assert compatibility.main(["--out", str(tmp_path)], said.append) == 0
    assert said == ["Llama: " + ", ".join(f"{check} True" for check in compatibility.CHECKS)]
    (part,) = record.newest(tmp_path, "compatibility")
    (row,) = part["rows"]
    assert 0 < row["forward_error"] < 2e-5
    assert row["tokens_per_forward"] > 1


def test_a_model_that_is_wrong_is_recorded_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that forgets the mask, as it would look in the table."""
    from tidar_kernels.integrations.transformers import attention

    monkeypatch.setattr(compatibility, "MODELS", compatibility.MODELS[:1])
    original = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *args, **kwargs: original(*args[:4], None, **kwargs)
    )
    assert compatibility.main(["--out", str(tmp_path)], lambda line: None) == 1
    (part,) = record.newest(tmp_path, "compatibility")
    (row,) = part["rows"]
    assert (row["forward_parity"], row["generate_equal"], row["decode_equal"]) == (False, False, True)
    assert "left padding" in row["failure"]
