"""A mutation run over the core: what the tests of a room notice of small faults in it.

    make mutants [ROOM=patterns] [SAMPLE=20] [SEED=0]

cosmic-ray changes one operator, number or condition at a time in a copy of the repository, and runs the room's own
tests until the first that fails. A mutant that no test notices survived; it is printed with its line. Exit code 1 if
one survived that is not in `KEPT`. Of every room a sample of mutants runs, drawn by the seed; SAMPLE=0 runs all, which
takes hours.
"""

from __future__ import annotations

import argparse
import ast
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("tidar_kernels", "tests", "benchmarks", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
# Of every room its modules, and the tests that are to notice.
ROOMS = {
    "patterns": (["tidar_kernels/patterns"], ["tests/patterns", "tests/test_wrong_arguments.py"]),
    "cache": (["tidar_kernels/cache.py"], ["tests/test_cache.py", "tests/test_paged_cache.py"]),
    "session": (
        ["tidar_kernels/decoding/session.py", "tidar_kernels/decoding/runner.py"],
        [
            f"tests/decoding/test_{name}.py"
            for name in ("session", "session_errors", "noise", "paged_session", "interrupts")
        ],
    ),
    "strategies": (
        ["tidar_kernels/decoding/strategies"],
        [
            *(f"tests/decoding/test_{name}.py" for name in ("strategies", "noise", "levels", "trees")),
            "tests/integrations/transformers/test_dflash.py",
        ],
    ),
    "sampling": (
        [f"tidar_kernels/ops/verify/{name}.py" for name in ("reference", "params", "noise", "cpu")],
        ["tests/ops/test_verify.py"],
    ),
    "cpu": (
        [f"tidar_kernels/ops/{name}.py" for name in ("_cpu", "attention/cpu", "step_attention/cpu")],
        [f"tests/ops/test_{name}.py" for name in ("cpu_attention", "attention", "step_attention", "nonfinite")],
    ),
}
EXCLUDED = ["tidar_kernels/patterns/drawing.py"]  # whether a picture is good is seen, not tested
# Survivors that no test needs to notice: (module, stripped line) -> why.
_FEWEST = "fewest = (mass < top_p.double() * mass[..., -1:]).sum(-1, keepdim=True).clamp(max=vocab_size - 1)"
KEPT: dict[tuple[str, str], str] = {
    (
        "tidar_kernels/patterns/pattern.py",
        'raise ValueError(f"rows: expected indices in [0, {self.q_len}), got {rows.flatten()[:8].tolist()}")',
    ): "how many of the wrong values an error shows",
    (
        "tidar_kernels/patterns/tidar.py",
        "lead=intervals(torch.zeros_like(row), torch.where(is_mask, level, m + 1), row >= 0),",
    ): "true of every row: each has a lead",
    (
        "tidar_kernels/ops/attention/cpu.py",
        "if int(more[late:].max()) + late - besides <= MAX_BEHIND and late <= MAX_BEHIND:",
    ): "which rows are cut into staircases is a matter of speed; the others are edge tiles, with the same results",
    (
        "tidar_kernels/ops/attention/cpu.py",
        "for start, stop in zip(starts, [*starts[1:], len(lo)], strict=True):",
    ): "both have as many by construction",
    (
        "tidar_kernels/ops/verify/reference.py",
        _FEWEST,
    ): "at most that by itself for top_p <= 1; SamplingParams has no other",
    **{
        ("tidar_kernels/decoding/strategies/head.py", line): "from a data sheet; tokens are the same with any number"
        for line in (
            "(8, 0): 64,  # A100: 312 TFLOP/s, 2.0 TB/s",
            "(8, 6): 32,  # RTX 3090: 71, 0.94",
            "(8, 9): 64,  # RTX 4090: 165, 1.0",
            "(9, 0): 64,  # H200: 790 as reached, 4.3",
            "(10, 0): 128,  # B200: 2250, 8.0",
            "(12, 0): 32,  # RTX 5090: 210, 1.8",
        )
    },
}
CONFIG = """
[cosmic-ray]
module-path = {modules}
timeout = {timeout}
excluded-modules = {excluded}
test-command = {command!r}
[cosmic-ray.distributor]
name = "local"
"""


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """`(start, end)` of every annotation, as `(line, column)`: they are not evaluated, so nothing can notice."""
    found: list[Any] = []
    for node in ast.walk(ast.parse(source)):
        found += [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [((x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)) for x in found if x is not None]


def select(session: Path, copy: Path, sample: int, seed: int) -> int:
    """Skip the mutants of annotations, and all but a sample of the others; how many are left."""
    skipped = WorkResult(WorkerOutcome.SKIPPED)
    with use_db(str(session), WorkDB.Mode.open) as db:
        ranges: dict[Path, Any] = {}
        wanted, others = [], []
        for item in sorted(db.work_items, key=lambda item: str(item.mutations)):
            (mutation,) = item.mutations
            if mutation.module_path not in ranges:
                ranges[mutation.module_path] = annotations((copy / mutation.module_path).read_text())
            start, end = tuple(mutation.start_pos), tuple(mutation.end_pos)
            hidden = any(first <= start and end <= last for first, last in ranges[mutation.module_path])
            (others if hidden else wanted).append(item.job_id)
        if sample:
            random.Random(seed).shuffle(wanted)
            wanted, rest = wanted[:sample], wanted[sample:]
            others += rest
        for job in others:
            db.set_result(job, skipped)
        return len(wanted)


def survivors(session: Path, copy: Path) -> Iterator[tuple[str, int, str, str]]:
    """`(module, line number, line, change)` of every mutant that no test noticed."""
    with use_db(str(session), WorkDB.Mode.open) as db:
        mutations = {item.job_id: item.mutations[0] for item in db.work_items}
        for job, result in db.results:
            if result.worker_outcome == WorkerOutcome.NORMAL and result.test_outcome == TestOutcome.SURVIVED:
                mutation = mutations[job]
                number = mutation.start_pos[0]
                line = (copy / mutation.module_path).read_text().splitlines()[number - 1].strip()
                change = [x[1:].strip() for x in (result.diff or "").splitlines() if x[:1] == "+" and x[:3] != "+++"]
                yield str(mutation.module_path), number, line, " ".join(change)


def run(room: str, python: str, work: Path, sample: int, seed: int) -> int:
    """Mutate a room and print what survived; how many that are not kept."""
    modules, tests = ROOMS[room]
    copy = work / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    pytest = [python, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow"]
    began = time.monotonic()
    subprocess.run([*pytest, *tests], cwd=copy, check=True, stdout=subprocess.DEVNULL)
    timeout = 4 * (time.monotonic() - began) + 20
    session, config = work / f"{room}.sqlite", work / f"{room}.toml"
    session.unlink(missing_ok=True)
    command = " ".join(f"'{word}'" if " " in word else word for word in [*pytest, *tests])
    config.write_text(CONFIG.format(modules=modules, excluded=EXCLUDED, timeout=timeout, command=command))
    cosmic_ray = [str(Path(sys.executable).with_name("cosmic-ray"))]
    subprocess.run([*cosmic_ray, "init", str(config), str(session)], cwd=copy, check=True)
    count = select(session, copy, sample, seed)
    subprocess.run([*cosmic_ray, "exec", str(config), str(session)], cwd=copy, check=True)
    found = list(survivors(session, copy))
    new = [one for one in found if (one[0], one[2]) not in KEPT]
    print(f"{room}: {count} mutants, {count - len(found)} killed, {len(found)} survived, {len(new)} of them not listed")
    for module, number, line, change in new:
        print(f"  {module}:{number}: {line}\n    {change}")
    return len(new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", choices=[*ROOMS, "all"], default="all")
    parser.add_argument("--sample", type=int, default=20, help="mutants of a room, drawn; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--python", default=sys.executable, help="runs the tests")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutants")
    options = parser.parse_args()
    rooms = list(ROOMS) if options.room == "all" else [options.room]
    counts = Counter({room: run(room, options.python, options.work, options.sample, options.seed) for room in rooms})
    return 1 if counts.total() else 0


if __name__ == "__main__":
    sys.exit(main())
