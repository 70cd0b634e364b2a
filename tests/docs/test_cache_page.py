"""The Python of docs/cache.md runs as it stands."""

from __future__ import annotations

import re

import pytest

from tests.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "cache.md"


def test_the_pages_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert capsys.readouterr().out == "61\n"
