"""`tidar-kernels draw`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.shell import Run, refused
from tidar_kernels import patterns
from tidar_kernels.cli import draw
from tidar_kernels.decoding import strategies


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["step", "--block-size", "3"], patterns.tidar_step(3)),
        (["step", "--block-size", "3", "--causal-blocks"], patterns.tidar_step(3, bidirectional=False)),
        (["prefill", "--prompt-len", "5", "--block-size", "2"], patterns.tidar_prefill(5, 2)),
        (["training", "--seq-len", "7", "--block-size", "3"], patterns.tidar_training(7, 3)),
        (["causal", "--length", "6"], patterns.causal(6)),
        (["isd", "--stride", "3"], patterns.isd_step(3)),
        (["isd", "--stride", "3", "--bidirectional"], patterns.isd_step(3, bidirectional=True)),
        (["isd", "--stride", "3", "--unshifted"], patterns.isd_step(3, shifted=False)),
        (["block", "--length", "5"], patterns.block_step(5)),
        (["tree", "--tokens", "3"], strategies.tree(3).pattern),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_draw(run: Run, arguments: list[str], pattern: patterns.Pattern) -> None:
    assert run("draw", *arguments) == (0, pattern.draw(), "")
    assert run("draw", *arguments, "--context-len", 3) == (0, pattern.draw(context_len=3), "")

    code, out, err = run("draw", *arguments, "--context-len", 3, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    rows = report.pop("rows")
    assert report == {
        "pattern": pattern.name,
        "q_len": pattern.q_len,
        "kv_len": pattern.kv_len,
        "context_len": 3,
        "visible_pairs": int(pattern.dense(3).sum()),
        "png": None,
    }
    assert [row["lead"] for row in rows] == pattern.lead.tolist()
    assert [row["own"] for row in rows] == pattern.own.tolist()
    assert [row["position"] for row in rows] == pattern.positions.tolist()
    assert [row["role"] for row in rows] == [patterns.Role(role).name.lower() for role in pattern.roles.tolist()]
    if pattern.tree_mask is not None:
        assert [row["tree_mask"] for row in rows] == [row.nonzero().flatten().tolist() for row in pattern.dense()]


def test_draw_has_defaults_for_every_pattern(run: Run) -> None:
    assert sorted(draw.PATTERNS) == ["block", "causal", "isd", "prefill", "step", "training", "tree"]
    for name, drawable in draw.PATTERNS.items():
        code, out, _ = run("draw", name, "--json")
        report = json.loads(out)
        assert code == 0
        assert report["q_len"] == drawable.rows(*(parameter.default for parameter in drawable.parameters))


def test_draw_png(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "step.png"
    assert run("draw", "step", "--out", path) == (0, f"tidar_step(block_size=4): wrote {path}\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads(run("draw", "step", "--out", path, "--json")[1])["png"] == str(path)


def test_draw_refuses_files_that_it_cannot_write(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    for path, expected in {
        tmp_path / "step.pdf": "a name that ends in .png",
        tmp_path / "none" / "step.png": "a file in a folder that exists",
        tmp_path / "folder.png": "a writable file",
    }.items():
        assert refused(run("draw", "step", "--out", path)).startswith(f"--out: expected {expected}, got '{path}'")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_draw_refuses_a_pattern_that_is_too_large(run: Run) -> None:
    message = refused(run("draw", "step", "--block-size", 10**9))
    assert message.startswith("--block-size 1000000000: expected a pattern of at most 1048576 rows, got 10000000")


def test_draw_names_the_option_that_a_constructor_refuses(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The range of a parameter may depend on another one, which its option does not know."""
    causal = draw.PATTERNS["causal"]
    loose = replace(causal, parameters=(replace(causal.parameters[0], least=0),))
    monkeypatch.setitem(draw.PATTERNS, "causal", loose)
    assert refused(run("draw", "causal", "--length", 0)).startswith("--length: expected >= 1, got 0")
