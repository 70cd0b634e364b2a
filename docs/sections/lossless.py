"""The table of docs/lossless.md, from what `tidar-kernels lossless --json` reported."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sections import Picture, Section
from sections.measured import parts, table, where


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


def human_eval_table() -> str:
    """A line for each strategy on the prompts of HumanEval: texts equal to `generate`'s, and what drafts were worth."""
    rows, under = [], []
    for part in (*parts("human_eval", "cpu"), *parts("human_eval_adapter", "cpu")):
        for run in part["rows"]:
            kept = " ".join(f"{share:.2f}" for share in run["acceptance"])
            step = f"{run['strategy']}, {run['block_size']}"
            equal = f"{run['equal']} of {run['prompts']}"
            texts = run.get("kind", "HumanEval")
            rows.append([run["model"], texts, step, equal, f"{run['tokens_per_forward']:.2f}", kept])
        under.append(f"{run['max_new_tokens']} tokens a prompt at most, greedy, float32; {where(part)}.")
    if not rows:
        return "No figures are published yet: `python -m benchmarks.decoding.human_eval` measures them."
    head = ["model", "prompts", "strategy, block size", "texts equal to `generate`", "tokens a forward"]
    return table([*head, "drafts kept by position"], rows, left=3) + f"\n\n{under[0]}"


def scores_table() -> str:
    """A line for each way to decode: problems of HumanEval that it solves, and how many texts are `generate`'s."""
    rows, under = [], ""
    for part in parts("scores", "cpu"):
        for run in part["rows"]:
            of = run["problems"]
            rows.append([run["model"], run["way"], f"{len(run['solved'])} of {of}", f"{run['equal']} of {of}"])
        solved = sorted({name for run in part["rows"] for name in run["solved"]}, key=lambda name: (len(name), name))
        under = f"The first {of} problems, {run['max_new_tokens']} tokens each at most, greedy, float32; solved: "
        under += f"{', '.join(solved) or 'none'}. {where(part)}."
    if not rows:
        return "No figures are published yet: `python -m benchmarks.decoding.scores` measures them."
    return table(["model", "decoded by", "solved (pass@1)", "texts equal to `generate`"], rows, left=2) + f"\n\n{under}"


def exactness_table() -> str:
    """A line for each model and strategy: long exact texts against one token at a time."""
    rows, under = [], []
    for part in (*parts("exactness_model", "cpu"), *parts("exactness", "cpu")):
        for run in part["rows"]:
            bits = "yes" if run["equal_bits"] else "no"
            of, same = run["equal_without"]
            equal = f"{run['equal']:,} of {run['tokens']:,}"
            rows.append([run["model"], _step(run), equal, bits, f"{same} of {of}"])
        under.append(f"bfloat16, temperature 0.8; {where(part)}.")
    if not rows:
        return "No figures are published yet: `python -m benchmarks.decoding.exactness` measures them."
    head = ["model", "strategy", "tokens equal", "K/V equal in every bit"]
    return table([*head, "before the first that differs without `exact`"], rows, left=2) + f"\n\n{under[0]}"


def exact_cost_table() -> str:
    """A line for each model, strategy and batch whose passes were timed in turns, plain and exact."""
    rows, under = [], ""
    for part in parts("exactness_cost", "cpu"):
        for run in part["rows"]:
            ratios = run["ratios"]
            times = [f"{run[kind]:.0f}" if kind in run else "-" for kind in ("plain_ms", "exact_ms")]
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if len(ratios) > 1 else "-"
            ratio = f"{statistics.median(ratios):.2f} x"
            rows.append([run["model"], _step(run), str(run["batch"]), *times, ratio, spread])
        under = f"bfloat16; {where(part)}."
    if not rows:
        return "No figures are published yet: `python -m benchmarks.decoding.exactness --cost` measures them."
    head = ["model", "strategy", "batch", "plain, ms a pass", "exact, ms a pass", "exact over plain", "in single turns"]
    return table(head, rows, left=2) + f"\n\n{under}"


def _step(run: dict[str, Any]) -> str:
    name: str = run["strategy"]
    return name if name == "autoregressive" else f"{name}, {run['block_size']}"


def _training() -> dict[str, Any] | None:
    found = parts("human_eval_adapter", "cpu")
    return found[0]["rows"][0]["training"] if found else None


def training_table() -> str:
    """What the adapter was worth before and after its training, on prompts that it never saw."""
    training = _training()
    if training is None:
        return "No figures are published yet."
    config = training["config"]
    rows = [
        [when, f"{figures['tokens_per_forward']:.2f}", " ".join(f"{share:.2f}" for share in figures["acceptance"])]
        for when, figures in (("before", training["before"]), ("after", training["after"]))
    ]
    said = f"Rank {config['rank']}, {config['strategy']}, block size {config['block_size']}, {config['steps']} steps, "
    said += f"{training['tokens']:,} tokens of text."
    return table(["", "tokens a forward", "drafts kept by position"], rows) + f"\n\n{said}"


def _description() -> str:
    return json.dumps((_training() or {}).get("loss"))


def _save(path: Path) -> None:
    losses = (_training() or {}).get("loss") or []
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color="#17364f")
    axes.set(xlabel="step", ylabel="cross-entropy, nats a mask row")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Description": _description(), "Software": None})


PICTURES = {"images/adapter.png": Picture(_save, _description)}
SECTIONS: dict[str, Section] = {
    "lossless": lossless_table,
    "human-eval": human_eval_table,
    "scores": scores_table,
    "adapter": training_table,
    "exactness": exactness_table,
    "exact-cost": exact_cost_table,
}
