"""Launch configurations of the linear kernels as data: which tile sizes run on which chip.

A row-invariant kernel's configuration depends on the chip, the dtype and the weights' shape alone, never on how many
rows there are: that, one ascending loop over the inner dimension, and no split are what make a row's bits its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .configs import ancestry
from .tables import ANY, Chip


@dataclass(frozen=True)
class LinearConfig:
    """A tile of BLOCK_M by BLOCK_N results, BLOCK_K of the inner dimension a step, `num_warps` and `num_stages`."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# Projections with at most this many results take the narrow tile: twice the programs, to keep more of the chip loading.
NARROW = 4096

# "wide", "narrow": the row-invariant projection. BLOCK_M 128 holds a whole TiDAR step at B = 8 (72 rows), so a weight
#     is loaded once; rows past the last are not loaded. Two to three stages of the weight's tile in flight cover the
#     latency of memory, which is what decoding waits for.
# "down": m * (x A^T) while decoding. Its results are few, so small tiles make more programs and shorter loops.
# "train_down", "add", "sum": training, with thousands of rows: adapter inputs, the term added to the rows that have it,
#     and sums over rows (the adapter's gradients).
ROLES = ("wide", "narrow", "down", "train_down", "add", "sum")
# TABLE[chip][class][role], inherited as `config_tables` says.
TABLE: dict[Chip, dict[str, dict[str, LinearConfig]]] = {
    80: {
        "half": {
            "wide": LinearConfig(128, 64, 64, 8, 4),
            "narrow": LinearConfig(128, 32, 64, 8, 4),
            "down": LinearConfig(16, 16, 256, 2, 4),
            "train_down": LinearConfig(128, 64, 64, 8, 3),
            "add": LinearConfig(128, 128, 32, 8, 3),
            "sum": LinearConfig(64, 64, 64, 4, 3),
        },
    },
    90: {
        "half": {
            "wide": LinearConfig(128, 64, 128, 8, 4),
            "narrow": LinearConfig(128, 32, 128, 8, 4),
            "down": LinearConfig(16, 16, 256, 2, 4),
            "train_down": LinearConfig(128, 64, 64, 8, 3),
            "add": LinearConfig(128, 128, 64, 8, 3),
            "sum": LinearConfig(64, 64, 64, 4, 3),
        },
    },
    100: {
        "half": {
            "wide": LinearConfig(128, 64, 128, 8, 4),
            "narrow": LinearConfig(128, 32, 128, 8, 4),
            "down": LinearConfig(16, 16, 256, 2, 4),
            "train_down": LinearConfig(128, 64, 64, 8, 3),
            "add": LinearConfig(128, 128, 64, 8, 3),
            "sum": LinearConfig(64, 64, 64, 4, 3),
        },
    },
    120: {"half": {"sum": LinearConfig(64, 64, 32, 4, 3)}},  # 64 deep uses 16 bytes of stack
    "gfx942": {
        "half": {
            "wide": LinearConfig(128, 64, 64, 4, 2),
            "narrow": LinearConfig(128, 32, 64, 4, 2),
            "down": LinearConfig(16, 16, 256, 2, 2),
            "train_down": LinearConfig(128, 64, 64, 4, 2),
            "add": LinearConfig(128, 128, 32, 8, 2),
            "sum": LinearConfig(64, 64, 64, 4, 2),
        },
    },
    # float32 multiplies exactly (no TF32), on the plain FMA units of every chip.
    ANY: {
        "float32": {
            "wide": LinearConfig(32, 64, 32, 4, 3),
            "narrow": LinearConfig(32, 32, 32, 4, 3),
            "down": LinearConfig(16, 16, 64, 2, 3),
            "train_down": LinearConfig(32, 32, 32, 4, 2),
            "add": LinearConfig(32, 64, 16, 4, 2),
            "sum": LinearConfig(32, 32, 32, 4, 2),
        },
    },
}
# The interpreter pays per operation, not per element; small tiles put edges within reach of tests.
_INTERPRET = LinearConfig(16, 32, 32, 1, 1)


@functools.cache
def _entries(chip: Chip, is_float32: bool) -> dict[str, LinearConfig]:
    name = "float32" if is_float32 else "half"
    found: dict[str, LinearConfig] = {}
    for one in reversed(ancestry(chip)):
        found |= TABLE.get(one, {}).get(name, {})
    return found


def linear_config(role: str, chip: Chip | None, dtype: torch.dtype, out_features: int) -> LinearConfig:
    """Tiles of a kernel by its role: "base", the row-invariant projection, "down", "train_down", "add" or "sum"."""
    if chip is None:
        return _INTERPRET
    if role == "base":
        role = "narrow" if out_features <= NARROW else "wide"
    return _entries(chip, dtype == torch.float32)[role]
