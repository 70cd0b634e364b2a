"""Published checkpoints on the command line: read like any other; what is wrong with one is a line, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.cli.shell import Run, refused
from tests.integrations.transformers.published import reference, write
from tests.integrations.transformers.test_convert import saved


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Nemotron-Labs-Diffusion with a tokenizer."""
    path = saved(tmp_path / "model")
    capsys.readouterr()
    return write("nemotron", path, reference("nemotron"))


def test_a_published_checkpoint_is_read(run: Run, folder: Path) -> None:
    code, out, err = run("lossless", folder, "--strategy", "self-speculation", "--max-new-tokens", 4, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["prompts"] == found["equal"] > 0


def test_what_is_wrong_with_one_is_a_line(run: Run, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())

    def said(**changed: object) -> str:
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        return refused(run("lossless", folder))

    assert said(num_hidden_layers=3).startswith("MODEL: expected all weights of Nemotron-Labs-Diffusion, got none for")
    assert said(intermediate_size=64).startswith("MODEL: expected weights of the shapes that config.json of Nemotron")
    assert said(architectures=["LLaDA2MoeModelLM"], model_type="llada2_moe").startswith(
        "MODEL: expected a checkpoint that can be decoded, got LLaDA2MoeModelLM, LLaDA 2.x: its mixture of experts"
    )
    assert said(architectures=["DFlashDraftModel"], model_type="qwen3").startswith(
        "MODEL: expected a checkpoint that can be decoded, got DFlashDraftModel, a drafter"
    )
    (folder / "config.json").write_text("{")
    assert refused(run("lossless", folder)).startswith("MODEL: expected a checkpoint that transformers can read")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert refused(run("lossless", folder)).startswith("MODEL: expected a tokenizer in the checkpoint of Nemotron")
