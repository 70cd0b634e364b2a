"""Add up the JUnit reports of several pytest runs and print one line like pytest's own."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree


def main(paths: list[str]) -> str:
    """`"N passed, M skipped in T s (name + name)"`, over the reports at `paths`."""
    tests = bad = skipped = 0
    seconds = 0.0
    for path in paths:
        for suite in ElementTree.parse(path).iter("testsuite"):
            tests += int(suite.attrib["tests"])
            bad += int(suite.attrib["failures"]) + int(suite.attrib["errors"])
            skipped += int(suite.attrib["skipped"])
            seconds += float(suite.attrib["time"])
    counts = {"failed": bad, "passed": tests - bad - skipped, "skipped": skipped}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) + f" in {seconds:.0f} s"


if __name__ == "__main__":
    print(f"===== all test runs: {main(sys.argv[1:])} =====")
