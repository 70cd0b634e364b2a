"""CONTRIBUTING.md and docs/architecture.md send readers to files, modules, commands and names: all of them exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

PACKAGE = REPOSITORY / "tidar_kernels"
# Where a path may start. The files of an operator are called by their bare names.
FOLDERS = (REPOSITORY, PACKAGE, *(path.parent for path in sorted(PACKAGE.glob("ops/*/api.py"))))
PAGES = [path for path in (REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "docs" / "architecture.md") if path.is_file()]
of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def quoted(text: str) -> Iterator[str]:
    """What stands in backticks, or is a line of an indented listing; line breaks are spaces."""
    listing = re.compile(r"(?<=\n\n)(?: {4}\S.*\n)+")
    for lines in listing.findall(text):
        yield from lines.splitlines()
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", listing.sub("", text)))


def words(text: str) -> set[str]:
    return {word.strip(":,;") for span in quoted(text) for word in span.split()}


def paths(text: str) -> set[str]:
    """Words with a slash in them, or with a file's ending; of a listing also the folders that commands take."""
    found = re.compile(r"(?:[\w-]+/)+(?:[\w.-]+)?|[\w-]+\.(?:py|md|toml|json|yml|txt)")
    return {word for word in words(text) if found.fullmatch(word)}


def exists(path: str) -> bool:
    """A file or folder, from the root of the repository, of the package or of an operator; NAME is any name."""
    return any(any(folder.glob(path.replace("NAME", "*"))) for folder in FOLDERS)


def modules(text: str) -> set[str]:
    found = re.compile(r"(?:tidar_kernels|benchmarks|tests)(?:\.\w+)*")
    return {word for word in words(text) if found.fullmatch(word)}


def targets(text: str) -> set[str]:
    return {target for span in quoted(text) for target in re.findall(r"^\s*make (\w+)", span)}


def names(text: str) -> set[tuple[str, str]]:
    """`(name, file)` where the text says "`name` in `file`" or "`name` of `file`"."""
    return set(re.findall(r"`(\w+)`\s(?:in|of)\s`([\w/.]+\.py)`", text))


@of_every_page
def test_what_a_page_sends_to_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    missing = {
        "paths": {path for path in paths(text) if not exists(path)},
        "modules": {module for module in modules(text) if find_spec(module) is None},
        "make targets": {target for target in targets(text) if not re.search(rf"^{target}:", makefile, re.MULTILINE)},
        "names": {
            (name, file)
            for name, file in names(text)
            if not any(
                re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))
                for folder in FOLDERS
                for path in folder.glob(file)
            )
        },
    }
    assert not any(missing.values()), f"{page.name} names what does not exist: {missing}"


def test_what_is_found_in_a_page() -> None:
    text = (
        "Run `make\ndocs` in `docs/`, see `ops/NAME/api.py` and `cpu.py`; `patterns/tidar.py: tidar_step` has no\n"
        "`a / b`. Not `[tokens | masks]`, `x.py.y` or `Launch.compile`.\n\n    pytest tests/ops/test_ops.py  # one\n\n"
        "An entry in `PARTS` of\n`benchmarks/registry.py`; `tidar_kernels.testing`; `python -m benchmarks.row`.\n"
    )
    assert paths(text) == {
        "docs/", "ops/NAME/api.py", "cpu.py", "patterns/tidar.py", "tests/ops/test_ops.py", "benchmarks/registry.py"
    }  # fmt: skip
    assert modules(text) == {"tidar_kernels.testing", "benchmarks.row"}
    assert targets(text) == {"docs"}
    assert names(text) == {("PARTS", "benchmarks/registry.py")}
    assert exists("ops/NAME/api.py")
    assert exists("cpu.py")
    assert not exists("ops/NAME/apis.py")
    assert not exists("decoding/engine.py")
