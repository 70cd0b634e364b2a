"""Predicted figures of GPUs beside measured ones: the traffic of step attention, and whole decoder steps."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import model
from sections import Section
from sections.measured import RESULTS, parts, table


def _measured(kind: str, **names: Any) -> str:
    """Microseconds of ours for a case, of the first GPU that was measured; nothing where none was."""
    for part in parts(kind, "cuda"):
        for row in part["rows"]:
            ours = row.get("implementation") in ("tidar_kernels", "tidar")
            if ours and "p50_us" in row and all(row.get(name) == value for name, value in names.items()):
                return f"{row['p50_us']:.1f}"
    return ""


def attention_table() -> str:
    """Step attention of a layer with Qwen3-8B's heads: what it moves and launches, and how long that should take."""
    rows = []
    for row in model.attention_rows():
        case = {name: row[name] for name in ("block_size", "context_len", "batch")}
        rows.append([
            f"{row['block_size']}", f"{row['context_len']}", f"{row['batch']}", f"{row['kv_mb']:.1f}",
            f"{row['partials']:.0%}", f"{row['programs']}", f"{row['dead']:.0%}", f"{row['dead_in_a_graph']:.0%}",
            f"{row['waves']}", f"{row['us']:.1f}", row["bound"], _measured("step", model="Qwen3-8B", **case),
        ])  # fmt: skip
    head = [
        "B", "context", "batch", "K/V, MB", "partials of K/V", "programs", "dead", "dead in a graph", "waves",
        "predicted, us", "bound by", "measured, us",
    ]  # fmt: skip
    return table(head, rows, left=0)


def partials_table() -> str:
    """How much of the partial results at B = 4 any scheme would have."""
    rows = [
        [
            f"{row['batch']}", f"{row['context_len']}", f"{row['row_tiles']}", f"{row['programs']}",
            f"{row['least']:.0%}", f"{row['partials']:.0%}",
        ]
        for row in model.partial_rows()
    ]  # fmt: skip
    head = ["batch", "context", "row tiles", "programs a tile that fill the chip", "least partials of K/V", "ours"]
    return table(head, rows, left=0)


def steps_table() -> str:
    """Decoder steps at the shapes of known models."""
    rows = [
        [
            row["model"], f"{row['block_size']}", f"{row['context_len']}", f"{row['autoregressive_us'] / 1e3:.2f}",
            f"{row['step_us'] / 1e3:.2f}", f"{row['ratio']:.2f}", f"{row['passes']}",
            f"{row['speedup']:.2f} x" if row["speedup"] else "",
            _measured("decoder_step", **{name: row[name] for name in ("model", "block_size", "context_len")}),
        ]
        for row in model.step_rows()
    ]  # fmt: skip
    head = [
        "shape of", "B", "context", "AR step, ms", "step, ms", "times AR", "lm_head passes", "speed-up", "measured, us"
    ]  # fmt: skip
    counted = model.launches_of_layer()
    said = (
        f"A layer launches {counted['torch']} kernels of PyTorch and {counted['ours']} operators of ours, counted on "
        "the CPU, where a norm is several; the lm_head, verification and sampling come once a step. Speed-up: the "
        "tokens a forward pass that TiDAR publishes for the model, over the predicted step."
    )
    return table(head, rows) + f"\n\n{said}"


def _both(before: Any, after: Any) -> str:
    """One value where nothing changed."""
    return f"{after}" if before == after else f"{before} → {after}"


def training_kernels_table() -> str:
    """The training kernels of two trees as the compiler left them, and what a GPU should make of them."""
    found = json.loads((RESULTS / "training-kernels.json").read_text())
    old, new = found["before"], found["after"]
    lines = []
    for one, other in zip(old["rows"], new["rows"], strict=True):
        both = [_entry(row) for row in (one, other)]
        cells = [_both(*pair) for pair in zip(*both, strict=True)]
        lines.append([f"`{other['kernel']}`", f"cc {other['chip']}", f"{other['head_dim']}", *cells])
    head = ["kernel", "chip", "d", "tile, stages", "registers", "spilled", "shared, kB", "resident warps"]
    head += ["tensor-core instructions", "others", "load to use"]
    predicted = [
        [f"cc {one['chip']}", f"{one['head_dim']}", one["pattern"]]
        + [_both(f"{one[name]:.0f}", f"{other[name]:.0f}") for name in ("forward", "backward")]
        for one, other in zip(old["predicted"], new["predicted"], strict=True)
    ]
    said = (
        f"Commit {old['commit']} → commit {new['commit']}, bfloat16, Triton {found['triton']}; one value where both "
        "are the same. Instructions are of one turn of the hot loop. Load to use: instructions between a plain load in "
        "it and what needs its value, the tensor cores' among them in brackets."
    )
    expected = table(["chip", "d", "pattern", "forward, TFLOP/s", "backward, TFLOP/s"], predicted, left=3)
    return f"{table(head, lines, left=2)}\n\n{said}\n\n{expected}"


def _entry(row: dict[str, Any]) -> list[str]:
    config, loop, loads = row["config"], row["loop"], row["load_to_use"]
    return [
        f"{config['BLOCK_M']} x {config['BLOCK_N']}, {config['num_stages']}", f"{row['registers']}",
        f"{row['spill_bytes'] or '–'}", f"{row['shared_bytes'] / 1024:.0f}", f"{row['warps']}",
        f"{loop['mma']} {row['tensor_core'][0]}", f"{sum(loop.values()) - loop['mma']}",
        f"{loads[0]} ({loads[1]})" if loads else "–",
    ]  # fmt: skip


SECTIONS: dict[str, Section] = {
    "predicted-attention": attention_table,
    "predicted-partials": partials_table,
    "predicted-steps": steps_table,
    "training-kernels": training_kernels_table,
}
