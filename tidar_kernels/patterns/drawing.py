"""Pictures of attention patterns: `as_text` for the terminal, `save_png` for pages.

Rows are queries, columns are keys, the cached context first. A cell shows by which term the key is visible (`lead`,
`own` or `tree_mask`) and, in the PNG, by its colour what the key is. Both pictures are computed from
intervals and tree masks, never from a dense mask, so a pattern of any size can be drawn: one that does not fit is
binned, several rows and keys to a cell, and the picture says so.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import check_int
from .rows import Role, unpack_tree_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .pattern import Pattern

__all__ = ["as_text", "save_png"]

MAX_TEXT_CELLS = 80  # rows and in-flight columns of a text drawing: one tall, wide terminal
MAX_TEXT_CONTEXT = 8  # context columns of a text drawing: rows see all of them, or the last ones, so a few say it
MAX_PNG_CELLS = 1200  # beyond this a cell would be less than a pixel

_CONTEXT, _IN_PART, _HIDDEN = "░", "▚", "·"
_TERMS = {"lead": "█", "own": "▒", "tree mask": "▓"}  # what sees a key; shares of cells are in this order
_MEANING = {_CONTEXT: "context", **{mark: term for term, mark in _TERMS.items()}}
_MEANING |= {_IN_PART: "visible in part", _HIDDEN: "not visible"}
_STRENGTH = {"lead": 1.0, "own": 0.6, "tree mask": 0.8}  # of the key's colour in the PNG

_DPI = 200
_COLOUR = {Role.CLEAN: "#2f6db5", Role.DRAFT: "#e5992b", Role.MASK: "#6f4bb0"}
_CONTEXT_COLOUR, _HIDDEN_COLOUR, _INK, _FAINT, _LINE = "#93a1b1", "#eef1f4", "#1f2933", "#66727f", "#bcc4cd"


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows or keys of one role and one own block: `[start, stop)`. Blocks of masks are numbered."""

    role: Role
    start: int
    stop: int
    number: int | None = None

    @property
    def name(self) -> str:
        return self.role.name.lower() + ("" if self.number is None else f" {self.number}")


@dataclass(frozen=True)
class _Axis:
    """One side of the picture: cell i covers `[edges[i], edges[i+1])`; `cuts` are the edges that get a grid line."""

    groups: list[_Group]
    cuts: list[int]
    edges: list[int]

    def cell(self, index: int) -> int:
        """The first cell that starts at `index` or after it."""
        return bisect_left(self.edges, index)

    def group_at(self, index: int) -> _Group:
        return self.groups[bisect_left([group.stop for group in self.groups], index + 1)]

    @property
    def cells(self) -> int:
        return len(self.edges) - 1

    @cached_property
    def cell_roles(self) -> list[Role]:
        """The role of the first row or key of each cell."""
        return [self.group_at(edge).role for edge in self.edges[:-1]]

    @property
    def per_cell(self) -> int:
        """The most rows or keys that one cell stands for."""
        return max((b - a for a, b in pairwise(self.edges)), default=1)


def as_text(pattern: Pattern, context_len: int = 0) -> str:
    """A pattern as a matrix of characters, one line a query row, labelled with its role and position.

    More than 80 rows or in-flight keys are binned (cut at block edges, where blocks are not too many), and more than
    8 context keys are drawn as 8; the first lines say so. With a sliding window these are the last 8.

    Args:
        pattern: what to draw.
        context_len: P, the number of cached keys drawn before the in-flight ones.

    Raises:
        TypeError, ValueError: `context_len` is not an int >= 0.
    """
    shown = min(check_int("context_len", context_len, 0), MAX_TEXT_CONTEXT)
    rows, columns = _axes(pattern, MAX_TEXT_CELLS)
    shares = _shares(pattern, rows, columns)
    body = ["".join(map(_character, *terms)) for terms in zip(*shares.tolist(), strict=True)]
    roles = columns.cell_roles
    labels = [_row_label(pattern, rows, cell) for cell in range(rows.cells)]
    label_width = max(map(len, labels), default=0)
    bounds = [*map(columns.cell, columns.cuts), columns.cells]

    def line(label: str, context: str, cells: str) -> str:
        parts = [cells[a:b] for a, b in pairwise(bounds)]
        return " ".join([f"{label:<{label_width}} ", *[context] * (shown > 0), *parts])

    lines = [pattern.name, _summary(pattern, context_len)]
    if shown < context_len:
        last = "" if pattern.reach is None else "the last "
        lines.append(f"(the {context_len} context columns are drawn as {last}{shown})")
    if max(rows.per_cell, columns.per_cell) > 1:
        lines.append(f"(a character stands for up to {rows.per_cell} rows x {columns.per_cell} keys)")
    context = ["".join(map(_context_character, share)) for share in _context_shares(pattern, rows, shown).tolist()]
    lines += ["", line("", "p" * shown, "".join(role.name[0].lower() for role in roles))]
    lines += [line(*parts) for parts in zip(labels, context, body, strict=True)]
    kinds = ["p cached context"] * (shown > 0) + [f"{r.name[0].lower()} {r.name.lower()}" for r in Role if r in roles]
    drawn = set("".join(body + context))
    marks = [f"{mark} {meaning}" for mark, meaning in _MEANING.items() if mark in drawn]
    return "\n".join([*lines, "", f"keys: {', '.join(kinds)}; cells: {', '.join(marks)}", ""])


def save_png(pattern: Pattern, path: str | os.PathLike[str], context_len: int = 0) -> None:
    """A pattern as a PNG picture: blue clean, amber draft and violet mask keys, paler by `own` and `tree_mask`.

    The text drawing is stored in the file as its `Description`. Nothing is written if anything is wrong.

    Args:
        pattern: what to draw.
        path: the file to write, ending in `.png`; its folder must exist.
        context_len: P, the number of cached keys drawn before the in-flight ones; a long context is shortened.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `path` is not a path, or `context_len` not an int.
        ValueError: `path` does not end in `.png` or cannot be written, or `context_len` is negative.
    """
    check_int("context_len", context_len, 0)
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a str or os.PathLike, got {type(path).__name__}")
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"path: expected a name that ends in .png, got {str(target)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"path: expected a file in a folder that exists, got {str(target)!r}")
    picture = _render(pattern, context_len)
    try:
        target.write_bytes(picture)
    except OSError as error:
        raise ValueError(f"path: expected a writable file, got {str(target)!r} ({error.strerror})") from error


def _axes(pattern: Pattern, limit: int) -> tuple[_Axis, _Axis]:
    """Rows and in-flight columns, each of at most `limit` cells."""
    rows = _groups(pattern)
    # The rows are the last of the keys; what lies before them is clean. With fewer keys nothing says what a key is.
    ahead = pattern.kv_len - pattern.q_len
    columns = [] if ahead == 0 else [_Group(Role.CLEAN, 0, max(ahead, 0) or pattern.kv_len)]
    if ahead >= 0:
        columns += [replace(group, start=group.start + ahead, stop=group.stop + ahead) for group in rows]
    return _axis(rows, pattern.q_len, limit), _axis(columns, pattern.kv_len, limit)


def _groups(pattern: Pattern) -> list[_Group]:
    """Split the rows where the role or the block changes: where own intervals have no key in common with the last."""
    if not pattern.q_len:
        return [_Group(Role.CLEAN, 0, 0)]
    roles = _roles(pattern)
    lo, hi = pattern.own.unbind(1)
    apart = torch.maximum(lo[1:], lo[:-1]) >= torch.minimum(hi[1:], hi[:-1])
    apart &= (lo < hi)[1:] | (lo < hi)[:-1]
    role = torch.tensor(roles, device="cpu")
    starts = [0, *((apart | (role[1:] != role[:-1])).nonzero().flatten() + 1).tolist()]
    spans = list(zip(starts, [*starts[1:], pattern.q_len], strict=True))
    # A decode step has no block 0: its block g is the one conditioned on g drafts.
    number = 1 if Role.DRAFT in roles else 0
    numbered = number == 1 or sum(roles[a] is Role.MASK for a, _ in spans) > 1
    groups = []
    for a, b in spans:
        is_mask = roles[a] is Role.MASK
        groups.append(_Group(roles[a], a, b, number if is_mask and numbered else None))
        number += is_mask
    return groups


def _roles(pattern: Pattern) -> list[Role]:
    return [Role(role) for role in pattern.roles.tolist()]


def _axis(groups: list[_Group], length: int, limit: int) -> _Axis:
    """Bins of 1, 2, 4, ... so that at most `limit` remain, cut between groups, or only between roles, or nowhere."""
    between_roles = [g.start for i, g in enumerate(groups) if i == 0 or groups[i - 1].role is not g.role]
    for cuts in ([group.start for group in groups], between_roles, [0]):
        if len(cuts) <= max(1, limit // 2):
            break
    per_cell = 1
    while True:
        ends = [*cuts[1:], length]
        edges = [edge for a, b in zip(cuts, ends, strict=True) for edge in range(a, b, per_cell)]
        if len(edges) <= limit:
            return _Axis(groups, cuts, [*edges, length])
        per_cell *= 2


def _shares(pattern: Pattern, rows: _Axis, columns: _Axis) -> Tensor:
    """The share of each cell's pairs that each of `_TERMS` sees: float64 `[3, row cells, column cells]`."""
    edges = torch.tensor(columns.edges, device="cpu")
    left, right = edges[:-1], edges[1:]
    shares = torch.zeros(len(_TERMS), rows.cells, columns.cells, dtype=torch.float64, device="cpu")
    for cell, (a, b) in enumerate(pairwise(rows.edges)):
        pairs = torch.zeros(len(_TERMS), columns.cells, dtype=torch.int64, device="cpu")
        for term, interval in enumerate((pattern.lead.long(), pattern.own.long())):
            lo, hi = interval[a:b, :1], interval[a:b, 1:]
            pairs[term] = (torch.minimum(hi, right) - torch.maximum(lo, left)).clamp(min=0).sum(dim=0)
        if pattern.tree_mask is not None:
            before = unpack_tree_mask(pattern.tree_mask[a:b], pattern.kv_len).sum(dim=0).cumsum(0)
            before = torch.nn.functional.pad(before, (1, 0))
            pairs[2] = before[right] - before[left]
        shares[:, cell] = pairs.double() / ((b - a) * (right - left))
    return shares


def _context_shares(pattern: Pattern, rows: _Axis, shown: int) -> Tensor:
    """The share of each cell's rows that see each of the last `shown` context keys: float64 `[row cells, shown]`."""
    shares = torch.ones(rows.cells, shown, dtype=torch.float64, device="cpu")
    if pattern.reach is not None:
        seen = torch.arange(shown, 0, -1, device="cpu") <= pattern.reach[:, None]
        for cell, (a, b) in enumerate(pairwise(rows.edges)):
            shares[cell] = seen[a:b].double().mean(dim=0)
    return shares


def _context_character(share: float) -> str:
    return _CONTEXT if share == 1 else _IN_PART if share > 0 else _HIDDEN


def _character(*shares: float) -> str:
    if sum(shares) == 0:
        return _HIDDEN
    if round(sum(shares), 12) < 1:
        return _IN_PART
    return list(_TERMS.values())[shares.index(max(shares))]


def _row_label(pattern: Pattern, rows: _Axis, cell: int) -> str:
    start, stop = rows.edges[cell], rows.edges[cell + 1]
    first, last = rows.group_at(start), rows.group_at(stop - 1)
    name = first.name
    if first is not last and last.number is not None:
        name = f"{name}-{last.number}"
    return f"{name:<8} {_position_range(pattern, start, stop)}"


def _position_range(pattern: Pattern, start: int, stop: int) -> str:
    positions = pattern.positions[start:stop]
    low, high = int(positions.min()), int(positions.max())
    return f"P{low:+d}" if low == high else f"P{low:+d}..{high}"


def _summary(pattern: Pattern, context_len: int) -> str:
    rows, keys = pattern.q_len, pattern.kv_len
    pairs = int((pattern.lead[:, 1] - pattern.lead[:, 0] + pattern.own[:, 1] - pattern.own[:, 0]).sum())
    if pattern.tree_mask is not None:
        pairs += int(unpack_tree_mask(pattern.tree_mask, keys).sum())
    text = f"{rows} row{'s' * (rows != 1)} x {keys} in-flight key{'s' * (keys != 1)}"
    if rows and keys:
        text += f", {100 * pairs / (rows * keys):.1f} % of these pairs visible"
    return f"{text}; context P = {context_len}" if context_len else text


@dataclass(frozen=True)
class _Layout:
    """Where things are in the PNG, in pixels from its upper left corner; cells are squares of `side` pixels."""

    rows: _Axis
    columns: _Axis
    context: int  # context columns drawn
    side: int
    top: int

    left = 310  # of the first context column: room for names and positions

    @property
    def context_right(self) -> int:
        return self.left + self.context * self.side

    @property
    def origin(self) -> int:
        """The left edge of in-flight key 0."""
        return self.context_right + (12 if self.context else 0)

    @property
    def right(self) -> int:
        return self.origin + self.columns.cells * self.side

    @property
    def bottom(self) -> int:
        return self.top + self.rows.cells * self.side


def _lay_out(pattern: Pattern, context_len: int) -> _Layout:
    rows, columns = _axes(pattern, MAX_PNG_CELLS)
    context = min(context_len, max(8, columns.cells // 5))
    side = min(64, max(1, 1400 // max(1, columns.cells + context, rows.cells)))
    return _Layout(rows, columns, context, side, top=300 if _names_upright(columns, side) else 250)


def _render(pattern: Pattern, context_len: int) -> bytes:
    """The picture as the bytes of a PNG file, drawn on one Axes whose unit is the pixel."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib: needed to draw a PNG; install tidar-kernels[bench]") from error

    layout = _lay_out(pattern, context_len)
    rows, columns = layout.rows, layout.columns
    shares = _shares(pattern, rows, columns)
    context = _context_shares(pattern, rows, layout.context)
    legend = _legend(columns, shares, context)

    width = max(layout.right + 50, 1200)
    per_line = (width - 40) // 290
    height = layout.bottom + 70 + 42 * -(-len(legend) // per_line)
    # A Figure with a canvas of its own leaves pyplot, its backend and its open figures alone.
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    _draw_cells(axes, layout, shares, context)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    _draw_grid(axes, layout, _clean_block_edges(pattern))
    _label_columns(axes, layout, shortened=layout.context < context_len)
    _label_rows(axes, layout, pattern)

    axes.text(40, 56, pattern.name, fontsize=12, fontweight="bold", color=_INK, va="center")
    note = _summary(pattern, context_len)
    if max(rows.per_cell, columns.per_cell) > 1:
        note += f"; a cell stands for up to {rows.per_cell} rows x {columns.per_cell} keys"
    axes.text(40, 102, note, fontsize=8, color=_FAINT, va="center")
    for i, (text, colour) in enumerate(legend):
        x, y = 40 + i % per_line * 290, layout.bottom + 46 + i // per_line * 42
        _rectangle(axes, x, y, x + 26, y + 26, colour)
        axes.text(x + 38, y + 13, text, fontsize=8, color=_INK, va="center")

    stream = io.BytesIO()
    metadata = {"Title": pattern.name, "Description": as_text(pattern, context_len), "Software": None}
    FigureCanvasAgg(figure).print_png(stream, metadata=metadata)
    return stream.getvalue()


def _rgb(colour: str) -> Tensor:
    """`#rrggbb` as float64 `[3]` in 0..1."""
    return torch.tensor(list(bytes.fromhex(colour[1:])), dtype=torch.float64, device="cpu") / 255


def _shade(colour: Tensor, term: str) -> Tensor:
    """Float RGB `[..., 3]` of a key, mixed with white as keys are that `term` sees."""
    return 1 - _STRENGTH[term] * (1 - colour)


def _legend(columns: _Axis, shares: Tensor, context: Tensor) -> list[tuple[str, Any]]:
    """Text and colour of what is in the picture, and of nothing else."""
    entries: list[tuple[str, Any]] = [("cached context", _CONTEXT_COLOUR)] if context.any() else []
    roles = columns.cell_roles
    for term, share in zip(_TERMS, shares, strict=True):
        for role in Role:
            if share[:, [cell for cell, of_cell in enumerate(roles) if of_cell is role]].any():
                colour = _shade(_rgb(_COLOUR[role]), term)
                entries.append((f"{role.name.lower()} key ({term})", tuple(colour.tolist())))
    hidden = shares.sum(0).lt(1 - 1e-12).any() or context.lt(1).any()
    return entries + ([("not visible", _HIDDEN_COLOUR)] if hidden else [])


def _draw_cells(axes: Axes, at: _Layout, shares: Tensor, context: Tensor) -> None:
    if at.context and context.eq(1).all():
        _rectangle(axes, at.left, at.top, at.context_right, at.bottom, _CONTEXT_COLOUR)
    elif context.numel():
        image = context[..., None] * _rgb(_CONTEXT_COLOUR) + (1 - context)[..., None] * _rgb(_HIDDEN_COLOUR)
        box = (at.left, at.context_right, at.bottom, at.top)
        axes.imshow(image.numpy(), extent=box, interpolation="nearest", aspect="auto")
    if not shares.numel():
        return
    key = torch.stack([_rgb(_COLOUR[role]) for role in at.columns.cell_roles])
    image = (1 - shares.sum(0))[..., None] * _rgb(_HIDDEN_COLOUR)
    for term, share in zip(_TERMS, shares, strict=True):
        image += share[..., None] * _shade(key, term)
    box = (at.origin, at.right, at.bottom, at.top)
    axes.imshow(image.clamp(0, 1).numpy(), extent=box, interpolation="nearest", aspect="auto")


def _draw_grid(axes: Axes, at: _Layout, clean_block_edges: list[int]) -> None:
    """White lines between cells, grey ones between blocks, where cells are large enough to bear them."""
    if at.side >= 10:
        x = [at.left + at.side * i for i in range(1, at.context)]
        x += [at.origin + at.side * i for i in range(1, at.columns.cells)]
        y = [at.top + at.side * i for i in range(1, at.rows.cells)]
        axes.vlines(x, at.top, at.bottom, colors="white", linewidth=0.5)
        axes.hlines(y, at.origin, at.right, colors="white", linewidth=0.5)
        axes.hlines(y, at.left, at.context_right, colors="white", linewidth=0.5)
    if at.side >= 3:
        x = [at.origin + at.side * at.columns.cell(i) for i in (*at.columns.cuts, *clean_block_edges)]
        y = [at.top + at.side * at.rows.cell(i) for i in (*at.rows.cuts, *clean_block_edges)]
        axes.vlines([*x, at.right], at.top, at.bottom, colors=_LINE, linewidth=0.7)
        axes.hlines([*y, at.bottom], at.origin, at.right, colors=_LINE, linewidth=0.7)


def _clean_block_edges(pattern: Pattern) -> list[int]:
    """Where mask rows' leads end inside clean keys: training's block edges, which the clean half itself lacks."""
    roles = _roles(pattern)
    ends = {end for role, end in zip(roles, pattern.lead[:, 1].tolist(), strict=True) if role is Role.MASK}
    return sorted(end for end in ends if 0 < end < min(len(roles), pattern.kv_len) and roles[end] is Role.CLEAN)


def _rectangle(axes: Axes, x0: float, y0: float, x1: float, y1: float, colour: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=colour, linewidth=0))


def _spans(axis: _Axis, side: int) -> list[tuple[str, Role, int, int]]:
    """What to label, as name, role and cells `[a, b)`: each group, or runs of one role where groups are too small."""
    bounds = [(axis.cell(g.start), axis.cell(g.stop)) for g in axis.groups]
    if all((b - a) * side >= 30 for a, b in bounds):
        runs = [[g] for g in axis.groups]
    else:
        runs = [list(run) for _, run in groupby(axis.groups, key=lambda group: group.role)]
    spans = []
    for run in runs:
        first, last = run[0], run[-1]
        name = first.name
        if first.role is Role.MASK:
            name = "mask block" if first.number is None else f"block {first.number}"
            name = name if first is last else f"blocks {first.number}-{last.number}"
        spans.append((name, first.role, axis.cell(first.start), axis.cell(last.stop)))
    return spans


def _names_upright(columns: _Axis, side: int) -> bool:
    """Whether a column name is wider than its columns: 7.5 points are about 13 pixels a character here."""
    return any(13 * len(name) > (b - a) * side for name, _, a, b in _spans(columns, side))


def _label_columns(axes: Axes, at: _Layout, shortened: bool) -> None:
    """Over each group a strip in its role's colour and its name; over each key its index, where there is room."""
    base = at.top - 32
    if at.side >= 28:
        for cell, index in enumerate(at.columns.edges[:-1]):
            x = at.origin + (cell + 0.5) * at.side
            axes.text(x, base - 2, str(index), ha="center", va="center", fontsize=5.5, color=_FAINT)
        base -= 20
    upright = 90 if _names_upright(at.columns, at.side) else 0
    for name, role, a, b in _spans(at.columns, at.side):
        x0, x1 = at.origin + a * at.side, at.origin + b * at.side
        _rectangle(axes, x0 + 1, at.top - 22, x1 - 1, at.top - 10, _COLOUR[role])
        where: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 7.5, "color": _INK, "rotation": upright}
        axes.text((x0 + x1) / 2, base, name, **where)
    if at.context:
        _rectangle(axes, at.left, at.top - 22, at.context_right, at.top - 10, _CONTEXT_COLOUR)
        name = "context\n(shortened)" if shortened else "context"
        axes.text((at.left + at.context_right) / 2, base, name, ha="center", va="bottom", fontsize=7.5, color=_INK)


def _label_rows(axes: Axes, at: _Layout, pattern: Pattern) -> None:
    """Beside each group a strip in its role's colour, its name, and the position of each row or of the whole group."""
    edges, each_row = at.rows.edges, at.side >= 22
    small: dict[str, Any] = {"va": "center", "fontsize": 6, "color": _FAINT}
    for name, role, a, b in _spans(at.rows, at.side):
        y0, y1 = at.top + a * at.side, at.top + b * at.side
        _rectangle(axes, at.left - 22, y0 + 1, at.left - 10, y1 - 1, _COLOUR[role])
        below = not each_row and y1 - y0 >= 80  # room for two lines
        y = (y0 + y1) / 2 - (15 if below else 0)
        axes.text(40, y, name, va="center", fontsize=7.5, color=_INK)
        if not each_row:
            x, side = (40, "left") if below else (at.left - 34, "right")
            axes.text(x, y + (30 if below else 0), _position_range(pattern, edges[a], edges[b]), ha=side, **small)
    if each_row:
        for cell, (a, b) in enumerate(pairwise(edges)):
            y = at.top + (cell + 0.5) * at.side
            axes.text(at.left - 34, y, _position_range(pattern, a, b), ha="right", **small)
