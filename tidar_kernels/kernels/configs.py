"""Launch configurations as data: which tile sizes run on which chip.

The step kernel's configuration depends on the chip, the dtype and the head dim, and on nothing else: not on the number
of rows, the batch or the length. Draft rows and single-token decoding therefore run the very same instructions, which
is half of what makes their bits equal. The other half is the split size, a function of the cache's capacity alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .launch import INTERPRET, block_dim

CHIPS = (80, 90, 100)
HEAD_DIM_TILES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class TileConfig:
    """BLOCK_M packed query rows by BLOCK_N keys, and Triton's `num_warps` and `num_stages`."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# Rows of a tile are query rows of all heads that share a kv head. 64 rows are the least that wgmma (cc 90) and
# tcgen05 (cc 100) take; 128 rows hold a whole B = 4 step at group 4 (80 rows), so K/V is read once.
# Every entry compiles without a spill; tests/test_compile.py reads the compiler's output.
_HALF = {
    80: {
        16: TileConfig(64, 64, 4, 3),
        32: TileConfig(64, 64, 4, 3),
        64: TileConfig(64, 64, 4, 3),
        128: TileConfig(64, 64, 8, 2),  # 4 warps fill all 255 registers, 8 take 212
        256: TileConfig(64, 32, 8, 2),
    },
    90: {
        16: TileConfig(128, 64, 8, 3),
        32: TileConfig(128, 64, 8, 3),
        64: TileConfig(128, 64, 8, 3),
        128: TileConfig(128, 64, 8, 2),
        256: TileConfig(64, 32, 8, 2),
    },
    100: {
        16: TileConfig(128, 64, 8, 3),
        32: TileConfig(128, 64, 8, 3),
        64: TileConfig(128, 64, 8, 3),
        128: TileConfig(128, 64, 8, 2),
        256: TileConfig(64, 32, 8, 2),
    },
}
# float32 multiplies exactly (no TF32), on the plain FMA units of every chip: one table of small tiles. From head dim
# 128 a second stage, or 32 rows, spills hundreds of bytes.
_FLOAT32 = {
    16: TileConfig(32, 32, 4, 2),
    32: TileConfig(32, 32, 4, 2),
    64: TileConfig(32, 32, 8, 2),
    128: TileConfig(16, 32, 8, 1),
    256: TileConfig(16, 16, 8, 1),
}
# The interpreter pays per operation, not per element; small tiles put tile and split edges within reach of tests.
_INTERPRET = TileConfig(32, 16, 1, 1)


def nearest_chip(capability: int) -> int:
    """The newest tabulated chip that is not newer than `capability` (10 * major + minor)."""
    return max((chip for chip in CHIPS if chip <= capability), default=CHIPS[0])


@functools.cache
def _chip_of(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return nearest_chip(10 * major + minor)


def chip_of(device: torch.device) -> int | None:
    """The chip whose table serves `device`; None for the interpreter."""
    return None if INTERPRET else _chip_of(device.index)


def step_config(chip: int | None, dtype: torch.dtype, head_dim: int) -> TileConfig:
    """Tiles of the step kernel."""
    if chip is None:
        return _INTERPRET
    return (_FLOAT32 if dtype == torch.float32 else _HALF[chip])[block_dim(head_dim)]


def split_size(chip: int | None, max_len: int) -> int:
    """Keys a split: fixed in absolute positions for a given cache capacity, never by the current length.

    About 64 splits at capacity: enough programs to fill the chip at short lengths, few enough partial results that
    combining them stays cheap. At least 512 keys, so that a split outweighs its epilogue; at most 4096, so that a
    long cache that is still nearly empty keeps some parallelism.
    """
    if chip is None:
        return 64
    size = 512
    while size < 4096 and size * 64 < max_len:
        size *= 2
    return size


# The training kernels, without a GPU to time them: the largest tiles that compile without a spill, wgmma and tcgen05
# shapes first. "forward" and "dq": BLOCK_M rows of a program, BLOCK_N keys a step; "dkdv": BLOCK_N keys of a program,
# BLOCK_M rows a step. tests/test_attention_compile.py reads the compiler's output for every entry.
_ATTENTION_HALF = {
    "forward": {
        80: {
            16: TileConfig(128, 64, 4, 3),
            32: TileConfig(128, 64, 4, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 32, 8, 3),  # 64 keys spill 8 to 40 bytes
            256: TileConfig(64, 64, 8, 2),
        },
        90: {
            16: TileConfig(128, 128, 8, 3),
            32: TileConfig(128, 128, 8, 3),
            64: TileConfig(128, 128, 8, 3),
            128: TileConfig(128, 64, 8, 3),  # 128 keys spill 48 bytes
            256: TileConfig(128, 32, 8, 2),
        },
        100: {
            16: TileConfig(128, 128, 8, 3),
            32: TileConfig(128, 128, 8, 3),
            64: TileConfig(128, 128, 8, 3),
            128: TileConfig(128, 64, 8, 3),
            256: TileConfig(64, 64, 8, 2),
        },
    },
    "dq": {
        80: {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(64, 64, 8, 2),
            256: TileConfig(64, 32, 8, 2),
        },
        90: {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 64, 8, 3),
            256: TileConfig(64, 16, 8, 2),
        },
        100: {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 64, 8, 2),
            256: TileConfig(64, 32, 8, 2),
        },
    },
    "dkdv": {
        80: {
            16: TileConfig(64, 128, 8, 2),
            32: TileConfig(64, 128, 8, 2),
            64: TileConfig(64, 128, 8, 3),
            128: TileConfig(64, 64, 8, 2),
            256: TileConfig(16, 64, 8, 2),
        },
        90: {
            16: TileConfig(64, 128, 8, 2),
            32: TileConfig(64, 128, 8, 2),
            64: TileConfig(64, 128, 8, 2),
            80: TileConfig(32, 128, 8, 2),  # padded to 128 columns: 64 rows spill 32 bytes
            96: TileConfig(32, 128, 8, 2),
            128: TileConfig(64, 128, 8, 2),
            256: TileConfig(16, 64, 8, 2),
        },
        100: {
            16: TileConfig(64, 128, 8, 2),
            32: TileConfig(64, 128, 8, 2),
            64: TileConfig(32, 128, 8, 2),  # 64 rows spill 64 bytes
            128: TileConfig(32, 64, 8, 2),  # 64 rows spill 72 bytes, 128 keys 150
            256: TileConfig(32, 32, 8, 1),  # below the 64 rows of tcgen05: HMMA; what tcgen05 takes spills 170 bytes
        },
    },
}
_ATTENTION_FLOAT32 = {
    "forward": {
        16: TileConfig(32, 32, 4, 2),
        32: TileConfig(32, 32, 4, 2),
        64: TileConfig(16, 32, 4, 2),
        128: TileConfig(16, 32, 8, 1),
        256: TileConfig(16, 16, 8, 1),
    },
    "dq": {
        16: TileConfig(32, 32, 4, 2),
        32: TileConfig(32, 32, 4, 2),
        64: TileConfig(32, 32, 4, 2),
        128: TileConfig(16, 32, 8, 1),
        256: TileConfig(16, 16, 16, 1),
    },
    "dkdv": {
        16: TileConfig(32, 32, 4, 2),
        32: TileConfig(32, 32, 4, 2),
        64: TileConfig(32, 32, 8, 1),
        128: TileConfig(16, 32, 8, 1),
        256: TileConfig(16, 16, 8, 1),
    },
}
_ATTENTION_INTERPRET = TileConfig(32, 32, 1, 1)


def attention_config(kernel: str, chip: int | None, dtype: torch.dtype, head_dim: int) -> TileConfig:
    """Tiles of a training kernel: "forward", "dq" or "dkdv"."""
    if chip is None:
        return _ATTENTION_INTERPRET
    table = _ATTENTION_FLOAT32[kernel] if dtype == torch.float32 else _ATTENTION_HALF[kernel][chip]
    return table.get(head_dim, table[block_dim(head_dim)])
