"""`tidar-kernels serve`: what it would start, and what it refuses before it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.shell import Run, refused
from tidar_kernels.cli import serve
from tidar_kernels.integrations.vllm import plugin


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.32.0")
    config = {"architectures": ["LlamaForCausalLM"], "tidar": {"block_size": 4, "mask_token_id": 7}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_command_of_the_server(run: Run, folder: Path) -> None:
    code, out, err = run("serve", folder, "--strategy", "isd", "--set", "port=8001", "--set", "enable-lora", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed["engine"]["hf_overrides"]["tidar"]["strategy"] == "isd"
    assert printed["command"][1:3] == ["-m", serve.SERVER]
    assert printed["command"][-3:] == ["--port", "8001", "--enable-lora"]
    at = printed["command"].index("--hf-overrides")
    assert json.loads(printed["command"][at + 1]) == printed["engine"]["hf_overrides"]


def test_the_server_takes_the_place_of_this_process(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def execv(path: str, command: list[str]) -> None:
        started.append(command)
        raise KeyboardInterrupt  # a real one does not return

    monkeypatch.setattr(serve.os, "execv", execv)
    assert run("serve", folder, "--levels", "1,2", "--max-num-seqs", 3)[0] == 130
    printed = json.loads(run("serve", folder, "--levels", "1,2", "--max-num-seqs", 3, "--json")[1])
    assert started == [printed["command"]]


def test_refusals(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(run("serve", tmp_path / "none")).startswith("FOLDER: expected a folder with a config.json, got")
    assert refused(run("serve", folder, "--strategy", "tree")).startswith("--strategy: invalid choice: 'tree'")
    assert refused(run("serve", folder, "--levels", "2,3")).startswith("--levels: expected ascending ints from 1")
    assert refused(run("serve", folder, "--set", "--port=1")).startswith("--set: expected")
    assert refused(run("serve", folder, "--adapter", "runs/smol")) == (
        "--adapter: expected none, for vLLM runs an adapter on every row of a request, and one that drafts would "
        "change the text there; tidar-kernels generate runs it on mask rows alone, got runs/smol"
    )
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.33.0")
    assert refused(run("serve", folder)) == (
        "vllm: expected version 0.32.x, which this package was tried with, got 0.33.0"
    )
    (folder / "config.json").write_text("[]")
    assert refused(run("serve", folder)).startswith(("FOLDER: expected", "vllm: expected"))
