"""How fast a chip goes through a kernel's hot loop, on paper: from its instructions and the rate of the tensor cores.

A multiprocessor has four schedulers, each of which issues an instruction of a warp a clock, and 16 exponentials a
clock. Where the next tile's scores are multiplied during the softmax, or another block is resident, the tensor cores
and the schedulers work at the same time; else one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HOT = ("mma", "fma", "mufu", "shared", "global", "local", "barrier", "other")  # instructions that the report counts
HMMA_FLOPS = 2048.0  # a clock and multiprocessor: the rate of an A100, which newer chips keep for `mma.sync`
LOAD_CLOCKS = 250.0  # from a load to its value, out of L2: an assumption


@dataclass(frozen=True)
class Chip:
    """A GPU: multiprocessors, what it copies and multiplies a second, and its clock.

    Two assumptions: `gap_s` from one kernel to the next that depends on it, in a CUDA graph, and `dead_s` of a program
    that returns at once.
    """

    name: str
    capability: int
    multiprocessors: int
    bytes_per_s: float
    flops_per_s: float
    clock_hz: float
    gap_s: float
    dead_s: float


H200 = Chip("H200", 90, 132, 4.3e12, 790e12, 1.755e9, 1.5e-6, 1.2e-6)  # rates as PyTorch reaches them
B200 = Chip("B200", 100, 148, 8e12, 2250e12, 1.85e9, 1.5e-6, 1.2e-6)  # rates of the data sheet


def resident_blocks(row: dict[str, Any]) -> int:
    """Blocks that a multiprocessor holds at a time of the kernel of this entry of the static report."""
    return max(1, row["warps"] // row["config"]["num_warps"])


def clocks_of_tile(row: dict[str, Any], products: int, chip: Chip) -> float:
    """Clocks that a multiprocessor needs for one tile: BLOCK_M x BLOCK_N scores and `products` products over them.

    `row` is an entry of the static report, whose hot loop takes a tile a turn. Where it has "load_to_use"
    (`assembly.load_to_use`) the loop waits for its loads, if too little stands between a load and its use.
    """
    config, loop = row["config"], row["loop"]
    rate = HMMA_FLOPS if row["tensor_core"] == ["HMMA"] else chip.flops_per_s / chip.multiprocessors / chip.clock_hz
    of_mma = 2.0 * products * config["BLOCK_M"] * config["BLOCK_N"] * row["head_dim"] / rate
    of_warp = config["num_warps"] / 4  # clocks of an instruction that all warps issue
    of_slots = max(sum(loop[name] for name in HOT) * of_warp, loop["mufu"] * config["num_warps"] * 2)
    if config.get("SCORES_AHEAD", False) or resident_blocks(row) > 1:
        return max(of_mma, of_slots)
    waits = 0.0
    if row.get("load_to_use"):
        between, multiplying = row["load_to_use"]
        waits = max(0.0, LOAD_CLOCKS - between * of_warp - multiplying / loop["mma"] * of_mma)
    return of_mma + of_slots + waits
