"""docs/architecture.md: the floor plan of the package, drawn from its imports and from the floors in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

import grimp
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from sections import Picture

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "tidar_kernels"
CONTRACT = "the floors of the package"
# What a room is for, in the words of a newcomer. A room without words here is an error.
PURPOSE = {
    "cli": "the command",
    "testing": "kernel parity as public API",
    "models": "a small decoder, its training, the shipped checkpoint",
    "integrations": "models of others",
    "decoding": "sessions, strategies, the decoder",
    "nn": "layers, adapters, the loss",
    "distributed": "rows shared out over devices, keys gathered",
    "cache": "KVCache",
    "eager": "the twins under one name",
    "ops": "the operators, a folder each",
    "patterns": "context + two intervals a row, a file a system",
}
# Files and folders that a newcomer need not see.
HIDDEN = {"__init__", "__main__", "custom_generate", "halves", "rows"}
WIDTH, FLOOR, PLANK, LINE, LINE_HEIGHT = 13.0, 1.0, 0.18, 92, 0.26
INK, FAINT, WALL, ROOM = "#1f2933", "#66727f", "#2f6db5", "#eaf1f9"


def _floors() -> list[str]:
    """Rooms from the roof down, from pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = (contract for contract in settings["contracts"] if contract["name"] == CONTRACT)
    return list(contract["layers"])


def _imports(rooms: list[str]) -> list[tuple[str, str]]:
    """Pairs of rooms, of which the first imports from the second."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            first, second = (f"{name}.".split(".")[1] for name in (module, imported))
            if first != second and first in rooms and second in rooms:
                found.add((first, second))
    return sorted(found, key=lambda pair: (rooms.index(pair[0]), rooms.index(pair[1])))


def _inside(room: str) -> list[str]:
    """A line a folder of a room, with what is in it, and lines of the files beside them."""
    folder = ROOT / PACKAGE / room
    lines = [
        line
        for path in sorted(folder.glob("*/__init__.py"))
        if path.parent.name not in HIDDEN
        for line in _wrapped(f"{path.parent.name}/".ljust(18), _files(path.parent))
    ]
    return lines + _wrapped("", _files(folder))


def _files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in HIDDEN)


def _wrapped(label: str, names: list[str]) -> list[str]:
    """`names` in lines of at most LINE characters, the first after `label`, the others below its end."""
    lines, line = [], label
    for name in names:
        if len(line) + len(name) > LINE:
            lines.append(line)
            line = " " * len(label)
        line += f"{name}  "
    return [*lines, line] if line.strip() else lines


def description() -> str:
    """All that the picture shows, as text: it tells whether the picture is current."""
    rooms = _floors()
    lines = [line for room in rooms for line in (f"{room}: {PURPOSE[room]}", *_inside(room))]
    lines += [f"{a} -> {b}" for a, b in _imports(rooms)]
    return "\n".join(lines)


def save(path: Path) -> None:
    """Draw the plan: a floor a room, and a shaft a room with an arrow into every floor that it imports from."""
    rooms = _floors()
    imports = _imports(rooms)
    contents = {room: _inside(room) for room in rooms}
    heights = {room: FLOOR + LINE_HEIGHT * max(0, len(contents[room]) - 1) for room in rooms}
    top = sum(heights.values()) + PLANK * len(rooms)
    figure = Figure(figsize=(WIDTH, top * 0.72 + 0.6), dpi=150)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(-0.1, top + 0.5)
    axes.axis("off")
    axes.text(0.1, top + 0.2, "rooms of tidar_kernels, from the roof down", fontsize=12, color=INK, weight="bold")
    axes.text(8.6, top + 0.2, "an arrow: imports from", fontsize=10, color=FAINT)
    middle, edge, ceiling = {}, 8.4, top
    for room in rooms:
        floor = ceiling - heights[room]
        box = FancyBboxPatch((0.1, floor), edge - 0.1, heights[room], "round,pad=0,rounding_size=0.08")
        box.set(facecolor=ROOM, edgecolor=WALL, linewidth=1.2)
        axes.add_patch(box)
        name = f"{room}/" if (ROOT / PACKAGE / room).is_dir() else f"{room}.py"
        axes.text(0.3, ceiling - 0.36, name, fontsize=12, color=WALL, weight="bold", family="monospace")
        axes.text(edge - 0.15, ceiling - 0.36, PURPOSE[room], fontsize=10, color=INK, ha="right")
        for i, line in enumerate(contents[room]):
            axes.text(0.3, ceiling - 0.74 - LINE_HEIGHT * i, line, fontsize=8, color=FAINT, family="monospace")
        middle[room] = (ceiling + floor) / 2
        ceiling = floor - PLANK
    sources = [room for room in rooms if any(a == room for a, _ in imports)]
    arrivals = {room: [a for a, b in imports if b == room] for room in rooms}

    def height_of(source: str, target: str) -> float:
        """Where an arrow meets its floor: in the lower half, one below another."""
        place = (arrivals[target].index(source) + 1) / (len(arrivals[target]) + 1)
        return middle[target] - place * heights[target] / 2

    apart = (WIDTH - edge - 1.1) / len(sources)
    for lane, room in enumerate(sources):
        x = edge + 0.35 + apart * lane
        reached = [b for a, b in imports if a == room]
        lowest = min(height_of(room, b) for b in reached)
        start = middle[room] + 0.12
        axes.plot([edge, x, x], [start, start, lowest], color=INK, linewidth=1.1, solid_capstyle="round")
        axes.text(x + 0.05, start + 0.08, room, fontsize=8, color=INK)
        for target in reached:
            y = height_of(room, target)
            axes.annotate(
                "", (edge, y), (x, y), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 0.8, "shrinkB": 0}
            )
    figure.savefig(path, metadata={"Description": description()})


PICTURES = {"images/floor_plan.png": Picture(save, description)}
