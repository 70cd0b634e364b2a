"""The part scores of the results: what counts as solved, and that every way to decode has the same score."""

from __future__ import annotations

import functools
import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from benchmarks.decoding import scores  # noqa: E402
from tests.benchmarks.benching import part_of, sections_of  # noqa: E402
from tests.benchmarks.test_human_eval import Letters, trained  # noqa: E402
from tests.integrations.transformers.test_convert import tiny  # noqa: E402
from tidar_kernels.integrations.transformers import generation, loading  # noqa: E402

PROBLEM = {"prompt": "def double(x):\n", "entry_point": "double", "test": "def check(f):\n    assert f(3) == 6\n"}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("    return 2 * x", True),
        ("    return 3 * x", False),
        ("    return 2 *", False),
        ("    import sys; sys.exit(0)", False),
        ("    import os; os._exit(0)", False),
        ("    return 2 * x\nraise SystemExit(0)", False),
        ("    open('x', 'w').write('x' * 2**22)\n    return 6", False),
        ("    x = 'x' * 2**33\n    return 6", False),
        ("    return 6 if input() == '' else 6", False),
        ("    import os\n    return 6 if os.listdir() == [] else 0", True),
    ],
)
def test_what_counts_as_solved(completion: str, expected: bool) -> None:
    assert scores.runs_through(scores.program(PROBLEM, completion)) == expected


def test_a_program_that_does_not_end_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """Its child would write a file."""
    child = f"import time; time.sleep(3); open({str(tmp_path / 'x')!r}, 'w')"
    source = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True: pass"
    started = time.monotonic()
    assert not scores.runs_through(source, seconds=1.5)
    assert time.monotonic() - started < 10
    time.sleep(3)
    assert not list(tmp_path.iterdir())


def test_a_completion_ends_with_its_function() -> None:
    assert scores.completion_of(" return 1\n\n\ndef other():\n    pass") == "    return 1\n\n"
    assert scores.completion_of(" return 1\nprint(2)\nif x:") == "    return 1"
    assert scores.completion_of(" if x:\n        return 1") == "    if x:\n        return 1"


class Coding(Letters):
    """Every text that it reads from tokens is the answer to one of the problems."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " return 2 * x\nprint(" if len(tokens) == 5 else ""


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(loading, "load", lambda *_: (tiny().eval(), Coding()))
    problems = folder / "problems.jsonl"
    names = (("A/0", PROBLEM), ("A/1", PROBLEM | {"test": "def check(f):\n    assert False"}))
    problems.write_text("".join(json.dumps(problem | {"task_id": name}) + "\n" for name, problem in names))
    arguments = ["MODEL", "--title", "tiny", "--problems", str(problems), "--out", str(folder)]
    assert scores.main([*arguments, "--max-new-tokens", "5", *more]) == 0
    return part_of(folder, "scores")


def test_every_way_to_decode_has_the_same_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "adapter", 1)
    called = []

    @functools.wraps(generation.tidar_generation)  # transformers looks at its arguments
    def watched(*args: Any, **options: Any) -> Any:
        called.append(options)
        return generation.tidar_generation(*args, **options)

    monkeypatch.setattr(scores, "tidar_generation", watched)
    rows = measured(tmp_path, monkeypatch, "--adapter", str(tmp_path / "adapter"))
    assert [row["solved"] for row in rows] == [["A/0"]] * 4
    assert [row["equal"] for row in rows] == [2] * 4
    assert [(options["block_size"], options["mask_token_id"]) for options in called] == [(2, 2)]
    assert not list(tmp_path.glob("scores-*.jsonl"))
    table = sections_of(tmp_path, monkeypatch, "lossless").scores_table()
    assert "| tiny | `Decoder`, ISD, N = 3, adapter | 1 of 2 | 2 of 2 |" in table


def test_a_row_says_how_to_measure_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured(tmp_path, monkeypatch, "--ways", "isd", "--limit", "1")
    said = shlex.split(first[0]["command"])
    assert measured(tmp_path, monkeypatch, *said[said.index("FILE") + 1 :]) == first
