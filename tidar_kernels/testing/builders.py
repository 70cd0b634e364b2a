"""What case tables are built from: rows that cover every pair of values, patterns without any order, and any tree."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from .._moved import renamed_keyword
from ..patterns import tree
from ..patterns.arguments import check_int, check_sequence
from ..patterns.pattern import Pattern
from ..patterns.rows import pack_tree_mask

__all__ = ["irregular_pattern", "pairwise", "random_tree"]


def pairwise(**axes: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Rows that hold every pair of values of every two axes at least once; deterministic, and near the fewest.

    Greedy: each row starts from the first pair still missing, then takes on each further axis the value that adds the
    most missing pairs.
    """
    axes = {name: check_sequence(name, values, "values") for name, values in axes.items()}
    names = list(axes)
    missing = {
        (a, i, b, j): None
        for a, b in itertools.combinations(range(len(names)), 2)
        for i, j in itertools.product(range(len(axes[names[a]])), range(len(axes[names[b]])))
    }
    turn = 0
    while missing:
        a, i, b, j = next(iter(missing))
        row = {a: i, b: j}
        for axis in range(len(names)):
            if axis in row:
                continue
            count = len(axes[names[axis]])
            # Ties go to a different value each time, so that no value hogs the rows that are already covered.
            values = [(value + turn) % count for value in range(count)]
            row[axis] = max(values, key=lambda value: sum(pair in missing for pair in _pairs(row, axis, value)))
            turn += 1
        for axis, value in row.items():
            for pair in _pairs(row, axis, value):
                missing.pop(pair, None)
        yield {name: axes[name][row[axis]] for axis, name in enumerate(names)}


def _pairs(row: dict[int, int], axis: int, value: int) -> list[tuple[int, int, int, int]]:
    """The pairs that `value` on `axis` makes with what the row holds on other axes."""
    return [
        (axis, value, other, theirs) if axis < other else (other, theirs, axis, value)
        for other, theirs in row.items()
        if other != axis
    ]


def random_tree(nodes: int, seed: int = 0) -> Pattern:
    """A token tree whose nodes have any of the nodes before them as parents.

    Raises:
        TypeError, ValueError: `nodes` is not an int in [1, 1024], or `seed` no 64-bit int.
    """
    check_int("nodes", nodes, 1, 1025)
    draw = torch.Generator().manual_seed(check_int("seed", seed, -(2**63)))
    return tree([-1, *(int(torch.randint(node, (), generator=draw, device="cpu")) for node in range(1, nodes))])


@renamed_keyword("with_bits", "with_tree_mask")
def irregular_pattern(
    q_len: int, kv_len: int, seed: int = 0, reach: int | None = None, with_tree_mask: bool = False
) -> Pattern:
    """Random intervals: leads that do not start at 0, own blocks on either side of them, rows that see no key.

    With `reach` every row sees some number of the last context tokens, from none to that many. With `with_tree_mask`
    some rows see some of the other keys too, and some of them nothing else.

    Raises:
        TypeError, ValueError: a number is not an int that fits.
    """
    for name, size in (("q_len", q_len), ("kv_len", kv_len)):
        check_int(name, size, 0, 2**24)
    if reach is not None:
        check_int("reach", reach, 0, 2**31 - 1)
    draw = torch.Generator().manual_seed(check_int("seed", seed, -(2**63)))
    lead, own = torch.zeros(2, q_len, 2, dtype=torch.int32, device="cpu").unbind(0)
    for row in range(q_len):
        cuts = torch.randint(0, kv_len + 1, (4,), generator=draw, device="cpu").sort().values.to(torch.int32)
        lead[row], own[row] = (cuts[:2], cuts[2:]) if row % 2 else (cuts[2:], cuts[:2])
    lead[::5] = 0
    own[::3] = 0
    reaches = None
    if reach is not None:
        reaches = torch.randint(0, reach + 1, (q_len,), generator=draw, device="cpu").to(torch.int32)
        reaches[::4] = 0
    pattern = Pattern(
        lead,
        own,
        torch.arange(q_len, dtype=torch.int32, device="cpu"),
        kv_len,
        name=f"irregular({q_len}, {kv_len})",
        reach=reaches,
    )
    if not with_tree_mask:
        return pattern
    share = torch.tensor([0.0, 0.05, 0.5], device="cpu")[torch.randint(3, (q_len, 1), generator=draw, device="cpu")]
    seen = (torch.rand(q_len, kv_len, generator=draw, device="cpu") < share) & ~pattern.dense()
    return replace(pattern, tree_mask=pack_tree_mask(seen))
