"""What `make gpu` runs, unattended, in one call of nine minutes: parity, then every CUDA table, as files.

    python -m benchmarks.gpu --out DIR [--budget SECONDS] [--dry-run]

Parity comes first, but does not gate: every row checks its own result before it is timed. Each part has a share of the
time that is left and runs in a process of its own, so that one that crashes, hangs, or loses the device takes nothing
with it; it is then started again behind the row that did it. What the time cuts is printed and on file. The exit code
is 1 if parity or a check of ours failed. `--dry-run` does all of it at tiny sizes on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidar_kernels.models import TransformerConfig

from . import cases, curves, decoder_step, rates, record, row, slots, targets, timing, training, workloads
from .implementations import OURS, listing

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520.0  # seconds in all; the rest of nine minutes is for starting and ending
PARITY_SECONDS = 190.0  # at most
# Of the time behind parity. What a part leaves goes to those behind it.
SHARES = {"step": 0.36, "operators": 0.1, "decoder_step": 0.18, "token_slots": 0.1, "training": 0.26}
WITHOUT_FLEX = 0.7  # of the time for step attention, until FlexAttention, which compiles for every case, has its turn
GRACE = 25.0  # seconds past its time until a part is stopped
TRIES = 3
DEVICE_LOST = 3  # exit code of a part whose process cannot go on
WITHOUT_FLEX_TRAINING = tuple(name for name in training.ON_CUDA if name != "flex_attention")
TRAINING_TOKENS = 16384  # clean tokens a call: shorter sequences come in larger batches
TRAINING_WIDTH = 2048  # num_heads * head_dim
TRAINING_LENGTHS = (2048, 4096, 8192, 16384, 32768)


def training_cases() -> list[training.Workload]:
    """TiDAR training at B = 16. One kind of heads over all lengths, then the others, the middle length first: the time
    may be used up before the end."""

    def case(seq_len: int, head_dim: int, group: int) -> training.Workload:
        heads = TRAINING_WIDTH // head_dim
        return training.Workload(seq_len, 16, heads, heads // group, head_dim, max(1, TRAINING_TOKENS // seq_len))

    kinds = [(128, 4), (64, 1), (128, 1), (64, 4)]
    middle = TRAINING_LENGTHS[2]
    lengths = sorted(TRAINING_LENGTHS, key=lambda s: s != middle)
    first = [case(s, *kinds[0]) for s in lengths] + [case(middle, *kind) for kind in kinds[1:]]
    return first + [case(s, *kind) for kind in kinds[1:] for s in TRAINING_LENGTHS if s != middle]


def _once(call: Callable[[], Any]) -> dict[str, float]:
    return timing.time_cpu(call, 0.0)


@dataclass(frozen=True)
class Suite:
    """What a run measures, and with what."""

    device: str
    dtype: torch.dtype
    cases: dict[str, list[workloads.Case]]
    flex: Sequence[Any]
    shapes: Sequence[decoder_step.Shape]
    contexts: tuple[int, ...]
    tokens: tuple[int, ...]
    training: Callable[[], list[training.Workload]]
    parity: tuple[str, ...]
    rotating: row.Timer
    step_timer: Callable[[Callable[[], Any]], dict[str, float]]
    graph_timer: Callable[[Callable[[], Any]], dict[str, float]]


FULL = Suite(
    "cuda", torch.bfloat16, workloads.CUDA, workloads.FLEX_CUDA, decoder_step.SHAPES, decoder_step.CONTEXTS,
    slots.TOKENS, training_cases, ("tests",), row.cuda_timer, timing.time_stream, slots.in_graph,
)  # fmt: skip
DRY = Suite(
    "cpu", torch.float32, workloads.TINY, workloads.FLEX_TINY,
    (decoder_step.Shape("tiny", TransformerConfig(300, 64, 96, 2, 4, 2, 16), {4: 3.0}),), (24,), (1, 8),
    lambda: [training.Workload(40, 8, 4, 2, 16)], ("tests/ops/test_append_kv.py",),
    lambda calls: _once(timing.rotated(calls)), _once, _once,
)  # fmt: skip


def cut(rows: record.Rows, what: str, left: int) -> None:
    """Say that the time was used up."""
    line = {"operator": "cut", "what": what, "left": left, "command": f"cut {what}"}
    print(f"{what}: {row.OUT_OF_TIME}, {left} case(s) not measured", file=sys.stderr, flush=True)
    rows.put(line)


def run_cases(
    suite: Suite,
    rows: record.Rows,
    known: rates.Rates,
    table: Sequence[tuple[str, Any, Sequence[str] | None]],
    what: str,
    deadline: float,
) -> bool:
    """Rows of `(operator, case, implementations)` until `deadline`; False if a check of ours failed."""
    passed = True
    for index, (operator, case, names) in enumerate(table):
        if time.perf_counter() > deadline:
            cut(rows, what, len(table) - index)
            break
        passed &= row.measure(
            case, operator, rows, known, suite.dtype, device=suite.device, names=names, timer=suite.rotating,
            deadline=deadline, report=lambda line: print(row.describe(line), flush=True),
        )  # fmt: skip
        if suite.device == "cuda":
            torch.cuda.empty_cache()
    return passed


def run_step(suite: Suite, rows: record.Rows, known: rates.Rates, deadline: float) -> bool:
    """Step attention beside its peers, FlexAttention behind all the others."""
    now = time.perf_counter()
    rows.put(*listing("step_attention", cases.StepAttention.implementations, suite.device))
    others = [name for name in cases.StepAttention.implementations if name != "flex_attention"]
    table: list[tuple[str, Any, Sequence[str] | None]]
    table = [("step_attention", case, others) for case in suite.cases["step_attention"]]
    passed = run_cases(suite, rows, known, table, "step attention", now + WITHOUT_FLEX * (deadline - now))
    table = [("step_attention", case, ["flex_attention"]) for case in suite.flex]
    return run_cases(suite, rows, known, table, "FlexAttention", deadline) and passed


def run_operators(suite: Suite, rows: record.Rows, known: rates.Rates, deadline: float) -> bool:
    """Append, rotation with append, verification, projections."""
    table = [(name, case, None) for name, each in suite.cases.items() if name != "step_attention" for case in each]
    return run_cases(suite, rows, known, table, "operators", deadline)


def run_decoder_step(suite: Suite, rows: record.Rows, known: rates.Rates, deadline: float) -> bool:
    """Whole steps of models; False if one failed."""
    passed, left = True, len(suite.shapes) * len(decoder_step.BLOCK_SIZES) * len(suite.contexts)
    options: dict[str, Any] = {"device": suite.device, "dtype": suite.dtype, "timer": suite.step_timer, "rows": rows}
    for shape in suite.shapes:
        for line in decoder_step.steps(
            shape, decoder_step.BLOCK_SIZES, suite.contexts, known, deadline=deadline, **options
        ):
            print(decoder_step.describe(line), flush=True)
            passed &= "not_available" not in line
        if suite.device == "cuda":
            torch.cuda.empty_cache()
    left -= sum(line["operator"] == "decoder_step" for line in rows.rows)
    if left:
        cut(rows, "decoder steps", left)
    return passed


def run_slots(suite: Suite, rows: record.Rows, known: rates.Rates, deadline: float) -> bool:
    """Free token slots of the same models; False if a pass failed."""
    passed, left = True, len(suite.shapes) * len(suite.tokens) * len(suite.contexts)
    for shape in suite.shapes:
        model = decoder_step.random_model(shape.config, suite.device, suite.dtype)
        passed &= slots.run(
            shape.name, model, rows, known, contexts=suite.contexts, tokens=suite.tokens, timer=suite.graph_timer,
            deadline=deadline,
        )  # fmt: skip
        del model
        if suite.device == "cuda":
            torch.cuda.empty_cache()
    left -= sum(line["operator"] == "token_slots" for line in rows.rows)
    if left:
        cut(rows, "token slots", left)
    return passed


def run_training(suite: Suite, rows: record.Rows, known: rates.Rates, deadline: float) -> bool:
    """Training attention, forward and backward, FlexAttention behind all others; False if a check of ours failed."""
    now, passed, table = time.perf_counter(), True, suite.training()
    rows.put(*listing("attention", training.peers("cuda"), suite.device))
    for what, names, until in (
        ("training attention", WITHOUT_FLEX_TRAINING, now + WITHOUT_FLEX * (deadline - now)),
        ("training attention, FlexAttention", ("flex_attention",), deadline),
    ):
        for index, case in enumerate(table):
            if time.perf_counter() > until:
                cut(rows, what, len(table) - index)
                break
            passed &= run_training_case(suite, rows, known, case, names, until)
    return passed


def run_training_case(
    suite: Suite, rows: record.Rows, known: rates.Rates, case: training.Workload, names: Sequence[str], until: float
) -> bool:
    """The implementations of one case; False if ours failed."""
    try:
        new = training.run_on_device(
            case, suite.dtype, names, suite.device, suite.step_timer, until, rows=rows, known=known
        )
    except row.DeviceLostError:
        raise
    except Exception as error:  # no room for the operands, say
        print(f"attention {case}: {row.reason(error)}", file=sys.stderr)
        return False
    for line in new:
        print(training.describe(line), flush=True)
    return not any(line["implementation"] == OURS and row.failed(line) for line in new)


PARTS: dict[str, Callable[[Suite, record.Rows, rates.Rates, float], bool]] = {
    "step": run_step,
    "operators": run_operators,
    "decoder_step": run_decoder_step,
    "token_slots": run_slots,
    "training": run_training,
}


def run_part(suite: Suite, name: str, folder: Path, seconds: float, *, resume: bool = False) -> int:
    """One part in this process; 0, 1 if a check of ours failed, or `DEVICE_LOST`."""
    deadline = time.perf_counter() + seconds
    rows = record.Rows(folder, name, suite.device, resume=resume)
    if not any(line["operator"] == "copy" for line in rows.rows):
        rows.put(*rates.measure(suite.device, (suite.dtype,), small=suite.device == "cpu"))
    try:
        return 0 if PARTS[name](suite, rows, rates.of(rows.rows), deadline) else 1
    except row.DeviceLostError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return DEVICE_LOST
    except Exception as error:  # what no row stands for; rows so far are on file, and the other parts are measured
        print(f"{name}: {row.reason(error)}", file=sys.stderr, flush=True)
        return 1


def stop(process: subprocess.Popen[bytes], patience: float = 15.0) -> None:
    """Ask a process to end, as Ctrl-C does, then make it and what it started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not end, it is killed", file=sys.stderr, flush=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_process(command: Sequence[str], seconds: float) -> int | None:
    """The exit code of a command; None if it had to be stopped after `seconds`."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        stop(process)
        return None
    except BaseException:
        stop(process)
        raise


def start_part(
    suite: Suite, name: str, folder: Path, seconds: float, end: float, launch: Callable[..., int | None]
) -> int:
    """A part in processes of its own, started again where one dies; 0, or 1 if anything failed."""
    until = time.perf_counter() + seconds
    code: int | None = 0
    for attempt in range(TRIES):
        left = until - time.perf_counter()
        if attempt and left < 10.0:
            break
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder.resolve()), "--part", name]
        command += ["--budget", f"{left:.0f}"] + ["--resume"] * (attempt > 0) + ["--dry-run"] * (suite.device == "cpu")
        code = launch(command, min(left + GRACE, end - time.perf_counter()))
        if code is None:
            print(f"{name}: stopped, its time is used up; rows measured so far are on file", file=sys.stderr)
        if code in (None, 0, 1):
            break
        print(f"{name}: ended with {code}, measured as far as it came", file=sys.stderr, flush=True)
    return 0 if code == 0 or code is None else 1


def run_parity(suite: Suite, folder: Path, seconds: float, launch: Callable[..., int | None]) -> int:
    """The tests marked cuda, within `seconds`; their outcome as a part of the results file. 0 if none failed."""
    if importlib.util.find_spec("pytest") is None:
        print("parity: not run, no pytest; every row still checks its own result", file=sys.stderr)
        record.add(folder, "parity", suite.device, [{"operator": "parity", "not_available": "no pytest"}])
        return 1
    report = folder / "parity.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--continue-on-collection-errors", *suite.parity]
    command += ["-p", "no:cacheprovider", f"--junitxml={report.resolve()}"]
    # A kernel that loses the device ends one worker, not all tests.
    parallel = suite.device == "cuda" and importlib.util.find_spec("xdist") is not None
    started = time.perf_counter()
    code = launch(command + (["-n", "4"] if parallel else []), seconds)
    line = parity_row(report) | {"seconds": round(time.perf_counter() - started, 1), "stopped": code is None}
    print(f"parity: {line}", flush=True)
    record.add(folder, "parity", suite.device, [line])
    return int(line["failed"] > 0 or code not in (None, 0, 5))  # 5: no test was collected


def parity_row(report: Path) -> dict[str, Any]:
    """What a JUnit report says, in numbers, and the names of tests that failed."""
    names: list[str] = []
    count = {"tests": 0, "failed": 0, "skipped": 0}
    root = ElementTree.parse(report).getroot() if report.is_file() else ElementTree.Element("none")
    for test in root.iter("testcase"):
        count["tests"] += 1
        if test.find("failure") is not None or test.find("error") is not None:
            count["failed"] += 1
            names.append(f"{test.get('classname')}::{test.get('name')}")
        elif test.find("skipped") is not None:
            count["skipped"] += 1
    return {"operator": "parity", **count, "failures": names[:50]}


def run_all(
    suite: Suite, folder: Path, budget: float, launch: Callable[..., int | None], *, separate: bool, parity: bool = True
) -> int:
    """Parity and every part within `budget` seconds; 0 if nothing failed."""
    end = time.perf_counter() + budget
    codes = {}
    if parity:
        codes["parity"] = run_parity(suite, folder, min(PARITY_SECONDS, 0.4 * budget), launch)
    waiting = dict(SHARES)
    while waiting:
        name, share = next(iter(waiting.items()))
        seconds = (end - time.perf_counter() - GRACE) * share / sum(waiting.values())
        del waiting[name]
        if seconds < 5.0:
            print(f"{name}: not started, {row.OUT_OF_TIME}", file=sys.stderr, flush=True)
            continue
        print(f"== {name}: {seconds:.0f} s", flush=True)
        if separate:
            codes[name] = start_part(suite, name, folder, seconds, end, launch)
        else:
            codes[name] = run_part(suite, name, folder, seconds)
    print(f"{budget - (end - time.perf_counter()):.0f} s; exit codes: {codes}", flush=True)
    return int(any(codes.values()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--no-parity", action="store_true", help="benchmarks alone")
    parser.add_argument("--dry-run", action="store_true", help="all of it at tiny sizes on the CPU")
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process")
    parser.add_argument("--resume", action="store_true", help="with --part: leave rows that are on file")
    options = parser.parse_args(arguments)
    suite = DRY if options.dry_run else FULL
    if suite.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: expected a CUDA GPU, got none", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        return run_part(suite, options.part, options.out, options.budget, resume=options.resume)
    code = run_all(suite, options.out, options.budget, run_process, separate=True, parity=not options.no_parity)
    for line in targets.lines(options.out, suite.device):
        print(line, flush=True)
    curves.draw_all(options.out, options.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
