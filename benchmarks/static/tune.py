"""Search launch configurations on the GPU at hand, and propose entries for the tables in `ops/_triton/tables.py`.

python -m benchmarks.static.tune --out DIR [--kernels NAME,..] [--head-dims D,..] [--dtypes NAME,..] [--extras]
                                 [--jobs N]
python -m benchmarks.static.tune --dry-run [--chip CHIP] ..

A candidate must compile without a spill and fit the chip's shared memory; it is compared with the oracle before it is
timed; what is timed is the kernel alone, by device events. `--dry-run` needs no GPU: it shows the candidates that
compile, and how many of their warps the chip can hold. What is proposed is data for a person to put into the table:
nothing that decodes ever searches.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tidar_kernels import patterns, testing
from tidar_kernels.ops._triton.configs import (
    EXTRAS,
    PLAIN,
    DkdvConfig,
    ForwardConfig,
    SpecialisedConfig,
    attention_config,
    chip_of,
    has_gluon,
)
from tidar_kernels.ops._triton.linear_tables import ROLES, LinearConfig, linear_config
from tidar_kernels.ops._triton.tables import CHIPS, TileConfig

from ..core import measure, record, timing
from .cases import HIDDEN, TABLE_OF, WIDE, Case, Config, configured, kernel_of, launch, launches, some_of, wanted
from .compilation import CompileReport, compile_all, compile_report
from .occupancy import LIMITS

TILES = (16, 32, 64, 128)
DEPTHS = (32, 64, 128, 256)
WARPS = (2, 4, 8)
STAGES = (1, 2, 3, 4)
MARGIN = 0.02  # what an entry must gain over the table's to replace it
TUNABLE = (*TABLE_OF, *ROLES)
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Trial:
    """A candidate that compiles: what the compiler made of it, and with a GPU its time or why it has none."""

    config: Config
    registers: int
    shared_bytes: int
    warps: int
    p50_us: float | None = None
    failure: str = ""


def case_for(name: str, chip: str, dtype: str, head_dim: int, extras: bool = False) -> Case:
    """The case of a kernel of `TABLE_OF` or of a projection's role, for which head dim and extras mean nothing."""
    if name in ROLES:
        return Case(kernel_of(name), chip, dtype, variant=name)
    return Case(name, chip, dtype, head_dim, EXTRAS if extras else PLAIN)


def current(case: Case) -> Config:
    """What the table has."""
    if case.variant in ROLES:
        role = "base" if case.variant in ("wide", "narrow") else case.variant
        columns = WIDE if case.variant == "wide" else HIDDEN
        return linear_config(role, case.target, case.torch_dtype, columns)
    return attention_config(TABLE_OF[case.kernel], case.target, case.torch_dtype, case.head_dim, case.variant)


def candidates(case: Case) -> list[Config]:
    """What is worth compiling, the table's own first. float32 multiplies on plain units: small tiles alone."""
    is_half, is_nvidia = case.dtype != "float32", isinstance(case.target, int)
    shapes = [
        (m, n) for m, n in itertools.product(TILES, TILES) if max(m, n) <= (128 if is_half else 32) and m * n >= 256
    ]
    found: list[Config] = []
    if case.variant in ROLES:
        width, room = case.torch_dtype.itemsize, LIMITS[case.target].block_shared
        for (m, n), k, warps, stages in itertools.product(shapes, DEPTHS, WARPS, STAGES[2:]):
            # Sums of a thread: too few and it idles, too many and it spills.
            if 8 <= m * n // (32 * warps) <= 64 and stages * (m + n) * k * width <= room:
                found.append(LinearConfig(m, n, k, warps, stages))
    else:
        make: list[Callable[..., Config]] = [TileConfig]
        if TABLE_OF[case.kernel] in ("step", "forward"):
            make = [partial(ForwardConfig, SCORES_AHEAD=ahead) for ahead in (False, True)[: 1 + is_half]]
        elif isinstance(current(case), DkdvConfig):
            make = [partial(DkdvConfig, ROWS_AHEAD=ahead) for ahead in (False, True)]
        # On NVIDIA's chips fewer than 3 stages leave no copy under way while a tile is multiplied.
        for (m, n), warps, stages in itertools.product(shapes, WARPS[1:], STAGES[2 * (is_half and is_nvidia) :]):
            # Of the second product's sums, which are as wide as the head.
            if m * n >= 64 * warps and m * max(n, case.head_dim) // (32 * warps) <= 160:
                found += [one(m, n, warps, stages) for one in make]
        specialised = (case.kernel, case.target, case.variant) == ("attention_forward", 90, PLAIN) and is_half
        if specialised and has_gluon():
            found += [SpecialisedConfig(128, n, 4, stages) for n in TILES[1:] for stages in STAGES]
    return list(dict.fromkeys([current(case), *found]))


def _compiled(work: tuple[Case, Config]) -> CompileReport | None:
    case, config = work
    try:
        return compile_report(launch(case, config), case.target)
    except Exception:
        return None  # a shape that the compiler does not take is no candidate


def survivors(case: Case, configs: Iterable[Config], jobs: int = 1) -> list[Trial]:
    """Of the candidates those that compile without local memory and fit the chip; most resident warps first."""
    configs, room = list(configs), LIMITS[case.target].block_shared
    found = [
        Trial(config, report.registers, report.shared_bytes, report.warps)
        for (_, config), report in compile_all(_compiled, [(case, config) for config in configs], jobs)
        if report is not None
        and not (report.stack_bytes or report.spill_bytes or report.local_accesses)
        and report.shared_bytes <= room
    ]
    return sorted(found, key=lambda trial: (-trial.warps, configs.index(trial.config)))


def check(case: Case, device: str) -> None:
    """The operator of a case against its oracle, with whatever configuration is in force.

    Raises:
        ParityError: it computes something else.
    """
    heads: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": case.head_dim, "dtype": case.torch_dtype}
    heads |= {"softcap": 30.0, "sinks": True} if case.variant == EXTRAS else {}
    if case.variant in ROLES:
        width, whole = WIDE if case.variant == "wide" else 320, case.variant in ("wide", "narrow", "down")
        linear = testing.LinearCase("tuned", (72,), 512, width, 64, case.torch_dtype, row_invariant=whole)
        testing.check_gated_lora(linear, device)
    elif case.kernel == "step_attention":
        heads |= {"window": 700} if case.variant == EXTRAS else {}
        step = testing.StepCase("tuned", patterns.tidar_step(8), (0, 1000, 4097), max_len=4200, **heads)
        testing.check_step_attention(step, device)
    else:
        training = testing.AttentionCase("tuned", patterns.tidar_training(300, 16), 1, **heads)
        testing.check_attention(training, device)


def time_on_gpu(case: Case) -> float:
    """Median microseconds of the kernel of a case on the current GPU, operands cold in L2."""
    width, cache = case.torch_dtype.itemsize, torch.cuda.get_device_properties(0).L2_cache_size
    # Two sets at least; attention's are larger than any L2.
    count = timing.copies(width * (WIDE * HIDDEN if case.variant in ROLES else 2**25), cache)
    sets = [launches(case, device="cuda") for _ in range(count)]
    for one in itertools.chain.from_iterable(sets):  # what a kernel reads, the launches before it wrote
        one.run()
    return timing.time_cuda([wanted(case, planned).run for planned in sets])["p50_us"]


def timed(
    case: Case,
    trials: Iterable[Trial],
    device: str,
    checker: Callable[[Case, str], None] = check,
    timer: Callable[[Case], float] = time_on_gpu,
) -> Iterator[Trial]:
    """Trials with their time; one that the oracle refutes, or that does not run, has a failure instead."""
    for trial in trials:
        with configured(case, trial.config):
            try:
                checker(case, device)
                trial = replace(trial, p50_us=timer(case))
            except Exception as error:
                trial = replace(trial, failure=measure.reason(error))
        yield trial


def _time(trial: Trial) -> float:
    return math.inf if trial.p50_us is None else trial.p50_us


def choose(case: Case, trials: Iterable[Trial]) -> tuple[Trial, str] | None:
    """The entry to propose and the reason; None if nothing ran. The table's stays unless another gains `MARGIN`."""
    ran = sorted((trial for trial in trials if trial.p50_us is not None), key=_time)
    if not ran:
        return None
    own = next((trial for trial in ran if trial.config == current(case)), None)
    best = own if own and _time(ran[0]) > (1 - MARGIN) * _time(own) else ran[0]
    other, place = next((trial for trial in ran if trial is not best), None), "next"
    if own and own is not best:
        other, place = own, "entry before"
    beside = f"; {_time(other):.1f} with {_shape(other.config)}, the {place}" if other else ""
    return best, f"{_time(best):.1f} us{beside}; {best.registers} registers, {best.warps} warps"


def _shape(config: Config) -> str:
    """The arguments of a configuration, as a table writes them."""
    every = [(one.name, getattr(config, one.name), one.default) for one in fields(config)]
    required = [str(value) for _, value, default in every if default is MISSING]
    chosen = [f"{name}={value}" for name, value, default in every if default is not MISSING and value != default]
    return ", ".join(required + chosen)


def source(chosen: Iterable[tuple[Case, Trial, str]]) -> str:
    """Entries as the tables write them, each under its place in them."""
    places: dict[str, list[str]] = {}
    for case, trial, reason in chosen:
        table, key = "linear_configs.TABLE", f'"{case.variant}"'
        if case.variant not in ROLES:
            table, key = f'TABLES["{TABLE_OF[case.kernel]}"]', str(case.head_dim)
        kind = ("float32" if case.dtype == "float32" else "half") + (" extras" if case.variant == EXTRAS else "")
        kind += " specialised" if isinstance(trial.config, SpecialisedConfig) else ""
        entry = f"{key}: {type(trial.config).__name__}({_shape(trial.config)}),  # {reason}"
        places.setdefault(f'# {table}[{case.target!r}]["{kind}"]', []).append(entry)
    return "\n".join(line for place, entries in places.items() for line in (place, *entries))


def _row(case: Case, trial: Trial) -> dict[str, Any]:
    at = {"operator": case.kernel, **vars(case), **vars(trial)}
    return at | {"config": vars(trial.config), "in_table": trial.config == current(case)}


def _describe(case: Case, trial: Trial) -> str:
    us = "" if trial.p50_us is None else f"{trial.p50_us:10.1f} us"
    used = (
        f"{trial.registers:4} registers {trial.shared_bytes:7} bytes shared {trial.warps:3}/{LIMITS[case.target].warps}"
    )
    table = " (table)" if trial.config == current(case) else ""
    return f"{_shape(trial.config):20} {used} warps{us} {trial.failure}{table}"


def _numbers(text: str) -> list[int]:
    try:
        return list(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text}") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for tune-CHIP.json")
    parser.add_argument("--dry-run", action="store_true", help="show what compiles; needs no GPU")
    parser.add_argument("--chip", choices=[str(chip) for chip in CHIPS], help="of a dry run; default: the GPU's, or 90")
    parser.add_argument("--kernels", type=some_of(TUNABLE), default=TUNABLE, help="separated by commas; default: all")
    parser.add_argument("--head-dims", type=_numbers, default=[64, 128], help="separated by commas")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=DTYPES[:1], help="bfloat16, float32 or both")
    parser.add_argument("--extras", action="store_true", help="with a cap, sinks and a window")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.dry_run:
        print("tune: expected a GPU to time on, got none; --dry-run shows what compiles without one", file=sys.stderr)
        return 1
    if not options.dry_run and (options.chip or options.out is None):
        parser.error("expected --out DIR without --chip, which is for --dry-run: what is timed is the GPU at hand")
    chip = options.chip or str(chip_of(torch.device("cuda", 0)) if has_gpu else 90)
    asked = itertools.product(options.kernels, options.dtypes, options.head_dims)
    cases = dict.fromkeys(case_for(name, chip, dtype, head_dim, options.extras) for name, dtype, head_dim in asked)
    rows: list[dict[str, Any]] = []
    chosen = []
    for case in cases:
        tried = candidates(case)
        trials = survivors(case, tried, options.jobs)
        print(f"{case}: {len(trials)} of {len(tried)} candidates compile without a spill and fit", flush=True)
        if not options.dry_run:
            trials = list(timed(case, trials, "cuda"))
            found = choose(case, trials)
            chosen += [] if found is None else [(case, *found)]
            rows += [_row(case, trial) for trial in trials]
            record.write(options.out / f"tune-{chip}.json", "tune", "cuda", rows)
        for trial in sorted(trials, key=_time):
            print(f"    {_describe(case, trial)}", flush=True)
    if chosen:
        print(source(chosen))
    return 1 if any(row["failure"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
