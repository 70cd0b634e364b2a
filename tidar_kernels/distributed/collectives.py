"""Gathering the shards of a dimension from all ranks, and its transpose: every rank's share summed into the shards.

PyTorch's functional collectives, which `torch.compile` puts into its graphs. The sum is an all-to-all exchange of
shares, added up by their owner in float32 and in the order of ranks: it moves the bytes that a reduce-scatter moves,
rounds once, and its bits depend neither on the backend's algorithm nor on timing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Shards", "all_reduced"]

_collective = torch.ops._c10d_functional


def all_reduced(x: Tensor, group: str) -> Tensor:
    """The sum of `x` over the ranks of a group, on all of them; not differentiable."""
    return _collective.wait_tensor(_collective.all_reduce(x.detach(), "sum", group))


class Shards:
    """Who has which elements of a dimension.

    Shards may differ in length by a few elements: on the way all are as long as the longest.

    Args:
        shards: the elements of each rank, int64: all of the dimension between them, each once.
        rank: which of them is here.
        group: name of the ranks' process group.
        device: of the tensors that are gathered.

    Attributes:
        own: the elements here, int64 on `device`.
    """

    def __init__(self, shards: list[Tensor], rank: int, group: str, device: torch.device) -> None:
        self.ranks, self.group = len(shards), group
        self.longest = max(len(shard) for shard in shards)
        everything = torch.cat(shards)
        place = torch.cat([r * self.longest + torch.arange(len(s), device="cpu") for r, s in enumerate(shards)])
        self.own = shards[rank].to(device)
        # Where each element lies among the gathered ones; and which element each of these is, 0 for what fills up.
        self._places = torch.empty_like(place).scatter_(0, everything, place).to(device)
        self._elements = place.new_zeros(self.ranks * self.longest).scatter_(0, place, everything).to(device)

    def gather(self, *parts: Tensor) -> list[Tensor]:
        """`[own, ..] -> [all, ..]` of each tensor, in the order of the dimension. On GPUs all are under way at once.

        On CPUs one follows another: two functional all-gathers under way on gloo corrupt the heap (seen with PyTorch
        2.13 alone, a crash within half a minute of nothing else), and there is no computation that they could hide.
        """
        missing = self.longest - len(self.own)
        filled = [F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x.contiguous() for x in parts]
        coming = [self._gathering(x) for x in filled]
        return [_collective.wait_tensor(x).index_select(0, self._places) for x in coming]

    def _gathering(self, x: Tensor) -> Tensor:
        coming = _collective.all_gather_into_tensor(x, self.ranks, self.group)
        return _collective.wait_tensor(coming) if x.device.type == "cpu" else coming

    def sum(self, share: Tensor) -> Tensor:
        """`[all, ..] -> [own, ..]`: the ranks' shares of what is here, added up."""
        sizes = [self.longest] * self.ranks
        leaving = share.index_select(0, self._elements)
        coming = _collective.wait_tensor(_collective.all_to_all_single(leaving, sizes, sizes, self.group))
        by_rank = coming.unflatten(0, (self.ranks, self.longest))[:, : len(self.own)]
        total = by_rank[0].to(torch.promote_types(share.dtype, torch.float32), copy=True)
        for rank in range(1, self.ranks):
            total += by_rank[rank]
        return total.to(share.dtype)


class Gather(torch.autograd.Function):
    """`Shards.gather` of one tensor, differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return shards.gather(x)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Sum.apply(grad, ctx.shards), None


class Sum(torch.autograd.Function):
    """`Shards.sum` of one tensor, differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return shards.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Gather.apply(grad, ctx.shards), None
