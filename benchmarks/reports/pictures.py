"""Pictures of results: bars of training and strategies, speed against the prefix, the roofline, free token slots.

A picture is a function that draws a part of a results file, and one that says the same as text: a title, and a line for
whatever has figures. Without lines there is nothing to draw. The text is stored in the PNG.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..core import record
from ..core.operands import OURS
from ..operators.attention import Attention
from ..operators.step_peers import STEP

Part = dict[str, Any]
Text = tuple[str, list[str]]  # title, lines
LABELS = {name: one.label for name, one in {**Attention.implementations, **STEP}.items()}
BLUE, RED = "#2f6690", "#d1603d"
COLOURS = {OURS: BLUE, "flex_attention": RED, "sdpa_dense_mask": "#8a8d91"}  # of training
AIMS = {"forward": 1.25, "backward": 1.25}  # of the floor
# Of step attention: implementation -> colour and marker.
STYLES = {
    OURS: (BLUE, "o"),
    "flex_attention": (RED, "s"),
    "sdpa_dense_mask": ("#8a8d91", "^"),
    "sdpa_no_mask": ("0.2", "_"),
    "sdpa_flash": ("0.2", "_"),
    "sdpa_cudnn": ("0.45", "|"),
    "flashinfer": ("#6a994e", "D"),
    "sglang_extend": ("#a15fa8", "v"),
    "flash_attention_2": ("#c9a227", "x"),
    "flash_attention_3": ("#7a5c00", "+"),
}
LADDER = ("#9fc3dd", "#5f93b8", BLUE, "#17364f")


def figure(width: float, height: float, panels: int, **options: Any) -> tuple[Any, Any]:
    """An empty figure, inches, and its panels side by side.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib: needed to draw a PNG; install tidar-kernels[bench]") from error
    drawing = Figure(figsize=(width, height), layout="constrained")
    return drawing, drawing.subplots(1, panels, squeeze=False, **options)[0]


def finish(axes: Any, x: str = "", y: str = "", ticks: Iterable[int] = (), *, grid: bool = False) -> None:
    """What all plots share: no upper and right edge; labels, and a tick for every size, where they are given."""
    axes.spines[["top", "right"]].set_visible(False)
    if x or y:
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
    if grid:
        axes.grid(True, lw=0.3, color="0.85")
    if sizes := sorted(set(ticks)):
        axes.set_xticks(sizes, [str(n) for n in sizes], fontsize=8)
        axes.minorticks_off()


def _where(part: Part) -> str:
    return f"{part['machine'].get('gpu') or part['machine']['cpu']}, {part['date']}"


def training_bars(part: Part, direction: str) -> dict[str, dict[str, float | None]]:
    """Time against the floor: operands -> implementation -> ratio, None where there are no figures."""
    bars: dict[str, dict[str, float | None]] = {}
    for row in part["rows"]:
        if row["operator"] == "attention" and row["direction"] == direction and row["implementation"] in COLOURS:
            group = f"{row['dtype']}, {row['num_heads']}/{row['num_kv_heads']} heads"
            bars.setdefault(group, {})[row["implementation"]] = row.get("against_floor")
    return {group: ratios for group, ratios in bars.items() if any(ratios.values())}


def describe_training(part: Part) -> Text:
    lines = []
    for direction, aim in AIMS.items():
        for group, bars in training_bars(part, direction).items():
            values = ", ".join(f"{name} {'none' if x is None else format(x, '.2f')}" for name, x in bars.items())
            lines.append(f"{direction} (aim {aim}), {group}: {values}")
    return f"training attention, time against the floor, {_where(part)}", lines


def draw_training(part: Part) -> Any:
    """Bars of training attention on a CPU."""
    drawing, panels = figure(10, 4, 2)
    for axes, (direction, aim) in zip(panels, AIMS.items(), strict=True):
        groups = training_bars(part, direction)
        for index, (name, colour) in enumerate(COLOURS.items()):
            heights = [bars.get(name) for bars in groups.values()]
            at = [group + (index - 1) * 0.27 for group in range(len(groups))]
            drawn = axes.bar(at, [height or 0.0 for height in heights], 0.25, color=colour, label=LABELS[name])
            axes.bar_label(drawn, ["n/a" if x is None else f"{x:.2f}" for x in heights], fontsize=7, padding=1)
        axes.axhline(1.0, color="0.2", lw=0.8)
        axes.axhline(aim, color=BLUE, lw=0.8, ls="--", label=f"aim: {aim} x")
        axes.set_xticks(range(len(groups)), [group.replace(", ", "\n") for group in groups], fontsize=8)
        axes.set_title(direction, fontsize=10)
        finish(axes)
        axes.legend(frameon=False, fontsize=7, loc="upper left")
        axes.margins(y=0.4)
    panels[0].set_ylabel("time / time of the floor")
    return drawing


def _strategies(part: Part) -> list[dict[str, Any]]:
    return [row for row in part["rows"] if row["operator"] == "strategy"]


def describe_strategies(part: Part) -> Text:
    title = f"tokens a forward pass, and speed against autoregression, {_where(part)}"
    return title, [f"{r['label']}: {r['tokens_per_forward']:.2f}, {r['speedup']:.2f} x" for r in _strategies(part)]


def draw_strategies(part: Part) -> Any:
    """Bars of all strategies."""
    rows = _strategies(part)[::-1]
    drawing, panels = figure(10, 1 + 0.3 * len(rows), 2, sharey=True)
    colours = [BLUE if row["exact"] else RED for row in rows]
    shown = [("tokens_per_forward", "tokens a forward pass", "")]
    shown += [("speedup", "tokens a second, times autoregression", " x")]
    for axes, (field, title, unit) in zip(panels, shown, strict=True):
        drawn = axes.barh([row["label"] for row in rows], [row[field] for row in rows], 0.7, color=colours)
        axes.bar_label(drawn, [f"{row[field]:.2f}{unit}" for row in rows], fontsize=8, padding=2)
        axes.set_title(title, fontsize=10)
        axes.axvline(1.0, color="0.2", lw=0.8)
        finish(axes)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.15)
    from matplotlib.patches import Patch

    handles = [Patch(color=BLUE, label="output of autoregression"), Patch(color=RED, label="its own output")]
    drawing.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return drawing


def step_rows(part: Part) -> list[dict[str, Any]]:
    """Rows of step attention with figures, one sequence."""
    rows = [row for row in part["rows"] if row["operator"] == "step_attention" and "tflops" in row]
    return [row for row in rows if row["batch"] == 1]


def prefix_series(part: Part) -> dict[int, dict[str, list[tuple[int, float]]]]:
    """Microseconds over the prefix of the model with most prefixes: block size -> implementation -> points."""
    found: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for model, _ in Counter(row["model"] for row in step_rows(part)).most_common(1):
        for row in sorted(step_rows(part), key=lambda row: row["context_len"]):
            if row["model"] == model:
                points = found.setdefault(row["block_size"], {}).setdefault(row["implementation"], [])
                points.append((row["context_len"], row["p50_us"]))
    return dict(sorted(found.items()))


def describe_prefix(part: Part) -> Text:
    return f"step attention, microseconds over the prefix, {_where(part)}", [
        f"B={block} {name}: " + ", ".join(f"{n} {us:.1f}" for n, us in points)
        for block, series in prefix_series(part).items()
        for name, points in series.items()
    ]


def draw_prefix(part: Part) -> Any:
    """Latency of step attention over the prefix, a panel a block length."""
    series = prefix_series(part)
    drawing, panels = figure(11, 3.4, len(series), sharey=True)
    for axes, (block, each) in zip(panels, series.items(), strict=True):
        for name, points in each.items():
            colour, marker = STYLES[name]
            style = {"color": colour, "marker": marker, "ms": 5, "lw": 1.8 if name == OURS else 1.0}
            axes.loglog(*zip(*points, strict=True), label=LABELS[name], **style)
        axes.set_title(f"B = {block}" if block else "single token", fontsize=10)
        y = "" if axes is not panels[0] else "microseconds"
        finish(axes, "tokens of context", y, (n for points in each.values() for n, _ in points), grid=True)
    labels = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    below = {"frameon": False, "fontsize": 8, "loc": "outside lower center", "ncols": len(labels)}
    drawing.legend(labels.values(), labels.keys(), **below)
    return drawing


def _roof(part: Part) -> tuple[float, float] | None:
    """GB/s of a copy and TFLOP/s of a matrix product, where both were measured."""
    copy = next((row["gbytes_per_s"] for row in part["rows"] if row["operator"] == "copy"), None)
    matmul = next((row["tflops"] for row in part["rows"] if row["operator"] == "matmul"), None)
    return (copy, matmul) if copy and matmul else None


def describe_roofline(part: Part) -> Text:
    roof, title = _roof(part), f"step attention under the roofline, {_where(part)}"
    return title + (f"\ncopy {roof[0]:.1f} GB/s, matmul {roof[1]:.2f} TFLOP/s" if roof else ""), [
        f"{row['model']} B={row['block_size']} P={row['context_len']} {row['implementation']}: "
        f"{row['flops'] / row['bytes']:.1f} {row['tflops']:.3g} {row['gbytes_per_s']:.3g}"
        for row in step_rows(part)
    ]


def draw_roofline(part: Part) -> Any:
    """TFLOP/s over arithmetic intensity under the roof, and GB/s over bytes under the copy bandwidth."""
    drawing, (left, right) = figure(11, 4, 2)
    rows, roof = step_rows(part), _roof(part)
    scale, unit = (1.0, "TFLOP/s") if part["machine"]["device"] == "cuda" else (1e3, "GFLOP/s")
    for name in dict.fromkeys(row["implementation"] for row in rows):
        mine = [row for row in rows if row["implementation"] == name]
        colour, marker = STYLES[name]
        style = {"color": colour, "marker": marker, "s": 34 if name == OURS else 20, "label": LABELS[name]}
        left.scatter([row["flops"] / row["bytes"] for row in mine], [row["tflops"] * scale for row in mine], **style)
        right.scatter([row["bytes"] / 1e6 for row in mine], [row["gbytes_per_s"] for row in mine], **style)
    if roof:
        intensities = [row["flops"] / row["bytes"] for row in rows]
        ends = min(intensities) / 1.5, max(intensities) * 1.5
        at = [ends[0], min(max(roof[1] * 1e3 / roof[0], ends[0]), ends[1]), ends[1]]  # the ridge between them
        left.plot(at, [scale * min(x * roof[0] / 1e3, roof[1]) for x in at], color="0.2", lw=1.0, label="roof")
        right.axhline(roof[0], color="0.2", lw=1.0, label="copy")
    for axes, label, measured in ((left, "FLOP a byte", unit), (right, "MB of operands", "GB/s")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        finish(axes, label, measured, grid=True)
    left.legend(frameon=False, fontsize=8)
    return drawing


def slot_series(part: Part) -> dict[str, dict[int, list[tuple[int, float, float]]]]:
    """Model -> prefix -> `(tokens in flight, milliseconds, of the floor in milliseconds)`."""
    found: dict[str, dict[int, list[tuple[int, float, float]]]] = {}
    for row in part["rows"]:
        if row["operator"] == "token_slots" and "p50_us" in row:
            point = row["tokens"], row["p50_us"] / 1e3, row.get("floor_us", 0.0) / 1e3
            found.setdefault(row["model"], {}).setdefault(row["context_len"], []).append(point)
    return found


def describe_slots(part: Part) -> Text:
    return f"a forward pass, milliseconds over tokens in flight, {_where(part)}", [
        f"{model} P={context}: " + ", ".join(f"{n} {ms:.3f}" for n, ms, _ in points)
        for model, each in slot_series(part).items()
        for context, points in each.items()
    ]


def draw_slots(part: Part) -> Any:
    """Latency of a forward pass over the tokens in flight, a line a prefix: flat is free."""
    series = slot_series(part)
    drawing, panels = figure(4 + 3.5 * len(series), 3.8, len(series))
    for axes, (model, each) in zip(panels, series.items(), strict=True):
        for colour, (context, points) in zip(itertools.cycle(LADDER), each.items(), strict=False):
            tokens, times, floors = zip(*sorted(points), strict=True)
            axes.loglog(tokens, times, "o-", color=colour, ms=4, lw=1.5, label=f"{context} tokens of context")
            axes.loglog(tokens, floors, ":", color=colour, lw=1.0)
        for block in (4, 8, 16):
            rows, text = block * (block + 1), {"color": RED, "fontsize": 7, "va": "top"}
            axes.axvline(rows, color=RED, lw=0.7, ls="--")
            axes.text(rows, 1.0, f" B = {block}", **text, transform=axes.get_xaxis_transform())
        axes.set_title(model if model != "shipped" else "the shipped model", fontsize=10)
        x, y = "tokens in flight (dashed: rows of a TiDAR step)", "milliseconds (dotted: floor)"
        finish(axes, x, y, (n for points in each.values() for n, _, _ in points), grid=True)
        axes.legend(frameon=False, fontsize=8)
    return drawing


class Picture(NamedTuple):
    """The parts of results files that it can be drawn from, the drawing, and the same as text."""

    kinds: tuple[str, ...]
    draw: Callable[[Part], Any]
    describe: Callable[[Part], Text]


PICTURES = {
    "training": Picture(("training",), draw_training, describe_training),
    "strategies": Picture(("strategies",), draw_strategies, describe_strategies),
    "step_prefix": Picture(("step", "operators"), draw_prefix, describe_prefix),
    "step_roofline": Picture(("step", "operators"), draw_roofline, describe_roofline),
    "token_slots": Picture(("token_slots",), draw_slots, describe_slots),
}


def part_for(folder: Path, name: str, device: str) -> Part | None:
    """What a picture is drawn from: of the machine whose results are the newest; None if there is nothing to draw."""
    kinds, _, describe = PICTURES[name]
    found = [part for kind in kinds for part in record.newest(folder, kind, device) if describe(part)[1]]
    return max(found, key=lambda part: part["date"], default=None)


def description(name: str, part: Part) -> str:
    """What a picture shows, as text."""
    title, lines = PICTURES[name].describe(part)
    return "\n".join([title, *lines])


def save(name: str, part: Part, path: Path) -> None:
    """Write a picture as PNG with what it shows as text in it.

    Raises:
        ImportError: matplotlib is missing.
    """
    drawing = PICTURES[name].draw(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120, metadata={"Description": description(name, part), "Software": None})


def draw_all(folder: Path, to: Path) -> list[Path]:
    """Every picture that the results of `folder` allow, as `NAME_DEVICE.png`; says so where matplotlib is missing."""
    drawn: list[Path] = []
    for device, name in itertools.product(("cpu", "cuda"), PICTURES):
        part = part_for(folder, name, device)
        if part is not None:
            try:
                save(name, part, to / f"{name}_{device}.png")
            except ImportError as error:
                print(f"no pictures: {error}", file=sys.stderr)
                return drawn
            drawn.append(to / f"{name}_{device}.png")
    return drawn
