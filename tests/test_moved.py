"""Modules that have moved: their old names import and run, with a warning."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from tests.paths import REPOSITORY
from tidar_kernels._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_new_module(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = import_module(f"tidar_kernels.{MOVED[old]}")
    monkeypatch.delitem(sys.modules, f"tidar_kernels.{old}", raising=False)
    with pytest.warns(FutureWarning, match=rf"^tidar_kernels\.{old} has moved to {new.__name__}; ") as warned:
        assert import_module(f"tidar_kernels.{old}") is new
    assert len(warned) == 1


def test_an_old_name_runs_from_the_shell() -> None:
    command = [sys.executable, "-m", "tidar_kernels.models.publish", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("usage: python -m tidar_kernels.models.training.publish")
    assert "FutureWarning: tidar_kernels.models.publish has moved to" in done.stderr


def test_an_old_name_of_a_class() -> None:
    from tidar_kernels import Decoder, decoding

    old = r"^tidar_kernels\.decoding\.Decoder has moved to tidar_kernels\.integrations\.decoder; "
    with pytest.warns(FutureWarning, match=old):
        assert decoding.Decoder is Decoder
    with pytest.raises(AttributeError, match=r"^module 'tidar_kernels\.decoding' has no attribute 'Encoder'$"):
        _ = decoding.Encoder
