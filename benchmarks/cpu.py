"""Operators on this machine's CPU, beside their peers and their floors.

    python -m benchmarks.cpu {operators,training,token_slots} --out DIR

A result is checked before it is timed; one of ours that is wrong has a row without figures, and the exit code is 1.
`python -m benchmarks.row` measures one row alone.
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
    options = parser.parse_args(arguments)
    operators, dtypes, budget_s = KINDS[options.part]
    rows, passed = record.Rows(options.out, options.part, "cpu"), True
    rows.put(*rates.measure("cpu", dtypes), *(line for name in operators for line in listing(OPERATORS[name], "cpu")))
    known = rates.of(rows.rows)
    for cls in map(OPERATORS.__getitem__, operators):
        for dtype, case in ((dtype, case) for dtype in dtypes for case in cls.cpu):
            passed &= measure.measure(cls, case, rows, known, dtype, device="cpu", budget_s=budget_s)
    if options.part == "training":
        rows.put(*memory.rows())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
