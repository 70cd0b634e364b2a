"""docs/generate.py: pages and pictures are fresh, and a stale one is noticed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.paths import REPOSITORY

ROOT = REPOSITORY
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.is_file()]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    pytest.importorskip("PIL.Image")
    specification = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    before = list(sys.path)
    specification.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture
def copy(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages and pictures, which `generate` now works on."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    if (ROOT / "README.md").is_file():
        shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    return tmp_path


def test_what_is_committed_is_fresh(generate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status = generate.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_stale_text_is_noticed_and_mended(
    generate: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = copy / "docs" / "masks.md"
    fresh = page.read_text(encoding="utf-8")
    page.write_text(fresh.replace("28.5 %", "29.5 %"), encoding="utf-8")
    stale = page.read_text(encoding="utf-8")
    assert stale != fresh
    assert generate.main(["--check"]) == 1
    assert "stale, run `make docs`: docs/masks.md" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == stale

    texts, _ = generate.registered()
    monkeypatch.setattr(generate, "registered", lambda: (texts, {}))
    assert generate.main([]) == 0
    assert page.read_text(encoding="utf-8") == fresh


def test_stale_and_missing_pictures_are_noticed(
    generate: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = copy / "docs" / "images"
    shutil.copy(images / "tidar_step_8.png", images / "tidar_step_4.png")
    (images / "causal.png").unlink()
    assert generate.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert "docs/images/tidar_step_4.png" in error
    assert "docs/images/causal.png" in error
    assert "docs/images/tidar_step_8.png" not in error


def test_a_section_that_no_page_shows_is_an_error(
    generate: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, pictures = generate.registered()
    monkeypatch.setattr(generate, "registered", lambda: (texts | {"lonely": str}, pictures))
    assert generate.main(["--check"]) == 1
    assert "no page shows the sections: lonely" in capsys.readouterr().err


def test_fill(generate: ModuleType) -> None:
    page = "a\n<!-- generated: one -->\nold\n<!-- /generated -->\nb\n<!-- generated: two -->\n<!-- /generated -->\n"
    filled, used = generate.fill("page.md", page, {"one": lambda: "1\n", "two": lambda: r"\2"})
    assert filled == (
        "a\n<!-- generated: one -->\n\n1\n\n<!-- /generated -->\nb\n"
        "<!-- generated: two -->\n\n\\2\n\n<!-- /generated -->\n"
    )
    assert used == {"one", "two"}
    assert generate.fill("page.md", filled, {"one": lambda: "1", "two": lambda: r"\2"})[0] == filled


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- generated: two -->\n<!-- /generated -->", "expected one of the sections one, got 'two'"),
        ("<!-- generated: one -->\nold\n", "expected a pair of section markers, got a lone '<!-- generated: one -->'"),
        ("<!-- /generated -->\n", "expected a pair of section markers, got a lone '<!-- /generated -->'"),
        ("<!-- generated: one -->\n<!-- generated: one -->\n<!-- /generated -->", "expected <!-- /generated --> after"),
    ],
)
def test_fill_refuses_bad_markers(generate: ModuleType, page: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^page\.md: {message}"):
        generate.fill("page.md", page, {"one": lambda: "1"})


def test_one_name_one_section(generate: ModuleType) -> None:
    known = {"one": str}
    with pytest.raises(ValueError, match=r"^one: expected one module to offer it, got a second, docs/sections/b\.py"):
        generate._merge(known, {"two": str, "one": str}, "b")
    assert known == {"one": str}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to files that do not exist: {missing}"
