"""The training kernels of two trees of this repository, compiled without a GPU and laid side by side.

    python -m benchmarks.static.trees --before TREE [--after TREE] [--out FILE]

Each tree compiles its own kernels with its own launch tables, in a process of its own; both binaries are read here, in
one way. What a GPU should make of them is predicted (`clocks_of_tile`) for two patterns over 8192 rows. It counts every
tile that a kernel visits, masked or not, at the price of the loop over whole tiles; work is spread over multiprocessors
evenly; memory never binds; the small kernels of the backward pass are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from tidar_kernels import Pattern, patterns

from ..core.record import replace
from .assembly import SASS, hot_loop, load_to_use
from .clocks import B200, H200, clocks_of_tile
from .compilation import disassembled, read_report

RESULTS = Path(__file__).parents[1] / "results" / "training-kernels.json"
HERE = Path(__file__).parents[2]
CHIPS, HEAD_DIMS = {90: H200, 100: B200}, (64, 128, 256)
PRODUCTS = {"attention_forward": 2, "attention_dq": 3, "attention_dkdv": 4}  # of a tile; the backward pass needs 5
PATTERNS = {"causal": patterns.causal(8192), "TiDAR": patterns.tidar_training(4096, 16)}
MEASURED = ("registers", "spill_bytes", "shared_bytes", "warps", "tensor_core", "loop", "copies_ahead")
# What a tree runs: old trees have their cases elsewhere.
COMPILE = """
import json, pickle, sys
try:
    from benchmarks.static.cases import Case, launch
    from benchmarks.static.compilation import compiling_for
except ImportError:
    from benchmarks.static_cases import Case, launch
    from tidar_kernels.testing.compilation import compiling_for
found = []
for kernel, chip, head_dim in json.loads(sys.argv[1]):
    planned = launch(Case(kernel, str(chip), "bfloat16", head_dim))
    with compiling_for(chip):
        compiled = planned.compile()
    asm = {name: compiled.asm[name] for name in ("ptx", "cubin")}
    metadata = {name: getattr(compiled.metadata, name, None) for name in ("name", "shared", "num_warps", "tmem_size")}
    found.append((asm, metadata, planned.options))
with open(sys.argv[2], "wb") as file:
    pickle.dump(found, file)
"""
CHOSEN = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "SCORES_AHEAD", "ROWS_AHEAD")


def compiled(tree: Path, wanted: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """An entry for each `(kernel, chip, head dim)`, as the kernels of `tree` are.

    Raises:
        subprocess.CalledProcessError: the tree has no such kernel, or it does not compile.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), "TRITON_INTERPRET": "0"}
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-c", COMPILE, json.dumps(wanted), file.name]
        subprocess.run(command, cwd=tree, env=environment, check=True)
        found = pickle.loads(Path(file.name).read_bytes())
    rows = []
    for (kernel, chip, head_dim), (asm, metadata, options) in zip(wanted, found, strict=True):
        binary = SimpleNamespace(asm=asm, metadata=SimpleNamespace(**metadata))
        report = read_report(binary, chip, read_binary=True)
        rows.append({
            "kernel": kernel, "chip": chip, "head_dim": head_dim,
            "config": {name: options[name] for name in CHOSEN if name in options},
            **{name: getattr(report, name) for name in MEASURED}, "tensor_core": list(report.tensor_core),
            "load_to_use": load_to_use(hot_loop(disassembled(asm["cubin"]), SASS)),
        })  # fmt: skip
    return rows


def tiles(pattern: Pattern, block_m: int, block_n: int, *, once: bool) -> int:
    """Tiles of `block_m` rows and `block_n` keys that one head visits.

    By row tiles (forward, dQ) lead and own are walked one after the other, so a tile may come twice; by key tiles
    (dK, dV) a tile comes `once`.
    """
    visits: list[Tensor] = []
    key_tile = torch.arange(-(-pattern.kv_len // block_n))
    for intervals in (pattern.lead, pattern.own):
        lo, hi = (_by_tiles(x, block_m) for x in intervals.unbind(-1))
        seen = hi > lo
        first = torch.where(seen, lo, pattern.kv_len).amin(1, keepdim=True) // block_n
        last = -(-torch.where(seen, hi, 0).amax(1, keepdim=True) // block_n)
        visits.append((first <= key_tile) & (key_tile < last))
    return int((visits[0] | visits[1]).sum() if once else visits[0].sum() + visits[1].sum())


def _by_tiles(bounds: Tensor, block_m: int) -> Tensor:
    """`[row tiles, block_m]`; rows past the end have empty intervals."""
    return torch.nn.functional.pad(bounds, (0, -len(bounds) % block_m)).view(-1, block_m)


def predicted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TFLOP/s of the forward pass (4 head_dim a live pair) and of the backward one (10), by chip, head dim, pattern."""
    found = []
    entries = {(row["kernel"], row["chip"], row["head_dim"]): row for row in rows}
    for number, chip in CHIPS.items():
        for head_dim in HEAD_DIMS:
            for name, pattern in PATTERNS.items():
                pairs = sum(int((x[:, 1] - x[:, 0]).clamp(min=0).sum()) for x in (pattern.lead, pattern.own))
                seconds = {}
                for kernel, products in PRODUCTS.items():
                    row = entries[kernel, number, head_dim]
                    blocks = row["config"]["BLOCK_M"], row["config"]["BLOCK_N"]
                    visited = tiles(pattern, *blocks, once=kernel == "attention_dkdv")
                    clocks = visited * clocks_of_tile(row, products, chip)
                    seconds[kernel] = clocks / chip.multiprocessors / chip.clock_hz
                backward = seconds["attention_dq"] + seconds["attention_dkdv"]
                found.append({
                    "chip": number, "head_dim": head_dim, "pattern": name,
                    "forward": round(4 * head_dim * pairs / seconds["attention_forward"] / 1e12, 1),
                    "backward": round(10 * head_dim * pairs / backward / 1e12, 1),
                })  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.trees", description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout")
    parser.add_argument("--after", type=Path, default=HERE, help="another, by default this one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write")
    options = parser.parse_args(arguments)
    wanted = [(kernel, chip, head_dim) for kernel in PRODUCTS for chip in CHIPS for head_dim in HEAD_DIMS]
    parts = []
    for name, tree in (("before", options.before.resolve()), ("after", options.after.resolve())):
        rows = compiled(tree, wanted)
        commit = subprocess.check_output(["git", "-C", str(tree), "rev-parse", "--short=7", "HEAD"], text=True).strip()
        lines = ",\n".join(map(json.dumps, rows))
        expected = ",\n".join(map(json.dumps, predicted(rows)))
        parts.append(f'"{name}": {{"commit": "{commit}", "rows": [\n{lines}\n], "predicted": [\n{expected}\n]}}')
        print(f"{name}: {len(rows)} kernels of {tree}", file=sys.stderr, flush=True)
    replace(options.out, f'{{"schema": 1, "triton": "{triton.__version__}",\n' + ",\n".join(parts) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
