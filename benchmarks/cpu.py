"""Operators on this machine's CPU, beside their peers and their floors.

    python -m benchmarks.cpu {operators,training,token_slots} --out DIR [--budget SECONDS] [--only TEXT]

A result is checked before it is timed; one of ours that is wrong has a row without figures, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .core import measure, rates, record
from .core.operands import listing
from .operators import memory
from .registry import OPERATORS, PARTS

# Of each part its operators, their dtypes, and seconds of timing a row.
KINDS = {
    "operators": (PARTS["step"] + PARTS["operators"], (torch.float32,), 0.6),
    "training": (PARTS["training"], (torch.float32, torch.bfloat16), 1.5),
    "token_slots": (PARTS["token_slots"], (torch.float32,), 0.5),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=KINDS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--budget", type=float, help="seconds of timing a row")
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose command has it")
    options = parser.parse_args(arguments)
    operators, dtypes, budget_s = KINDS[options.part]
    rows, passed = record.Rows(options.out, options.part, "cpu"), True
    rows.put(*rates.measure("cpu", dtypes))
    rows.put(*(line for name in operators for line in listing(OPERATORS[name], "cpu")))
    known = rates.of(rows.rows)
    for cls in map(OPERATORS.__getitem__, operators):
        for dtype, case in ((dtype, case) for dtype in dtypes for case in cls.cpu):
            commands = {
                name: measure.head(cls.operator, name, "cpu", dtype, vars(case))["command"]
                for name in cls.offered(case, "cpu")
            }
            passed &= measure.measure(
                cls, case, rows, known, dtype, device="cpu", budget_s=options.budget or budget_s,
                names=[name for name, command in commands.items() if options.only in command],
                report=lambda line: print(measure.describe(line), flush=True),
            )  # fmt: skip
    if options.part == "training" and not options.only:
        for line in memory.rows():
            print(memory.describe(line), flush=True)
            rows.put(line)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
