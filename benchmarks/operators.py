"""Micro-benchmarks of the operators on this machine's CPU, by pytest-benchmark, as JSON.

python -m benchmarks.operators --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pytest

from . import record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operators", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for operators-cpu.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "operators.json"
        failed = pytest.main([str(Path(__file__).parent), "-q", "-p", "no:cacheprovider", f"--benchmark-json={report}"])
        if failed:
            return int(failed)
        measured = json.loads(report.read_text())["benchmarks"]
    rows = [
        {
            "operator": entry["name"].split("[")[0].removeprefix("test_"),
            **entry["params"],
            **entry["extra_info"],
            "p50_us": round(entry["stats"]["median"] * 1e6, 2),
            "p25_us": round(entry["stats"]["q1"] * 1e6, 2),
            "p75_us": round(entry["stats"]["q3"] * 1e6, 2),
        }
        for entry in measured
    ]
    for line in rows:
        line.pop("case", None)
    record.write(options.out / "operators-cpu.json", "operators", "cpu", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
