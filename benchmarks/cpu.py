"""Operators on this machine's CPU, beside their peers and their floors.

    python -m benchmarks.cpu {operators,training,token_slots,steps} --out DIR

A result is checked before it is timed; one of ours that is wrong has a row without figures, and the exit code is 1.
`python -m benchmarks.row` measures one row alone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

from .core import measure, rates, record
from .core.operands import Operands, listing
from .decoding.slots import TokenSlots
from .operators import memory
from .registry import OPERATORS, PARTS

BOTH = (torch.float32, torch.bfloat16)


def _cases(*operators: str) -> list[tuple[type[Operands], Any]]:
    return [(OPERATORS[name], case) for name in operators for case in OPERATORS[name].cpu]


# Of each part its operators and workloads, their dtypes, and seconds of timing a row.
KINDS: dict[str, tuple[list[tuple[type[Operands], Any]], tuple[torch.dtype, ...], float]] = {
    "operators": (_cases(*PARTS["step"], *PARTS["operators"]), (torch.float32,), 0.6),
    "training": (_cases(*PARTS["training"]), BOTH, 1.5),
    "token_slots": (_cases(*PARTS["token_slots"]), (torch.float32,), 0.5),
    "steps": (_cases(*PARTS["decoder_step"]) + [(TokenSlots, case) for case in TokenSlots.small], BOTH, 0.5),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=KINDS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    options = parser.parse_args(arguments)
    cases, dtypes, budget_s = KINDS[options.part]
    rows, passed = record.Rows(options.out, options.part, "cpu"), True
    operators = list(dict.fromkeys(cls for cls, _ in cases))
    rows.put(*rates.measure("cpu", dtypes), *(line for cls in operators for line in listing(cls, "cpu")))
    known = rates.of(rows.rows)
    for of in operators:
        for dtype, (cls, case) in itertools.product(dtypes, cases):
            if cls is of:
                passed &= measure.measure(cls, case, rows, known, dtype, device="cpu", budget_s=budget_s)
    if options.part == "training":
        rows.put(*memory.rows())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
