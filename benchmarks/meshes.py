"""One training run of the package's own model on several meshes of processes: the same losses, step by step.

    python -m benchmarks.meshes --out DIR

Each run is `tidar-kernels train` under `torchrun` on this machine's CPU, on gloo; what it logs is read from its state.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tidar_kernels.models.training.config import TrainConfig
from tidar_kernels.models.training.trainer import read_state

from .core import record

CONFIG = TrainConfig(
    steps=200,
    batch=8,
    seq_len=128,
    block_sizes=(8,),
    lr=3e-3,
    warmup=20,
    workers=2,
    accumulate=2,
    precision="fp32",
    optimizer="adamw",
    hidden_size=64,
    intermediate_size=192,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
# Of each mesh its processes, and its options of the command.
MESHES: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    "2 data parallel (DDP)": (2, ()),
    "2 sharded (FSDP2)": (2, ("--fsdp",)),
    "2 context parallel": (2, ("--context-parallel", "2")),
    "2 x 2, data x context (FSDP2)": (4, ("--fsdp", "--context-parallel", "2")),
}


def command(world: int, options: tuple[str, ...], config: Path, out: Path) -> list[str]:
    """The command line of one run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{world}"] if world > 1 else []
    train = ["-m", "tidar_kernels", "train", "--config", str(config), "--out", str(out), "--device", "cpu"]
    return [sys.executable, *launcher, *train, "--eval-every", "0", "--save-every", "100", *options]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One run: `losses`, `[CE_AR, CE_Diff]` of every step in nats a byte."""
    world, options = MESHES[name]
    config, out = folder / "run.toml", folder / f"run-{list(MESHES).index(name)}"
    config.write_text(CONFIG.to_toml())
    subprocess.run(
        command(world, options, config, out), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr
    )
    state = read_state(out)
    return {
        "operator": "training_mesh",
        "mesh": name,
        "processes": world,
        "steps": state["done"],
        "losses": state["curve"],
        "command": "python -m benchmarks.meshes --out results",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meshes", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MESHES:
            rows.append(measure(name, Path(folder)))
            print(name, rows[-1]["losses"][-1], flush=True)
    record.add(options.out, "meshes", "cpu", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
