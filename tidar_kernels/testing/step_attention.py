"""Cases and checks of `step_attention`: parity with its eager twin, and the bits that do not depend on a launch.

The same tables run in Triton's interpreter, on the CPU path and on CUDA. A case is data: copy one with
`dataclasses.replace`, or write your own with the shapes of your model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import eager, ops, patterns
from ..ops import paging
from ..ops.operands import Cached, Keys
from ..ops.paging import plain
from ..patterns import Pattern
from .builders import irregular_pattern, pairwise, random_tree
from .caches import CacheKind, make_cache
from .harness import (
    Guarded,
    ParityError,
    ParityResult,
    bits,
    budget,
    check_equal,
    generator_of,
    guarded,
    naming,
    poisoned_allocations,
    result_of,
)

__all__ = [
    "BITS_CASES",
    "BITS_CASES_LARGE",
    "LAUNCH_CASES",
    "STEP_CASES",
    "STEP_CASES_LARGE",
    "StepCase",
    "StepOperands",
    "check_launch_bits",
    "check_row_bits",
    "check_step_attention",
    "step_operands",
]


@dataclass(frozen=True)
class StepCase:
    """One call of `step_attention`.

    Args:
        name: for messages; `id` adds the dtype.
        pattern: the in-flight rows.
        lengths: tokens of context of each sequence; their number is the batch size.
        num_heads, num_kv_heads, head_dim, dtype: of the operands.
        max_len: slots of the cache; None for the longest context and the causal rows after it, exactly.
        layout: strides of q, k and v (`tidar_kernels.testing.LAYOUTS`).
        cache_layout: strides of the caches, where `cache` does not say them.
        cache: pages, float8 and scales of the caches; None for contiguous ones of the operands' dtype.
        head_dim_v: of the values; None for `head_dim`.
        lengths_dtype: int32 or int64.
        scale: of the scores; None for the default.
        max_context: as in `step_attention`.
        window: of `Pattern.windowed`, which every pattern of the case goes through; None for none.
        softcap: as in `step_attention`.
        sinks: with a random sink a head.
    """

    name: str
    pattern: Pattern
    lengths: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    max_len: int | None = None
    layout: str = "bnhd"
    cache_layout: str = "bhnd"
    lengths_dtype: torch.dtype = torch.int32
    scale: float | None = None
    max_context: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    cache: CacheKind | None = None
    head_dim_v: int | None = None

    @property
    def id(self) -> str:
        """Name and dtype."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    def windowed(self, pattern: Pattern) -> Pattern:
        """`pattern` with the window of the case."""
        return pattern if self.window is None else pattern.windowed(self.window)

    @property
    def cache_len(self) -> int:
        """Slots of the cache."""
        return max(self.lengths) + self.pattern.causal_len if self.max_len is None else self.max_len


def _covering_cases() -> Iterator[StepCase]:
    """Every two of: block size, heads, head dim, context lengths, dtype, strides, spare slots, width of lengths.

    The interpreter's tiles are 32 rows by 16 keys and its splits 64 keys (`ops/_triton/configs.py`): lengths lie on,
    before and after these edges. Single splits need `max_len + kv_len <= 64`, so only small blocks have them.
    """
    rows = pairwise(
        lengths=((0,), (1,), (13,), (0, 5, 37), (15, 17), (16,), (63, 1), (64,), (65, 0), (127,), (128, 31)),
        block_size=(1, 2, 4, 8, 16),
        heads=((2, 2), (4, 1), (6, 1), (7, 1)),
        head_dim=(16, 64, 80, 128),
        layout=("bnhd", "bhnd", "gaps", "bhdn", "shared_heads"),
        cache_layout=("bhnd", "bnhd", "gaps", "bhdn", "shared_heads"),
        dtype=(torch.float32, torch.float16),
        spare=(0, 20),
        lengths_dtype=(torch.int32, torch.int64),
    )
    for row in rows:
        num_heads, num_kv_heads = row["heads"]
        block, lengths = row["block_size"], row["lengths"]
        yield StepCase(
            name=f"B{block}-h{num_heads}_{num_kv_heads}-d{row['head_dim']}-P{'_'.join(map(str, lengths))}"
            f"-{row['layout']}-{row['cache_layout']}",
            pattern=patterns.tidar_step(block),
            lengths=lengths,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=row["head_dim"],
            dtype=row["dtype"],
            max_len=max(lengths) + row["spare"],
            layout=row["layout"],
            cache_layout=row["cache_layout"],
            lengths_dtype=row["lengths_dtype"],
        )


def _feature_cases() -> Iterator[StepCase]:
    """Every two of: window, softcap, sinks, pattern, context lengths, heads, head dim, dtype.

    Windows end in the row itself, among the drafts, in a tile, in a split, and beyond the context.
    """
    rows = pairwise(
        window=(None, 1, 20, 65),
        lengths=((0, 37), (64,), (63, 130), (200,)),
        pattern=(
            patterns.tidar_step(4),
            patterns.tidar_step(7),
            patterns.tidar_prefill(40, 4),
            patterns.tidar_step(3, bidirectional=False),
        ),
        heads=((2, 2), (6, 1)),
        head_dim=(16, 64, 80),
        softcap=(None, 1.5),
        sinks=(False, True),
        dtype=(torch.float32, torch.float16),
    )
    for row in rows:
        (num_heads, num_kv_heads), lengths = row.pop("heads"), row["lengths"]
        yield StepCase(
            name=f"w{row['window']}-c{row['softcap']}-s{int(row['sinks'])}-{row['pattern'].name}"
            f"-h{num_heads}_{num_kv_heads}-d{row['head_dim']}-P{'_'.join(map(str, lengths))}",
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            **row,
        )


_STEP = StepCase("step", patterns.tidar_step(4), lengths=(21, 64), num_heads=8, num_kv_heads=2)
_NO_KEYS = replace(_STEP, name="no_keys", pattern=irregular_pattern(6, 0))
_HAND_MADE_STEPS = (
    replace(_STEP, name="head_dim_96", head_dim=96),
    replace(_STEP, name="head_dim_256", head_dim=256, dtype=torch.float16),
    replace(_STEP, name="head_dim_20", head_dim=20),
    replace(_STEP, name="bfloat16", dtype=torch.bfloat16),
    replace(_STEP, name="bfloat16_split", dtype=torch.bfloat16, lengths=(0, 140), num_heads=6, head_dim=80),
    replace(_STEP, name="scale", scale=0.5),
    replace(_STEP, name="sharp_softmax", scale=8.0),
    replace(_STEP, name="max_context", lengths=(3, 40), max_len=200, max_context=40),
    replace(_STEP, name="causal_blocks", pattern=patterns.tidar_step(4, bidirectional=False)),
    replace(_STEP, name="one_slot", lengths=(0, 1), max_len=1),
    replace(_STEP, name="no_cache", lengths=(0, 0), max_len=0),
    replace(_STEP, name="prefill", pattern=patterns.tidar_prefill(19, 4), lengths=(0,)),
    replace(_STEP, name="prefill_long", pattern=patterns.tidar_prefill(70, 8), lengths=(0, 0), dtype=torch.float16),
    replace(_STEP, name="prefill_chunk", pattern=patterns.tidar_prefill(33, 4), lengths=(31, 64)),
    replace(_STEP, name="prefill_last_token", pattern=patterns.tidar_prefill(1, 8), lengths=(16, 0, 130)),
    replace(_STEP, name="decode", pattern=patterns.causal(1), lengths=(0, 15, 16, 63, 64, 200)),
    replace(_STEP, name="decode_single_split", pattern=patterns.causal(1), lengths=(0, 15, 16, 47), max_len=63),
    replace(_STEP, name="verify", pattern=patterns.causal(5), lengths=(14, 62)),
    replace(_STEP, name="prompt_chunk", pattern=patterns.causal(40), lengths=(0, 24, 100), dtype=torch.float16),
    replace(_STEP, name="irregular", pattern=irregular_pattern(23, 37), lengths=(0, 50)),
    replace(_STEP, name="irregular_long", pattern=irregular_pattern(9, 150, seed=1), lengths=(0, 33)),
    replace(_STEP, name="empty_rows", pattern=irregular_pattern(11, 5, seed=2), lengths=(0, 0), max_len=3),
    replace(_NO_KEYS, lengths=(0, 0, 5), max_len=70),
    replace(
        _STEP, name="no_keys_no_context", pattern=irregular_pattern(6, 0), lengths=(0,), max_len=130, max_context=0
    ),
    replace(_STEP, name="no_keys_no_cache", pattern=irregular_pattern(6, 0), lengths=(0, 0), max_len=0),
    replace(_NO_KEYS, name="no_keys_sinks", lengths=(0, 0, 5), max_len=70, sinks=True),
    replace(_STEP, name="reach", pattern=irregular_pattern(23, 37, 4, reach=60), lengths=(0, 50, 150)),
    replace(_STEP, name="reach_sinks", pattern=irregular_pattern(9, 5, 6, reach=90), lengths=(130, 20), sinks=True),
    replace(_STEP, name="no_reach", pattern=irregular_pattern(6, 4, 7, reach=0), lengths=(0, 80), max_len=90),
    replace(_STEP, name="tree_root", pattern=random_tree(1), lengths=(0, 16)),
    replace(_STEP, name="tree", pattern=random_tree(13), lengths=(0, 21, 64)),
    replace(_STEP, name="tree_fp16", pattern=random_tree(40, 1), lengths=(7, 130), dtype=torch.float16, head_dim=80),
    replace(_STEP, name="tree_of_three_words", pattern=random_tree(70, 2), lengths=(0, 50), num_heads=2),
    replace(_STEP, name="tree_all", pattern=random_tree(33, 3), lengths=(5, 90), window=7, softcap=2.0, sinks=True),
    replace(_STEP, name="tree_mask", pattern=irregular_pattern(23, 70, 8, with_tree_mask=True), lengths=(0, 50)),
    replace(_STEP, name="tree_mask_reach", pattern=irregular_pattern(11, 37, 9, 60, True), lengths=(80, 3), max_len=90),
    replace(_STEP, name="softcap_50", softcap=50.0, scale=4.0),
    replace(_STEP, name="softcap_50_fp16", softcap=50.0, scale=4.0, dtype=torch.float16),
    replace(_STEP, name="bfloat16_all", dtype=torch.bfloat16, softcap=2.0, sinks=True, window=30),
    # Splits are merged some at a time; several times as many lie before the window.
    replace(_STEP, name="window_far", lengths=(530, 290, 130, 40), window=20),
    replace(_STEP, name="head_dim_256_all", head_dim=256, softcap=2.0, sinks=True, window=30, dtype=torch.float16),
    replace(_STEP, name="head_dim_192_128", head_dim=192, head_dim_v=128, dtype=torch.float16),
    replace(_STEP, name="head_dim_16_40", head_dim=16, head_dim_v=40, lengths=(0, 140), window=50, sinks=True),
    # Nodes of several sizes, that programs in turn take whole and in part.
    replace(_STEP, name="long", lengths=(1500, 3, 700), num_heads=2, head_dim=16),
)


def _cache_cases() -> Iterator[StepCase]:
    """Every two of: page size and layout, float8 and scales, context lengths, heads, head dim, pattern, dtype.

    The interpreter's tiles are 16 keys: pages are smaller, one tile, several, no multiple of it, and the capacity.
    """
    rows = pairwise(
        pages=(
            (1, "nhd"),
            (16, "packed_hnd"),
            (16, "pair_nhd"),
            (24, "hnd"),
            (32, "tokens"),
            (64, "packed_nhd"),
            (256, "hnd"),
            (0, "bnhd"),
        ),
        stored=(None, (torch.float8_e4m3fn, "tensor"), (torch.float8_e4m3fn, "slot"), (torch.float8_e5m2, "head")),
        lengths=((0, 37), (130,), (16, 63, 5)),
        heads=((2, 2), (4, 1), (6, 1), (7, 1)),
        head_dim=(16, 64, 72, 80),
        pattern=(patterns.tidar_step(4), patterns.causal(1), patterns.tidar_prefill(19, 4), random_tree(13)),
        window=(None, 20),
        dtype=(torch.float32, torch.float16),
    )
    for row in rows:
        (num_heads, num_kv_heads), (page_size, layout), stored = row.pop("heads"), row.pop("pages"), row.pop("stored")
        if not page_size and stored is None:
            continue
        kind = "own" if stored is None else f"{str(stored[0]).removeprefix('torch.float8_')}-{stored[1]}"
        yield StepCase(
            name=f"{layout}{page_size}-{kind}-h{num_heads}_{num_kv_heads}-d{row['head_dim']}-w{row['window']}"
            f"-{row['pattern'].name}-P{'_'.join(map(str, row['lengths']))}",
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            cache=CacheKind(page_size, layout, *(stored or ())),
            **row,
        )


STEP_CASES: tuple[StepCase, ...] = (*_covering_cases(), *_HAND_MADE_STEPS, *_feature_cases(), *_cache_cases())

# A GPU's tiles are 64 keys and its splits 512 to 4096 keys: edges lie elsewhere, and only real dtypes show the rest.
_LARGE = StepCase("large", patterns.tidar_step(16), (8192, 0, 511), 32, 8, 128, torch.bfloat16, max_len=8300)
STEP_CASES_LARGE: tuple[StepCase, ...] = (
    _LARGE,
    replace(_LARGE, name="large_fp16", dtype=torch.float16),
    replace(_LARGE, name="large_fp32", num_heads=8, num_kv_heads=2, dtype=torch.float32, lengths=(8191, 513)),
    replace(_LARGE, name="batch_16", pattern=patterns.tidar_step(4), lengths=tuple(range(0, 8192, 512))),
    replace(_LARGE, name="edges", pattern=patterns.tidar_step(8), lengths=(63, 64, 65, 127, 128, 511, 512, 513, 1024)),
    replace(_LARGE, name="qwen_group_7", num_heads=28, num_kv_heads=4, lengths=(4097, 1023)),
    replace(_LARGE, name="head_dim_64", pattern=patterns.tidar_step(32), head_dim=64, lengths=(2000,)),
    replace(_LARGE, name="head_dim_80", head_dim=80, lengths=(1500, 449)),
    replace(_LARGE, name="head_dim_96", head_dim=96, lengths=(1500, 449)),
    replace(_LARGE, name="head_dim_256", num_heads=8, num_kv_heads=1, head_dim=256, lengths=(1500, 449)),
    replace(_LARGE, name="prefill", pattern=patterns.tidar_prefill(1000, 8), lengths=(0, 0)),
    replace(_LARGE, name="prefill_chunk", pattern=patterns.tidar_prefill(333, 8), lengths=(512, 1000)),
    replace(_LARGE, name="softcap", lengths=(2000, 449), softcap=50.0, scale=1.0),
    replace(_LARGE, name="softcap_fp32", num_heads=8, dtype=torch.float32, lengths=(511,), softcap=50.0, scale=1.0),
    replace(_LARGE, name="sinks", lengths=(2000, 449), sinks=True),
    replace(_LARGE, name="window", lengths=(8192, 4095, 1100, 513, 0), window=1024),
    replace(_LARGE, name="window_far", lengths=(20_000, 9_000), max_len=20_300, window=128),
    replace(_LARGE, name="window_d64", head_dim=64, lengths=(8192, 100), window=128, sinks=True),
    replace(_LARGE, name="gemma", num_heads=8, num_kv_heads=4, head_dim=256, lengths=(6000, 4095), softcap=50.0),
    replace(_LARGE, name="gemma_window", head_dim=256, lengths=(6000, 4095), softcap=50.0, window=4096),
    replace(_LARGE, name="tree_16", pattern=random_tree(16), lengths=(2000, 449)),
    replace(_LARGE, name="tree_100", pattern=random_tree(100, 1), lengths=(8192, 0, 511)),
    replace(_LARGE, name="tree_64_d64", pattern=random_tree(64, 2), head_dim=64, lengths=(1500, 63), sinks=True),
    replace(_LARGE, name="tree_fp32", pattern=random_tree(64, 2), num_heads=8, dtype=torch.float32, lengths=(1500,)),
    replace(_LARGE, name="tree_mask", pattern=irregular_pattern(90, 300, 8, with_tree_mask=True), lengths=(511, 0)),
    replace(_LARGE, name="pages_of_16", cache=CacheKind(16, "packed_nhd")),
    replace(_LARGE, name="pages_of_64", cache=CacheKind(64, "hnd"), num_heads=28, num_kv_heads=4),
    replace(_LARGE, name="pages_of_1", cache=CacheKind(1, "nhd"), pattern=patterns.tidar_step(4), window=1024),
    replace(_LARGE, name="pages_of_256_d64", cache=CacheKind(256, "packed_hnd"), head_dim=64),
    replace(_LARGE, name="float8", cache=CacheKind(0, "bhnd", torch.float8_e4m3fn, "head")),
    replace(_LARGE, name="float8_pages", cache=CacheKind(16, "packed_hnd", torch.float8_e4m3fn, "slot")),
    replace(_LARGE, name="float8_e5m2", cache=CacheKind(64, "nhd", torch.float8_e5m2), dtype=torch.float16),
    replace(_LARGE, name="head_dim_192_128", head_dim=192, head_dim_v=128, lengths=(1500, 449)),
    replace(_LARGE, name="head_dim_72", head_dim=72, lengths=(1500, 449)),
    replace(_LARGE, name="long_context", pattern=patterns.tidar_step(4), lengths=(130_000, 70_001), max_len=131_072),
)

# Row bits: draft row m against single-token decoding at length P + m. Sums of 16, 64 and 512 are edges of tiles and
# splits, in the interpreter and on GPUs; with 16 drafts, P = 50 has its edge inside the drafts.
_BITS = StepCase("bits", patterns.tidar_step(2), (0, 1, 14, 15, 16, 17, 62, 63, 64, 65, 127, 128), 2, 1, 64)
BITS_CASES: tuple[StepCase, ...] = (
    replace(_BITS, name="B2"),
    replace(_BITS, name="B2_fp16", dtype=torch.float16),
    replace(_BITS, name="B2_group_7", lengths=(0, 15, 63), num_heads=14, num_kv_heads=2, head_dim=80),
    replace(_BITS, name="B2_single_split", lengths=(0, 15, 30), max_len=40),
    replace(_BITS, name="B8_tile_edges", pattern=patterns.tidar_step(8), lengths=(0, 1, 9, 15, 16, 17)),
    replace(_BITS, name="B8_split_edges", pattern=patterns.tidar_step(8), lengths=(55, 57, 63, 64, 65)),
    replace(_BITS, name="B8_later_splits", pattern=patterns.tidar_step(8), lengths=(121, 127, 128), num_heads=1),
    replace(_BITS, name="B8_fp16", pattern=patterns.tidar_step(8), lengths=(15, 60, 127), dtype=torch.float16),
    replace(_BITS, name="B16_tile_edges", pattern=patterns.tidar_step(16), lengths=(0, 1, 15, 16, 17), num_heads=1),
    replace(_BITS, name="B16_split_edges", pattern=patterns.tidar_step(16), lengths=(50, 63, 64, 65), num_heads=1),
    replace(_BITS, name="B16_fp16", pattern=patterns.tidar_step(16), lengths=(17, 120), dtype=torch.float16),
    replace(_BITS, name="prefill_chunk", pattern=patterns.tidar_prefill(20, 4), lengths=(0, 13, 60)),
    # With a window the first key of a row lies on, before and after edges of tiles and splits: P + m + 1 - window.
    replace(_BITS, name="B2_window_1", window=1, lengths=(0, 15, 16, 63, 64, 130)),
    replace(_BITS, name="B2_window_16", window=16, lengths=(0, 14, 15, 30, 31, 78, 79, 143), sinks=True),
    replace(_BITS, name="B2_window_far", window=20, lengths=(530, 290, 40)),
    replace(_BITS, name="B8_window_5", pattern=patterns.tidar_step(8), window=5, lengths=(3, 12, 58, 125), num_heads=1),
    replace(_BITS, name="B8_window_70", pattern=patterns.tidar_step(8), window=70, lengths=(66, 134), sinks=True),
    replace(
        _BITS,
        name="B8_window_70_all",
        pattern=patterns.tidar_step(8),
        window=70,
        lengths=(61, 133),
        num_heads=1,
        sinks=True,
        softcap=2.0,
        dtype=torch.float16,
    ),
    replace(_BITS, name="B2_softcap_sinks", softcap=2.0, sinks=True, lengths=(0, 14, 15, 16, 63, 64, 65)),
    replace(_BITS, name="prefill_window", pattern=patterns.tidar_prefill(20, 4), lengths=(13, 60), window=11),
    replace(_BITS, name="pages", pattern=patterns.tidar_step(4), lengths=(14, 63), cache=CacheKind(16, "packed_nhd")),
    replace(_BITS, name="pages_fp16", lengths=(15, 130), cache=CacheKind(3, "hnd"), window=20, dtype=torch.float16),
    replace(_BITS, name="float8", lengths=(14, 63), cache=CacheKind(0, "bhnd", torch.float8_e4m3fn, "head")),
    replace(
        _BITS,
        name="float8_pages",
        pattern=patterns.tidar_step(4),
        lengths=(13, 62),
        cache=CacheKind(16, "tokens", torch.float8_e5m2, "slot"),
        dtype=torch.float16,
    ),
)
_BITS_LARGE = StepCase("large", patterns.tidar_step(16), (), 32, 8, 128, torch.bfloat16, max_len=8300)
_EDGES = (0, 1, 63, 64, 65, 505, 511, 512, 513, 1020, 4095, 8192)
BITS_CASES_LARGE: tuple[StepCase, ...] = (
    replace(_BITS_LARGE, name="large_B16", lengths=_EDGES),
    replace(_BITS_LARGE, name="large_B16_fp32", lengths=_EDGES, dtype=torch.float32),
    replace(_BITS_LARGE, name="large_B8_fp16", pattern=patterns.tidar_step(8), lengths=_EDGES, dtype=torch.float16),
    replace(_BITS_LARGE, name="large_B2_d64", pattern=patterns.tidar_step(2), lengths=_EDGES, head_dim=64),
    replace(_BITS_LARGE, name="large_B8_d256", pattern=patterns.tidar_step(8), lengths=_EDGES, head_dim=256),
    replace(_BITS_LARGE, name="large_B16_window", lengths=(0, 1023, 1535, 5000, 8192), window=1024, sinks=True),
    replace(_BITS_LARGE, name="large_B8_softcap", pattern=patterns.tidar_step(8), lengths=_EDGES, softcap=50.0),
    replace(_BITS_LARGE, name="large_B8_pages", lengths=_EDGES, cache=CacheKind(16, "packed_nhd")),
    replace(
        _BITS_LARGE,
        name="large_B8_float8",
        pattern=patterns.tidar_step(8),
        lengths=_EDGES,
        cache=CacheKind(64, "hnd", torch.float8_e4m3fn, "slot"),
    ),
    replace(_BITS_LARGE, name="large_B8_group_7", pattern=patterns.tidar_step(8), lengths=_EDGES, num_heads=56),
)

# Launch bits: what a launch can vary without varying a row's bits.
_LAUNCH = StepCase("launch", patterns.tidar_step(4), (66, 3), 4, 2, 16)
LAUNCH_CASES: tuple[StepCase, ...] = (
    replace(_LAUNCH, name="pages", cache=CacheKind(16, "packed_hnd")),
    replace(_LAUNCH, name="float8", cache=CacheKind(16, "nhd", torch.float8_e4m3fn, "slot")),
    replace(_LAUNCH, name="float8_heads", cache=CacheKind(0, "bhnd", torch.float8_e5m2, "head")),
    StepCase("step_B4", patterns.tidar_step(4), (3, 64, 20), 4, 2, 16, max_len=80),
    StepCase("step_B4_single_split", patterns.tidar_step(4), (3, 20), 6, 2, 16, torch.float16, max_len=40),
    StepCase("step_B8", patterns.tidar_step(8), (66, 0), 4, 2, 64, torch.float16, max_len=80),
    StepCase("prefill", patterns.tidar_prefill(17, 8), (0, 50), 2, 2, 16, max_len=70),
    # Blocks that do not divide a tile of keys, rows that do not fit one tile of rows: where own tiles must be aligned.
    StepCase("step_B5", patterns.tidar_step(5), (18,), 4, 2, 16, max_len=30),
    StepCase("irregular", irregular_pattern(25, 29, seed=3), (0, 50), 4, 2, 16, max_len=70),
    StepCase(
        "window", patterns.tidar_step(5), (130, 18), 2, 1, 16, torch.float16, 140, window=66, softcap=2.0, sinks=True
    ),
    StepCase("tree", random_tree(40), (18,), 2, 1, 16, max_len=30),
    StepCase("tree_mask", irregular_pattern(25, 70, 3, with_tree_mask=True), (50,), 2, 1, 16, max_len=70),
    StepCase("reach", irregular_pattern(17, 19, seed=3, reach=80), (0, 150), 2, 1, 16, max_len=150, sinks=True),
)


_NAMES = ("q", "k", "v", "k_cache", "v_cache", "lengths")
_OPTIONS = ("sinks", "block_table", "k_scale", "v_scale")


@dataclass(frozen=True)
class StepOperands:
    """The operands of one step, each between guard bands; sinks, the table and scales may be None.

    Cache slots past the length hold NaN, and those of a cache with pages or scales random bits.
    """

    q: Guarded
    k: Guarded
    v: Guarded
    k_cache: Guarded
    v_cache: Guarded
    lengths: Guarded
    sinks: Guarded | None = None
    block_table: Guarded | None = None
    k_scale: Guarded | None = None
    v_scale: Guarded | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the operator's arguments, but for `options`."""
        return tuple(memory.tensor for name, memory in vars(self).items() if name not in _OPTIONS)

    @property
    def options(self) -> dict[str, Any]:
        """Sinks, the block table and scales, as the operator takes them."""
        return {name: None if (memory := getattr(self, name)) is None else memory.tensor for name in _OPTIONS}

    @property
    def cache_options(self) -> dict[str, Any]:
        """The block table and scales."""
        return {name: value for name, value in self.options.items() if name != "sinks"}

    def check_untouched(self) -> None:
        """Raise `ParityError` if an operand, or the memory around it, was written to."""
        for name, memory in vars(self).items():
            if memory is not None:
                memory.check(name)


def step_operands(case: StepCase, device: torch.device | str = "cpu") -> StepOperands:
    """Fresh random operands of a case."""
    draw, batch = generator_of(case), len(case.lengths)

    head_dim_v = case.head_dim if case.head_dim_v is None else case.head_dim_v

    def normal(heads: int, rows: int, head_dim: int = case.head_dim) -> Tensor:
        shape = batch, heads, rows, head_dim
        return torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu").to(case.dtype)

    def cache(head_dim: int = case.head_dim) -> Tensor:
        values = normal(case.num_kv_heads, case.cache_len, head_dim)
        for sequence, length in enumerate(case.lengths):
            values[sequence, :, length:] = torch.nan
        return values

    # Query heads differ even where the layout shares one kv head.
    q_layout = "bnhd" if case.layout == "shared_heads" else case.layout

    def place(values: Tensor, layout: str) -> Guarded:
        return guarded(values.to(device), layout)

    q = place(normal(case.num_heads, case.pattern.q_len), q_layout)
    k = place(normal(case.num_kv_heads, case.pattern.kv_len), case.layout)
    v = place(normal(case.num_kv_heads, case.pattern.kv_len, head_dim_v), case.layout)
    lengths = guarded(torch.tensor(case.lengths, dtype=case.lengths_dtype, device=device))
    if case.cache is None:
        caches = {"k_cache": place(cache(), case.cache_layout), "v_cache": place(cache(head_dim_v), case.cache_layout)}
    else:
        caches = _caches(case, case.cache, (cache(), cache()), lengths.tensor, draw, device)
    return StepOperands(
        q=q,
        k=k,
        v=v,
        lengths=lengths,
        **caches,
        sinks=guarded(torch.randn(case.num_heads, generator=draw, device="cpu").to(device, case.dtype))
        if case.sinks
        else None,
    )


def _caches(
    case: StepCase,
    kind: CacheKind,
    values: tuple[Tensor, Tensor],
    lengths: Tensor,
    draw: torch.Generator,
    device: torch.device | str,
) -> dict[str, Guarded]:
    """Caches of a kind that hold `values [batch, kv_heads, cache_len, head_dim]` below `lengths`, and what they need.

    There are pages for the context and the causal rows after it, no more.
    """
    needed = [(0, length + case.pattern.causal_len) for length in case.lengths]
    shape = (case.num_kv_heads, case.cache_len, case.head_dim)
    made = make_cache(kind, lengths, needed, shape, case.dtype, draw, device)
    position = torch.arange(case.cache_len, device=device)
    places = paging.locate(made.cached, torch.where(position < lengths[:, None], position, -1))
    found = {}
    for name, value in zip("kv", values, strict=True):
        cache, scale = getattr(made.cached, f"{name}_cache"), getattr(made.cached, f"{name}_scale")
        stored = value.to(device).transpose(1, 2)[places.exists]  # [keys, kv_heads, head_dim]
        page, slot = places.page[places.exists], places.slot[places.exists]
        if scale is not None:
            of_keys = None if scale.ndim == 3 else scale.expand(len(lengths), case.num_kv_heads)
            of_keys = None if of_keys is None else of_keys[places.exists.nonzero()[:, 0]]
            stored, of_keys = paging.quantise(stored, of_keys, cache.dtype)
            if scale.ndim == 3:
                scale[page, :, slot] = of_keys
            found[f"{name}_scale"] = guarded(scale)
        bits(cache)[page, :, slot] = bits(stored)
    for name, memory in zip("kv", made.memories, strict=False):
        found[f"{name}_cache"] = Guarded(memory.tensor, memory.buffer, memory.buffer.clone())
    if made.cached.block_table is not None:
        found["block_table"] = guarded(made.cached.block_table)
    return found


def _step(
    case: StepCase, operands: Iterable[Tensor], backend: ops.Backend | None = None, **changes: Any
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of the operator under poisoned allocations; sinks are among the `changes`."""
    q, k, v, k_cache, v_cache, lengths = operands
    options: dict[str, Any] = {"scale": case.scale, "softcap": case.softcap, "max_context": case.max_context} | changes
    options["pattern"] = case.windowed(options.get("pattern", case.pattern))
    with poisoned_allocations():
        out, lse = ops.step_attention(q, k, v, k_cache, v_cache, lengths, **options, return_lse=True, backend=backend)
        return out, lse


def check_step_attention(
    case: StepCase, device: torch.device | str = "cpu", backend: ops.Backend | None = None
) -> ParityResult:
    """`step_attention` against its eager twin in float64, by the budget rule; out, its worst row, and lse.

    Also: every output finite where it should be; rows without a key exactly 0; nothing read past a sequence's length
    (NaN lies there); nothing written but the outputs. With pages or scales, the bits are those of a contiguous cache of
    what the keys are worth.

    Raises:
        ParityError: any of it fails.
    """
    operands = step_operands(case, device)
    with naming("step_attention", case, device):
        out, lse = _step(case, operands.tensors, backend, **operands.options)
        operands.check_untouched()
        pattern, sinks = case.windowed(case.pattern), operands.options["sinks"]

        def twin(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            q, k, v, k_cache, v_cache, lengths = (x.to(dtype) if x.dtype == case.dtype else x for x in operands.tensors)
            return eager.step_attention(
                *(q, k, v, k_cache, v_cache, lengths, pattern, case.scale),
                softcap=case.softcap,
                sinks=None if sinks is None else sinks.to(dtype),
                return_lse=True,
                **operands.cache_options,
            )

        (reference, reference_lse), (plain, plain_lse) = twin(torch.float64), twin(case.dtype)
        if out.dtype != case.dtype:
            raise ParityError(f"out: expected dtype {case.dtype}, got {out.dtype}")
        measures = (
            budget(out, reference, plain),
            budget(out, reference, plain, "worst row of out", by_row=True),
            budget(lse, reference_lse, plain_lse, "lse"),
        )
        empty = (reference == 0.0).all(-1)
        check_equal(out[empty], torch.zeros_like(out[empty]), "rows of out that see no key")
        if case.cache is not None:
            alike, alike_lse = _step(case, _plain(case, operands), backend, sinks=sinks, max_context=None)
            check_equal(out, alike, "out, against a contiguous cache")
            check_equal(lse, alike_lse, "lse, against a contiguous cache")
    return result_of("step_attention", case, device, measures)


def _plain(case: StepCase, operands: StepOperands) -> tuple[Tensor, ...]:
    """The operands that a contiguous cache of the dtype of q would have: `plain` of the reference."""
    q, k, v, k_cache, v_cache, lengths = operands.tensors
    kept_len = 0 if operands.k_scale is None else case.windowed(case.pattern).kept_len
    cached = Cached(k_cache, v_cache, lengths, case.cache_len, **operands.cache_options, kept_len=kept_len)
    keys, cached = plain(Keys(k, v), cached)
    return q, *keys, cached.k_cache, cached.v_cache, lengths


def check_row_bits(
    case: StepCase, device: torch.device | str = "cpu", backend: ops.Backend | None = "triton"
) -> ParityResult:
    """Causal row m of a step at length P has the very bits of single-token decoding at length P + m, lse too.

    The drafts before it are committed as the decoder commits them, by `append_kv`. This is a promise of the kernels:
    the CPU path does not make it, so "triton" is asked for by name.

    Raises:
        ParityError: a bit differs, in out or lse, for any m below `pattern.causal_len`.
    """
    causal_len = case.pattern.causal_len
    if case.max_len is None:
        case = replace(case, max_len=max(case.lengths) + causal_len + 1)
    operands = step_operands(case, device)
    q, k, v, k_cache, v_cache, lengths = operands.tensors
    with naming("row bits", case, device):
        out, lse = _step(case, operands.tensors, backend, **operands.options)
        new, options = (k[:, :, :causal_len], v[:, :, :causal_len]), operands.cache_options
        ops.append_kv(k_cache, v_cache, *new, lengths, **options, backend=backend)
        decode = patterns.causal(1)
        for m in range(causal_len):
            row = [x[:, :, m : m + 1] for x in (q, k, v)]
            at = (*row, k_cache, v_cache, lengths + m)
            alone, alone_lse = _step(case, at, backend, pattern=decode, **operands.options)
            check_equal(out[:, :, m : m + 1], alone, f"row {m} of out")
            check_equal(lse[:, :, m : m + 1], alone_lse, f"row {m} of lse")
    return result_of("row_bits", case, device)


def check_launch_bits(
    case: StepCase, device: torch.device | str = "cpu", backend: ops.Backend | None = "triton"
) -> ParityResult:
    """What else is in a launch does not change the bits of a row, be it a draft, a prompt or a mask row.

    Varied: the other sequences of the batch, the other heads, `max_context`, the width of `lengths`, the strides of
    every operand. A promise of the kernels, as in `check_row_bits`.

    Raises:
        ParityError: a bit differs.
    """
    memory = step_operands(case, device)
    operands, sinks, paged = memory.tensors, memory.options["sinks"], memory.cache_options.items()
    group = case.num_heads // case.num_kv_heads

    def compare(what: str, at: tuple[slice, ...], tensors: Iterable[Tensor], **changes: Any) -> None:
        changed, changed_lse = _step(case, tensors, backend, **(memory.options | changes))
        check_equal(changed, out[at], f"out {what}")
        check_equal(changed_lse, lse[at], f"lse {what}")

    with naming("launch bits", case, device):
        out, lse = _step(case, operands, backend, **memory.options)
        for b in range(len(case.lengths)):
            one = slice(b, b + 1)
            # Pages are everybody's; what there is one of a sequence is taken apart.
            whose = {"k_cache", "v_cache", "k_scale", "v_scale"} if memory.block_table is not None else set()
            part = [x if name in whose else x[one] for name, x in zip(_NAMES, operands, strict=True)]
            own = {
                name: x if x is None or not x.ndim or (name in whose and x.ndim == 3) else x[one] for name, x in paged
            }
            compare(f"of sequence {b} alone", (one,), part, **own)
        for h in range(case.num_heads):
            head, kv_head = slice(h, h + 1), slice(h // group, h // group + 1)
            part = [operands[0][:, head], *(x[:, kv_head] for x in operands[1:5]), operands[5]]
            own = {name: x[:, kv_head] for name, x in paged if x is not None and name != "block_table" and x.ndim}
            own |= {} if sinks is None else {"sinks": sinks[head]}
            compare(f"of head {h} alone", (slice(None), head), part, **own)
        compare("with max_context", (), operands, max_context=max(case.lengths))
        compare("with int64 lengths", (), [*operands[:5], operands[5].long()])
        for layout in ("bhnd", "gaps", "bhdn"):
            moved = [guarded(x, layout).tensor if x.dtype == case.dtype else x for x in operands[:5]]
            compare(f"in layout {layout}", (), [*moved, operands[5]])
    return result_of("launch_bits", case, device)
