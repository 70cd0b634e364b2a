"""What the figures should come to, and what they do: every target against every row that it speaks of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import record
from ..core.operands import OURS

MEBIBYTE = 2**20
AGAINST_CAUSAL = 1.25  # the aim of training attention on a CPU, in times of two causal SDPA calls
CEILINGS = ("sdpa_no_mask", "sdpa_flash", "sdpa_cudnn", "flash_attention_2", "flash_attention_3")  # not the same work


@dataclass(frozen=True)
class Target:
    """An aim and the cases it was held against: `reached` is that of the worst, `met` how many of `cases` reach it."""

    what: str
    aim: float
    unit: str
    at_least: bool
    reached: float
    worst: str
    met: int
    cases: int

    @property
    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        figures = f"{self.met} of {self.cases} cases, the worst {self.reached:.3g} {self.unit} ({self.worst})"
        return f"{self.what} {sign} {self.aim:g} {self.unit}: {figures}"


def _target(what: str, aim: float, unit: str, found: list[tuple[float, str]], *, at_least: bool = True) -> list[Target]:
    """The target, or nothing where no case was measured."""
    if not found:
        return []
    worst = min(found) if at_least else max(found)
    met = sum(value >= aim if at_least else value <= aim for value, _ in found)
    return [Target(what, aim, unit, at_least, *worst, met, len(found))]


def _rows(folder: Path, device: str, kind: str) -> list[list[dict[str, Any]]]:
    """Rows of a part: of a CPU those of the machine that was measured last; of GPUs those of each."""
    found = record.newest(folder, kind, device)
    if device == "cpu":
        found = sorted(found, key=lambda part: str(part["date"]))[-1:]
    return [part["rows"] for part in found]


def step_cases(rows: list[dict[str, Any]]) -> Iterator[dict[str, dict[str, Any]]]:
    """The rows with figures of step attention, those of a case together, by implementation."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["operator"] == "step_attention" and "p50_us" in row:
            key = row["model"], row["block_size"], row["context_len"], row["batch"]
            found.setdefault(key, {})[row["implementation"]] = row
    yield from (each for each in found.values() if OURS in each)


def _step_name(row: dict[str, Any]) -> str:
    batch = f", batch {row['batch']}" if row["batch"] > 1 else ""
    return f"{row['model']}, B = {row['block_size'] or 'AR'}, {row['context_len']} tokens{batch}"


def _heads(row: dict[str, Any]) -> str:
    return f"{row['num_heads']}/{row['num_kv_heads']} heads"


def _faster(rows: list[dict[str, Any]], blocks: tuple[int, ...], peer: str | None = None) -> list[tuple[float, str]]:
    """Times faster than a peer (None: than the best of all that do the same work), by case."""
    found = []
    for case in step_cases(rows):
        ours = case.pop(OURS)
        times = [row["p50_us"] for name, row in case.items() if (name == peer if peer else name not in CEILINGS)]
        if times and ours["block_size"] in blocks:
            found.append((min(times) / ours["p50_us"], _step_name(ours)))
    return found


def _of_argmax(rows: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """Times as long as an argmax of the same logits: verification with top-p over a vocabulary of 151,936."""
    times: dict[str, float] = {}
    for row in rows:
        shaped = row["operator"] == "verify" and row["vocab_size"] == 151936 and row["temperature"] > 0.0
        alone = not row.get("top_k") and not row.get("min_p") and row.get("repetition_penalty", 1.0) == 1.0
        if shaped and alone and row.get("top_p", 1.0) < 1.0 and "p50_us" in row:
            times[row["implementation"]] = row["p50_us"]
    return [(times[OURS] / times["argmax"], "151936 tokens, top-p")] if {OURS, "argmax"} <= set(times) else []


def cpu(folder: Path) -> list[Target]:
    """The targets of a CPU."""
    found = []
    for rows in _rows(folder, "cpu", "training"):
        mine = [row for row in rows if row.get("implementation") == OURS and "against_floor" in row]
        ratios = [(row["against_floor"], f"{row['dtype']}, {_heads(row)}, {row['direction']}") for row in mine]
        found += _target("training attention, two causal SDPA calls", AGAINST_CAUSAL, "x", ratios, at_least=False)
    for rows in _rows(folder, "cpu", "operators"):
        beside = [case for case in step_cases(rows) if "sdpa_no_mask" in case]
        times = [(case[OURS]["p50_us"] / case["sdpa_no_mask"]["p50_us"], _step_name(case[OURS])) for case in beside]
        found += _target("step attention, SDPA without mask", 1.3, "x", times, at_least=False)
    for rows in _rows(folder, "cpu", "operators"):
        found += _target("verify with top-p, argmax of the same logits", 12.0, "x", _of_argmax(rows), at_least=False)
    exact = [row for rows in _rows(folder, "cpu", "strategies") for row in rows if row.get("exact")]
    if exact:
        best = max(exact, key=lambda row: row["speedup"])
        found += _target("the shipped model, autoregression", 2.5, "x", [(best["speedup"], best["label"])])
    return found


def cuda(folder: Path) -> list[Target]:
    """The targets of a CUDA GPU."""
    found = []
    for rows in _rows(folder, "cuda", "step"):
        copy = next((row["gbytes_per_s"] for row in rows if row["operator"] == "copy"), None)
        ours = [case[OURS] for case in step_cases(rows)]
        if copy:
            for least, most, aim in ((256, float("inf"), 85.0), (64, 256, 70.0)):
                shares = [
                    (100 * row["gbytes_per_s"] / copy, _step_name(row))
                    for row in ours
                    if row["block_size"] == 4 and least <= row["bytes"] / MEBIBYTE < most
                ]
                found += _target(f"step attention, B = 4, from {least} MiB, copy bandwidth", aim, "%", shares)
        wide = [row for row in ours if row["block_size"] >= 8 and row["context_len"] >= 8192]
        rates = [(row["tflops"], _step_name(row)) for row in wide]
        found += _target("step attention, B >= 8, 8192 tokens and more", 550, "TFLOP/s", rates)
        found += _target("step attention, B = 16, FlexAttention", 3.0, "x", _faster(rows, (16,), "flex_attention"))
        found += _target("step attention, the best peer", 1.5, "x", _faster(rows, (4, 8, 16)))
    for rows in _rows(folder, "cuda", "operators"):
        times: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in rows:
            if row["operator"] == "append_kv" and "p50_us" in row:
                key = row["model"], row["new_tokens"], row["batch"]
                times.setdefault(key, {})[row["implementation"]] = row["p50_us"]
        shares = [
            (100 * us["copy"] / us[OURS], f"{model}, {tokens} tokens, batch {batch}")
            for (model, tokens, batch), us in times.items()
            if {OURS, "copy"} <= set(us)
        ]
        found += _target("append, copy_ of as many bytes", 80, "%", shares)
    for rows in _rows(folder, "cuda", "training"):
        mine = [row for row in rows if row.get("implementation") == OURS and "tflops" in row]
        mine = [row for row in mine if (row["seq_len"], row["head_dim"]) == (8192, 128)]
        for direction, aim in (("forward", 600), ("backward", 450)):
            reached = [(row["tflops"], _heads(row)) for row in mine if row["direction"] == direction]
            found += _target(f"training attention {direction}, S = 8192, d = 128", aim, "TFLOP/s", reached)
    return found


def lines(folder: Path, device: str) -> list[str]:
    """The targets of a device, a line each."""
    return [target.line for target in (cpu(folder) if device == "cpu" else cuda(folder))]
