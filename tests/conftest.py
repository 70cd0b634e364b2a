"""Which tests a process collects, and the same start for each of them."""

from __future__ import annotations

import os
import random
import zlib

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET", "") == "1"
os.environ.setdefault("MPLBACKEND", "Agg")

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker: the workers share the cores, and PyTorch's own threads would only get in their way.
    torch.set_num_threads(1)


# Tests of these marks are collected where the option of that name is given, whatever `-m` and `-k` say.
ON_REQUEST = ("distributed", "models", "thorough")


def pytest_addoption(parser: pytest.Parser) -> None:
    for mark in ON_REQUEST:
        parser.addoption(f"--{mark}", action="store_true", help=f"run the tests marked {mark} too")


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    kernels = "interpreted, only tests marked interpret" if INTERPRETING else "compiled, no tests marked interpret"
    return f"torch {torch.__version__}, {device}; kernels: {kernels}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton kernels are interpreted by the whole process or not at all, so `interpret` tests have one of their own."""
    unasked = [mark for mark in ON_REQUEST if not config.getoption(mark)]
    wanted: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        is_interpreted = item.get_closest_marker("interpret") is not None
        is_unasked = any(item.get_closest_marker(mark) for mark in unasked)
        (wanted if is_interpreted == INTERPRETING and not is_unasked else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = wanted
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers alone, in any order and on any worker; two tests draw different ones."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)
