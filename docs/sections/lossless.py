"""The table of docs/lossless.md, from what `tidar-kernels lossless --json` reported."""

from __future__ import annotations

from typing import Any

from sections import Section
from sections.measured import parts


def lossless_table() -> str:
    """A line for each run: what was compared, what was equal, and where bits first differ."""
    found = []
    for part in parts("lossless", "cpu"):
        lines = [
            "| dtype | strategy | texts equal | equal in every bit | first bits that differ | modules whose rows "
            "depend on others |",
            "| :--- | :--- | ---: | ---: | :--- | :--- |",
            *(_line(run) for run in part["rows"]),
        ]
        run = part["rows"][0]
        said = f"{run['model']}, {run['prompts']} prompts, {run['max_new_tokens']} tokens each at most, greedy; "
        said += f"PyTorch {part['versions']['torch']}, {part['machine']['cpu']}, {part['date']}."
        found.append("\n".join(lines) + f"\n\n{said}")
    return "\n\n".join(found) or "No figures are published yet: `python -m benchmarks.decoding.lossless` measures them."


def _line(run: dict[str, Any]) -> str:
    bits = [each["first_bits"]["stage"] for each in run["trajectories"] if each["first_bits"] is not None]
    first = ", ".join(f"{stage} ({bits.count(stage)})" for stage in sorted(set(bits))) or "none"
    depending = [
        f"{stage} {found['depending'] / found['rows']:.0%}"
        for stage, found in run["stages"].items()
        if found["depending"]
    ]
    name = f"{run['strategy']}, B = {run['block_size']}" + (", exact" if run["exact"] else "")
    count = run["prompts"]
    cells = [run["dtype"], name, f"{run['equal']} of {count}", f"{run['equal_bits']} of {count}", first]
    return f"| {' | '.join([*cells, ', '.join(depending) or 'none'])} |"


SECTIONS: dict[str, Section] = {"lossless": lossless_table}
