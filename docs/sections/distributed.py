"""Tables and the picture of docs/distributed.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.long_sequences import Shape
from sections import Picture, Section
from sections.measured import parts, table, where

GIB = 2**30
ROOM = 64 * GIB  # of a GPU of 80 GB, for what the table counts
COLOURS = ("#17364f", "#d1603d", "#6a994e", "#c9a227", "#a15fa8")


def _runs() -> dict[str, Any]:
    return parts("meshes", "cpu")[0]


def _furthest(losses: list[list[float]]) -> float:
    """The largest difference of a run's losses from those of the first run."""
    first = _runs()["rows"][0]["losses"]
    return max(abs(a - b) for one, other in zip(first, losses, strict=True) for a, b in zip(one, other, strict=True))


def runs_table() -> str:
    """The runs on several meshes, and how far each is from one process."""
    rows = [
        [
            *(row["mesh"], f"{row['processes']}", *(f"{loss:.4f}" for loss in row["losses"][-1])),
            f"{_furthest(row['losses']):.4f}",
        ]
        for row in _runs()["rows"]
    ]
    head = ["mesh", "processes", "last AR loss", "last diffusion loss", "largest difference in any step"]
    return table(head, rows) + f"\n\nNats a byte, noted to 0.0001. {where(_runs())}."


def memory_table() -> str:
    """Measured memory of one call of attention and its backward pass."""
    part = parts("long_sequences", "cpu")[0]
    found = {(row["ranks"], row["seq_len"]): row["most_bytes"] for row in part["rows"]}
    lengths = sorted({seq_len for _, seq_len in found})
    rows = [
        [f"{ranks}", *(f"{found[ranks, seq_len] / 2**20:.1f}" for seq_len in lengths)]
        for ranks in sorted({ranks for ranks, _ in found})
    ]
    head = ["ranks", *(f"S = {seq_len}" for seq_len in lengths)]
    return table(head, rows) + f"\n\nMiB a rank; 8 heads of 2 kv heads, head dim 32, float32. {where(part)}."


def paper_table() -> str:
    """What a rank needs for long sequences, from the formulas."""
    shape, rows = Shape(), []
    for exponent in (15, 16, 17, 18, 19, 20):
        seq_len = 2**exponent
        for gpus in (8, 64, 512):
            fitting = [n for n in (2**i for i in range(10)) if n <= gpus and _total(shape, seq_len, n, gpus) <= ROOM]
            if not fitting:
                needed = _total(shape, seq_len, gpus, gpus) / GIB
                rows.append([_length(seq_len), f"{gpus}", "-", "", "", "", f"{needed:.0f}", ""])
                continue
            ranks = fitting[0]
            sizes = (
                shape.states(gpus),
                shape.checkpoints(seq_len, ranks),
                shape.attention(seq_len, ranks),
                _total(shape, seq_len, ranks, gpus),
                shape.layers * shape.received(seq_len, ranks),
            )
            rows.append([_length(seq_len), f"{gpus}", f"{ranks}", *(f"{size / GIB:.1f}" for size in sizes)])
    head = [
        "S",
        "GPUs (FSDP2)",
        "context ranks",
        "states",
        "layer inputs",
        "attention",
        "together",
        "K/V traffic a step",
    ]
    return table(head, rows, left=0)


def _length(seq_len: int) -> str:
    return f"{seq_len // 2**20}M" if seq_len >= 2**20 else f"{seq_len // 2**10}k"


def _total(shape: Shape, seq_len: int, ranks: int, gpus: int) -> int:
    return shape.states(gpus) + shape.checkpoints(seq_len, ranks) + shape.attention(seq_len, ranks)


def _description() -> str:
    return "\n".join(f"{row['mesh']}: {row['losses']}" for row in _runs()["rows"])


def _save(path: Path) -> None:
    """Every run's losses, wide lines below narrow ones: they lie on each other."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(_runs()["rows"]):
        for kind in (0, 1):
            losses = [both[kind] for both in row["losses"]]
            axes.plot(
                range(1, len(losses) + 1), losses, color=COLOURS[i], lw=6 - 1.2 * i, label=None if kind else row["mesh"]
            )
    axes.annotate("diffusion", (120, 3.45))
    axes.annotate("autoregressive", (120, 2.1))
    axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="cross-entropy, nats a byte")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Description": _description(), "Software": None})


SECTIONS: dict[str, Section] = {
    "mesh-runs": runs_table,
    "context-parallel-memory": memory_table,
    "long-sequences": paper_table,
}
PICTURES = {"images/meshes.png": Picture(_save, _description)}
