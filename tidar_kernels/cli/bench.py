"""`tidar-kernels bench`: the benchmark suite of a source checkout, one part or all."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .common import PROGRAM, UserError, add_json_argument, any_path, number, print_json, whole_numbers

SUMMARY = "measure operators, training attention, decoding and strategies on this machine"
USAGE = "[PART ...] --out DIR | compare OLD.json NEW.json [--fail-over X] | --tune [--dry-run]"
# What a part is, and the module of the checkout that runs it, with an argument where it needs one.
PARTS = {
    "operators": ("operators on the CPU", "benchmarks.cpu operators"),
    "training": ("training attention beside its peers, on the CPU", "benchmarks.cpu training"),
    "decode": ("the shipped model, TiDAR against autoregression", "benchmarks.decoding.decode"),
    "slots": ("a forward pass over the tokens in flight", "benchmarks.cpu token_slots"),
    "steps": ("steps of a model of SmolLM2-135M's size, float32 and bfloat16", "benchmarks.cpu steps"),
    "breakdown": ("where the time of a decode step goes", "benchmarks.decoding.breakdown"),
    "strategies": ("every way to decode, side by side", "benchmarks.decoding.strategies"),
    "compatibility": (
        "transformers models on these kernels; needs transformers",
        "tests.integrations.transformers.compatibility",
    ),
    "gpu": ("all that needs a CUDA GPU, parity first", "benchmarks.gpu"),
}
CHECKOUT = Path(__file__).resolve().parents[2]
CHIPS = ("80", "86", "89", "90", "100", "120", "gfx942", "gfx950")


def _one_chip(text: str) -> str:
    """An argparse type: a chip that launch tables know."""
    if text not in CHIPS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(CHIPS)}, got {text!r}")
    return text


def _some_dtypes(text: str) -> str:
    """An argparse type: dtypes with commas between them."""
    if not {*text.split(",")} <= {"bfloat16", "float32"}:
        raise argparse.ArgumentTypeError(f"expected bfloat16, float32, or both with a comma between them, got {text!r}")
    return text


def _head_dims(text: str) -> str:
    """An argparse type: head dims with commas between them."""
    if not all(1 <= dim <= 512 for dim in whole_numbers(text)):
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1 to 512 with commas between them, got {text!r}")
    return text


def _names(text: str) -> str:
    """An argparse type: names with commas between them; the checkout says which it knows."""
    if not all(text.split(",")):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return text


# Options that --tune hands on to `benchmarks.static.tune`.
TUNING: dict[str, tuple[str, Callable[[str], str], str]] = {
    "chip": ("CHIP", _one_chip, f"of a dry run: {', '.join(CHIPS[:-1])} or {CHIPS[-1]}"),
    "kernels": ("NAMES", _names, "which kernels, separated by commas; default: all that have tables"),
    "head-dims": ("DIMS", _head_dims, "which head dims, separated by commas; default: 64,128"),
    "dtypes": ("NAMES", _some_dtypes, "bfloat16 (default), float32, or both, separated by commas"),
}
ON_CPU = tuple(name for name in PARTS if name != "gpu")

EPILOG = (
    "parts (default: all but gpu):\n"
    + "".join(f"  {name:12} {what}\n" for name, (what, _) in PARTS.items())
    + f"""
Results go into one JSON file a machine and day under DIR. A result is compared with its oracle before it is timed; one
that fails has no speed, the others are measured, and the exit code is 1.

`bench compare` shows two such files side by side, and ends with 1 if a row of ours takes more than X times as long.

`bench --tune` searches launch configurations on the GPU at hand and prints the best as entries of the launch tables;
with --dry-run it shows, without a GPU, which of them compile without a spill and fit the chip. Decoding never searches.

examples:
  {PROGRAM} bench --out results
  {PROGRAM} bench strategies --out results
  {PROGRAM} bench compare old.json new.json --fail-over 1.1
  {PROGRAM} bench --tune --kernels step_attention --out results
  {PROGRAM} bench --tune --dry-run --chip 90 --kernels step_attention
"""
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure, see below")
    parser.add_argument("--out", type=any_path, metavar="DIR", help="folder of the results file (default: results)")
    parser.add_argument(
        "--fail-over",
        type=number(float, lambda x: 0 < x < math.inf, "a finite number > 0"),
        metavar="X",
        help="with compare: the regression that is too much",
    )
    tuning = parser.add_argument_group("launch configurations")
    tuning.add_argument("--tune", action="store_true", help="search them on this GPU instead of measuring parts")
    tuning.add_argument("--dry-run", action="store_true", help="show what compiles for --chip; needs no GPU")
    for name, (metavar, kind, what) in TUNING.items():
        tuning.add_argument(f"--{name}", type=kind, metavar=metavar, help=what)
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    if options.tune:
        return _tune(options)
    if options.dry_run or any(getattr(options, name.replace("-", "_")) is not None for name in TUNING):
        raise UserError(f"--dry-run, --{', --'.join(TUNING)}: expected with --tune alone")
    if options.parts[:1] == ["compare"]:
        return _compare(options)
    if options.fail_over is not None:
        raise UserError("--fail-over: expected with compare alone")
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise UserError(f"PART: expected some of {', '.join(PARTS)}, got {unknown[0]}")
    _checkout()
    out = options.out or Path("results")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    codes: dict[str, int] = {}
    before = _written(out)
    for part in dict.fromkeys(options.parts or ON_CPU):
        what, command = PARTS[part]
        print(f"{part}: {what}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        codes[part] = _run_module(*command.split(), "--out", str(out.resolve()), is_json=options.json)
        print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if options.json:
        print_json({"parts": codes, "files": _changed(out, before)})
    return max(codes.values())


def _checkout() -> Path:
    """The source checkout that this package is in.

    Raises:
        UserError: this is an installed package.
    """
    if not (CHECKOUT / "benchmarks" / "__init__.py").is_file():
        raise UserError(f"bench: expected a source checkout, whose benchmarks/ it runs, got a package in {CHECKOUT}")
    return CHECKOUT


def _run_module(name: str, *arguments: str, is_json: bool) -> int:
    """The exit code of a module of the checkout, whose arguments have absolute paths.

    It has a process of its own: what ends one part does not end those after it. With --json standard output is the
    report alone.
    """
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=_checkout(),
        stdout=2 if is_json else None,  # the file of standard error
    )
    return done.returncode if done.returncode >= 0 else 128 - done.returncode  # as a shell says that a signal ended it


def _compare(options: argparse.Namespace) -> int:
    """`bench compare OLD NEW`."""
    files = options.parts[1:]
    if len(files) != 2:
        raise UserError(f"compare: expected two results files, OLD.json NEW.json, got {len(files)}")
    _checkout()
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"compare: expected a results file, got {file!r}")
    limit = [] if options.fail_over is None else ["--fail-over", str(options.fail_over)]
    code = _run_module(
        "benchmarks.reports.compare", *(str(Path(file).resolve()) for file in files), *limit, is_json=options.json
    )
    if options.json:
        print_json({"parts": {"compare": code}, "files": []})
    return code


def _tune(options: argparse.Namespace) -> int:
    """`bench --tune`."""
    if options.parts:
        raise UserError(f"--tune: expected no PART, got {options.parts[0]}")
    if not options.dry_run and (options.chip is not None or options.out is None):
        raise UserError("--tune: expected --out DIR and no --chip, or --dry-run: what is timed is the GPU at hand")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out: expected a folder, got the file {options.out}")
    before = _written(options.out)
    given = {name: getattr(options, name.replace("-", "_")) for name in TUNING}
    arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
    arguments += [] if options.out is None else [f"--out={options.out.resolve()}"]
    arguments += ["--dry-run"] if options.dry_run else []
    code = _run_module("benchmarks.static.tune", *arguments, is_json=options.json)
    if options.json:
        print_json({"parts": {"tune": code}, "files": _changed(options.out, before)})
    return code


def _written(folder: Path | None) -> dict[Path, int]:
    """Files of a folder, and when each was written."""
    if folder is None or not folder.is_dir():
        return {}
    return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def _changed(folder: Path | None, before: dict[Path, int]) -> list[str]:
    """Files of a folder that were written since `before`."""
    return sorted(str(path) for path, written in _written(folder).items() if before.get(path) != written)
