"""Memory and traffic of context parallelism: formulas, and the memory that they are checked against.

    python -m benchmarks.long_sequences --out DIR

A step of `ContextParallel.attention` is measured on this machine's CPU, on gloo, by the tensors that are alive: what
PyTorch hands out, not what a process has. Formulas count bytes of one rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tidar_kernels.distributed import ContextParallel
from tidar_kernels.patterns import tidar_training

from .core import record

# Ranks and clean tokens that are measured.
MEASURED = tuple((ranks, seq_len) for ranks in (1, 2, 4) for seq_len in (512, 1024, 2048))


@dataclass(frozen=True)
class Shape:
    """A decoder as far as memory is concerned; the default is that of Qwen3-8B in bfloat16."""

    layers: int = 36
    hidden_size: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    parameters: int = 8_190_000_000
    itemsize: int = 2

    def gathered(self, seq_len: int) -> int:
        """Bytes of K, or of V, of all 2 S rows of one layer."""
        return 2 * seq_len * self.kv_heads * self.head_dim * self.itemsize

    def passing(self, seq_len: int) -> int:
        """Most bytes as large as the sequence that are alive at a time: K, V, dK and dV, and afterwards dK and dV with
        one of them on its way out and what came in for it."""
        return 4 * self.gathered(seq_len)

    def attention(self, seq_len: int, ranks: int) -> int:
        """Most bytes of one call of attention and its backward pass, beside q, k and v: what passes, the shards of K, V
        and their gradients, out with its gradient, dQ and lse."""
        rows = -(-2 * seq_len // ranks)
        of_rows = rows * self.heads * (3 * self.head_dim * self.itemsize + 4)
        return self.passing(seq_len) + 4 * self.gathered(seq_len) // ranks + of_rows

    def checkpoints(self, seq_len: int, ranks: int) -> int:
        """Bytes of the layers' inputs, all that activation checkpointing keeps of a layer."""
        return self.layers * -(-2 * seq_len // ranks) * self.hidden_size * self.itemsize

    def states(self, ranks: int) -> int:
        """Bytes of weights, gradients and two moments, in float32, sharded over all ranks."""
        return 16 * self.parameters // ranks

    def received(self, seq_len: int, ranks: int) -> int:
        """Bytes that a rank receives a layer and step: K and V forward, again backward, and its keys' gradients."""
        return 6 * self.gathered(seq_len) * (ranks - 1) // ranks


class Alive(TorchDispatchMode):
    """Counts bytes of the storages that operators return and that are alive: `now` and the `most` so far.

    Of collectives those in our hands: gloo's threads let go of what they sent and received whenever they run next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func.namespace != "_c10d_functional" or func is _wait
        found = func(*args, **(kwargs or {})) if ours else _apart(func, args)
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


_wait = torch.ops._c10d_functional.wait_tensor.default


def _apart(collective: Any, args: Any) -> Tensor:
    """The result of a collective, which works on copies of its own."""
    coming = collective(*tree_map_only(Tensor, torch.clone, args))
    return _wait(coming).clone()


def measure(seq_len: int, shape: Shape) -> int:
    """Most bytes alive in one call of attention in this rank and its backward pass, beside q, k and v."""
    cp = ContextParallel(init_device_mesh("cpu", (dist.get_world_size(),)), tidar_training(seq_len, 16))
    rows = len(cp.rows)
    q, k, v = (
        torch.randn(1, heads, rows, shape.head_dim, requires_grad=True)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    with Alive() as alive:
        cp.attention(q, k, v).backward(torch.ones_like(q))
    return alive.most


def _process(rank: int, ranks: int, seq_lens: list[int], shape: Shape, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    found = [measure(seq_len, shape) for seq_len in seq_lens]
    dist.destroy_process_group()
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def measured(ranks: int, seq_lens: list[int], shape: Shape) -> list[int]:
    """`measure` of each length, in the first of `ranks` processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (ranks, seq_lens, shape, folder), nprocs=ranks)
        found: list[int] = torch.load(f"{folder}/found.pt")
        return found


SMALL = Shape(layers=1, heads=8, kv_heads=2, head_dim=32, itemsize=4)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_sequences", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for ranks in sorted({ranks for ranks, _ in MEASURED}):
        seq_lens = [seq_len for one, seq_len in MEASURED if one == ranks]
        for seq_len, most in zip(seq_lens, measured(ranks, seq_lens, SMALL), strict=True):
            rows.append({
                "operator": "context_parallel_memory", "ranks": ranks, "seq_len": seq_len, "most_bytes": most,
                "command": "python -m benchmarks.long_sequences --out results",
            })  # fmt: skip
    record.add(options.out, "long_sequences", "cpu", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
