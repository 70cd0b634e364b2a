"""Cases of `step_attention`: what is compared with the twin, whose rows' bits are compared, and whose launches'.

The same tables run in Triton's interpreter, on the CPU path and on CUDA. A case is data: copy one with
`dataclasses.replace`, or write your own with the shapes of your model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .. import patterns
from ..patterns import Pattern
from .builders import irregular_pattern, pairwise, random_tree
from .caches import CacheKind

__all__ = ["BITS_CASES", "BITS_CASES_LARGE", "LAUNCH_CASES", "STEP_CASES", "STEP_CASES_LARGE", "StepCase"]


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
    replace(_STEP, name="head_dim_512", head_dim=512, dtype=torch.float16),
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
    replace(_LARGE, name="head_dim_512", num_heads=8, num_kv_heads=1, head_dim=512, lengths=(1500, 449)),
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
