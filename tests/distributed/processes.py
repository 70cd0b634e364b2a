"""Several processes on gloo that run one function, each with what it returns."""

from __future__ import annotations

import faulthandler
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tidar_kernels.testing import budget

__all__ = ["budgets", "on_ranks"]


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of `world` processes, which are the ranks of the default group.

    A process that ends by a signal fails with its number and with what each of its threads was doing; one that raises,
    with what every process raised: those that lose their peer may be the first to say so.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            torch.multiprocessing.spawn(_process, (world, folder, function, args), nprocs=world)
        except ProcessExitedException as error:
            threads = (folder / f"{error.error_index}.threads").read_text()
            raise AssertionError(f"rank {error.error_index} of {world}: {error}\n{threads}") from None
        except ProcessRaisedException:
            raised = "\n".join(path.read_text() for path in sorted(folder.glob("*.raised")))
            raise AssertionError(raised) from None
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _process(rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Runs `function` and keeps what it returns; faults leave the stacks of all threads in `<rank>.threads`."""
    torch.set_num_threads(1)
    with (folder / f"{rank}.threads").open("w") as threads:
        faulthandler.enable(threads)
        dist.init_process_group(
            "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=120)
        )
        try:
            torch.save(function(*args), folder / f"{rank}.pt")
        except Exception:  # written before the group ends, which the others notice
            (folder / f"{rank}.raised").write_text(f"rank {rank} of {world}: {traceback.format_exc()}")
            raise
        finally:
            dist.destroy_process_group()
            faulthandler.disable()


def budgets(found: dict[str, Any], exact: dict[str, Any], plain: dict[str, Any]) -> None:
    """The error of everything found is at most twice that of eager PyTorch in the same dtype."""
    assert found.keys() == exact.keys() == plain.keys()
    for name, value in found.items():
        budget(value, exact[name], plain[name], name)
