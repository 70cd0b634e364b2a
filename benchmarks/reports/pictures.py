"""Pictures of results: bars of training and strategies, speed against the prefix, the roofline, free token slots.

A picture is data, panels of bars or of points, that a function takes from a part of a results file. All are drawn
alike, and the same data as text is stored in the PNG. Without panels there is nothing to draw.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..core import record
from ..core.operands import OURS
from ..operators.attention import DIRECTIONS, Attention
from ..operators.step_peers import STEP
from .targets import AGAINST_CAUSAL

Part = dict[str, Any]
LABELS = {name: one.label for name, one in {**Attention.implementations, **STEP}.items()}
BLUE, RED = "#2f6690", "#d1603d"
LADDER = ("#9fc3dd", "#5f93b8", BLUE, "#17364f")
# Implementations: colour and marker.
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
OF_TRAINING = (OURS, "flex_attention", "sdpa_dense_mask")
EXACT, OTHER = "output of autoregression", "its own output"  # of strategies
COLOURS = {**{name: colour for name, (colour, _) in STYLES.items()}, EXACT: BLUE, OTHER: RED}
SETTINGS: dict[Any, Any] = {  # of matplotlib, for all pictures
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8, "font.size": 8,
    "grid.linewidth": 0.3, "grid.color": "0.85", "lines.linewidth": 1.0, "lines.markersize": 5,
}  # fmt: skip


class Series(NamedTuple):
    """Points `(x, y)`, how they are drawn, and their entry in the legend, if they have one."""

    points: Sequence[tuple[float, float]]
    style: dict[str, Any]
    label: str = ""


@dataclass
class Panel:
    """Bars, or points on logarithmic axes.

    Args:
        title, x, y: of the panel and its axes.
        bars: a group's name -> a series' name -> length, None where there are no figures.
        points: by the name that each series has in the text.
        marks: vertical lines, and what is written on them.
    """

    title: str
    x: str
    y: str = ""
    bars: dict[str, dict[str, float | None]] = field(default_factory=dict)
    points: dict[str, Series] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """What it shows, as text."""
        for group, bars in self.bars.items():
            values = ", ".join(f"{name} {'none' if x is None else format(x, '.2f')}" for name, x in bars.items())
            yield f"{self.title}, {group}: {values}"
        for name, series in self.points.items():
            yield f"{self.title}, {name}: " + ", ".join(f"{x:.4g} {y:.4g}" for x, y in series.points)


def training_bars(part: Part, direction: str) -> dict[str, dict[str, float | None]]:
    """Time against the floor: operands -> implementation -> ratio, None where there are no figures."""
    bars: dict[str, dict[str, float | None]] = {}
    for row in part["rows"]:
        if row["operator"] == "attention" and row["direction"] == direction and row["implementation"] in OF_TRAINING:
            group = f"{row['dtype']}, {row['num_heads']}/{row['num_kv_heads']} heads"
            bars.setdefault(group, {})[row["implementation"]] = row.get("against_floor")
    return {group: ratios for group, ratios in bars.items() if any(ratios.values())}


def training(part: Part) -> list[Panel]:
    """Bars of training attention on a CPU."""
    marks = {"": 1.0, f"aim: {AGAINST_CAUSAL} x": AGAINST_CAUSAL}
    panels = [
        Panel(direction, "time / time of the floor", bars=training_bars(part, direction), marks=marks)
        for direction in DIRECTIONS
    ]
    return [panel for panel in panels if panel.bars]


def strategies(part: Part) -> list[Panel]:
    """Bars of all strategies."""
    rows = [row for row in part["rows"] if row["operator"] == "strategy"]
    shown = (("tokens_per_forward", "tokens a forward pass"), ("speedup", "tokens a second, times autoregression"))
    return [
        Panel(title, "", bars={row["label"]: {EXACT if row["exact"] else OTHER: row[name]} for row in rows},
              marks={"": 1.0})
        for name, title in shown * bool(rows)
    ]  # fmt: skip


def _step_rows(part: Part) -> list[dict[str, Any]]:
    """Rows of step attention with figures, one sequence."""
    rows = [row for row in part["rows"] if row["operator"] == "step_attention" and "tflops" in row]
    return [row for row in rows if row["batch"] == 1]


def _series(name: str, points: list[tuple[float, float]], line: str) -> Series:
    """The points of an implementation."""
    colour, marker = STYLES[name]
    wide = {"lw": 1.8, "zorder": 3} if name == OURS else {}
    return Series(points, {"color": colour, "marker": marker, "ls": line, **wide}, LABELS[name])


def prefix(part: Part) -> list[Panel]:
    """Microseconds over the prefix of the model with most prefixes, a panel a block length."""
    found: dict[int, dict[str, list[tuple[float, float]]]] = {}
    for model, _ in Counter(row["model"] for row in _step_rows(part)).most_common(1):
        for row in sorted(_step_rows(part), key=lambda row: row["context_len"]):
            if row["model"] == model:
                points = found.setdefault(row["block_size"], {}).setdefault(row["implementation"], [])
                points.append((row["context_len"], row["p50_us"]))
    return [
        Panel(f"B = {block}" if block else "single token", "tokens of context", "microseconds",
              points={name: _series(name, points, "-") for name, points in each.items()})
        for block, each in sorted(found.items())
    ]  # fmt: skip


def roofline(part: Part) -> list[Panel]:
    """TFLOP/s over arithmetic intensity under the roof, and GB/s over bytes under the copy bandwidth."""
    rows = _step_rows(part)
    if not rows:
        return []
    scale, unit = (1.0, "TFLOP/s") if part["machine"]["device"] == "cuda" else (1e3, "GFLOP/s")
    left, right = Panel("under the roof", "FLOP a byte", unit), Panel("under copy", "MB of operands", "GB/s")
    for name in dict.fromkeys(row["implementation"] for row in rows):
        mine = [row for row in rows if row["implementation"] == name]
        left.points[name] = _series(name, [(row["flops"] / row["bytes"], row["tflops"] * scale) for row in mine], "")
        right.points[name] = _series(name, [(row["bytes"] / 1e6, row["gbytes_per_s"]) for row in mine], "")
    copy = next((row["gbytes_per_s"] for row in part["rows"] if row["operator"] == "copy"), None)
    matmul = next((row["tflops"] for row in part["rows"] if row["operator"] == "matmul"), None)
    if copy and matmul:
        black = {"color": "0.2"}
        (first, last), (small, large) = (
            (min(xs) / 1.5, max(xs) * 1.5)
            for xs in ([row["flops"] / row["bytes"] for row in rows], [row["bytes"] / 1e6 for row in rows])
        )
        at = [first, min(max(matmul * 1e3 / copy, first), last), last]  # the ridge between the ends
        left.points["roof"] = Series([(x, scale * min(x * copy / 1e3, matmul)) for x in at], black, "roof, copy")
        right.points["copy"] = Series([(small, copy), (large, copy)], black, "roof, copy")
    return [left, right]


def slot_series(part: Part) -> dict[str, dict[int, list[tuple[int, float, float]]]]:
    """Model -> prefix -> `(tokens in flight, milliseconds, of the floor in milliseconds)`."""
    found: dict[str, dict[int, list[tuple[int, float, float]]]] = {}
    for row in part["rows"]:
        if row["operator"] == "token_slots" and "p50_us" in row:
            point = row["tokens"], row["p50_us"] / 1e3, row.get("floor_us", 0.0) / 1e3
            found.setdefault(row["model"], {}).setdefault(row["context_len"], []).append(point)
    return found


def slots(part: Part) -> list[Panel]:
    """Latency of a forward pass over the tokens in flight, a line a prefix: flat is free."""
    found, marks = [], {f"B = {block}": float(block * (block + 1)) for block in (4, 8, 16)}
    for model, each in slot_series(part).items():
        title = model if model != "shipped" else "the shipped model"
        panel = Panel(title, "tokens in flight (dashed: rows of a TiDAR step)", "milliseconds", marks=marks)
        for colour, (context, points) in zip(itertools.cycle(LADDER), each.items(), strict=False):
            times, floors = [(n, ms) for n, ms, _ in sorted(points)], [(n, floor) for n, _, floor in sorted(points)]
            name = f"{context} tokens of context"
            panel.points[name] = Series(times, {"color": colour, "marker": "o", "lw": 1.5}, name)
            panel.points[f"{name}, floor"] = Series(floors, {"color": colour, "ls": ":"}, "dotted: floor")
        found.append(panel)
    return found


class Picture(NamedTuple):
    """The parts of results files that it can be drawn from, what it shows, and its panels."""

    kinds: tuple[str, ...]
    title: str
    panels: Callable[[Part], list[Panel]]


PICTURES = {
    "training": Picture(("training",), "training attention, time against the floor", training),
    "strategies": Picture(("strategies",), "tokens a forward pass, and speed against autoregression", strategies),
    "step_prefix": Picture(("step", "operators"), "step attention, microseconds over the prefix", prefix),
    "step_roofline": Picture(("step", "operators"), "step attention under the roofline", roofline),
    "token_slots": Picture(("token_slots",), "a forward pass, milliseconds over tokens in flight", slots),
}


def part_for(folder: Path, name: str, device: str) -> Part | None:
    """What a picture is drawn from: of the machine whose results are the newest; None if there is nothing to draw."""
    kinds, _, panels = PICTURES[name]
    found = [part for kind in kinds for part in record.newest(folder, kind, device) if panels(part)]
    return max(found, key=lambda part: part["date"], default=None)


def description(name: str, part: Part) -> str:
    """What a picture shows, as text."""
    title = f"{PICTURES[name].title}, {part['machine'].get('gpu') or part['machine']['cpu']}, {part['date']}"
    return "\n".join([title, *(line for panel in PICTURES[name].panels(part) for line in panel.lines())])


def _bars(axes: Any, panel: Panel) -> None:
    """Groups of bars, the first on top; each as long as it says."""
    most = max(map(len, panel.bars.values()))
    for name in dict.fromkeys(name for bars in panel.bars.values() for name in bars):
        mine = [(at, list(bars).index(name), bars[name]) for at, bars in enumerate(panel.bars.values()) if name in bars]
        where = [at + 0.8 * (index - (most - 1) / 2) / most for at, index, _ in mine]
        lengths = [length or 0.0 for _, _, length in mine]
        drawn = axes.barh(where, lengths, 0.72 / most, color=COLOURS[name], label=LABELS.get(name, name))
        axes.bar_label(drawn, ["n/a" if x is None else f"{x:.2f}" for _, _, x in mine], padding=2)
    axes.set_yticks(range(len(panel.bars)), panel.bars)
    axes.set_ylim(len(panel.bars) - 0.5, -0.5)
    axes.margins(x=0.15)


def _points(axes: Any, panel: Panel) -> None:
    """Lines, with a tick for every size where there are sizes."""
    for series in panel.points.values():
        axes.loglog(*zip(*series.points, strict=True), label=series.label, **series.style)
    axes.grid(True)
    sizes = sorted({x for series in panel.points.values() for x, _ in series.points})
    if all(isinstance(x, int) for x in sizes):
        axes.set_xticks(sizes, [str(x) for x in sizes])
        axes.minorticks_off()


def save(name: str, part: Part, path: Path) -> None:
    """Write a picture as PNG with what it shows as text in it.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib: needed to draw a PNG; install tidar-kernels[bench]") from error
    panels = PICTURES[name].panels(part)
    bars = sum(map(len, panels[0].bars.values()))
    with rc_context(SETTINGS):
        drawing = Figure(figsize=(4 + 3.5 * min(len(panels), 2), 1 + 0.3 * bars if bars else 4), layout="constrained")
        same_y = len({panel.y for panel in panels}) == 1
        entries: dict[str, Any] = {}
        for axes, panel in zip(drawing.subplots(1, len(panels), sharey=same_y, squeeze=False)[0], panels, strict=True):
            (_bars if panel.bars else _points)(axes, panel)
            for text, at in panel.marks.items():
                axes.axvline(at, color=RED, lw=0.7, ls="--")
                axes.text(at, 1.0, f" {text}", color=RED, fontsize=7, va="top", transform=axes.get_xaxis_transform())
            axes.set(title=panel.title, xlabel=panel.x, ylabel="" if same_y and entries else panel.y)
            entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        drawing.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(len(entries), 5))
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
