"""Bar charts of results, and what all pictures share; docs/generate.py draws them for the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .peers import STEP

LABELS = {
    **{name: implementation.label for name, implementation in STEP.items()},
    "causal_sdpa": "2 causal SDPA calls: the floor",
    "causal_flash": "causal flash",
    "causal_cudnn": "causal cuDNN",
}
COLOURS = {"tidar_kernels": "#2f6690", "flex_attention": "#d1603d", "sdpa_dense_mask": "#8a8d91"}
AIMS = {"forward": 1.25, "backward": 1.25}  # of the floor


def training_bars(result: dict[str, Any], direction: str) -> dict[str, dict[str, float | None]]:
    """Time against the floor: operands -> implementation -> ratio, None where there are no figures."""
    bars: dict[str, dict[str, float | None]] = {}
    for row in result["rows"]:
        if row["operator"] == "attention" and row["direction"] == direction and row["implementation"] in COLOURS:
            group = f"{row['dtype']}, {row['num_heads']}/{row['num_kv_heads']} heads"
            bars.setdefault(group, {})[row["implementation"]] = row.get("against_floor")
    return bars


def training_description(result: dict[str, Any]) -> str:
    """What the picture shows, as text: it is stored in the PNG."""
    lines = [f"training attention, time against the floor, {result['machine']['cpu']}, {result['date']}"]
    for direction, aim in AIMS.items():
        for group, bars in training_bars(result, direction).items():
            values = ", ".join(f"{name} {'none' if x is None else format(x, '.2f')}" for name, x in bars.items())
            lines.append(f"{direction} (aim {aim}), {group}: {values}")
    return "\n".join(lines)


def figure(width: float, height: float) -> Any:
    """An empty figure, inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib: needed to draw a PNG; install tidar-kernels[bench]") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(drawing: Any, path: Path, description: str) -> None:
    """Write a figure as PNG with what it shows as text in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120, metadata={"Description": description, "Software": None})


def save_training(result: dict[str, Any], path: Path) -> None:
    """The bar chart of training attention on a CPU as a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    drawing = figure(10, 4)
    for axes, (direction, aim) in zip(drawing.subplots(1, 2), AIMS.items(), strict=True):
        groups = training_bars(result, direction)
        for index, (name, colour) in enumerate(COLOURS.items()):
            heights = [bars.get(name) for bars in groups.values()]
            at = [group + (index - 1) * 0.27 for group in range(len(groups))]
            drawn = axes.bar(at, [height or 0.0 for height in heights], 0.25, color=colour, label=LABELS[name])
            axes.bar_label(drawn, ["n/a" if x is None else f"{x:.2f}" for x in heights], fontsize=7, padding=1)
        axes.axhline(1.0, color="0.2", lw=0.8)
        axes.axhline(aim, color="#2f6690", lw=0.8, ls="--", label=f"aim: {aim} x")
        axes.set_xticks(range(len(groups)), [group.replace(", ", "\n") for group in groups], fontsize=8)
        axes.set_title(direction, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="upper left")
        axes.margins(y=0.4)
    drawing.axes[0].set_ylabel("time / time of the floor")
    save(drawing, path, training_description(result))


def strategies_description(result: dict[str, Any]) -> str:
    """What the picture shows, as text: it is stored in the PNG."""
    lines = [f"tokens a forward pass, and speed against autoregression, {result['machine']['cpu']}, {result['date']}"]
    rows = [row for row in result["rows"] if row["operator"] == "strategy"]
    lines += [f"{row['label']}: {row['tokens_per_forward']:.2f}, {row['speedup']:.2f} x" for row in rows]
    return "\n".join(lines)


def save_strategies(result: dict[str, Any], path: Path) -> None:
    """The bar chart of all strategies as a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = [row for row in result["rows"] if row["operator"] == "strategy"][::-1]
    drawing = figure(10, 1 + 0.3 * len(rows))
    left, right = drawing.subplots(1, 2, sharey=True)
    colours = ["#2f6690" if row["exact"] else "#d1603d" for row in rows]
    for axes, field, title in ((left, "tokens_per_forward", "tokens a forward pass"), (right, "speedup", "speed")):
        drawn = axes.barh([row["label"] for row in rows], [row[field] for row in rows], 0.7, color=colours)
        labels = [f"{row[field]:.2f}{' x' if field == 'speedup' else ''}" for row in rows]
        axes.bar_label(drawn, labels, fontsize=8, padding=2)
        axes.set_title(title if field != "speedup" else "tokens a second, times autoregression", fontsize=10)
        axes.axvline(1.0, color="0.2", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.15)
    from matplotlib.patches import Patch

    handles = [Patch(color="#2f6690", label="output of autoregression"), Patch(color="#d1603d", label="its own output")]
    drawing.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    save(drawing, path, strategies_description(result))
