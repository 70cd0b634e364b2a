"""Cases and check of `compact_kv`: every slot of the cache bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import ops
from .harness import ParityResult, bits, check_equal, generator_of, guarded, naming, result_of

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

    Values are random bit patterns, NaN payloads included. All of the memory is compared, slot by slot from the
    operator's definition: slots of the path and others, what lies between strided slots, and guard bands.

    Raises:
        ParityError: any bit differs.
        ValueError: a case that does not fit, with a backend by name: only the default has checks to go below.
    """
    if backend is not None and not case.fits:
        raise ValueError(f"backend: expected None for a case that does not fit, got {backend!r}")
    draw, batch = generator_of(case), len(case.lengths)
    shape = (batch, case.num_kv_heads, case.max_len, case.head_dim * case.dtype.itemsize)
    caches = [
        guarded(
            torch.randint(256, shape, generator=draw, dtype=torch.uint8, device="cpu").view(case.dtype).to(device),
            case.layout,
        )
        for _ in "kv"
    ]
    padded = [[*path, *[-1] * (case.width - len(path))] for path in case.paths]
    lengths = guarded(torch.tensor(case.lengths, dtype=case.index_dtype, device=device))
    path = guarded(torch.tensor(padded, dtype=case.index_dtype, device=device).view(batch, case.width))
    expected = []
    for cache in caches:
        before = bits(cache.before)
        after = before.clone()
        where = (cache.tensor.shape, cache.tensor.stride(), cache.tensor.storage_offset())
        old, new = before.as_strided(*where), after.as_strided(*where)
        for b, (length, nodes) in enumerate(zip(case.lengths, case.paths, strict=True)):
            for i, node in enumerate(nodes):
                if length + i >= 0 and length + node < case.max_len:
                    new[b, :, length + i] = old[b, :, length + node]
        expected.append(after)
    operands = [memory.tensor for memory in (*caches, lengths, path)]
    with naming("compact_kv", case, device):
        if case.fits:
            ops.compact_kv(*operands, backend=backend)
        else:
            torch.ops.tidar_kernels.compact_kv(*operands)
        for name, cache, memory in zip(("k_cache", "v_cache"), caches, expected, strict=True):
            check_equal(bits(cache.buffer), memory, f"memory of {name}")
        lengths.check("lengths")
        path.check("path")
    return result_of("compact_kv", case, device)
