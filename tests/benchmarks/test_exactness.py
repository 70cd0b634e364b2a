"""The part exactness of the results: rows are measured one by one, and none replaces that of another command."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

from benchmarks.decoding import exactness
from tests.benchmarks.benching import part_of, sections_of
from tests.integrations.transformers.test_convert import tiny


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in bfloat16, and turns that take no time."""
    monkeypatch.setattr(exactness, "random_model", lambda: tiny(300).to(torch.bfloat16).eval())
    monkeypatch.setattr(exactness, "_COST_TOKENS", 9)
    monkeypatch.setattr(exactness, "_COST_TURNS", 3)


def test_rows_stay_and_are_replaced_by_their_own_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--tokens", "6", "--out", str(tmp_path)]
    assert exactness.main([*asked, "--only", "isd"]) == 0
    (isd,) = part_of(tmp_path, "exactness")
    assert (isd["strategy"], isd["equal"], isd["equal_bits"]) == ("isd", 6, True)
    again = shlex.split(isd["command"])[3:]
    assert exactness.main([*again, "--out", str(tmp_path)]) == 0
    assert exactness.main([*asked, "--only", "autoregressive"]) == 0
    assert [row["strategy"] for row in part_of(tmp_path, "exactness")] == ["isd", "autoregressive"]


def test_plain_and_exact_passes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    seconds = exactness.seconds_a_pass
    monkeypatch.setattr(exactness, "seconds_a_pass", lambda *args: timed.append(args[2]) or seconds(*args))
    assert exactness.main(["--cost", "--only", "isd", "--out", str(tmp_path)]) == 0
    assert timed == [False, True] * 6
    rows = part_of(tmp_path, "exactness_cost")
    assert [(row["strategy"], row["batch"], len(row["ratios"])) for row in rows] == [("isd", 1, 3), ("isd", 8, 3)]
    table = sections_of(tmp_path, monkeypatch, "lossless").exact_cost_table()
    assert table.count("| isd, 4 |") == 2


def test_a_text_that_differs_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "same_bits", lambda *_: False)
    assert exactness.main(["--tokens", "3", "--only", "tidar", "--out", str(tmp_path)]) == 1


def test_a_run_that_was_cut_short_keeps_the_text_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--tokens", "5", "--only", "isd", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(exactness, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            exactness.main(asked)
    decoded = []
    sample = exactness.sample
    monkeypatch.setattr(exactness, "sample", lambda *args: decoded.append(args[1:3]) or sample(*args))
    assert exactness.main(asked) == 0
    assert (None, True) not in decoded
    assert not list(tmp_path.glob("*.pt"))
