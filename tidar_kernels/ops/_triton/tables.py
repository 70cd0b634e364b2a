"""Launch configurations as data: the tiles of the attention kernels, by kernel, chip, dtype class and head dim.

`TABLES[kernel][chip][class][head dim]`. Chips are compute capabilities (10 * major + minor) and AMD's architecture
names. Classes are "half" (float16, bfloat16) and "float32"; "half extras" and "float32 extras" hold what differs with a
cap, sinks or a window, which need more registers, and "half tree" and "float32 tree" what differs from those with the
paths of a token tree besides. A chip that is not in a table, or an entry that is not in a chip's part, is its parent's
(`PARENTS`); all chips share ANY. Head dims between the powers of two run the next one's entry unless they have their
own. "half specialised" of a chip has entries that another kernel runs (`SpecialisedConfig`), each for its own head dim.
None has been measured, so there are none; `bench --tune` tries them.

"step", "forward" and "dq": BLOCK_M rows of a program, BLOCK_N keys a step; "dkdv": BLOCK_N keys of a program, BLOCK_M
rows a step. `benchmarks/static/report.py` shows what the compiler made of each. No time on a GPU has chosen one yet:
what spills or does not fit the chip's shared memory is out, and of the rest an entry without a reason beside it

    overlaps async copies for the next iterations with this iteration's MMAs: from 3 stages on;
    reads K/V for 128 rows at a time where it can (cc 80: 64), as L2 has no bandwidth for fewer;
    up to head dim 64 lets two CTAs share an SM, so that one's MMAs fill the other's softmax;
    from head dim 128 on, where one CTA fills the registers, computes SCORES_AHEAD on cc 90 and 100;
    on cc 80 to 89 and 120 lets no row span warps where it can, so that no warp waits for another's maximum.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """BLOCK_M packed query rows by BLOCK_N keys, and Triton's `num_warps`, `num_stages` and `maxnreg`.

    `maxnreg` is what a thread may have of registers: left alone, NVIDIA's compiler spills a few scalars where that fits
    more programs on a multiprocessor.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class ForwardConfig(TileConfig):
    """Of "step" and "forward", also the order of their loop over whole tiles (`common.attend_whole_tiles`)."""

    SCORES_AHEAD: bool = False


@dataclass(frozen=True)
class SpecialisedConfig(TileConfig):
    """Of "forward", for `attention/gluon_forward.py`: BLOCK_M 128, `num_warps` 4 for each half of these rows, and
    `num_stages` buffers of keys.

    It stands under "half specialised" and is used without a cap and sinks, where Triton has Gluon.
    """


@dataclass(frozen=True)
class DkdvConfig(TileConfig):
    """Of "dkdv", also when lse and delta of a row tile are loaded (`triton_backward.attention_dkdv_kernel`)."""

    ROWS_AHEAD: bool = False


Chip = int | str
Table = dict[Chip, dict[str, dict[int, TileConfig]]]

ANY = "any"
# What a launch does besides: each kind takes the entries of those before it where it has none of its own.
KINDS = PLAIN, EXTRAS, TREE = "", "extras", "tree"
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

# Of the chip's largest product: A100, A40, L40S, H200, B200, RTX PRO 6000, MI300X, MI350X.
MULTIPROCESSORS: dict[Chip, int] = {
    80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188, "gfx942": 304, "gfx950": 256,
}  # fmt: skip
# Head dims at which a program of the step kernel may have several splits: scalars and the tile of folded results are
# spilled around the loop over whole tiles, and nothing in it. With a cap, sinks or a window some would be in the loop.
FOLDING: dict[Chip, tuple[int, ...]] = dict.fromkeys((80, 90, 100), (64, 128))

# Rows of a tile are query rows of all heads that share a kv head. 128 rows hold a whole B = 4 step at group 4 (80
# rows), so K/V is read once.
_STEP: Table = {
    80: {
        "half": {
            16: ForwardConfig(64, 64, 4, 3),
            32: ForwardConfig(64, 64, 4, 3),
            64: ForwardConfig(128, 32, 4, 3),
            72: ForwardConfig(64, 32, 8, 3),  # rows that start anywhere: in ragged batches 4 warps spill in the loop
            128: ForwardConfig(64, 32, 4, 3),  # 128 rows spill 8 bytes
            256: ForwardConfig(32, 32, 8, 3),  # of pages and float8 64 rows spill in the loop
            512: ForwardConfig(32, 32, 8, 3),
        },
        "half extras": {
            16: ForwardConfig(64, 32, 4, 3),  # 64 keys spill 8 bytes
            32: ForwardConfig(64, 32, 4, 3),  # 64 keys spill 16 bytes
            256: ForwardConfig(64, 16, 8, 3),  # 32 keys spill 12 bytes
        },
        "half tree": {512: ForwardConfig(32, 16, 8, 3)},  # 32 keys use 32 bytes of stack
    },
    86: {
        "half": {
            128: ForwardConfig(128, 32, 8, 3),
            256: ForwardConfig(32, 16, 8, 3),  # of pages and float8 64 rows spill in the loop
            512: ForwardConfig(32, 16, 8, 3),  # 32 keys take 162 kB of shared memory
        },
    },
    90: {
        "half": {
            16: ForwardConfig(128, 64, 4, 4),
            32: ForwardConfig(128, 64, 4, 4),
            64: ForwardConfig(128, 64, 4, 4),
            72: ForwardConfig(128, 32, 8, 4),  # rows that start anywhere: in ragged batches 64 keys spill in the loop
            128: ForwardConfig(128, 64, 8, 4, SCORES_AHEAD=True),
            256: ForwardConfig(64, 32, 8, 3),
            512: ForwardConfig(32, 32, 8, 3),  # below the 64 rows of wgmma, which spill a kilobyte
        },
        "half extras": {256: ForwardConfig(64, 16, 8, 3)},  # 32 keys spill 48 bytes
        "half tree": {
            128: ForwardConfig(128, 64, 8, 4),  # with scores ahead Triton 3.6 spills 36 bytes
            512: ForwardConfig(16, 32, 8, 3),  # 32 rows use 8 to 40 bytes of stack
        },
    },
    100: {
        "half": {
            16: ForwardConfig(128, 64, 4, 4, SCORES_AHEAD=True),
            32: ForwardConfig(128, 64, 4, 4, SCORES_AHEAD=True),
            64: ForwardConfig(128, 64, 4, 4, SCORES_AHEAD=True),
            128: ForwardConfig(128, 64, 8, 4, SCORES_AHEAD=True),
            256: ForwardConfig(64, 32, 8, 3, SCORES_AHEAD=True),
            512: ForwardConfig(32, 32, 8, 3),  # below the 64 rows of tcgen05, which spill 768 bytes
        },
        "half extras": {64: ForwardConfig(128, 64, 8, 4, SCORES_AHEAD=True)},  # 4 warps spill 32 bytes
        "half tree": {512: ForwardConfig(16, 32, 8, 3)},  # 32 rows use 24 to 80 bytes of stack
        "float32 extras": {
            128: ForwardConfig(32, 16, 8, 1),  # the plain tile uses 8 bytes of stack
            256: ForwardConfig(16, 16, 16, 1),  # the plain tile uses 8 bytes of stack
        },
    },
    120: {
        "half extras": {
            16: ForwardConfig(64, 64, 4, 3),  # 32 keys use 8 bytes of stack
            512: ForwardConfig(16, 16, 8, 3),  # 32 rows use 8 bytes of stack
        },
        "half tree": {
            256: ForwardConfig(32, 16, 8, 3),  # 64 rows use 32 bytes of stack
            512: ForwardConfig(16, 16, 8, 3),  # 32 rows use 8 bytes of stack
        },
        "float32 extras": {256: ForwardConfig(16, 16, 16, 1)},  # 8 warps use 8 bytes of stack
    },
    "gfx942": {
        "half": {
            16: ForwardConfig(128, 64, 4, 2),
            32: ForwardConfig(128, 64, 4, 2),
            64: ForwardConfig(128, 64, 4, 2),
            128: ForwardConfig(128, 64, 4, 2),
            256: ForwardConfig(64, 32, 4, 2),  # 64 keys take 72 kB of LDS, 128 rows spill
            512: ForwardConfig(32, 16, 8, 2),
        },
        "half extras": {128: ForwardConfig(64, 64, 4, 2)},  # 128 rows spill
        "float32": {512: ForwardConfig(16, 16, 4, 1)},  # 8 warps have 256 registers a lane, and use 536 bytes of stack
    },
    # float32 multiplies exactly (no TF32), on the plain FMA units of every chip: one table of small tiles. From head
    # dim 128 a second stage, or 32 rows, spills hundreds of bytes.
    ANY: {
        "float32": {
            16: ForwardConfig(32, 32, 4, 2),
            32: ForwardConfig(32, 32, 4, 2),
            64: ForwardConfig(32, 32, 8, 2),
            128: ForwardConfig(16, 32, 8, 1),
            256: ForwardConfig(16, 16, 8, 1),
            512: ForwardConfig(16, 16, 8, 1),
        },
    },
}

_FORWARD: Table = {
    80: {
        "half": {
            16: ForwardConfig(128, 64, 4, 3),
            32: ForwardConfig(128, 64, 4, 3),
            64: ForwardConfig(64, 64, 4, 3),
            128: ForwardConfig(128, 32, 8, 3),  # 64 keys spill 8 to 40 bytes
            256: ForwardConfig(64, 32, 8, 3),
            512: ForwardConfig(32, 32, 8, 3),
        },
        "half extras": {
            16: ForwardConfig(128, 64, 8, 3),  # 4 warps spill 36 bytes
            32: ForwardConfig(128, 32, 8, 3),  # 64 keys spill 20 bytes
            64: ForwardConfig(128, 32, 8, 3),  # 64 keys of 64 rows spill 20 bytes
        },
    },
    86: {
        "half": {
            256: ForwardConfig(64, 16, 8, 3),
            512: ForwardConfig(32, 16, 8, 3),  # 32 keys take 162 kB of shared memory
        },
    },
    90: {
        "half": {
            16: ForwardConfig(128, 64, 4, 4),
            32: ForwardConfig(128, 64, 4, 4),
            64: ForwardConfig(128, 64, 4, 4),
            128: ForwardConfig(128, 64, 8, 4, SCORES_AHEAD=True),  # 128 keys spill
            256: ForwardConfig(128, 32, 8, 3),
            512: ForwardConfig(32, 32, 8, 3),  # below the 64 rows of wgmma, which spill 370 bytes
        },
    },
    100: {
        "half": {
            16: ForwardConfig(128, 64, 4, 4, SCORES_AHEAD=True),
            32: ForwardConfig(128, 64, 4, 4, SCORES_AHEAD=True),
            64: ForwardConfig(128, 64, 4, 4, SCORES_AHEAD=True),
            128: ForwardConfig(128, 64, 8, 4, SCORES_AHEAD=True),
            256: ForwardConfig(128, 32, 8, 3),
            512: ForwardConfig(32, 32, 8, 3),  # below the 64 rows of tcgen05, which spill 120 bytes
        },
        "half extras": {256: ForwardConfig(64, 32, 8, 3)},  # 128 rows use 16 bytes of stack
    },
    120: {"half": {32: ForwardConfig(128, 64, 8, 3)}},  # 4 warps use 24 bytes of stack
    "gfx942": {
        "half": {
            16: ForwardConfig(128, 64, 4, 2),
            32: ForwardConfig(128, 64, 4, 2),
            64: ForwardConfig(128, 64, 4, 2),
            128: ForwardConfig(128, 64, 4, 2),  # 8 warps have 256 registers a lane, and spill 32 bytes
            256: ForwardConfig(128, 32, 4, 2),  # 64 keys take 72 kB of LDS
            512: ForwardConfig(32, 16, 8, 2),
        },
        "float32": {512: ForwardConfig(16, 16, 4, 1)},  # 16 warps have 128 registers a lane, and spill
        "float32 extras": {256: ForwardConfig(16, 16, 8, 1)},  # 16 warps have 128 registers a lane, and spill 260 bytes
    },
    ANY: {
        "float32": {
            16: ForwardConfig(32, 32, 4, 2, maxnreg=128),
            32: ForwardConfig(32, 32, 4, 2),
            64: ForwardConfig(16, 32, 8, 2, maxnreg=128),
            128: ForwardConfig(16, 32, 8, 1, maxnreg=128),
            256: ForwardConfig(16, 16, 8, 1),
            512: ForwardConfig(16, 16, 16, 1),
        },
        "float32 extras": {256: ForwardConfig(16, 16, 16, 1, maxnreg=128)},  # 8 warps spill 8 bytes
    },
}

# In float32 the least tiles of "dq" and "dkdv", 16 by 16, take 128 kB of shared memory at head dim 512: only cc 90 and
# 100 have entries. cc 80 has as much, but 86 takes its entries; on AMD's chips "dq" uses 900 bytes of stack.
_DQ: Table = {
    80: {
        "half": {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(64, 64, 8, 3),
            256: TileConfig(64, 32, 8, 3),
            512: TileConfig(32, 16, 8, 3),  # 32 keys take 194 kB of shared memory
        },
        "half extras": {
            64: TileConfig(128, 32, 8, 3),  # 64 keys spill 8 bytes
            256: TileConfig(64, 16, 8, 3),  # 32 keys spill 24 bytes
        },
    },
    86: {
        "half": {
            128: TileConfig(128, 16, 8, 3),
            256: TileConfig(64, 16, 8, 3),
            512: TileConfig(16, 16, 8, 3),  # 32 rows take 129 kB of shared memory
        },
    },
    90: {
        "half": {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 32, 8, 4),
            128: TileConfig(128, 64, 8, 3),
            256: TileConfig(128, 16, 8, 3),
            512: TileConfig(32, 32, 8, 3),  # below the 64 rows of wgmma, which spill kilobytes
        },
        "float32": {512: TileConfig(16, 16, 16, 1)},
    },
    100: {
        "half": {
            16: TileConfig(128, 64, 8, 3),
            32: TileConfig(128, 64, 8, 3),
            64: TileConfig(128, 64, 4, 3),
            128: TileConfig(128, 64, 8, 3),
            256: TileConfig(128, 16, 8, 3),
            512: TileConfig(32, 32, 8, 3),  # below the 64 rows of tcgen05, which take 240 kB of shared memory
        },
        "half extras": {
            64: TileConfig(128, 64, 8, 3),  # 4 warps spill 1452 bytes
            128: TileConfig(128, 32, 8, 3),  # 64 keys use 8 bytes of stack
        },
        "float32": {512: TileConfig(16, 16, 8, 1)},  # 16 warps use 48 bytes of stack
    },
    "gfx942": {
        "half": {
            16: TileConfig(128, 64, 4, 2),
            32: TileConfig(128, 64, 4, 2),
            64: TileConfig(128, 64, 4, 2),
            128: TileConfig(64, 64, 4, 2),  # 128 rows spill, as do 8 warps
            256: TileConfig(64, 16, 4, 2),  # 32 keys spill 200 bytes
            512: TileConfig(32, 16, 4, 2),  # 8 warps have 256 registers a lane, and use 188 bytes of stack
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
            16: TileConfig(64, 128, 8, 3),
            32: TileConfig(64, 128, 8, 3),
            64: TileConfig(64, 128, 8, 3),
            128: TileConfig(64, 64, 8, 3),
            256: TileConfig(16, 64, 8, 3),
            512: TileConfig(16, 16, 8, 3),  # 32 keys use 48 bytes of stack
        },
        "half extras": {
            64: TileConfig(32, 128, 8, 3),  # 64 rows spill 44 bytes
            256: TileConfig(16, 32, 8, 3),  # 64 keys spill 40 bytes
        },
        "float32": {128: TileConfig(16, 64, 8, 1)},  # 32 keys spill 24 bytes
    },
    86: {"half": {128: TileConfig(32, 64, 8, 3)}},
    90: {
        "half": {
            16: DkdvConfig(64, 128, 8, 3, ROWS_AHEAD=True),
            32: DkdvConfig(64, 128, 8, 3, ROWS_AHEAD=True),
            64: DkdvConfig(64, 128, 8, 3, ROWS_AHEAD=True),
            128: DkdvConfig(32, 128, 8, 4, ROWS_AHEAD=True),  # 64 rows spill 40 bytes
            256: DkdvConfig(16, 64, 8, 3, ROWS_AHEAD=True),
            512: DkdvConfig(16, 16, 8, 3, ROWS_AHEAD=True),  # 32 keys use 72 bytes of stack
        },
        "float32": {512: TileConfig(16, 16, 16, 1)},
        "float32 extras": {512: TileConfig(16, 16, 8, 1)},  # 16 warps use 16 bytes of stack
    },
    100: {
        "half": {
            16: TileConfig(64, 128, 8, 3),
            32: TileConfig(64, 128, 8, 3),
            64: TileConfig(64, 128, 8, 3),
            128: TileConfig(32, 64, 8, 3),  # 64 rows spill 72 bytes, 128 keys 150
            256: TileConfig(32, 32, 8, 3),  # below the 64 rows of tcgen05: HMMA; what tcgen05 takes spills 170 bytes
            512: TileConfig(16, 16, 8, 3),  # 32 keys use 104 bytes of stack
        },
        "half extras": {64: TileConfig(32, 128, 8, 3)},  # 64 rows spill 116 bytes
        "float32": {512: TileConfig(16, 16, 8, 1)},  # 16 warps use 40 bytes of stack
    },
    120: {"half": {256: TileConfig(16, 32, 8, 3)}},  # 64 keys use 16 bytes of stack
    "gfx942": {
        "half": {
            16: TileConfig(64, 128, 4, 2),
            32: TileConfig(64, 128, 4, 2),
            64: TileConfig(64, 128, 4, 2),
            128: TileConfig(32, 64, 4, 2),  # 64 rows or 128 keys spill, as do 8 warps
            256: TileConfig(16, 32, 4, 2),
            512: TileConfig(16, 16, 4, 2),  # 8 warps have 256 registers a lane, and use 544 bytes of stack
        },
        "half extras": {
            16: TileConfig(32, 128, 4, 2),  # 64 rows spill
            32: TileConfig(32, 128, 4, 2),  # 64 rows spill
            64: TileConfig(32, 128, 4, 2),  # 64 rows spill
            128: TileConfig(16, 64, 4, 2),  # 32 rows spill
        },
        "float32": {
            32: TileConfig(32, 32, 4, 2),  # 8 warps have 256 registers a lane, and spill 176 bytes
            64: TileConfig(32, 32, 4, 1),  # 8 warps spill 12 bytes
            256: TileConfig(16, 16, 4, 1),  # 8 warps spill 308 bytes
        },
        "float32 extras": {16: TileConfig(32, 32, 4, 2)},  # 8 warps spill 236 bytes
    },
    ANY: {
        "float32": {
            16: TileConfig(32, 32, 4, 2),
            32: TileConfig(32, 32, 8, 2, maxnreg=128),
            64: TileConfig(32, 32, 8, 1),
            128: TileConfig(16, 32, 8, 1),
            256: TileConfig(16, 16, 16, 1, maxnreg=128),
        },
        "float32 extras": {16: TileConfig(32, 32, 8, 2)},  # 4 warps spill 8 bytes
    },
}

TABLES: dict[str, Table] = {"step": _STEP, "forward": _FORWARD, "dq": _DQ, "dkdv": _DKDV}
