"""Several processes on gloo that run one function, each with what it returns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tidar_kernels.testing import budget

__all__ = ["budgets", "on_ranks"]


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of `world` processes, which are the ranks of the default group."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (world, folder, function, args), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _process(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def budgets(found: dict[str, Any], exact: dict[str, Any], plain: dict[str, Any]) -> None:
    """The error of everything found is at most twice that of eager PyTorch in the same dtype."""
    assert found.keys() == exact.keys() == plain.keys()
    for name, value in found.items():
        budget(value, exact[name], plain[name], name)
