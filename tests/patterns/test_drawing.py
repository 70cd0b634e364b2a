"""Drawings: small texts to the character, every cell of text and picture against the dense form, and the errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tidar_kernels.patterns import Pattern, Role, causal, drawing, tidar_prefill, tidar_step, tidar_training, tree
from tidar_kernels.patterns.drawing import as_text, save_png
from tidar_kernels.patterns.rows import unpack_tree_mask
from tidar_kernels.testing import irregular_pattern, random_tree

STEP = """\
tidar_step(block_size=2)
6 rows x 6 in-flight keys, 47.2 % of these pairs visible; context P = 3

              ppp dd mm mm
draft    P+0  ░░░ █· ·· ··
draft    P+1  ░░░ ██ ·· ··
mask 1   P+1  ░░░ █· ▒▒ ··
mask 1   P+2  ░░░ █· ▒▒ ··
mask 2   P+2  ░░░ ██ ·· ▒▒
mask 2   P+3  ░░░ ██ ·· ▒▒

keys: p cached context, d draft, m mask; cells: ░ context, █ lead, ▒ own, · not visible
"""

STEP_WITH_CAUSAL_BLOCKS = """\
tidar_step(block_size=2, bidirectional=False)
6 rows x 6 in-flight keys, 41.7 % of these pairs visible

              dd mm mm
draft    P+0  █· ·· ··
draft    P+1  ██ ·· ··
mask 1   P+1  █· ▒· ··
mask 1   P+2  █· ▒▒ ··
mask 2   P+2  ██ ·· ▒·
mask 2   P+3  ██ ·· ▒▒

keys: d draft, m mask; cells: █ lead, ▒ own, · not visible
"""

PREFILL = """\
tidar_prefill(prompt_len=3, block_size=2)
5 rows x 5 in-flight keys, 64.0 % of these pairs visible; context P = 1

              p ccc mm
clean    P+0  ░ █·· ··
clean    P+1  ░ ██· ··
clean    P+2  ░ ███ ··
mask     P+3  ░ ███ ▒▒
mask     P+4  ░ ███ ▒▒

keys: p cached context, c clean, m mask; cells: ░ context, █ lead, ▒ own, · not visible
"""

TRAINING = """\
tidar_training(seq_len=3, block_size=2)
6 rows x 6 in-flight keys, 36.1 % of these pairs visible

              ccc mm m
clean    P+0  █·· ·· ·
clean    P+1  ██· ·· ·
clean    P+2  ███ ·· ·
mask 0   P+0  ··· ▒▒ ·
mask 0   P+1  ··· ▒▒ ·
mask 1   P+2  ██· ·· ▒

keys: c clean, m mask; cells: █ lead, ▒ own, · not visible
"""

DECODE = """\
causal(length=1)
1 row x 1 in-flight key, 100.0 % of these pairs visible; context P = 20
(the 20 context columns are drawn as 8)

              pppppppp c
clean    P+0  ░░░░░░░░ █

keys: p cached context, c clean; cells: ░ context, █ lead
"""

TREE = """\
tree(5 nodes, depth 2)
5 rows x 5 in-flight keys, 44.0 % of these pairs visible; context P = 2

              pp ddddd
draft    P+0  ░░ ▓····
draft    P+1  ░░ ▓▓···
draft    P+1  ░░ ▓·▓··
draft    P+2  ░░ ▓▓·▓·
draft    P+2  ░░ ▓·▓·▓

keys: p cached context, d draft; cells: ░ context, ▓ tree mask, · not visible
"""


def random_pattern(rows: int, keys: int) -> Pattern:
    """Disjoint random intervals, random roles: what no constructor builds, but anyone may."""
    ends = torch.randint(0, keys + 1, (rows, 4), dtype=torch.int32).sort(dim=1).values
    roles = torch.randint(0, 3, (rows,), dtype=torch.int8)
    positions = torch.randint(0, 50, (rows,), dtype=torch.int32)
    swap = torch.rand(rows, 1) < 0.5
    first, second = ends[:, :2], ends[:, 2:]
    lead, own = torch.where(swap, second, first), torch.where(swap, first, second)
    return Pattern(lead, own, positions, keys, roles, name="random")


def matrix(text: str) -> list[str]:
    """The in-flight cells of a text drawing, one string a row."""
    body = text.split("\n\n")[1].splitlines()[1:]
    return ["".join(mark for mark in line if mark in "█▒▓▚·") for line in body]


@pytest.mark.parametrize(
    ("pattern", "context_len", "expected"),
    [
        (tidar_step(2), 3, STEP),
        (tidar_step(2, bidirectional=False), 0, STEP_WITH_CAUSAL_BLOCKS),
        (tidar_prefill(3, 2), 1, PREFILL),
        (tidar_training(3, 2), 0, TRAINING),
        (causal(1), 20, DECODE),
        (tree([-1, 0, 0, 1, 2]), 2, TREE),
    ],
    ids=lambda value: value.name if isinstance(value, Pattern) else "",
)
def test_text_to_the_character(pattern: Pattern, context_len: int, expected: str) -> None:
    assert as_text(pattern, context_len) == expected
    assert pattern.draw(context_len=context_len) == expected


PATTERNS = [causal(5), tidar_prefill(7, 1), tidar_step(1), tidar_step(5), tidar_step(8), tidar_training(14, 4)]
PATTERNS += [tidar_step(6, bidirectional=False), tidar_training(5, 8), tidar_training(40, 1)]
PATTERNS += [tree([-1, 0, 0, 1, 1, 2, 4]), random_tree(40), irregular_pattern(37, 37, with_tree_mask=True)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("context_len", [0, 3, 1000])
def test_every_cell_of_the_text_is_the_dense_form(pattern: Pattern, context_len: int) -> None:
    cells = matrix(as_text(pattern, context_len))
    visible = torch.tensor([[mark != "·" for mark in row] for row in cells])
    assert torch.equal(visible, pattern.dense())
    if pattern.tree_mask is not None:
        other = torch.tensor([[mark == "▓" for mark in row] for row in cells])
        assert torch.equal(other, unpack_tree_mask(pattern.tree_mask, pattern.kv_len))
    own = torch.tensor([[mark == "▒" for mark in row] for row in cells])
    key = torch.arange(pattern.kv_len)
    assert torch.equal(own, (pattern.own[:, :1] <= key) & (key < pattern.own[:, 1:]))


@pytest.mark.parametrize("shape", [(12, 12), (9, 30), (30, 9), (1, 1), (70, 80)])
def test_text_of_random_patterns(shape: tuple[int, int]) -> None:
    for _ in range(5):
        pattern = random_pattern(*shape)
        cells = matrix(as_text(pattern))
        assert torch.equal(torch.tensor([[mark != "·" for mark in row] for row in cells]), pattern.dense())


@pytest.mark.parametrize(
    ("pattern", "per_cell"),
    [(tidar_step(16), 4), (tidar_step(12), 2), (tidar_training(64, 4), 2), (random_tree(128), 2)],
)
def test_large_text_is_binned_and_says_so(pattern: Pattern, per_cell: int) -> None:
    text = as_text(pattern)
    assert f"(a character stands for up to {per_cell} rows x {per_cell} keys)" in text
    n = pattern.q_len // per_cell
    pooled = pattern.dense().reshape(n, per_cell, n, per_cell).float().mean(dim=(1, 3))
    marks = np.array([list(row) for row in matrix(text)])
    assert marks.shape == (n, n)
    assert n <= 80
    np.testing.assert_array_equal(marks == "·", pooled.numpy() == 0)
    np.testing.assert_array_equal(np.isin(marks, ["█", "▒", "▓"]), pooled.numpy() == 1)
    np.testing.assert_array_equal(marks == "▚", ((pooled > 0) & (pooled < 1)).numpy())


@pytest.mark.parametrize(
    "pattern",
    [tidar_training(5000, 7), tidar_step(33), causal(100_000), tidar_prefill(4099, 16), tidar_training(16384, 16)],
    ids=lambda pattern: pattern.name,
)
def test_text_of_any_size_fits_a_screen(pattern: Pattern) -> None:
    lines = as_text(pattern, context_len=10**6).splitlines()
    assert len(lines) <= 80 + 8
    assert max(map(len, lines)) <= 160


def test_bins_are_cut_at_block_edges() -> None:
    """90 rows need bins of 2, and blocks of 9 do not divide by 2: no bin may hold rows of two blocks."""
    rows = as_text(tidar_step(9)).split("\n\n")[1].splitlines()[1:]
    labels = [line[:8].strip() for line in rows]
    assert labels == ["draft"] * 5 + [f"mask {g}" for g in range(1, 10) for _ in range(5)]
    assert rows[5].split()[2] == "P+1..2"
    assert rows[9].split()[2] == "P+9"


def test_rows_and_keys_may_differ_in_number() -> None:
    text = as_text(random_pattern(3, 7))
    assert "3 rows x 7 in-flight keys" in text
    assert "keys: c clean" in text


@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (0, 4), (4, 0)])
def test_empty_patterns_can_be_drawn(rows: int, keys: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pattern = random_pattern(rows, keys)
    assert f"{rows} rows x {keys} in-flight keys" in as_text(pattern, 2)
    save_png(pattern, tmp_path / "a.png", 2)
    read_png(tmp_path / "a.png")


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (None, TypeError), (True, TypeError)])
def test_context_len_is_checked(value: Any, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match=r"^context_len: expected "):
        as_text(causal(2), value)
    with pytest.raises(error, match=r"^context_len: expected "):
        save_png(causal(2), tmp_path / "a.png", value)
    assert not list(tmp_path.iterdir())


def read_png(path: Path) -> tuple[np.ndarray, dict[Any, Any]]:
    """Pixels `[height, width, 3]` and the text stored with them; an incomplete or damaged file raises."""
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as opened:
        opened.verify()
    with image.open(path) as opened:
        return np.asarray(opened.convert("RGB")), dict(opened.info)


def rgb(colour: torch.Tensor) -> np.ndarray:
    return (255 * colour).round().numpy().astype(np.uint8)


@pytest.mark.parametrize("pattern", [*PATTERNS, tidar_training(16, 4)], ids=lambda pattern: pattern.name)
def test_every_cell_of_the_png_is_the_dense_form(pattern: Pattern, tmp_path: Path) -> None:
    """The pixel in the middle of each cell has the colour of the key's role, pale by `own`, or the hidden colour."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "pattern.png"
    save_png(pattern, path, context_len=6)
    pixels, info = read_png(path)
    at = drawing._lay_out(pattern, 6)
    assert at.side >= 10
    middle = at.side // 2
    y = at.top + at.side * np.arange(pattern.q_len) + middle
    x = at.origin + at.side * np.arange(pattern.kv_len) + middle
    key = torch.arange(pattern.kv_len)
    lead, own = (((t[:, :1] <= key) & (key < t[:, 1:])).numpy() for t in (pattern.lead, pattern.own))
    strong = torch.stack([drawing._rgb(drawing._COLOUR[Role(role)]) for role in pattern.roles.tolist()])
    expected = np.where(lead[..., None], rgb(strong), rgb(drawing._rgb(drawing._HIDDEN_COLOUR)))
    expected = np.where(own[..., None], rgb(drawing._shade(strong, "own")), expected)
    if pattern.tree_mask is not None:
        other = unpack_tree_mask(pattern.tree_mask, pattern.kv_len).numpy()
        expected = np.where(other[..., None], rgb(drawing._shade(strong, "tree mask")), expected)
    got = pixels[y[:, None], x[None, :]]
    assert np.abs(got.astype(int) - expected).max() <= 1  # of 255: rounding
    np.testing.assert_array_equal((got != rgb(drawing._rgb(drawing._HIDDEN_COLOUR))).any(-1), pattern.dense().numpy())
    context = pixels[y[:, None], at.left + at.side * np.arange(6)[None, :] + middle]
    assert (context == rgb(drawing._rgb(drawing._CONTEXT_COLOUR))).all()
    assert info["Title"] == pattern.name
    assert info["Description"] == as_text(pattern, 6)


@pytest.mark.parametrize("pattern", [tidar_step(16), tidar_training(4096, 8)], ids=lambda pattern: pattern.name)
def test_png_of_large_patterns_stays_small(pattern: Pattern, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "pattern.png"
    assert pattern.draw(path, context_len=4096) == as_text(pattern, 4096)
    pixels, _ = read_png(path)
    assert 1000 < pixels.shape[0] < 2000
    assert 1000 < pixels.shape[1] < 2000
    assert path.stat().st_size < 500_000


def test_png_is_reproducible_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pyplot_before = "matplotlib.pyplot" in sys.modules
    for name in ("a.png", "b.PNG"):
        save_png(tidar_step(2), str(tmp_path / name), 3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.svg"])
def test_suffix_must_be_png(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^path: expected a name that ends in \.png, got .*{name}"):
        tidar_step(2).draw(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_path_must_be_writable(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"^path: expected a file in a folder that exists, got .*missing"):
        save_png(causal(2), tmp_path / "missing" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"^path: expected a writable file, got .*folder\.png"):
        save_png(causal(2), tmp_path / "folder.png")
    with pytest.raises(TypeError, match=r"^path: expected a str or os.PathLike, got int"):
        save_png(causal(2), 3)  # type: ignore[arg-type]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"matplotlib: .* tidar-kernels\[bench\]"):
        save_png(causal(2), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    assert as_text(causal(2)).startswith("causal(length=2)")


def test_a_window_hides_context() -> None:
    """The last columns of the context, those that a window can leave; blocks stay blocks."""
    pattern = tidar_step(2).windowed(3)
    lines = pattern.draw(context_len=12).splitlines()
    assert "(the 12 context columns are drawn as the last 8)" in lines
    rows = [line.split() for line in lines if "P+" in line]
    context = [next(part for part in row if len(part) == 8) for row in rows]
    reach = [2, 1, 1, 0, 0, 0]
    assert context == ["·" * (8 - n) + "░" * n for n in reach]
    assert [row[0] for row in rows] == ["draft", "draft", "mask", "mask", "mask", "mask"]
    assert [row[1] for row in rows[2:]] == ["1", "1", "2", "2"]
