"""A part of `make gpu`: row m of a step has the bits of single-token decoding, on this GPU's kernels, by size of tile.

    python -m benchmarks.bits --out DIR [--case NAME] [--dry-run]

Exact decoding rests on it. A compiler may order the sums of a product by the shape of its tile, so it is shown for both
shapes that a step may have, 64 and 128 packed rows, whatever the table of the chip says. Whether the two agree with
each other is on file too: if so, a chip could choose by the number of rows. A dry run is in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tidar_kernels as tk
from tidar_kernels import patterns, testing
from tidar_kernels.ops._triton.configs import step_config
from tidar_kernels.ops.step_attention import triton as kernels
from tidar_kernels.testing import StepCase

from .core import measure, record

ROWS = (64, 128)  # of a tile
COMMAND = "python -m benchmarks.bits"


def cases(device: str) -> list[StepCase]:
    """Steps over contexts that end on, before and after the edges of tiles and splits."""
    if device == "cpu":
        return [StepCase("B4-d16", patterns.tidar_step(4), (15, 65), num_heads=4, head_dim=16, dtype=torch.float16)]
    lengths = (0, 511, 513, 4100)
    return [
        StepCase(f"B{block}-d{dim}-h{heads}_{kv}", patterns.tidar_step(block), lengths, heads, kv, dim, torch.bfloat16)
        for block in (4, 16, 8)
        for heads, kv, dim in ((32, 8, 128), (12, 2, 128), (14, 2, 64))
    ]


@contextmanager
def tile_rows(rows: int) -> Iterator[None]:
    """Within it steps run in tiles of so many packed rows, 16 to a warp."""

    def config(*key: Any) -> Any:
        return replace(step_config(*key), BLOCK_M=rows, num_warps=rows // 16)

    with mock.patch.object(kernels, "step_config", config):
        yield


def attended(case: StepCase, device: str) -> Tensor:
    """What the step gives: the same operands in every call."""
    operands = testing.step_operands(case, device)
    q, k, v, k_cache, v_cache, lengths = operands.tensors
    return tk.step_attention(q, k, v, k_cache, v_cache, lengths, case.pattern, backend="triton")


def rows(device: str, deadline: float, name: str | None = None) -> Iterator[dict[str, Any]]:
    """A row for each case and size of tile: whether its bits are those of single tokens; then whether sizes agree."""
    for case in (case for case in cases(device) if name in (None, case.id)):
        found: list[Tensor] = []
        again = f"{COMMAND} --out DIR --case {case.id}{' --dry-run' * (device == 'cpu')}"
        head = {"operator": "step_bits", "case": case.id, "device": device}
        for size in ROWS:
            line = head | {"tile_rows": size, "command": f"{again} # {size}"}
            if time.perf_counter() > deadline:
                yield line | {"not_available": measure.OUT_OF_TIME}
                continue
            try:
                with tile_rows(size):
                    found.append(attended(case, device))
                    testing.check_row_bits(case, device)
                yield line | {"equal": True}
            except testing.ParityError as error:
                yield line | {"equal": False, "failure": measure.reason(error)}
            except Exception as error:  # a tile that does not compile there is no table's
                yield line | {"not_available": measure.reason(error)}
        if len(found) == len(ROWS):
            agree = torch.equal(*found)
            yield {**head, "operator": "tile_bits", "equal": agree, "command": f"{again} # both"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds")
    parser.add_argument("--case", metavar="NAME", help="this one alone")
    parser.add_argument("--dry-run", action="store_true", help="in Triton's interpreter")
    options = parser.parse_args(arguments)
    device = "cpu" if options.dry_run else "cuda"
    held = record.Rows(options.out, "bits", device)
    deadline = time.perf_counter() + options.budget
    for line in rows(device, deadline, options.case):
        held.put(line)
        outcome = line.get("not_available") or ("equal" if line["equal"] else "NOT equal")
        print(f"{line['operator']} {line['case']} {line.get('tile_rows', '')}: {outcome}", file=sys.stderr, flush=True)
    return verdict(held.rows, device)


def verdict(found: Sequence[dict[str, Any]], device: str) -> int:
    """1 if a row's bits differ, or on a GPU if nothing was shown. An old interpreter may run nothing in a dry run."""
    shown = [line["equal"] for line in found if line["operator"] == "step_bits" and "equal" in line]
    return int(not all(shown) or (not shown and device == "cuda"))


if __name__ == "__main__":
    sys.exit(main())
