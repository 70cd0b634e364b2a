"""Cases and check of `compact_kv`: every slot of the cache bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .. import ops
from .caches import CacheKind, make_cache
from .harness import ParityResult, bits, check_case, generator_of, guarded, naming, result_of

__all__ = ["COMPACT_CASES", "COMPACT_CASES_LARGE", "CompactCase", "check_compact_kv"]


@dataclass(frozen=True)
class CompactCase:
    """One call of `compact_kv`. What leaves the cache is given to the operator below its checks.

    Args:
        name: for messages; `id` adds the dtype.
        lengths: committed tokens of each sequence, any integer.
        paths: the accepted nodes of each, without the padding after them.
        width: entries of a path with its padding.
        num_kv_heads, head_dim, dtype, max_len: of the cache.
        cache: pages, layout, dtype and scales of the cache.
        index_dtype: of lengths and paths.
    """

    name: str
    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    width: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    max_len: int = 40
    cache: CacheKind = field(default=CacheKind())
    index_dtype: torch.dtype = torch.int32

    @property
    def id(self) -> str:
        """Name and dtype."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def fits(self) -> bool:
        """All slots lie in the cache, in pages of it."""
        ends = [length + max(path, default=-1) for length, path in zip(self.lengths, self.paths, strict=True)]
        fit = (length >= 0 and end < self.max_len for length, end in zip(self.lengths, ends, strict=True))
        return not self.cache.bad_entries and all(fit)


_CASE = CompactCase("compact", (0, 7, 25), ((0, 2, 3, 9), (0, 1), (0, 4, 5, 11, 13, 14)))
_LONG = CompactCase("long", (3,), (tuple(range(0, 1400, 2)),), 700, 1, 16, max_len=1500)
COMPACT_CASES: tuple[CompactCase, ...] = (
    _CASE,
    replace(_CASE, name="nothing_moves", paths=((), (0,), tuple(range(6))), dtype=torch.bfloat16),
    replace(_CASE, name="all_move", paths=((1, 2, 3, 4, 5, 6), (5,), (9, 10)), dtype=torch.float16, head_dim=80),
    replace(_CASE, name="no_room_to_spare", max_len=32, lengths=(28, 26, 17), dtype=torch.float64,
            paths=((0, 3), (0, 1, 5), (0, 14))),
    replace(_CASE, name="no_nodes", width=0, paths=((), (), ())),
    replace(_CASE, name="one_node", width=1, paths=((0,), (3,), ())),
    replace(_CASE, name="int64", index_dtype=torch.int64, head_dim=96, num_kv_heads=3, dtype=torch.bfloat16),
    replace(_CASE, name="gaps", cache=CacheKind(layout="gaps"), head_dim=5, dtype=torch.bfloat16),
    replace(_CASE, name="bnhd", cache=CacheKind(layout="bnhd"), dtype=torch.float16),
    replace(_CASE, name="strided_heads", cache=CacheKind(layout="bhdn"), head_dim=16, dtype=torch.float64),
    replace(_CASE, name="head_dim_256", head_dim=256, num_kv_heads=1, dtype=torch.bfloat16),
    _LONG,
    # Below the checks: nothing lands outside the cache, and what is inside lands where it should.
    replace(_CASE, name="outside", lengths=(36, -2, 60)),
    replace(_CASE, name="int64_extremes", lengths=(2**62, -(2**62), 2**32 + 3), index_dtype=torch.int64),
    replace(_CASE, name="pages", cache=CacheKind(16, "packed_hnd"), dtype=torch.bfloat16),
    replace(_CASE, name="pages_of_1", cache=CacheKind(1, "nhd"), dtype=torch.float16, head_dim=80),
    replace(_CASE, name="pages_of_3", cache=CacheKind(3, "packed_nhd")),
    replace(_CASE, name="pages_of_64", cache=CacheKind(64, "tokens"), index_dtype=torch.int64),
    replace(_LONG, name="long_pages", cache=CacheKind(16, "pair_nhd")),
    replace(_CASE, name="bad_entries", cache=CacheKind(2, "hnd", bad_entries=True)),
    replace(_CASE, name="pages_outside", lengths=(36, -2, 60), cache=CacheKind(8, "nhd")),
    replace(_CASE, name="e4m3", cache=CacheKind(16, "hnd", torch.float8_e4m3fn, "head")),
    replace(_CASE, name="e5m2_slot", cache=CacheKind(0, "bnhd", torch.float8_e5m2, "slot"), head_dim=80),
    replace(_CASE, name="e4m3_slot", cache=CacheKind(16, "packed_nhd", torch.float8_e4m3fn, "slot")),
)  # fmt: skip
COMPACT_CASES_LARGE: tuple[CompactCase, ...] = (
    CompactCase("large", tuple(range(0, 8192, 512)), ((0, 2, 5, 9, 17, 33, 40, 63),) * 16, 12, 8, 128,
                torch.bfloat16, 8300),
    replace(_LONG, name="large_long", num_kv_heads=8, head_dim=128, dtype=torch.float16),
)  # fmt: skip


def check_compact_kv(
    case: CompactCase, device: torch.device | str = "cpu", backend: ops.Backend | None = None
) -> ParityResult:
    """`compact_kv` moves exactly the slots of the path, bit for bit, and nothing else.

    Values are random bit patterns, NaN payloads included. All of the memory is compared, slot by slot from the
    operator's definition: slots of the path and others, what lies between strided slots, and guard bands.

    Raises:
        ParityError: any bit differs.
        ValueError: a case that does not fit, with a backend by name: only the default has checks to go below.
    """
    check_case(case, CompactCase, device)
    if backend is not None and not case.fits:
        raise ValueError(f"backend: expected None for a case that does not fit, got {backend!r}")
    draw, batch = generator_of(case), len(case.lengths)
    padded = [[*path, *[-1] * (case.width - len(path))] for path in case.paths]
    lengths = guarded(torch.tensor(case.lengths, dtype=case.index_dtype, device=device))
    path = guarded(torch.tensor(padded, dtype=case.index_dtype, device=device).view(batch, case.width))
    needed = [
        (length, length + max(nodes, default=-1) + 1) for length, nodes in zip(case.lengths, case.paths, strict=True)
    ]
    shape = (case.num_kv_heads, case.max_len, case.head_dim)
    cache = make_cache(case.cache, lengths.tensor, needed, shape, case.dtype, draw, device)
    names = ["k_cache", "v_cache", *(("k_scale", "v_scale") if case.cache.scale == "slot" else ())]
    for name in names:
        old, new = bits(getattr(cache.cached, name)), bits(cache.expected(name))
        for b, (length, nodes) in enumerate(zip(case.lengths, case.paths, strict=True)):
            for i, node in enumerate(nodes):
                to, of = cache.place(b, length + i), cache.place(b, length + node)
                if to is not None and of is not None:
                    new[to[0], :, to[1]] = old[of[0], :, of[1]]
    operands = (cache.cached.k_cache, cache.cached.v_cache, lengths.tensor, path.tensor)
    with naming("compact_kv", case, device):
        if case.fits:
            ops.compact_kv(*operands, **cache.options, backend=backend)
        else:
            torch.ops.tidar_kernels.compact_kv(*operands, **cache.options)
        cache.check()
        lengths.check("lengths")
        path.check("path")
    return result_of("compact_kv", case, device)
