"""Launch configurations as data: which tile sizes run on which chip.

The step kernel's configuration depends on the chip, the dtype, the head dim and what the model does to its logits (a
cap, sinks, a window), and on nothing else: not on the number of rows, the batch or the length. Draft rows and
single-token decoding therefore run the very same instructions, which is half of what makes their bits equal. The other
half is the split size, a function of the cache's capacity alone.
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
# With a cap, sinks or a window there is more to hold: smaller tiles where the plain ones spill.
_HALF_EXTRAS = {
    80: {
        16: TileConfig(64, 32, 4, 3),  # 64 keys spill 8 bytes
        256: TileConfig(64, 16, 8, 2),  # 32 keys spill 12 bytes
    },
    90: {256: TileConfig(64, 16, 8, 2)},  # 32 keys spill 48 bytes
    100: {},
}
_FLOAT32_EXTRAS = {
    80: {},
    90: {},
    100: {128: TileConfig(32, 16, 8, 1), 256: TileConfig(16, 16, 16, 1)},  # the plain tiles use 8 bytes of stack
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


def step_config(chip: int | None, dtype: torch.dtype, head_dim: int, extras: bool = False) -> TileConfig:
    """Tiles of the step kernel; `extras`: with a cap, sinks or a window."""
    if chip is None:
        return _INTERPRET
    is_float32 = dtype == torch.float32
    table = _FLOAT32 if is_float32 else _HALF[chip]
    if extras:
        table = table | (_FLOAT32_EXTRAS if is_float32 else _HALF_EXTRAS)[chip]
    return table[block_dim(head_dim)]


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
# With a cap, or in the forward pass sinks, smaller tiles or more warps where the plain ones spill. The backward pass of
# dK and dV can no longer put lse into an accumulator (`attention_backward._dkdv_tile`), which costs it most.
_ATTENTION_HALF_EXTRAS = {
    "forward": {80: {32: TileConfig(128, 64, 8, 3)}, 90: {}, 100: {}},  # 4 warps spill 8 bytes
    "dq": {80: {64: TileConfig(128, 32, 8, 3)}, 90: {}, 100: {}},  # 64 keys spill 8 bytes
    "dkdv": {
        80: {
            64: TileConfig(32, 128, 8, 2),  # 64 rows spill 44 bytes
            256: TileConfig(16, 32, 8, 2),  # 64 keys spill 40 bytes
        },
        90: {
            80: TileConfig(32, 64, 8, 2),  # 128 keys spill 8 bytes
            96: TileConfig(32, 64, 8, 2),
            128: TileConfig(32, 128, 8, 2),  # 64 rows spill 340 bytes
        },
        100: {},
    },
}
_ATTENTION_FLOAT32_EXTRAS = {
    "forward": {64: TileConfig(16, 32, 8, 2), 256: TileConfig(16, 16, 16, 1)},  # half the warps spill 8 bytes
    "dq": {},
    "dkdv": {16: TileConfig(32, 32, 8, 2)},  # 4 warps spill 8 bytes
}
_ATTENTION_INTERPRET = TileConfig(32, 32, 1, 1)


def attention_config(
    kernel: str, chip: int | None, dtype: torch.dtype, head_dim: int, extras: bool = False
) -> TileConfig:
    """Tiles of a training kernel: "forward", "dq" or "dkdv"; `extras`: with a cap, in the forward pass also sinks."""
    if chip is None:
        return _ATTENTION_INTERPRET
    is_float32 = dtype == torch.float32
    table = _ATTENTION_FLOAT32[kernel] if is_float32 else _ATTENTION_HALF[kernel][chip]
    if extras:
        table = table | (_ATTENTION_FLOAT32_EXTRAS[kernel] if is_float32 else _ATTENTION_HALF_EXTRAS[kernel][chip])
    return table.get(head_dim, table[block_dim(head_dim)])
