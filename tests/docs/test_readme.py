"""The README's Python runs as it stands, with the shipped model."""

from __future__ import annotations

import re

from tests.paths import REPOSITORY

README = REPOSITORY / "README.md"


def test_the_readmes_python_runs(capsys) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert capsys.readouterr().out.rstrip().splitlines()
    assert names["tidar"].tokens == names["ar"].tokens
