"""Fixtures of the tests of training: a small library, and its corpus."""

from __future__ import annotations

import pytest

from tidar_kernels.models.training.data import Corpus, stdlib_files


@pytest.fixture
def folder(tmp_path):
    """A small library: two modules, one of them in a package, and things that must not be read."""
    library = tmp_path / "lib"
    for name, text in {
        "alpha.py": "import sys\n" * 20,
        "pack/beta.py": "def beta(x):\n    return x + 1\n" * 10,
        "heapq.py": "HELD OUT",
        "pack/heapq.py": "not held out: another module\n",
        "test/test_alpha.py": "A TEST",
        "pack/tests/test_beta.py": "A TEST",
        "site-packages/other/code.py": "FOREIGN",
        "encodings/cp037.py": "TABLE",
        "_sysconfigdata__linux.py": "BUILD",
        "config-3/python-config.py": "BUILD",
        "notes.txt": "NOT PYTHON",
    }.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(text)
    return library


@pytest.fixture
def corpus(folder):
    return Corpus(stdlib_files(folder))
