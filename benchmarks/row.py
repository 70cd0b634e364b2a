"""One row of figures, measured again: the command line that every row of a results file has under `command`.

    python -m benchmarks.row OPERATOR IMPLEMENTATION DEVICE DTYPE FIELD=VALUE ...

It measures the machine's rates too, prints the row as JSON, and ends with 1 where the row has no figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .core import measure, rates, record
from .registry import OPERATORS


def one(
    operator: str, implementation: str, device: str, dtype: torch.dtype, fields: Sequence[str]
) -> list[dict[str, Any]]:
    """The row of a command line.

    Raises:
        ValueError: an argument does not fit.
    """
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
    names = [name for name in (implementation, cls.yardstick) if name]
    measure.measure(cls, case, held, known, dtype, device=device, names=names)
    wanted = measure.head(operator, implementation, device, dtype, vars(case))["command"]
    return [line for line in held.rows if line["command"] == wanted]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row", description=__doc__.splitlines()[0])
    parser.add_argument("operator")
    parser.add_argument("implementation")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("fields", nargs="*", metavar="FIELD=VALUE")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.row: error: expected a CUDA GPU, got none", file=sys.stderr)
        return 2
    try:
        rows = one(given.operator, given.implementation, given.device, getattr(torch, given.dtype), given.fields)
    except ValueError as error:
        print(f"benchmarks.row: error: {error}", file=sys.stderr)
        return 2
    for line in rows:
        print(json.dumps(line))
    return 0 if rows and not any("not_available" in line for line in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
