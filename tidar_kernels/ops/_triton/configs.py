"""Which launch configuration runs where: chips, and the rule by which `config_tables.TABLES` is read.

The step kernel's configuration depends on the chip, the dtype, the head dim and what the model does to its logits (a
cap, sinks, a window, the paths of a tree), and on nothing else: not on the number of rows, the batch or the length.
Draft rows and single-token decoding therefore run the very same instructions, which is half of what makes their bits
equal. The other half is the split size, a function of the cache's capacity alone. So nothing is tuned while it runs:
`tidar-kernels bench --tune` proposes tables, and a table is what ships.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import asdict
from typing import Any

import torch

from .launch import INTERPRET, block_dim
from .tables import (
    ANY,
    CHIPS,
    EXTRAS,
    FOLDING,
    KINDS,
    MULTIPROCESSORS,
    PARENTS,
    PLAIN,
    TABLES,
    TREE,
    Chip,
    DkdvConfig,
    ForwardConfig,
    SpecialisedConfig,
    TileConfig,
)

__all__ = [
    "CHIPS",
    "EXTRAS",
    "HEAD_DIM_TILES",
    "KINDS",
    "PLAIN",
    "TREE",
    "Chip",
    "DkdvConfig",
    "ForwardConfig",
    "SpecialisedConfig",
    "TileConfig",
    "ancestry",
    "attention_config",
    "chip_of",
    "entries",
    "has_gluon",
    "nearest_chip",
    "options",
    "programs_of_a_tile",
    "split_size",
    "step_config",
]

HEAD_DIM_TILES = (16, 32, 64, 128, 256, 512)
# The interpreter pays per operation, not per element; small tiles put tile and split edges within reach of tests.
_INTERPRET: dict[str, TileConfig] = {
    "step": ForwardConfig(32, 16, 1, 1, SCORES_AHEAD=True),
    "forward": ForwardConfig(32, 32, 1, 1, SCORES_AHEAD=True),
    "dq": TileConfig(32, 32, 1, 1),
    "dkdv": DkdvConfig(32, 32, 1, 1, ROWS_AHEAD=True),
}

_INTERPRET_MULTIPROCESSORS = 12  # few row tiles have a program a split, more of them a few programs or one
_MOST_PROGRAMS = 8


@functools.cache
def nearest_chip(chip: Chip) -> Chip:
    """The chip whose table serves `chip`: its own, or with a warning, once, another's.

    That is the newest NVIDIA chip of the tables that is not newer, and for those before all of them the one with the
    least shared memory. AMD's architectures that are not of the gfx95 family take the table with the least LDS.
    """
    if chip in PARENTS:
        return chip
    if isinstance(chip, str):
        nearest: Chip = "gfx950" if chip.startswith("gfx95") else "gfx942"
    else:
        nearest = max((known for known in CHIPS if isinstance(known, int) and known <= chip), default=86)
    warnings.warn(f"{chip}: no launch table for this chip, that of {nearest} serves it", RuntimeWarning, stacklevel=2)
    return nearest


@functools.cache
def _chip_of(index: int | None) -> Chip:
    if torch.version.hip is not None:
        return nearest_chip(torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return nearest_chip(10 * major + minor)


def chip_of(device: torch.device) -> Chip | None:
    """The chip whose table serves `device`; None for the interpreter."""
    return None if INTERPRET else _chip_of(device.index)


def ancestry(chip: Chip) -> list[Chip]:
    """The chip, its parent, and so on to ANY, which has none."""
    line = [chip]
    while line[-1] != ANY:
        line.append(PARENTS[line[-1]])
    return line


@functools.cache
def entries(kernel: str, chip: Chip, is_float32: bool, kind: str = PLAIN) -> dict[int, TileConfig]:
    """All entries of a kernel that `chip` has or inherits, by head dim. Those of a later kind precede the earlier's."""
    found: dict[int, TileConfig] = {}
    for one_kind in KINDS[: KINDS.index(kind) + 1]:
        name = f"{'float32' if is_float32 else 'half'} {one_kind}".strip()
        for one in reversed(ancestry(chip)):
            found |= TABLES[kernel].get(one, {}).get(name, {})
    return found


def step_config(chip: Chip | None, dtype: torch.dtype, head_dim: int, kind: str = PLAIN) -> TileConfig:
    """Tiles of the step kernel; `kind` is one of `KINDS`."""
    return attention_config("step", chip, dtype, head_dim, kind)


@functools.cache
def has_gluon() -> bool:
    """Whether this Triton has what `gluon_forward.py` is written in."""
    try:
        from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def attention_config(
    kernel: str, chip: Chip | None, dtype: torch.dtype, head_dim: int, kind: str = PLAIN
) -> TileConfig:
    """Tiles of "step", "forward", "dq" or "dkdv"; `kind` is one of `KINDS`.

    Raises:
        TypeError: float64, which only the eager twin and the CPU path compute. ValueError: a head dim that the kernel
            has no tiles for on this chip.
    """
    if dtype == torch.float64:
        raise TypeError("q: expected float32, float16 or bfloat16 for the Triton kernels, got torch.float64")
    if chip is None:
        table = dict.fromkeys(HEAD_DIM_TILES, _INTERPRET[kernel])
    else:
        table = entries(kernel, chip, dtype == torch.float32, kind)
    if head_dim > max(table):
        of = "the Triton kernels" if chip is None else f"the kernel {kernel!r} in {dtype} on {chip}"
        raise ValueError(f"q: expected a head_dim of at most {max(table)} for {of}, got {head_dim}")
    if chip is not None and kind == PLAIN and dtype != torch.float32:
        specialised = TABLES[kernel].get(chip, {}).get("half specialised", {}).get(head_dim)
        if specialised is not None and has_gluon():
            return specialised
    return table.get(head_dim) or table[block_dim(head_dim)]


@functools.cache
def options(config: TileConfig) -> dict[str, Any]:
    """What a launch with `config` passes to Triton; made once, not to be changed."""
    return {name: value for name, value in asdict(config).items() if value is not None}


def split_size(chip: Chip | None, max_len: int) -> int:
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


def _used(programs: int, multiprocessors: int) -> float:
    """Of the waves that `programs` of equal length take, one a multiprocessor, how much of the chip's time is used."""
    waves = -(-programs // multiprocessors)
    return programs / (waves * multiprocessors) if waves else 1.0


@functools.lru_cache(maxsize=1024)
def _sharing(multiprocessors: int, tiles: int) -> int:
    """How many programs share the splits of a row tile, where one would leave much of the chip unused and one a split
    would be too many.

    At least two waves, since some programs have a split more than others; the fewest then that use 95 % of their waves,
    up to `_MOST_PROGRAMS` a multiprocessor, or else those that use the most.
    """
    least, most = max(2, -(-2 * multiprocessors // tiles)), _MOST_PROGRAMS * multiprocessors // tiles
    used = {programs: _used(programs * tiles, multiprocessors) for programs in range(least, most + 1)}
    return next((programs for programs, share in used.items() if share >= 0.95), max(used, key=used.__getitem__))


def programs_of_a_tile(chip: Chip | None, dtype: torch.dtype, head_dim: int, kind: str, tiles: int, splits: int) -> int:
    """How many programs of the step kernel share the splits of a row tile, of which a launch has `tiles` (x kv heads).

    One, which leaves no partial results, where the last wave of programs leaves less than a fifth of the chip's time
    unused. Else one a split, up to `_MOST_PROGRAMS` a multiprocessor: the finest shares are the most even ones. Past
    these, where most would return at once in a long cache that is nearly empty, as many as make whole waves
    (`_sharing`), each with several splits. A kernel that would spill in its loop if programs had several splits
    (`FOLDING`) has one a split. This moves work between programs and changes no bit.
    """
    multiprocessors = _INTERPRET_MULTIPROCESSORS if chip is None else MULTIPROCESSORS[chip]
    plain = kind == PLAIN and dtype != torch.float32
    if chip is not None and not (plain and head_dim in FOLDING.get(chip, ())):
        return splits
    if _used(tiles, multiprocessors) >= 0.8:
        return 1
    if tiles * splits <= _MOST_PROGRAMS * multiprocessors:
        return splits
    return _sharing(multiprocessors, tiles)
