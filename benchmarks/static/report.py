"""What the compiler made of every kernel that ships, on every chip, without a GPU: as data, and held to a budget.

python -m benchmarks.static.report [--out FILE] [--chips CHIP,..] [--kernels NAME,..] [--jobs N] [--all]
                                   [--accept-warps]

Entries whose kernel, configuration and Triton are still the same are kept, so that a run that was cut short goes on
where it stopped. Exit code 1 if an entry breaks the budget of benchmarks/static/budget.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import triton

from tidar_kernels.ops._triton.configs import CHIPS

from ..core.record import replace
from .cases import KERNELS, SHARES, STORED, Case, Config, cases, launch, some_of
from .compilation import CompileReport, compile_all, compile_report
from .fingerprints import fingerprint
from .occupancy import LIMITS

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "results" / "static-report.json"
BUDGET = HERE / "budget.json"
RENEW = "make report"
SCHEMA = 2
WRITE_EVERY_S = 20.0
# Of a launch's options, those that a table chooses.
CHOSEN = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "maxnreg", "SCORES_AHEAD", "ROWS_AHEAD")
# Of an entry, what is compared with a fresh compilation.
MEASURED = tuple(one.name for one in fields(CompileReport))[2:]  # but for kernel and chip


def compiled_row(case: Case, config: Config | None = None) -> dict[str, Any]:
    """The entry of a case, compiled now, with the table's configuration or another."""
    planned = launch(case, config)
    report = compile_report(planned, case.target, read_binary=True)
    chosen = {name: planned.options[name] for name in CHOSEN if name in planned.options}
    measured = {name: getattr(report, name) for name in MEASURED} | {"tensor_core": list(report.tensor_core)}
    return {**asdict(case), "config": chosen, **measured, "fingerprint": fingerprint(planned)}


def case_of(row: dict[str, Any]) -> Case:
    """The case of an entry."""
    return Case(*(row[name] for name in ("kernel", "chip", "dtype", "head_dim", "variant")))


def load(path: Path = REPORT) -> dict[str, Any]:
    """A report; an empty one if there is no such file."""
    if not path.is_file():
        return {"schema": SCHEMA, "triton": "", "rows": []}
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write(path: Path, version: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write a report whole or not at all: sorted, an entry a line, so that a change is a line in a diff."""
    lines = ",\n".join(map(json.dumps, sorted(rows, key=case_of)))
    replace(path, f'{{"schema": {SCHEMA}, "triton": {json.dumps(version)}, "rows": [\n{lines}\n]}}\n')


def fresh(rows: Iterable[dict[str, Any]]) -> dict[Case, dict[str, Any]]:
    """Entries by case, those alone that are still what would be compiled."""
    kept = {}
    for row in rows:
        case = case_of(row)
        try:
            planned = launch(case)
        except (KeyError, ValueError):  # no longer a kernel, a chip or an entry of the tables
            continue
        if fingerprint(planned) == row["fingerprint"]:
            kept[case] = row
    return kept


def _line_of(case: Case) -> str:
    """Where the budget has the least resident warps of a case, by chip."""
    line = f"{case.kernel} {case.dtype}" + (f" d{case.head_dim}" if case.head_dim else f" {case.variant}")
    return f"{line} {case.variant}" if case.stored in {*STORED, *SHARES} else line


def broken(rows: Iterable[dict[str, Any]], budget: dict[str, Any]) -> list[str]:
    """How entries break the budget, one line each; none where all is well."""
    found = []
    for row in rows:
        case, limits = case_of(row), LIMITS[case_of(row).target]
        excused: dict[str, Any] = {}
        for exception in budget["exceptions"]:
            if all(row[name] in wanted for name, wanted in exception["of"].items()):
                excused |= exception["allowed"]
        multiplies = case.kernel in budget["multiplying"] and case.dtype != "float32"
        wanted = excused.get("tensor_core", [budget["tensor_core"][case.chip]] if multiplies else [])
        bounds = {name: excused.get(name, 0) for name in ("stack_bytes", "local_accesses", "spill_bytes")}
        bounds |= {"registers": limits.registers, "shared_bytes": limits.block_shared}
        least = excused.get("warps", budget["warps"].get(_line_of(case), {}).get(case.chip, 1))
        wrong = [f"{name}: expected <= {most}, got {row[name]}" for name, most in bounds.items() if row[name] > most]
        wrong += [f"warps: expected >= {least}, got {row['warps']}"] if row["warps"] < least else []
        hidden = multiplies and isinstance(case.target, int)  # AMD's assembly does not say
        if hidden and (row["copies_ahead"] or 0) < excused.get("copies_ahead", 1):
            wrong.append(f"copies_ahead: expected >= 1, got {row['copies_ahead']}")
        if list(row["tensor_core"]) != wanted:
            wrong.append(f"tensor_core: expected {', '.join(wanted) or 'none'}, got {row['tensor_core']}")
        found += [f"{case}: {one}" for one in wrong]
    return found


def with_warps_of(rows: Iterable[dict[str, Any]], budget: str) -> str:
    """The text of a budget with the resident warps of `rows` as the least that it asks for."""
    least: dict[str, dict[str, int]] = {}
    for case, warps in sorted((case_of(row), row["warps"]) for row in rows):
        line = least.setdefault(_line_of(case), {})
        line[case.chip] = min(warps, line.get(case.chip, warps))
    lines = [
        f"  {json.dumps(name)}: {json.dumps({str(c): line[str(c)] for c in CHIPS if str(c) in line})}"
        for name, line in least.items()
    ]
    return budget[: budget.index(' "warps": {')] + ' "warps": {\n' + ",\n".join(lines) + "\n }\n}\n"


def _changes(old: dict[str, Any], row: dict[str, Any]) -> str:
    names = (*MEASURED, "config")
    changed = [f"{name} {old.get(name)} -> {row[name]}" for name in names if old.get(name) != row[name]]
    return (", ".join(changed) or "as it was") if old else "new"


def renew(path: Path, wanted: list[Case], jobs: int, everything: bool = False) -> tuple[list[dict[str, Any]], int]:
    """Compile what is missing or stale in the report at `path` and write it: `(entries, how many failed)`.

    Entries of chips and kernels that are not `wanted` stay as they are unless no chip or table has them any more.
    """
    before = load(path)
    old = {case_of(row): row for row in before["rows"]}
    comparable = before["triton"] in ("", triton.__version__) and before["schema"] == SCHEMA  # else no mixture
    kept = fresh(before["rows"]) if comparable and not everything else {}
    shipped = {case for chip in CHIPS for case in cases(chip)}
    rows = {case: row for case, row in old.items() if case in shipped} if comparable else {}
    todo = [case for case in wanted if case not in kept]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} entries are fresh, {len(todo)} to compile", file=sys.stderr)
    failed, written = 0, time.monotonic()
    for done, (case, result) in enumerate(compile_all(_attempt, todo, jobs), 1):
        if isinstance(result, str):
            failed += 1
            line = result
        else:
            rows[case] = result
            line = f"{case}: {_changes(old.get(case, {}), result)}"
        print(f"[{done}/{len(todo)}] {line}", file=sys.stderr, flush=True)
        if time.monotonic() - written > WRITE_EVERY_S:
            write(path, triton.__version__, rows.values())
            written = time.monotonic()
    write(path, triton.__version__, rows.values())
    return list(rows.values()), failed


def _attempt(case: Case) -> dict[str, Any] | str:
    """The entry of a case, or why it has none: compilers fail in their own ways."""
    try:
        return compiled_row(case)
    except Exception as error:
        return f"{case}: {type(error).__name__}: {str(error).splitlines()[-1:]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPORT, help="the report, whose fresh entries are kept")
    for name, known in (("--chips", CHIPS), ("--kernels", KERNELS)):
        every = ",".join(map(str, known))
        parser.add_argument(name, type=some_of(known), default=every, help=f"some of {every}, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--all", action="store_true", help="compile fresh entries too")
    parser.add_argument(
        "--accept-warps", action="store_true", help=f"take the report's resident warps as the least in {BUDGET.name}"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    shipped = [case for chip in CHIPS for case in cases(chip)]
    wanted = [case for case in shipped if case.chip in options.chips and case.kernel in options.kernels]
    rows, failed = renew(options.out, wanted, options.jobs, options.all)
    if options.accept_warps:
        BUDGET.write_text(with_warps_of(rows, BUDGET.read_text()))
    complaints = broken(rows, json.loads(BUDGET.read_text()))
    for line in complaints:
        print(line, file=sys.stderr)
    print(f"{options.out}: {len(rows)} entries, {failed} failed, {len(complaints)} break the budget")
    return 1 if failed or complaints else 0


if __name__ == "__main__":
    sys.exit(main())
