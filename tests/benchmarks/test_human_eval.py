"""The parts human_eval and lossless of the results: texts are `generate`'s, and commands measure a row again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from benchmarks.decoding import human_eval, lossless  # noqa: E402
from tests.benchmarks.benching import part_of  # noqa: E402
from tests.integrations.transformers.test_convert import tiny  # noqa: E402
from tidar_kernels import cli  # noqa: E402
from tidar_kernels.integrations.transformers import loading  # noqa: E402


class Letters:
    """A tokenizer of nine letters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 9 for letter in text]}

    def __len__(self) -> int:
        return 16


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict[str, Any]]:
    """The rows of a run on a tiny random model and three prompts of other lengths."""
    model = tiny().eval()
    monkeypatch.setattr(loading, "load", lambda *_: (model, Letters()))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "a longer one", "abc")))
    arguments = ["MODEL", "--title", "tiny", "--prompts", str(prompts), "--out", str(folder), *more]
    assert human_eval.main(arguments) == 0
    return part_of(folder, "human_eval")


def test_texts_are_those_of_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(tmp_path, monkeypatch, "--max-new-tokens", "6", "--batch-size", "2")
    assert [row["strategy"] for row in rows] == list(human_eval.STRATEGIES)
    assert all(row["equal"] == row["prompts"] == 3 for row in rows)
    assert not list(tmp_path.glob("human-eval-*.jsonl"))  # nothing to resume is left


def test_a_row_says_how_to_measure_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--max-new-tokens", "5", "--batch-size", "2", "--limit", "2")
    first = measured(tmp_path, monkeypatch, "--strategies", "tree", "isd", *sizes)[0]
    said = shlex.split(first["command"])
    again = said[said.index("FILE") + 1 :]  # what follows the paths
    assert measured(tmp_path, monkeypatch, *again) == [first]


def test_lossless_commands_name_the_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(arguments: list[str]) -> int:
        ran.append(arguments)
        print("{}")
        return 0

    monkeypatch.setattr(cli, "main", run)
    assert lossless.main(["folder", "--title", "tiny", "--max-new-tokens", "7", "--out", str(tmp_path)]) == 0
    commands = [row["command"].split() for row in part_of(tmp_path, "lossless")]
    # "tidar-kernels lossless tiny .." ran as "lossless folder .. --json".
    assert [command[3:] for command in commands] == [arguments[2:-1] for arguments in ran]
    assert all(command[-2:] == ["--max-new-tokens", "7"] for command in commands)
