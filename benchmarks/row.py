"""One row of figures, measured again: the command line that every row of a results file has under `command`.

    python -m benchmarks.row OPERATOR IMPLEMENTATION DEVICE DTYPE FIELD=VALUE ...

It measures the machine's rates too, prints the row as JSON, and ends with 1 where the row has no figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from .core import measure, rates, record
from .registry import OPERATORS


def one(operator: str, implementation: str, device: str, dtype: torch.dtype, fields: list[str]) -> dict[str, Any]:
    """The row of a command line.

    Raises:
        ValueError: an argument does not fit.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("DEVICE: expected a CUDA GPU, got none")
    if operator not in OPERATORS:
        raise ValueError(f"OPERATOR: expected one of {', '.join(OPERATORS)}, got {operator}")
    cls = OPERATORS[operator]
    if implementation not in cls.implementations:
        raise ValueError(f"IMPLEMENTATION: expected one of {', '.join(cls.implementations)}, got {implementation}")
    offered, case = cls.implementations[implementation], measure.parse(cls.workload, fields)
    if offered.absent(device):
        raise ValueError(f"{implementation}: {offered.absent(device)}; {offered.install}")
    held, known = record.Rows(None, "", device), rates.of(rates.measure(device, (dtype,)))
    for before in cls.before(case):
        measure.measure(cls, before, held, known, dtype, device=device)
    measure.measure(cls, case, held, known, dtype, device=device, names=[implementation, cls.yardstick or ""])
    wanted = measure.head(operator, implementation, device, dtype, vars(case))["command"]
    # An implementation that the operator does not offer for this case has no row.
    return held.get(wanted) or {"not_available": f"{implementation} is not measured for {case}"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row", description=__doc__.splitlines()[0])
    parser.add_argument("operator")
    parser.add_argument("implementation")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("fields", nargs="*", metavar="FIELD=VALUE")
    given = parser.parse_args(arguments)
    try:
        line = one(given.operator, given.implementation, given.device, getattr(torch, given.dtype), given.fields)
    except ValueError as error:
        print(f"benchmarks.row: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(line))
    return 1 if "not_available" in line else 0


if __name__ == "__main__":
    sys.exit(main())
