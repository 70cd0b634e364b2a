"""A training run on several processes (`torchrun`): who does what, and what they keep together.

The processes form a mesh of data x context. A step's shares are dealt to the rows of the mesh, whose processes share
out the rows of each sequence between them (`tidar_kernels.distributed`). Weights are whole in every process (DDP) or
sharded over all of them (FSDP2). What a step trains on follows from the settings alone, never from the mesh.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["Parallel", "load_shards", "load_whole_weights", "place_optimiser_state"]

_SHARDS = "shards-"


@dataclass(frozen=True)
class Parallel:
    """The place of this process among those that train together.

    Attributes:
        mesh: of two dimensions, "data" and "context".
        sharded: weights, gradients and optimisers are sharded over all processes (FSDP2), not whole in each (DDP).
    """

    mesh: DeviceMesh
    sharded: bool = False

    @classmethod
    def launched(cls, device: str, context: int = 1, sharded: bool = False) -> Parallel:
        """Join the processes that `torchrun` has started, each with a device of its own.

        Raises:
            ValueError: `context` does not divide their number.
        """
        world = int(os.environ["WORLD_SIZE"])
        if world % context:
            raise ValueError(f"context_parallel: expected a divisor of {world} processes, got {context}")
        kind = torch.device(device).type
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        return cls(init_device_mesh(kind, (world // context, context), mesh_dim_names=("data", "context")), sharded)

    @property
    def world(self) -> int:
        return self.mesh.size()

    @property
    def context(self) -> DeviceMesh | None:
        """The mesh of the processes that share sequences with this one; None if it has its own alone."""
        return self.mesh["context"] if self.mesh.size(1) > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return dist.get_rank() == 0

    def shares(self, count: int) -> range:
        """Which of a step's shares are this process's.

        Raises:
            ValueError: there are not as many for each.
        """
        rows = self.mesh.size(0)
        if count % rows:
            raise ValueError(f"workers x accumulate: expected a multiple of {rows} groups of processes, got {count}")
        return range(self.mesh.get_local_rank("data"), count, rows)

    def wrap(self, module: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
        """`module` with gradients that are the mean over all processes."""
        if not self.sharded:
            return nn.parallel.DistributedDataParallel(module)
        from torch.distributed.fsdp import fully_shard

        over = init_device_mesh(self.mesh.device_type, (self.world,))
        for layer in layers:
            fully_shard(layer, mesh=over)
        fully_shard(module, mesh=over)
        return module

    def accumulating(self, module: Any, last: bool) -> AbstractContextManager[Any]:
        """For a backward pass: processes exchange gradients in the last one of a step only."""
        if self.sharded:
            module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else module.no_sync()

    def sum(self, *values: float) -> list[float]:
        """The sums of numbers over all processes, the same bits in each."""
        total = torch.tensor(values, dtype=torch.float64, device=self.mesh.device_type)
        dist.all_reduce(total)
        return total.tolist()

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of `model` as whole tensors on the CPU: in the first process, in the others nothing."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return weights

    def save_shards(self, folder: Path, step: int, model: nn.Module, optimisers: Sequence[Any]) -> str:
        """Every process writes what it has of weights and optimisers into a new folder below `folder`: its name.

        Raises:
            OSError: one of them could not.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_saver import save

        names = [_free_name(folder, step) if self.is_first else None]
        dist.broadcast_object_list(names, src=0)
        name = str(names[0])
        try:
            save(_state(model, optimisers), checkpoint_id=folder / name)
        except CheckpointException as error:
            shutil.rmtree(folder / name, ignore_errors=True)
            raise OSError(f"{folder / name}: expected to write it, got {error}") from error
        return name

    def keep_only(self, folder: Path, name: str) -> None:
        """Remove all shards below `folder` but those of this name, once nothing refers to them."""
        if self.is_first:
            for other in folder.glob(f"{_SHARDS}*"):
                if other.name != name:
                    shutil.rmtree(other, ignore_errors=True)


def _free_name(folder: Path, step: int) -> str:
    name = f"{_SHARDS}{step}"
    while (folder / name).exists():  # of an earlier run, or of this step: what is there may be in use
        name += "+"
    return name


def _state(model: nn.Module, optimisers: Sequence[Any]) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    return {"model": get_model_state_dict(model), "optimisers": get_optimizer_state_dict(model, tuple(optimisers))}


def load_shards(folder: Path, model: nn.Module, optimisers: Sequence[Any]) -> None:
    """Weights and optimisers from the shards in `folder`, which any number of processes may have written.

    Raises:
        ValueError: they are not all there, or damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    state = _state(model, optimisers)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*load in a single process")  # which is meant
            load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{folder}: expected the whole shards of a training run, got {error}") from None
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, tuple(optimisers), state["optimisers"])


def load_whole_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Whole weights, which every process has, into a model that may be sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def place_optimiser_state(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The `state_dict` of an optimiser of whole parameters, as one of the sharded parameters of `optimiser`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    placed = {}
    for index, values in state["state"].items():
        like = parameters[index]
        placed[index] = {
            name: distribute_tensor(value, like.device_mesh, like.placements)
            if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape
            else value
            for name, value in values.items()
        }
    return {**state, "state": placed}
