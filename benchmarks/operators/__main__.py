"""The operators on this machine's CPU, by pytest-benchmark, beside their peers and their floors.

    python -m benchmarks.operators --out DIR [--max-time SECONDS]

A result is checked before it is timed; one of ours that is wrong has a row without figures, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from .. import rates, record, registry, row, timing
from ..implementations import OURS, listing


class Failures:
    """A pytest plugin: the rows that could not be measured, and why."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.failed and call.when == "call" and hasattr(item, "callspec") and call.excinfo is not None:
            given = item.callspec.params
            line = row.head(given["operator"], given["name"], "cpu", torch.float32, vars(given["case"]))
            self.rows.append(line | {"not_available": row.reason(call.excinfo.value)})
        return report


def rows_of(measured: list[dict[str, Any]], known: rates.Rates) -> list[dict[str, Any]]:
    """Rows of a pytest-benchmark report."""
    rows = []
    for entry in measured:
        line: dict[str, Any] = dict(entry["extra_info"]["row"])
        line |= row.figures(timing.summary(entry["stats"]["data"]), line)
        rows.append(line | known.against(line))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operators", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--max-time", type=float, default=0.6, help="seconds of timing a row")
    parser.add_argument("-k", dest="select", default="", help="of the rows' names, as pytest takes it")
    options = parser.parse_args(arguments)
    limits = rates.measure("cpu", (torch.float32,))
    failures = Failures()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "operators.json"
        code = pytest.main(
            [
                str(Path(__file__).parents[1] / "test_operators.py"), "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
                "-W", "ignore",  # what a peer deprecates is no failure
                "-k", options.select, f"--benchmark-json={report}", f"--benchmark-max-time={options.max_time}",
                "--benchmark-min-rounds=7", "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=fullname",
            ],
            plugins=[failures],
        )  # fmt: skip
        measured = json.loads(report.read_text())["benchmarks"] if report.is_file() and report.stat().st_size else []
    peers = [line for name, cls in registry.OPERATORS.items() for line in listing(name, cls.implementations, "cpu")]
    rows = rows_of(measured, rates.of(limits)) + failures.rows
    record.add(options.out, "operators", "cpu", [*limits, *peers, *rows])
    for line in rows:
        print(row.describe(line), flush=True)
    # 1: some test failed, which a peer's may.
    return int(code > 1 or any(line["implementation"] == OURS for line in failures.rows))


if __name__ == "__main__":
    sys.exit(main())
