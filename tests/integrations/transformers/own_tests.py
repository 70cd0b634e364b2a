"""transformers' own tests under `"sdpa"` and under `"tidar"`: pytest's reports of both runs, counted and recorded.

    python -m tests.integrations.transformers.own_tests --out DIR VERSION,LABEL,SDPA.xml,TIDAR.xml [...]

docs/transformers.md says how the reports are made. A class of tests is one row a run: what passed, failed and was
skipped, and how many of the passed tests ran attention of `"tidar"` (the property `tidar_calls` of
`tidar_kernels.integrations.transformers.testing`). The rows replace those that were recorded before.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.core import record

CLASSES = ("LlamaModelTest", "Qwen3ModelTest")


def count(report: Path) -> dict[str, Counter[str]]:
    """`{class: Counter(passed, failed, skipped, on_kernels)}` of one of pytest's XML reports.

    Raises:
        ValueError: it is not one, or has none of the classes.
    """
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{report}: expected a report of pytest --junitxml, got {error}") from None
    found = {name: Counter[str]() for name in CLASSES}
    for case in cases:
        counts = found.get(case.get("classname", "").rsplit(".", 1)[-1])
        if counts is None:
            continue
        if case.find("skipped") is not None:
            counts["skipped"] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
        else:
            counts["passed"] += 1
            calls = (p.get("value", "0") for p in case.iter("property") if p.get("name") == "tidar_calls")
            counts["on_kernels"] += any(int(value) for value in calls)
    if not any(found.values()):
        raise ValueError(f"{report}: expected tests of {', '.join(CLASSES)}, got none")
    return found


def rows_of(triple: str) -> list[dict[str, Any]]:
    """The rows of one argument, `VERSION,LABEL,SDPA.xml,TIDAR.xml`."""
    parts = triple.split(",")
    if len(parts) != 4:
        raise ValueError(f"expected VERSION,LABEL,SDPA.xml,TIDAR.xml, got {triple!r}")
    version, label, *reports = parts
    return [
        {
            "operator": "own_tests",
            "transformers": version,
            "tests": label,
            "class": name,
            "implementation": implementation,
            **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped", "on_kernels")},
        }
        for implementation, report in zip(("sdpa", "tidar"), reports, strict=True)
        for name, counts in count(Path(report)).items()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.integrations.transformers.own_tests", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("reports", nargs="+", metavar="VERSION,LABEL,SDPA.xml,TIDAR.xml")
    options = parser.parse_args(arguments)
    try:
        rows = [row for triple in options.reports for row in rows_of(triple)]
    except ValueError as error:
        print(f"own_tests: error: {error}", file=sys.stderr)
        return 2
    record.add(options.out, "own_tests", "cpu", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
