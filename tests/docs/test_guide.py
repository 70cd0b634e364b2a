"""docs/guide_transformers.md: its code runs as it stands, with fewer steps than a reader takes."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest

from tests.paths import REPOSITORY

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

GUIDE = REPOSITORY / "docs" / "guide_transformers.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_guide_runs_and_keeps_its_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GUIDE_STEPS", "60")
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    try:
        for number, block in enumerate(blocks, start=1):
            exec(compile(block, f"{GUIDE.name}, block {number}", "exec"), names)
        assert {path.name for path in (names["folder"] / "run").iterdir()} == {"checkpoint-60"}
    finally:
        shutil.rmtree(names.get("folder", ""), ignore_errors=True)
    logged = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert logged[-1] < 0.5 * logged[0]
    assert names["tidar"].tokens == names["ar"].tokens
    assert names["tidar"].tokens_per_forward > 1.2
    printed = capsys.readouterr().out.splitlines()
    assert "same tokens: True" in printed
    assert "True" in printed
    assert "['1', '3']" in printed
