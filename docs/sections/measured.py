"""What all tables of results share: where the files are, and what stands under a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.core import record

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
NO_GPU = "No GPU figures are published yet: `make gpu` measures them and writes the file this table is drawn from."
NO_CPU = "No figures are published yet: `make bench` measures them."


def parts(kind: str, device: str) -> list[dict[str, Any]]:
    """One part of every machine of a device, from its newest file."""
    return record.newest(RESULTS, kind, device)


def where(part: dict[str, Any]) -> str:
    """Machine, versions and date."""
    machine, versions = part["machine"], part["versions"]
    name = machine.get("gpu") or f"{machine['cpu']} cores, {machine['threads']} threads"
    software = f"PyTorch {versions['torch']}, Triton {versions['triton']}, Python {versions['python']}"
    return f"{name}; {software}; {part['date']}"


def newest(kind: str, device: str) -> list[dict[str, Any]]:
    """A part of the machine that was measured last, alone; nothing where there is none."""
    return sorted(parts(kind, device), key=lambda part: str(part["date"]))[-1:]


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are aligned to the left."""
    rule = [":---" if index < left else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def left_out(part: dict[str, Any]) -> str:
    """What the time limit of a run cut, as a sentence, or nothing."""
    cut = [row for row in part["rows"] if row["operator"] == "cut"]
    return "".join(f" The time limit cut {row['left']} case(s) of {row['what']}." for row in cut)
