"""Trees of draft tokens (Medusa, EAGLE): the one mask of the field that is not two intervals a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import check_sequence
from .pattern import Pattern
from .rows import Role, pack_tree_mask

__all__ = ["tree"]


def tree(parents: Sequence[int]) -> Pattern:
    """A tree of draft tokens (Medusa, arXiv 2401.10774; EAGLE, arXiv 2401.15077): every node sees its own path.

    Row i is node i. It sees the context, its ancestors and itself, and stands at the position of its depth: it computes
    what autoregressive decoding would after the tokens of its path. A step writes the K/V of all nodes after the
    context; which of them stay is a path (`KVCache.compact`).

    Args:
        parents: of each node the index of its parent, which comes before it, or -1 for a root.

    Raises:
        TypeError: a parent is not an int. ValueError: there is no node, a parent is out of range, on a cycle, or comes
            after its child.
    """
    parents = check_sequence("parents", parents, "ints")
    nodes = len(parents)
    if not nodes:
        raise ValueError("parents: expected at least one node, got none")
    for node, parent in enumerate(parents):
        if not isinstance(parent, int) or isinstance(parent, bool):
            raise TypeError(f"parents: expected ints, got {type(parent).__name__} for node {node}")
        if not -1 <= parent < nodes:
            raise ValueError(f"parents: expected -1 or a node below {nodes}, got {parent} for node {node}")
    for node, parent in enumerate(parents):
        if parent >= node:
            cycle = _cycle(parents, node)
            got = f"the cycle {' -> '.join(map(str, cycle))}" if cycle else f"node {parent} as that of node {node}"
            raise ValueError(f"parents: expected each before its children, got {got}")
    seen = torch.eye(nodes, dtype=torch.bool, device="cpu")
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    depth = seen.sum(1, dtype=torch.int32) - 1
    nothing = torch.zeros(nodes, 2, dtype=torch.int32, device="cpu")
    return Pattern(
        lead=nothing,
        own=nothing,
        positions=depth,
        kv_len=nodes,
        roles=torch.full((nodes,), int(Role.DRAFT), dtype=torch.int8, device="cpu"),
        name=f"tree({nodes} nodes, depth {int(depth.max())})",
        tree_mask=pack_tree_mask(seen),
    )


def _cycle(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from `node` along its parents back to itself; empty if they lead elsewhere."""
    path = [node]
    while len(path) <= len(parents):
        path.append(parents[path[-1]])
        if path[-1] == node:
            return path
        if path[-1] < 0:
            break
    return []
