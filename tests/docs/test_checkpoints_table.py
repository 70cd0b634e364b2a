"""The table of docs/checkpoints.md: each cell that says something names a test that exists, each system has a row."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from tests.paths import REPOSITORY


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    return importlib.import_module("sections.checkpoints")


def test_every_cell_names_a_test(checkpoints: Any) -> None:
    cells = [cell for row in checkpoints.ROWS for cell in row.cells]
    cells += [train for _, train in checkpoints.NOT_DECODED.values()]
    for said, test in cells:
        if said == "no":
            assert not test
            continue
        path, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE), test
    assert all(len(row.cells) == len(checkpoints.COLUMNS) for row in checkpoints.ROWS)


def test_the_rows_are_the_systems(checkpoints: Any) -> None:
    pytest.importorskip("transformers")
    from tidar_kernels.integrations.transformers.checkpoints import SYSTEMS
    from tidar_kernels.integrations.transformers.checkpoints.refused import REFUSED

    assert {row.name for row in checkpoints.ROWS} - {""} == {system.name for system in SYSTEMS}
    assert set(checkpoints.NOT_DECODED) == {system.name for system in REFUSED}
