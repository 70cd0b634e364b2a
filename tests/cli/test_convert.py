"""`tidar-kernels convert` on checkpoints that are not what they say: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.cli.shell import Run, refused
from tests.integrations.transformers.test_convert import saved


@pytest.fixture
def source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A small checkpoint in good order."""
    path = saved(tmp_path / "ar")
    capsys.readouterr()  # progress of its writing
    return path


CONFIGS: list[Any] = [
    [],
    None,
    3,
    "x",
    {},
    {"model_type": 7},
    {"model_type": "no such model"},
    {"model_type": "bert"},
    {"model_type": "llama", "num_hidden_layers": 10**9, "layer_types": None},
    *(
        {"model_type": "qwen3", name: value}
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim")
        for value in (-1, 0, 7, "x", [], 10**9)
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: json.dumps(config)[:60])
def test_configurations_that_do_not_fit(run: Run, source: Path, tmp_path: Path, config: Any) -> None:
    """The weights are those of another shape, or the file is no configuration at all."""
    whole = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(whole | config if isinstance(config, dict) and config else config))
    refused(run("convert", source, tmp_path / "out", "--block-size", 4))
    assert [path.name for path in tmp_path.iterdir()] == ["ar"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"\xff" * 500, b"[" * 100_000, None],
    ids=["empty", "list", "null", "garbage", "deep", "folder"],
)
def test_files_that_are_damaged(run: Run, source: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    path = source / name
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    code, out, err = run("convert", source, tmp_path / "out", "--block-size", 4)
    if code:
        refused((code, out, err))
        assert [path.name for path in tmp_path.iterdir()] == ["ar"]
