"""What `make gpu` runs, unattended, in one call of nine minutes: sanitizer, bits, parity, every CUDA table, as files.

Where vLLM is installed, the GPU part of its plug-in's tests runs too.

    python -m benchmarks.gpu --out DIR [--budget SECONDS] [--dry-run]

Parity comes first, but does not gate: every row checks its own result before it is timed. Each part has a share of the
time that is left and runs in a process of its own, so that one that crashes, hangs, or loses the device takes nothing
with it; it is then started again after the row that did it. What the time cuts is printed and on file. The exit code
is 1 if parity or a check of ours failed. `--dry-run` does all of it at tiny sizes on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
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

from .core import measure, rates, record, timing
from .core.operands import listing
from .registry import OPERATORS, PARTS
from .reports import pictures, targets

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520.0  # seconds in all; the rest of nine minutes is for starting and ending
PARITY_SECONDS = 190.0  # at most
SANITIZER_SECONDS = 50.0  # at most, of both tools together
BITS_SECONDS = 60.0  # at most
VLLM_SECONDS = 120.0  # at most, where vLLM is installed: five small engines start
VLLM_TESTS = "tests/integrations/vllm/test_gpu.py"
# Parts: their titles, and their shares of the time after parity. What a part leaves goes to those after it.
SHARES = {
    "step": ("step attention", 0.34),
    "stored": ("caches of step attention", 0.06),
    "operators": ("operators", 0.1),
    "decoder_step": ("decoder steps", 0.18),
    "token_slots": ("token slots", 0.1),
    "training": ("training attention", 0.22),
}
WITHOUT_COMPILERS = 0.7  # of a part's time, until FlexAttention, which compiles for every case, has its turn
GRACE = 25.0  # seconds past its time until a part is stopped
PATIENCE = 15.0  # seconds from asking it to end, as Ctrl-C does, to the kill
TRIES = 3
Launcher = Callable[[list[str], float], int | None]  # a command and its seconds; its exit code, None if stopped
DEVICE_LOST = 3  # exit code of a part whose process cannot go on


@dataclass(frozen=True)
class Suite:
    """What a run measures: the workloads `cuda` or `tiny` of every operator, and the tests of parity."""

    device: str
    dtype: torch.dtype
    workloads: str
    parity: tuple[str, ...]
    timer: measure.Timer | None = None


FULL = Suite("cuda", torch.bfloat16, "cuda", ("tests", f"--ignore={VLLM_TESTS}"))
DRY = Suite(
    "cpu", torch.float32, "tiny", ("tests/ops/test_append_kv.py",),
    lambda calls: timing.time_cpu(timing.rotated(calls), 0),
)  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measured(suite: Suite, name: str, rows: record.Rows, known: rates.Rates, deadline: float) -> bool:
    """The rows of a part until `deadline`, what compiles for every case after all the others; False if ours failed."""
    now, passed = time.perf_counter(), True
    table = [(cls, case) for cls in map(OPERATORS.__getitem__, PARTS[name]) for case in getattr(cls, suite.workloads)]
    compilers = {key for cls, _ in table for key, one in cls.implementations.items() if one.compiles}
    title, _ = SHARES[name]
    turns = [(title, False, now + (WITHOUT_COMPILERS if compilers else 1.0) * (deadline - now))]
    turns += [(f"{title}, FlexAttention", True, deadline)] if compilers else []
    for what, compiling, until in turns:
        mine = [
            (cls, case, names)
            for cls, case in table
            if (names := [n for n in cls.offered(case, suite.device) if (n in compilers) == compiling])
        ]
        for index, (cls, case, names) in enumerate(mine):
            if time.perf_counter() > until:
                left = len(mine) - index
                say(f"{what}: {measure.OUT_OF_TIME}, {left} case(s) not measured")
                rows.put({"operator": "cut", "what": what, "left": left, "command": f"cut {what}"})
                break
            passed &= measure.measure(
                cls, case, rows, known, suite.dtype,
                device=suite.device, names=names, timer=suite.timer, deadline=until,
            )  # fmt: skip
    return passed


def run_part(suite: Suite, name: str, folder: Path, seconds: float, *, resume: bool = False) -> int:
    """One part in this process; 0, 1 if a check of ours failed, or `DEVICE_LOST`."""
    deadline = time.perf_counter() + seconds
    rows = record.Rows(folder, name, suite.device, resume=resume)
    if not any(line["operator"] == "copy" for line in rows.rows):
        rows.put(*rates.measure(suite.device, (suite.dtype,), small=suite.device == "cpu"))
        if name in ("step", "training"):
            rows.put(*(line for operator in PARTS[name] for line in listing(OPERATORS[operator], suite.device)))
    try:
        return 0 if measured(suite, name, rows, rates.of(rows.rows), deadline) else 1
    except Exception as error:  # what no row stands for; rows so far are on file, and the other parts are measured
        say(f"{name}: {measure.reason(error)}")
        return DEVICE_LOST if isinstance(error, measure.DeviceLostError) else 1


def run_process(command: Sequence[str], seconds: float) -> int | None:
    """The exit code of a command; None if it had to be stopped after `seconds`, with all that it started."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(max(1.0, seconds))
    except BaseException as error:  # its time is up, or ours
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def start_part(suite: Suite, name: str, folder: Path, seconds: float, end: float, launch: Launcher) -> int:
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
            say(f"{name}: stopped, its time is used up; rows measured so far are on file")
        if code in (None, 0, 1):
            break
        say(f"{name}: ended with {code}, measured as far as it came")
    return 0 if code == 0 or code is None else 1


def run_parity(suite: Suite, folder: Path, seconds: float, launch: Launcher) -> int:
    """The tests marked cuda, within `seconds`; their outcome as a part of the results file.

    0 if every one of them ran and passed. A run that was cut, or that ran nothing, shows nothing: it is red. A dry run
    has no CUDA, so its tests are skipped.
    """
    if importlib.util.find_spec("pytest") is None:
        say("parity: not run, no pytest; every row still checks its own result")
        record.add(folder, "parity", suite.device, [{"operator": "parity", "not_available": "no pytest"}])
        return 1
    report = folder / "parity.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--continue-on-collection-errors", *suite.parity]
    command += ["-p", "no:cacheprovider", f"--junitxml={report.resolve()}"]
    # A kernel that loses the device ends one worker, not all tests.
    parallel = suite.device == "cuda" and importlib.util.find_spec("xdist") is not None
    started = time.perf_counter()
    # Nearly all of the time is compiling, on the host.
    code = launch(command + (["-n", str(os.cpu_count() or 1)] if parallel else []), seconds)
    line = parity_row(report) | {"seconds": round(time.perf_counter() - started, 1), "stopped": code is None}
    print(f"parity: {line}", flush=True)
    record.add(folder, "parity", suite.device, [line])
    if suite.device != "cuda":
        return int(line["failed"] > 0 or code not in (0, 5))  # 5: no test was collected
    ran = line["tests"] - line["skipped"]
    if code is None or not ran:
        say(f"parity: expected a whole run, got {'one that was stopped' if code is None else 'one'} with {ran} tests")
    return int(code != 0 or line["failed"] > 0 or not ran)


def run_sanitizer(folder: Path, seconds: float, launch: Launcher) -> int:
    """One small case of every kernel under compute-sanitizer, where it is installed; 1 if it found anything."""
    program, rows = shutil.which("compute-sanitizer"), list[dict[str, Any]]()
    if program is None:
        say("sanitizer: not run, no compute-sanitizer")
        rows = [{"operator": "sanitizer", "not_available": "no compute-sanitizer"}]
    for tool in ("memcheck", "racecheck") if program else ():
        command = [str(program), "--tool", tool, "--error-exitcode", "9", sys.executable]
        code = launch([*command, "-m", "tidar_kernels", "doctor", "--parity"], seconds / 2)
        rows.append({"operator": "sanitizer", "tool": tool, "exit_code": code, "stopped": code is None})
        print(f"sanitizer: {rows[-1]}", flush=True)
    record.add(folder, "sanitizer", "cuda", rows)
    return int(any(row.get("exit_code") not in (None, 0) for row in rows))


def run_bits(suite: Suite, folder: Path, seconds: float, launch: Launcher) -> int:
    """Whether rows of a step have the bits of single tokens, in both sizes of tile (`bits`); 0 if all of them do."""
    command = [sys.executable, "-m", "benchmarks.bits", "--out", str(folder.resolve()), "--budget", f"{seconds:.0f}"]
    if suite.device == "cpu":
        command = ["env", "TRITON_INTERPRET=1", *command, "--dry-run"]
    code = launch(command, seconds + GRACE)
    if code is None:
        say("bits: stopped, its time is used up; rows so far are on file")
    return int(code != 0)


def run_vllm(suite: Suite, folder: Path, seconds: float, launch: Launcher) -> int:
    """What vLLM serves on this GPU with the plug-in against vLLM itself; 0 if every test ran and passed.

    Not a part of parity, whose tests run side by side: an engine takes a GPU for itself. A dry run has no CUDA, so its
    tests are skipped.
    """
    report = folder / "vllm.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-o", "filterwarnings=default", VLLM_TESTS]
    code = launch([*command, "-p", "no:cacheprovider", f"--junitxml={report.resolve()}"], seconds)
    line = parity_row(report) | {"operator": "vllm_tests", "stopped": code is None}
    print(f"vllm: {line}", flush=True)
    record.add(folder, "vllm_tests", suite.device, [line])
    if suite.device != "cuda":
        return int(line["failed"] > 0 or code not in (0, 5))
    return int(code != 0 or line["tests"] == line["skipped"])


def parity_row(report: Path) -> dict[str, Any]:
    """What a JUnit report says, in numbers, and the names of tests that failed."""
    root = ElementTree.parse(report).getroot() if report.is_file() else ElementTree.Element("none")
    tests, skipped = root.findall(".//testcase"), root.findall(".//testcase/skipped")
    failed = [test for test in tests if test.find("failure") is not None or test.find("error") is not None]
    names = [f"{test.get('classname')}::{test.get('name')}" for test in failed]
    count = {"tests": len(tests), "failed": len(failed), "skipped": len(skipped)}
    return {"operator": "parity", **count, "failures": names[:50]}


def run_all(suite: Suite, folder: Path, budget: float, launch: Launcher, *, parity: bool = True) -> int:
    """Parity and every part within `budget` seconds; 0 if nothing failed."""
    end = time.perf_counter() + budget
    codes = {}
    if parity and suite.device == "cuda":
        codes["sanitizer"] = run_sanitizer(folder, min(SANITIZER_SECONDS, 0.1 * budget), launch)
    if parity:
        codes["bits"] = run_bits(suite, folder, min(BITS_SECONDS, 0.12 * budget), launch)
        codes["parity"] = run_parity(suite, folder, min(PARITY_SECONDS, 0.4 * budget), launch)
    if parity and importlib.util.find_spec("vllm") is not None:
        codes["vllm"] = run_vllm(suite, folder, min(VLLM_SECONDS, 0.25 * budget), launch)
    elif parity:
        say("vllm: not run, no vLLM")
    shares = sum(share for _, share in SHARES.values())
    for name, (_, share) in SHARES.items():
        seconds = (end - time.perf_counter() - GRACE) * share / shares
        shares -= share
        if seconds < 5.0:
            say(f"{name}: not started, {measure.OUT_OF_TIME}")
            continue
        print(f"== {name}: {seconds:.0f} s", flush=True)
        codes[name] = start_part(suite, name, folder, seconds, end, launch)
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
        say("benchmarks.gpu: expected a CUDA GPU, got none")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        return run_part(suite, options.part, options.out, options.budget, resume=options.resume)
    code = run_all(suite, options.out, options.budget, run_process, parity=not options.no_parity)
    for line in targets.lines(options.out, suite.device):
        print(line, flush=True)
    pictures.draw_all(options.out, options.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
