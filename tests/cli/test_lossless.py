"""`tidar-kernels lossless`: the report, its exit code, and input that does not fit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.cli.shell import Run, refused
from tests.integrations.transformers.test_convert import saved
from tests.integrations.transformers.test_lossless import plant_sampler


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = saved(tmp_path / "model")
    capsys.readouterr()
    return path


def test_the_command_reports_and_its_exit_code_says_whether_texts_are_equal(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl.gz"
    prompts.write_bytes(gzip.compress(b'{"prompt": "abc def"}\n\n{"prompt": "the end", "id": 3}\n'))
    common = ("lossless", folder, "--max-new-tokens", 6, "--prompts", prompts)
    code, out, err = run(*common, "--exact", "--json")
    found = json.loads(out)
    assert (code, err, found["prompts"], found["equal"], found["equal_bits"]) == (0, "", 2, 2, 2)
    plant_sampler(None, monkeypatch)
    code, out, err = run(*common)
    assert (code, err) == (1, "")
    assert out.startswith("0 of 2 texts equal")
    assert "sampler" in out


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", b"\xff\xfe", b"[1]\n", b'{"text": "x"}\n', b"{"], ids=lambda content: repr(content)
)
def test_files_without_prompts_are_refused(run: Run, folder: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert refused(run("lossless", folder, "--prompts", path)).startswith("--prompts: expected ")


def test_other_bad_input_is_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    assert refused(run("lossless", tmp_path / "nowhere")).startswith("MODEL: expected a folder or a name on the Hub")
    assert refused(run("lossless", folder, "--strategy", "tree", "--exact")).startswith("exact: ")
    assert refused(run("lossless", folder, "--assistant", folder)).startswith("--assistant: expected with --strategy")
    assert refused(run("lossless", folder, "--prompts", tmp_path / "none")).startswith("--prompts: ")
    (folder / "model.safetensors").write_bytes(b"")
    assert refused(run("lossless", folder)).startswith("MODEL: expected a checkpoint that transformers can read")
