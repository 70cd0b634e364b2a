"""Cases and check of `compact_kv`: every slot of the cache bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from .caches import check_caches, random_bits, slots_of
from .harness import Guarded, ParityResult, bits, guarded

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
        layout: strides of the caches (`tidar_kernels.testing.LAYOUTS`).
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
    layout: str = "bhnd"
    index_dtype: torch.dtype = torch.int32

    @property
    def id(self) -> str:
        """Name and dtype."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def fits(self) -> bool:
        """All slots lie in the cache."""
        ends = [length + max(path, default=-1) for length, path in zip(self.lengths, self.paths, strict=True)]
        return all(length >= 0 and end < self.max_len for length, end in zip(self.lengths, ends, strict=True))


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
    replace(_CASE, name="gaps", layout="gaps", head_dim=5, dtype=torch.bfloat16),
    replace(_CASE, name="bnhd", layout="bnhd", dtype=torch.float16),
    replace(_CASE, name="strided_heads", layout="bhdn", head_dim=16, dtype=torch.float64),
    replace(_CASE, name="head_dim_256", head_dim=256, num_kv_heads=1, dtype=torch.bfloat16),
    _LONG,
    # Below the checks: nothing lands outside the cache, and what is inside lands where it should.
    replace(_CASE, name="outside", lengths=(36, -2, 60)),
    replace(_CASE, name="int64_extremes", lengths=(2**62, -(2**62), 2**32 + 3), index_dtype=torch.int64),
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

    Raises: as `caches.check_caches`.
    """
    caches = [guarded(cache, case.layout) for cache in random_bits(case, device, case.max_len, case.max_len)]
    padded = [[*path, *[-1] * (case.width - len(path))] for path in case.paths]
    lengths = guarded(torch.tensor(case.lengths, dtype=case.index_dtype, device=device))
    path = guarded(torch.tensor(padded, dtype=case.index_dtype, device=device).view(len(case.lengths), case.width))
    expected = [_compacted(case, cache) for cache in caches]
    return check_caches("compact_kv", case, device, backend, caches, expected, {"lengths": lengths, "path": path})


def _compacted(case: CompactCase, cache: Guarded) -> Tensor:
    """The bits of a cache's whole buffer after the move, slot by slot from the operator's definition."""
    memory = bits(cache.buffer).clone()
    old, new = slots_of(cache, bits(cache.buffer)), slots_of(cache, memory)
    for b, (length, nodes) in enumerate(zip(case.lengths, case.paths, strict=True)):
        for i, node in enumerate(nodes):
            if length + i >= 0 and length + node < case.max_len:
                new[b, :, length + i] = old[b, :, length + node]
    return memory
