"""Launch configurations as data: the tiles of the attention kernels, by kernel, chip, dtype class and head dim.

`TABLES[kernel][chip][class][head dim]`. Chips are compute capabilities (10 * major + minor) and AMD's architecture
names. Classes are "half" (float16, bfloat16) and "float32"; "half extras" and "float32 extras" hold what differs with a
cap, sinks or a window, which need more registers. A chip that is not in a table, or an entry that is not in a chip's
part, is its parent's (`PARENTS`); all chips share ANY. Head dims between the powers of two run the next one's entry
unless they have their own.

"step", "forward" and "dq": BLOCK_M rows of a program, BLOCK_N keys a step; "dkdv": BLOCK_N keys of a program, BLOCK_M
rows a step. Without a reason beside it an entry is the largest tile that compiles without a spill and fits the chip's
shared memory, shapes of wgmma (cc 90) and tcgen05 (cc 100), of at least 64 rows, first. `benchmarks/static_report.py`
shows what the compiler made of each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """BLOCK_M packed query rows by BLOCK_N keys, and Triton's `num_warps` and `num_stages`."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


Chip = int | str
Table = dict[Chip, dict[str, dict[int, TileConfig]]]

ANY = "any"
# 86, 89 and 120, the consumer chips, have the tensor cores of cc 80 and 99 of its 163 kB of shared memory a block.
# gfx950 has 160 kB of LDS a block against 64.
PARENTS: dict[Chip, Chip] = {
    80: ANY,
    86: 80,
    89: 86,
    90: ANY,
    100: ANY,
    120: 86,
    "gfx942": ANY,
    "gfx950": "gfx942",
}
CHIPS = tuple(PARENTS)

# Rows of a tile are query rows of all heads that share a kv head. 128 rows hold a whole B = 4 step at group 4 (80
# rows), so K/V is read once.
_STEP: Table = {
    80: {
        "half": {
            16: TileConfig(64, 64, 4, 3),
            32: TileConfig(64, 64, 4, 3),
            64: TileConfig(64, 64, 4, 3),
            128: TileConfig(64, 64, 8, 2),  # 4 warps fill all 255 registers, 8 take 212
            256: TileConfig(64, 32, 8, 2),
        },
        "half extras": {
            16: TileConfig(64, 32, 4, 3),  # 64 keys spill 8 bytes
            256: TileConfig(64, 16, 8, 2),  # 32 keys spill 12 bytes
        },
    },
    90: {
        "half": {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 64, 8, 2),
            256: TileConfig(64, 32, 8, 2),
        },
        "half extras": {256: TileConfig(64, 16, 8, 2)},  # 32 keys spill 48 bytes
    },
    100: {
        "half": {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 64, 8, 2),
            256: TileConfig(64, 32, 8, 2),
        },
        "float32 extras": {
            128: TileConfig(32, 16, 8, 1),  # the plain tile uses 8 bytes of stack
            256: TileConfig(16, 16, 16, 1),  # the plain tile uses 8 bytes of stack
        },
    },
    120: {"float32 extras": {256: TileConfig(16, 16, 16, 1)}},  # 8 warps use 8 bytes of stack
    "gfx942": {
        "half": {
            16: TileConfig(128, 64, 4, 2),
            32: TileConfig(128, 64, 4, 2),
            64: TileConfig(128, 64, 4, 2),
            128: TileConfig(128, 64, 4, 2),
            256: TileConfig(64, 32, 4, 2),  # 64 keys take 72 kB of LDS, 128 rows spill
        },
        "half extras": {128: TileConfig(64, 64, 4, 2)},  # 128 rows spill
    },
    # float32 multiplies exactly (no TF32), on the plain FMA units of every chip: one table of small tiles. From head
    # dim 128 a second stage, or 32 rows, spills hundreds of bytes.
    ANY: {
        "float32": {
            16: TileConfig(32, 32, 4, 2),
            32: TileConfig(32, 32, 4, 2),
            64: TileConfig(32, 32, 8, 2),
            128: TileConfig(16, 32, 8, 1),
            256: TileConfig(16, 16, 8, 1),
        },
    },
}

_FORWARD: Table = {
    80: {
        "half": {
            16: TileConfig(128, 64, 4, 3),
            32: TileConfig(128, 64, 4, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 32, 8, 3),  # 64 keys spill 8 to 40 bytes
            256: TileConfig(64, 64, 8, 2),
        },
        "half extras": {
            16: TileConfig(128, 64, 8, 3),  # 4 warps spill 36 bytes
            32: TileConfig(128, 64, 8, 3),  # 4 warps spill 8 bytes
        },
    },
    86: {"half": {256: TileConfig(64, 32, 8, 2)}},  # 64 keys take 104 kB of shared memory
    90: {
        "half": {
            16: TileConfig(128, 128, 8, 3),
            32: TileConfig(128, 128, 8, 3),
            64: TileConfig(128, 128, 8, 3),
            128: TileConfig(128, 64, 8, 3),  # 128 keys spill 48 bytes
            256: TileConfig(128, 32, 8, 2),
        },
    },
    100: {
        "half": {
            16: TileConfig(128, 128, 8, 3),
            32: TileConfig(128, 128, 8, 3),
            64: TileConfig(128, 128, 8, 3),
            128: TileConfig(128, 64, 8, 3),
            256: TileConfig(64, 64, 8, 2),
        },
    },
    120: {"half": {32: TileConfig(128, 64, 8, 3)}},  # 4 warps use 24 bytes of stack
    "gfx942": {
        "half": {
            16: TileConfig(128, 64, 4, 2),
            32: TileConfig(128, 64, 4, 2),
            64: TileConfig(128, 64, 4, 2),
            128: TileConfig(128, 64, 4, 2),  # 8 warps have 256 registers a lane, and spill 32 bytes
            256: TileConfig(128, 32, 4, 2),  # 64 keys take 72 kB of LDS
        },
        "float32 extras": {256: TileConfig(16, 16, 8, 1)},  # 16 warps have 128 registers a lane, and spill 260 bytes
    },
    ANY: {
        "float32": {
            16: TileConfig(32, 32, 4, 2),
            32: TileConfig(32, 32, 4, 2),
            64: TileConfig(16, 32, 4, 2),
            128: TileConfig(16, 32, 8, 1),
            256: TileConfig(16, 16, 8, 1),
        },
        "float32 extras": {
            64: TileConfig(16, 32, 8, 2),  # 4 warps spill 8 bytes
            256: TileConfig(16, 16, 16, 1),  # 8 warps spill 8 bytes
        },
    },
}

_DQ: Table = {
    80: {
        "half": {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(64, 64, 8, 2),
            256: TileConfig(64, 32, 8, 2),
        },
        "half extras": {64: TileConfig(128, 32, 8, 3)},  # 64 keys spill 8 bytes
    },
    86: {"half": {256: TileConfig(64, 16, 8, 2)}},  # 32 keys take 100 kB of shared memory
    90: {
        "half": {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 64, 8, 3),
            256: TileConfig(64, 16, 8, 2),
        },
    },
    100: {
        "half": {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 64, 8, 2),
            256: TileConfig(64, 32, 8, 2),
        },
    },
    "gfx942": {
        "half": {
            16: TileConfig(128, 64, 4, 2),
            32: TileConfig(128, 64, 4, 2),
            64: TileConfig(128, 64, 4, 2),
            128: TileConfig(64, 64, 4, 2),  # 128 rows spill, as do 8 warps
            256: TileConfig(64, 16, 4, 2),  # 32 keys spill 200 bytes
        },
        "float32": {256: TileConfig(16, 16, 4, 1)},  # 16 warps have 128 registers a lane, and spill 1476 bytes
        "float32 extras": {128: TileConfig(16, 32, 4, 1)},  # 8 warps have 256, and spill 176 bytes
    },
    ANY: {
        "float32": {
            16: TileConfig(32, 32, 4, 2),
            32: TileConfig(32, 32, 4, 2),
            64: TileConfig(32, 32, 4, 2),
            128: TileConfig(16, 32, 8, 1),
            256: TileConfig(16, 16, 16, 1),
        },
    },
}

# With a cap, lse can no longer go into an accumulator (`attention_backward._dkdv_tile`), which costs this kernel most.
_DKDV: Table = {
    80: {
        "half": {
            16: TileConfig(64, 128, 8, 2),
            32: TileConfig(64, 128, 8, 2),
            64: TileConfig(64, 128, 8, 3),
            128: TileConfig(64, 64, 8, 2),
            256: TileConfig(16, 64, 8, 2),
        },
        "half extras": {
            64: TileConfig(32, 128, 8, 2),  # 64 rows spill 44 bytes
            256: TileConfig(16, 32, 8, 2),  # 64 keys spill 40 bytes
        },
        "float32": {128: TileConfig(16, 64, 8, 1)},  # 32 keys spill 24 bytes
    },
    120: {
        "half": {256: TileConfig(16, 32, 8, 2)},  # 64 keys use 16 bytes of stack
        "float32 extras": {256: TileConfig(16, 16, 16, 1)},  # 8 warps use 32 bytes of stack
    },
    90: {
        "half": {
            16: TileConfig(64, 128, 8, 2),
            32: TileConfig(64, 128, 8, 2),
            64: TileConfig(64, 128, 8, 2),
            80: TileConfig(32, 128, 8, 2),  # padded to 128 columns: 64 rows spill 32 bytes
            96: TileConfig(32, 128, 8, 2),
            128: TileConfig(64, 128, 8, 2),
            256: TileConfig(16, 64, 8, 2),
        },
        "half extras": {
            80: TileConfig(32, 64, 8, 2),  # 128 keys spill 8 bytes
            96: TileConfig(32, 64, 8, 2),
            128: TileConfig(32, 128, 8, 2),  # 64 rows spill 340 bytes
        },
    },
    100: {
        "half": {
            16: TileConfig(64, 128, 8, 2),
            32: TileConfig(64, 128, 8, 2),
            64: TileConfig(32, 128, 8, 2),  # 64 rows spill 64 bytes
            128: TileConfig(32, 64, 8, 2),  # 64 rows spill 72 bytes, 128 keys 150
            256: TileConfig(32, 32, 8, 1),  # below the 64 rows of tcgen05: HMMA; what tcgen05 takes spills 170 bytes
        },
    },
    "gfx942": {
        "half": {
            16: TileConfig(64, 128, 4, 2),
            32: TileConfig(64, 128, 4, 2),
            64: TileConfig(64, 128, 4, 2),
            128: TileConfig(32, 64, 4, 2),  # 64 rows or 128 keys spill, as do 8 warps
            256: TileConfig(16, 32, 4, 2),
        },
        "half extras": {
            16: TileConfig(32, 128, 4, 2),  # 64 rows spill
            32: TileConfig(32, 128, 4, 2),  # 64 rows spill
            64: TileConfig(32, 128, 4, 2),  # 64 rows spill
            128: TileConfig(16, 64, 4, 2),  # 32 rows spill
        },
        "float32": {
            64: TileConfig(32, 32, 4, 1),  # 8 warps have 256 registers a lane, and spill 12 bytes
            256: TileConfig(16, 16, 4, 1),  # 8 warps spill 308 bytes
        },
        "float32 extras": {16: TileConfig(32, 32, 4, 2)},  # 8 warps spill 236 bytes
    },
    ANY: {
        "float32": {
            16: TileConfig(32, 32, 4, 2),
            32: TileConfig(32, 32, 4, 2),
            64: TileConfig(32, 32, 8, 1),
            128: TileConfig(16, 32, 8, 1),
            256: TileConfig(16, 16, 8, 1),
        },
        "float32 extras": {16: TileConfig(32, 32, 8, 2)},  # 4 warps spill 8 bytes
    },
}

TABLES: dict[str, Table] = {"step": _STEP, "forward": _FORWARD, "dq": _DQ, "dkdv": _DKDV}
