"""A plug-in of pytest: every Triton kernel that a test launches is checked by `tidar_kernels.testing.sanitize`.

TRITON_INTERPRET=1 pytest -p tidar_kernels.testing.pytest_sanitizer
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from .sanitizer import sanitize


def pytest_configure() -> None:
    """Refuse a process whose kernels are compiled: nothing in it could be checked."""
    if os.environ.get("TRITON_INTERPRET", "") != "1":
        raise pytest.UsageError("TRITON_INTERPRET: expected 1 for the sanitizer, got unset")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Check the kernels of one test; a fault fails it."""
    with sanitize():
        yield
