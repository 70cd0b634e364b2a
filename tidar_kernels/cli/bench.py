"""`tidar-kernels bench`: the benchmark suite of a source checkout, one part or all."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from pathlib import Path

from .common import PROGRAM, UserError, add_json_argument, print_json

SUMMARY = "measure operators, training attention, decoding and strategies on this machine"
USAGE = "[PART ...] --out DIR"
# What a part is, and the module of the checkout's `benchmarks` package that runs it.
PARTS = {
    "operators": ("operators on the CPU", "benchmarks.operators"),
    "training": ("training attention beside its peers, on the CPU", "benchmarks.training"),
    "decode": ("the shipped model, TiDAR against autoregression", "benchmarks.decode"),
    "breakdown": ("where the time of a decode step goes", "benchmarks.breakdown"),
    "strategies": ("every way to decode, side by side", "benchmarks.strategies"),
    "gpu": ("all that needs a CUDA GPU", "benchmarks.gpu"),
}
ON_CPU = tuple(name for name in PARTS if name != "gpu")

EPILOG = (
    "parts (default: all but gpu):\n"
    + "".join(f"  {name:12} {what}\n" for name, (what, _) in PARTS.items())
    + f"""
Results are JSON files under DIR. A result is compared with its oracle before it is timed.

examples:
  {PROGRAM} bench --out results
  {PROGRAM} bench strategies --out results
"""
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure, see below")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results files")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise UserError(f"PART: expected some of {', '.join(PARTS)}, got {unknown[0]}")
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "__init__.py").is_file():
        raise UserError(f"bench: expected a source checkout, whose benchmarks/ it runs, got a package in {checkout}")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out: expected a folder, got the file {options.out}")
    options.out.mkdir(parents=True, exist_ok=True)
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    codes: dict[str, int] = {}
    before = _written(options.out)
    # With --json standard output is the report alone.
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        for part in dict.fromkeys(options.parts or ON_CPU):
            print(f"{part}: {PARTS[part][0]}", file=sys.stderr, flush=True)
            codes[part] = int(import_module(PARTS[part][1]).main(["--out", str(options.out)]))
    if options.json:
        files = [str(path) for path, written in _written(options.out).items() if before.get(path) != written]
        print_json({"parts": codes, "files": sorted(files)})
    return max(codes.values())


def _written(folder: Path) -> dict[Path, int]:
    """Files of a folder, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
