"""Two results files side by side: what became faster, what slower; exit code 1 past a given regression.

    python -m benchmarks.reports.compare OLD.json NEW.json [--fail-over 1.1]

Rows are matched by what was measured: every field that is a name, a size or a shape, and none that is a result.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..core import record
from ..core.operands import OURS

YARDSTICKS = ("copy", "matmul")
# What a regression counts in: a peer that became slower is none.
MEASURED = (OURS, "tidar", "autoregressive", "gated_lora")
# Results that are compared, and whether less of it is better; the first that a row has counts.
METRICS = (("p50_us", True), ("step_ms", True), ("tokens_per_second", False), ("peak_bytes", True))
# What says which row it is. Anything else is a result, or follows from these.
IDENTITY = (
    "operator", "implementation", "direction", "mode", "name", "label", "model", "dtype", "batch", "block_size",
    "context_len", "seq_len", "num_heads", "num_kv_heads", "head_dim", "num_rows", "vocab_size", "in_features",
    "out_features", "rank", "nodes", "rows", "temperature", "tokens", "prompts", "prompt_tokens", "new_tokens",
    "top_k", "top_p", "min_p", "repetition_penalty",
    "threads", "size", "device", "workloads",
)  # fmt: skip


class Change(NamedTuple):
    """One row in both files; `factor`, which they sort by, is above 1 where the new one is slower (or larger)."""

    factor: float
    metric: str
    old: float
    new: float
    what: str
    ours: bool


def _by_identity(content: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    # The same yardstick, say copy bandwidth, is measured in every part.
    for kind, row in ((kind, row) for kind, part in sorted(content["parts"].items()) for row in part["rows"]):
        identity = tuple((name, row[name]) for name in IDENTITY if isinstance(row.get(name), (str, int, float)))
        # Two rows that nothing tells apart keep their order.
        order = next(n for n in itertools.count() if (*identity, ("in", kind), n) not in rows)
        rows[(*identity, ("in", kind), order)] = row
    return rows


def _label(identity: tuple[Any, ...]) -> str:
    shown = (pair for pair in identity[:-1] if pair[0] not in ("in", "workloads"))
    return " ".join(f"{name}={value}" if name != "operator" else str(value) for name, value in shown)


def changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], list[str], list[str]]:
    """`(rows in both, rows only in old, rows only in new)`; rows without a figure in one file are left out of both."""
    before, after, found = _by_identity(old), _by_identity(new), []
    for identity, row in before.items():
        for metric, less_is_better in METRICS:
            was, now = row.get(metric), after.get(identity, {}).get(metric)
            if isinstance(was, (int, float)) and isinstance(now, (int, float)) and was and now:
                factor = now / was if less_is_better else was / now
                ours = row.get("implementation", OURS) in MEASURED and row["operator"] not in YARDSTICKS
                found.append(Change(factor, metric, was, now, _label(identity), ours))
                break
    gone, come = ([_label(i) for i in some if i not in others] for some, others in ((before, after), (after, before)))
    return found, gone, come


def _source(part: dict[str, Any]) -> str:
    """When a part was measured, on what, and at which clock as far as it is known."""
    clocks = part.get("clocks", {})
    megahertz = clocks.get("clocks_sm", clocks.get("cpu_mhz"))
    clock = f"{megahertz:g} MHz" if megahertz else "clock unknown"
    return f"{part['date']}, {part['machine'].get('gpu') or part['machine']['cpu']}, {clock}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--fail-over", type=float, metavar="X", help="exit with 1 if a row of ours takes X times as long"
    )
    options = parser.parse_args(arguments)
    try:
        old, new = record.load(options.old), record.load(options.new)
        found, gone, come = changes(old, new)
        if not found:
            raise ValueError("expected rows that both files have, got none")
    except ValueError as error:
        print(f"benchmarks.reports.compare: error: {error}", file=sys.stderr)
        return 2
    parts = [(name, *part) for name, each in (("old", old), ("new", new)) for part in sorted(each["parts"].items())]
    for name, kind, part in parts:
        print(f"{name}: {kind}, {_source(part)}")
    if any(part["machine"] != parts[0][2]["machine"] for _, _, part in parts):
        print("the machines differ: factors compare them too")
    for change in sorted(found, reverse=True):
        print(f"{change.factor:6.2f} x  {change.metric} {change.old:,.2f} -> {change.new:,.2f}  {change.what}")
    for name in gone:
        print(f"only in old: {name}")
    for name in come:
        print(f"only in new: {name}")
    worst = max((change for change in found if change.ours), default=None)
    if options.fail_over is not None and worst is not None and worst.factor > options.fail_over:
        print(f"regression: {worst.factor:.2f} x, over {options.fail_over:g}: {worst.what}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
