"""Pictures of results: bars of training and strategies, speed against the prefix, the roofline, free token slots."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core import record
from ..core.operands import OURS
from ..operators.attention import Attention
from ..operators.step_peers import STEP

LABELS = {name: one.label for name, one in {**Attention.implementations, **STEP}.items()}
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
        finish(axes)
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
        finish(axes)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.15)
    from matplotlib.patches import Patch

    handles = [Patch(color="#2f6690", label="output of autoregression"), Patch(color="#d1603d", label="its own output")]
    drawing.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    save(drawing, path, strategies_description(result))


# Implementation -> colour and marker.
STYLES = {
    OURS: ("#2f6690", "o"),
    "flex_attention": ("#d1603d", "s"),
    "sdpa_dense_mask": ("#8a8d91", "^"),
    "sdpa_no_mask": ("0.2", "_"),
    "sdpa_flash": ("0.2", "_"),
    "sdpa_cudnn": ("0.45", "|"),
    "flashinfer": ("#6a994e", "D"),
    "sglang_extend": ("#a15fa8", "v"),
    "flash_attention_2": ("#c9a227", "x"),
    "flash_attention_3": ("#7a5c00", "+"),
}
LADDER = ("#9fc3dd", "#5f93b8", "#2f6690", "#17364f")


def step_rows(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of step attention with figures, one sequence."""
    rows = [row for row in part["rows"] if row["operator"] == "step_attention" and "tflops" in row]
    return [row for row in rows if row["batch"] == 1]


def _where(part: dict[str, Any]) -> str:
    return f"{part['machine'].get('gpu') or part['machine']['cpu']}, {part['date']}"


def prefix_series(part: dict[str, Any]) -> dict[int, dict[str, list[tuple[int, float]]]]:
    """Microseconds over the prefix of the model with most prefixes: block size -> implementation -> points."""
    rows = step_rows(part)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["model"]] = counts.get(row["model"], 0) + 1
    chosen = max(counts, key=lambda name: counts[name], default="")
    found: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for row in sorted((row for row in rows if row["model"] == chosen), key=lambda row: row["context_len"]):
        points = found.setdefault(row["block_size"], {}).setdefault(row["implementation"], [])
        points.append((row["context_len"], row["p50_us"]))
    return dict(sorted(found.items()))


def prefix_description(part: dict[str, Any]) -> str:
    """What the picture shows, as text."""
    lines = [f"step attention, microseconds over the prefix, {_where(part)}"]
    for block, series in prefix_series(part).items():
        for name, points in series.items():
            lines.append(f"B={block} {name}: " + ", ".join(f"{n} {us:.1f}" for n, us in points))
    return "\n".join(lines)


def save_prefix(part: dict[str, Any], path: Path) -> None:
    """Latency of step attention over the prefix, a panel a block length."""
    series = prefix_series(part)
    drawing = figure(11, 3.4)
    panels = drawing.subplots(1, max(1, len(series)), sharey=True, squeeze=False)[0]
    for axes, (block, each) in zip(panels, series.items(), strict=False):
        for name, points in each.items():
            colour, marker = STYLES[name]
            style = {"color": colour, "marker": marker, "ms": 5, "lw": 1.8 if name == OURS else 1.0}
            axes.loglog(*zip(*points, strict=True), label=LABELS[name], **style)
        axes.set_title(f"B = {block}" if block else "single token", fontsize=10)
        y = "" if axes is not panels[0] else "microseconds"
        finish(axes, "tokens of context", y, (n for points in each.values() for n, _ in points), grid=True)
    handles = {
        text: handle
        for axes in panels
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    drawing.legend(
        handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=len(handles) or 1
    )
    save(drawing, path, prefix_description(part))


def _roof(part: dict[str, Any]) -> tuple[float, float] | None:
    """Copy bandwidth in GB/s and matmul rate in TFLOP/s of the part's own run."""
    copy = next((row["gbytes_per_s"] for row in part["rows"] if row["operator"] == "copy"), None)
    matmul = next((row["tflops"] for row in part["rows"] if row["operator"] == "matmul"), None)
    return (copy, matmul) if copy and matmul else None


def roofline_description(part: dict[str, Any]) -> str:
    """What the picture shows, as text."""
    roof = _roof(part)
    lines = [f"step attention under the roofline, {_where(part)}"]
    lines += [f"copy {roof[0]:.1f} GB/s, matmul {roof[1]:.2f} TFLOP/s"] if roof else []
    for row in step_rows(part):
        place = f"{row['model']} B={row['block_size']} P={row['context_len']} {row['implementation']}"
        lines.append(f"{place}: {row['flops'] / row['bytes']:.1f} {row['tflops']:.3g} {row['gbytes_per_s']:.3g}")
    return "\n".join(lines)


def save_roofline(part: dict[str, Any], path: Path) -> None:
    """TFLOP/s over arithmetic intensity under the roof, and GB/s over bytes under the copy bandwidth."""
    drawing = figure(11, 4)
    left, right = drawing.subplots(1, 2)
    rows, roof = step_rows(part), _roof(part)
    scale, unit = (1.0, "TFLOP/s") if part["machine"]["device"] == "cuda" else (1e3, "GFLOP/s")
    for name in dict.fromkeys(row["implementation"] for row in rows):
        mine = [row for row in rows if row["implementation"] == name]
        colour, marker = STYLES[name]
        style = {"color": colour, "marker": marker, "s": 34 if name == OURS else 20, "label": LABELS[name]}
        left.scatter([row["flops"] / row["bytes"] for row in mine], [row["tflops"] * scale for row in mine], **style)
        right.scatter([row["bytes"] / 1e6 for row in mine], [row["gbytes_per_s"] for row in mine], **style)
    if roof and rows:
        intensities = sorted(row["flops"] / row["bytes"] for row in rows)
        ends = intensities[0] / 1.5, intensities[-1] * 1.5
        ridge = min(max(roof[1] * 1e3 / roof[0], ends[0]), ends[1])
        at = [ends[0], ridge, ends[1]]
        left.plot(at, [scale * min(x * roof[0] / 1e3, roof[1]) for x in at], color="0.2", lw=1.0, label="roof")
        right.axhline(roof[0], color="0.2", lw=1.0, label="copy")
    for axes, label, measured in ((left, "FLOP a byte", unit), (right, "MB of operands", "GB/s")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        finish(axes, label, measured, grid=True)
    left.legend(frameon=False, fontsize=8)
    save(drawing, path, roofline_description(part))


def slot_series(part: dict[str, Any]) -> dict[str, dict[int, list[tuple[int, float, float]]]]:
    """Model -> prefix -> `(tokens in flight, milliseconds, of the floor in milliseconds)`."""
    found: dict[str, dict[int, list[tuple[int, float, float]]]] = {}
    for row in part["rows"]:
        if row["operator"] == "token_slots" and "p50_us" in row:
            point = row["tokens"], row["p50_us"] / 1e3, row.get("floor_us", 0.0) / 1e3
            found.setdefault(row["model"], {}).setdefault(row["context_len"], []).append(point)
    return found


def slots_description(part: dict[str, Any]) -> str:
    """What the picture shows, as text."""
    lines = [f"a forward pass, milliseconds over tokens in flight, {_where(part)}"]
    for model, each in slot_series(part).items():
        for context, points in each.items():
            lines.append(f"{model} P={context}: " + ", ".join(f"{n} {ms:.3f}" for n, ms, _ in points))
    return "\n".join(lines)


def save_slots(part: dict[str, Any], path: Path) -> None:
    """Latency of a forward pass over the tokens in flight, a line a prefix: flat is free."""
    series = slot_series(part)
    drawing = figure(4 + 3.5 * len(series), 3.8)
    panels = drawing.subplots(1, max(1, len(series)), squeeze=False)[0]
    for axes, (model, each) in zip(panels, series.items(), strict=False):
        for colour, (context, points) in zip(itertools.cycle(LADDER), each.items(), strict=False):
            tokens, times, floors = zip(*sorted(points), strict=True)
            axes.loglog(tokens, times, "o-", color=colour, ms=4, lw=1.5, label=f"{context} tokens of context")
            axes.loglog(tokens, floors, ":", color=colour, lw=1.0)
        for block in (4, 8, 16):
            axes.axvline(block * (block + 1), color="#d1603d", lw=0.7, ls="--")
            axes.text(
                block * (block + 1), 1.0, f" B = {block}", color="#d1603d", fontsize=7, va="top",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        axes.set_title(model if model != "shipped" else "the shipped model", fontsize=10)
        x, y = "tokens in flight (dashed: rows of a TiDAR step)", "milliseconds (dotted: floor)"
        finish(axes, x, y, (n for points in each.values() for n, _, _ in points), grid=True)
        axes.legend(frameon=False, fontsize=8)
    save(drawing, path, slots_description(part))


# Picture -> the parts it is drawn from, the drawing, its description.
PICTURES = {
    "step_prefix": (("step", "operators"), save_prefix, prefix_description),
    "step_roofline": (("step", "operators"), save_roofline, roofline_description),
    "token_slots": (("token_slots",), save_slots, slots_description),
}


def part_for(folder: Path, name: str, device: str) -> dict[str, Any] | None:
    """What a picture is drawn from: of the machine whose results are the newest; None if there is nothing to draw."""
    kinds = PICTURES[name][0]
    found = [part for kind in kinds for part in record.newest(folder, kind, device) if _drawable(name, part)]
    return max(found, key=lambda part: part["date"], default=None)


def _drawable(name: str, part: dict[str, Any]) -> bool:
    return bool(slot_series(part)) if name == "token_slots" else bool(step_rows(part))


def draw_all(folder: Path, to: Path) -> list[Path]:
    """Every picture that the results of `folder` allow, as `NAME_DEVICE.png`; says so where matplotlib is missing."""
    drawn: list[Path] = []
    for device in ("cpu", "cuda"):
        for name, (_, save, _) in PICTURES.items():
            part = part_for(folder, name, device)
            if part is None:
                continue
            path = to / f"{name}_{device}.png"
            try:
                save(part, path)
            except ImportError as error:
                print(f"no pictures: {error}", file=sys.stderr)
                return drawn
            drawn.append(path)
    return drawn
