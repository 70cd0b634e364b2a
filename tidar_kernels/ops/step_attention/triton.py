"""The launches of step attention: what is allocated, how rows, splits and programs are laid out, what the kernels get.

Three kernels (`triton_kernels.py`): a check of the keys in flight, attention, and where there are partial results their
merge. Tiles and the size of a split follow from chip, dtype, head dim and capacity, the number of programs from all of
these, the batch and the rows: bits depend on the former alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton.configs import (
    EXTRAS,
    PLAIN,
    TREE,
    Chip,
    TileConfig,
    chip_of,
    options,
    programs_of_a_tile,
    split_size,
    step_config,
)
from .._triton.launch import Launch, block_dim, cdiv, strided
from .._triton.paging import pages, scale_operand, stored, stored_as
from .._triton.softmax import score_units
from ..operands import Cached, Keys, Rows, Scores, results_of
from ..paging import as_kept
from .triton_kernels import combine_splits_kernel, sound_keys_kernel, step_attention_kernel

# The merge kernel loads partial results of 8 splits at a time, of so many rows that a thread has 16 values.
COMBINED_SPLITS, COMBINED_VALUES = 8, 256
LOG2_E = math.log2(math.e)
SOUND_KEYS = 16  # keys in flight that a program checks: a step of B = 8 has 72 a head


class Requests(NamedTuple):
    """The requests of a ragged batch as a kernel operand.

    Attributes:
        ptr: `cu_rows`, int32 `[batch + 1]`.
        batch: number of requests.
        kinds: int32 `[batch]`, the pattern of each.
        offsets: int32 `[num_kinds + 1]`, where the rows of each pattern begin in the table.
        num_kinds: number of patterns.
        words: of a row's tree mask; 0 without.
    """

    ptr: Any
    batch: int
    kinds: Any
    offsets: Any
    num_kinds: int
    words: int


def _requests(rows: Rows) -> Requests | None:
    """The kernel operand of a ragged batch; None of one whose sequences have one pattern."""
    cu_rows, kinds, offsets, tree_mask = rows.cu_rows, rows.kinds, rows.offsets, rows.tree_mask
    if cu_rows is None or kinds is None or offsets is None:
        return None
    words = 0 if tree_mask is None else tree_mask.shape[1]
    return Requests(cu_rows, len(kinds), kinds, offsets, len(offsets) - 1, words)


class _Layout(NamedTuple):
    """What of a step's launches follows from shapes alone."""

    block_m: int
    split: int
    num_splits: int
    sound: dict[str, Any]
    attend: dict[tuple[bool, bool], dict[str, Any]]  # by SEVERAL and PARTIAL
    combine: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _layout(
    chip: Chip | None,
    config: TileConfig,
    head_dim: int,
    head_dim_v: int,
    max_len: int,
    kv_len: int,
    cache: tuple[int, int, bool],
) -> _Layout:
    """Splits and the kernels' options; kept, since every layer of every step asks for the same ones.

    `cache` is what `stored_as` says of it. `config` is not looked up in here: tuning and tests plan with others.
    """
    widest, split = max(head_dim, head_dim_v), split_size(chip, max_len)
    # Without any key there is still one split: it writes the zeros.
    num_splits = max(1, cdiv(max_len + kv_len, split))
    widths = {"HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim_v, "BLOCK_D": block_dim(widest)}
    storage = dict(zip(("PAGE_SIZE", "MANTISSA", "SCALE_BY_SLOT"), cache, strict=True))
    # AMD's compiler fails on a choice between the addresses of two tensors: there the values are chosen.
    attend = {**widths, "SPLIT": split, **options(config), "ONE_LOAD": not isinstance(chip, str), **storage}
    flags = itertools.product((False, True), repeat=2)
    # The interpreter pays by the program; with 2 splits an iteration a window's later iterations are in reach of tests.
    rows, splits = (16, 2) if chip is None else (max(1, COMBINED_VALUES // block_dim(head_dim_v)), COMBINED_SPLITS)
    merged = {"HEAD_DIM": head_dim_v, "BLOCK_D": block_dim(head_dim_v), "SPLIT": split}
    return _Layout(
        config.BLOCK_M,
        split,
        num_splits,
        {**widths, "BLOCK_T": SOUND_KEYS, "num_warps": 4},
        {(several, partial): {**attend, "SEVERAL": several, "PARTIAL": partial} for several, partial in flags},
        {**merged, "BLOCK_R": rows, "BLOCK_S": splits, "num_warps": 4},
    )


def plan_step_attention(
    rows: Rows, keys: Keys, cached: Cached, scores: Scores, chip: Chip | None
) -> tuple[list[Launch], Tensor, Tensor]:
    """Allocate results and lay out the launches of one step: `(launches, out, lse)`.

    Raises:
        TypeError, ValueError: a dtype or head dim that the kernels have no tiles for (`attention_config`).
    """
    (q, lead, own, reach, tree_mask, *_), (k, v), (scale, softcap, sinks) = rows, as_kept(keys, cached), scores
    lengths, max_context, requests = cached.lengths, cached.max_context, _requests(rows)
    (batch, num_heads, q_len, head_dim), sequences = q.shape, len(lengths)
    num_kv_heads, kv_len, head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    max_len = cached.capacity
    group = num_heads // num_kv_heads
    extras = reach is not None or softcap is not None or sinks is not None
    kind = TREE if tree_mask is not None else EXTRAS if extras else PLAIN
    config = step_config(chip, q.dtype, max(head_dim, head_dim_v), kind)
    of_request = kv_len if requests is None else rows.max_rows
    layout = _layout(chip, config, head_dim, head_dim_v, max_len, of_request, stored_as(cached))
    unit, inner = score_units(scale, softcap)
    launched = max(1, min(layout.num_splits, cdiv(max_context + of_request, layout.split)))
    if requests is None:
        row_tiles = batch * cdiv(q_len * group, layout.block_m)
    else:  # those of the rows that are nobody's too (`_row_tile_of`)
        row_tiles = q_len * group // layout.block_m + requests.batch + 1
    tiles = row_tiles * num_kv_heads
    programs = programs_of_a_tile(chip, q.dtype, max(head_dim, head_dim_v), kind, tiles, launched)
    partial = programs > 1

    out = results_of(rows, head_dim_v)
    lse = q.new_empty(batch, num_heads, q_len, dtype=torch.float32)
    if partial:
        part = q.new_empty(launched, batch, num_heads, q_len, head_dim_v, dtype=torch.float32)
        part_lse = q.new_empty(launched, batch, num_heads, q_len, dtype=torch.float32)
    else:
        part, part_lse = out.unsqueeze(0), lse
    launches, in_flight = [], (strided(k), strided(v))
    if kv_len > 1:  # a lone key is seen by whoever attends to it
        sound = (strided(torch.empty_like(k)), strided(torch.empty_like(v)))
        grid = (batch * num_kv_heads, cdiv(kv_len, SOUND_KEYS))
        args = (*in_flight, *sound, kv_len, num_kv_heads)
        launches.append(Launch(sound_keys_kernel, grid, args, layout.sound))
        in_flight = sound
    attend = Launch(
        step_attention_kernel,
        (tiles, programs),
        (
            *(strided(q), *in_flight, stored(cached.k_cache), stored(cached.v_cache)),
            *(pages(cached), *(scale_operand(x, sequences, num_kv_heads) for x in (cached.k_scale, cached.v_scale))),
            *(lengths, lead, own, reach, None if sinks is None else strided(sinks), tree_mask, requests),
            *(strided(part), part_lse),
            *(q_len, num_kv_heads, group, kv_len, max_context, unit * LOG2_E, inner),
        ),
        layout.attend[programs < launched, partial],
    )
    launches.append(attend)
    if not partial:
        return launches, out, lse
    combine = Launch(
        combine_splits_kernel,
        (batch * num_heads, cdiv(q_len, layout.combine["BLOCK_R"])),
        (part, part_lse, lengths, lead, reach, requests, strided(out), lse, num_heads, q_len, max_context),
        layout.combine,
    )
    return [*launches, combine], out, lse


def step_attention(rows: Rows, keys: Keys, cached: Cached, scores: Scores) -> tuple[Tensor, Tensor]:
    """Run the kernels: `(out [batch, heads, q_len, head_dim_v], lse [batch, heads, q_len])`; arguments are checked."""
    launches, out, lse = plan_step_attention(rows, keys, cached, scores, chip_of(rows.q.device))
    for launch in launches:
        launch.run()
    return out, lse
