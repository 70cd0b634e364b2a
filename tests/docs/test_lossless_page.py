"""docs/lossless.md: the commands of the guide run as they stand, one after the other, on a model of the test's size."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

pytest.importorskip("transformers")

from tests.cli.conftest import run as run
from tests.cli.shell import Run
from tests.integrations.transformers.test_convert import saved
from tidar_kernels.integrations.vllm import plugin

GUIDE = REPOSITORY / "docs" / "lossless.md"
# What a reader need not say, and a test has no time for.
SHORTER = {
    "lossless": ["--max-new-tokens", "4"],
    "train-adapter": ["--steps", "2", "--seq-len", "8", "--continuations", "8", "--max-new-tokens", "8", "--rank", "2"],
    "serve": ["--json"],
}


def commands() -> list[list[str]]:
    """Those of the guide's first part, before the page turns to how it works."""
    guide = GUIDE.read_text(encoding="utf-8").partition("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_guide_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.32.0")
    monkeypatch.chdir(tmp_path)
    saved(Path("SmolLM2-135M-Instruct"))
    capsys.readouterr()
    said = []
    for program, name, *words in commands():
        assert program == "tidar-kernels"
        code, out, _ = run(name, *words, *SHORTER.get(name, []))
        assert code == 0, [name, *words]
        said.append((name, out))
    assert [name for name, _ in said] == [
        *("lossless", "train-adapter", "lossless", "generate", "convert", "lossless", "serve"),
    ]
    assert all(out.startswith("8 of 8 texts equal") for name, out in said if name == "lossless")
    assert "adapter runs/smol" in said[2][1]
    assert json.loads(said[-1][1])["engine"]["hf_overrides"]["tidar"]["strategy"] == "isd"
