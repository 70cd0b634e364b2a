"""Attention of DTensors: sequences and heads may be on different ranks, for none needs another's.

PyTorch picks the cheapest of these rules by where the operands are, and moves them if need be. What defines DTensor
takes most of a second to import: it is looked at only where a DTensor comes.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["any_dtensor", "beside"]

# Which dimension of a tensor is sequences and which is heads; of all that are not named here, the first two.
_DIMENSIONS: dict[str, tuple[int | None, int | None]] = {"lead": (None, None), "own": (None, None), "sinks": (None, 0)}


def any_dtensor(*operands: Any) -> bool:
    """Whether one of them is a `torch.distributed.tensor.DTensor`."""
    for x in operands:
        if x is None or type(x) is Tensor:
            continue
        defined = sys.modules.get("torch.distributed.tensor")
        if defined is not None and isinstance(x, defined.DTensor):
            return True
    return False


def beside(intervals: tuple[Tensor, Tensor], **operands: Any) -> tuple[Any, Any]:
    """The intervals of rows as DTensors that every rank has whole, on the mesh of these operands.

    Raises:
        TypeError: not all of `operands` are DTensors. ValueError: not all are of one mesh.
    """
    from torch.distributed.tensor import DTensor, Replicate

    given = {name: value for name, value in operands.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, DTensor):
            raise TypeError(f"{name}: expected a DTensor like the other operands, got {type(value).__name__}")
    mesh = given["q"].device_mesh
    for name, value in given.items():
        if value.device_mesh != mesh:
            raise ValueError(f"{name}: expected the mesh of q, {mesh}, got {value.device_mesh}")
    _register()
    everywhere = [Replicate()] * mesh.ndim
    lead, own = (DTensor.from_local(x, mesh, everywhere, run_check=False) for x in intervals)
    return lead, own


@functools.cache
def _register() -> None:
    """Make the rules known to DTensor, of attention and of its backward pass."""
    from torch.distributed.tensor.experimental import register_sharding

    names = torch.ops.tidar_kernels
    for overload in (names.attention.default, names.attention_backward.default):
        register_sharding(overload)(functools.partial(_rules, overload._schema))


def _rules(schema: Any, *operands: Any) -> list[tuple[list[Any], list[Any]]]:
    """Of every rule, where results and operands are on a dimension of the mesh; None for what is no tensor.

    On several dimensions of a mesh PyTorch combines them.
    """
    from torch.distributed.tensor import Replicate, Shard

    given = {argument.name: value for argument, value in zip(schema.arguments, operands, strict=False)}
    k = given["k"]

    def placed(name: str, kind: int | None) -> Any:
        dimension = None if kind is None else _DIMENSIONS.get(name, (0, 1))[kind]
        return Replicate() if dimension is None else Shard(dimension)

    kinds = [None, *(kind for kind in (0, 1) if _is_even(k.shape[kind], k.mesh))]
    return [
        (
            [placed("", kind) for _ in schema.returns],
            [placed(name, kind) if hasattr(value, "placements") else None for name, value in given.items()],
        )
        for kind in kinds
    ]


def _is_even(size: int, mesh: Any) -> bool:
    """Whether ranks get equal shares, over whichever dimensions of the mesh: a share of query heads must be that of
    the kv heads that they use. PyTorch itself leaves out what would leave ranks without any."""
    counts = {math.prod(some) for n in range(mesh.ndim) for some in itertools.combinations(mesh.shape, n + 1)}
    return all(size % count == 0 for count in counts if count <= size)
