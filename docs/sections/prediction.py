"""Predicted figures of GPUs beside measured ones: the traffic of step attention, and whole decoder steps."""

from __future__ import annotations

from typing import Any

from benchmarks import model
from sections import Section
from sections.measured import parts, table


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


SECTIONS: dict[str, Section] = {"predicted-attention": attention_table, "predicted-steps": steps_table}
