"""Cases and check of `append_kv`: the slots that are written, and everything around them that is not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from .caches import check_caches, random_bits, slots_of
from .harness import Guarded, ParityResult, bits, guarded

__all__ = ["APPEND_CASES", "APPEND_CASES_LARGE", "AppendCase", "check_append_kv"]


@dataclass(frozen=True)
class AppendCase:
    """One call of `append_kv`. Lengths for which not all new tokens fit are given to the operator below its checks.

    Args:
        name: for messages; `id` adds the dtype.
        lengths: where the new tokens go, one entry a sequence; any integer.
        num_new: new tokens a sequence.
        num_kv_heads, head_dim, dtype, max_len: of the cache.
        layout, cache_layout: strides of the new K/V and of the caches (`tidar_kernels.testing.LAYOUTS`).
        lengths_dtype: int32 or int64.
    """

    name: str
    lengths: tuple[int, ...]
    num_new: int
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    max_len: int = 40
    layout: str = "bnhd"
    cache_layout: str = "bhnd"
    lengths_dtype: torch.dtype = torch.int32

    @property
    def id(self) -> str:
        """Name and dtype."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def fits(self) -> bool:
        """All new tokens of all sequences have a slot."""
        return all(0 <= length <= self.max_len - self.num_new for length in self.lengths)


_APPEND = AppendCase("append", lengths=(0, 7, 32), num_new=8)
_INT32, _INT64 = 2**31, 2**63
APPEND_CASES: tuple[AppendCase, ...] = (
    _APPEND,
    replace(_APPEND, name="one_token", num_new=1, lengths=(0, 39, 16), dtype=torch.float16),
    replace(_APPEND, name="one_tile", num_new=16, lengths=(24, 1), dtype=torch.bfloat16),
    replace(_APPEND, name="two_tiles", num_new=17, lengths=(23, 5, 0), head_dim=80, dtype=torch.bfloat16),
    replace(_APPEND, name="whole_cache", num_new=40, lengths=(0, 0), dtype=torch.float64),
    replace(_APPEND, name="nothing", num_new=0, lengths=(0, 40)),
    replace(_APPEND, name="int64_lengths", lengths_dtype=torch.int64, num_kv_heads=3, dtype=torch.float16),
    replace(_APPEND, name="contiguous", layout="bhnd", head_dim=16, dtype=torch.bfloat16),
    replace(_APPEND, name="gaps", layout="gaps", cache_layout="gaps", head_dim=80, dtype=torch.float16),
    replace(_APPEND, name="gaps_bf16", layout="gaps", cache_layout="gaps", head_dim=5, dtype=torch.bfloat16),
    replace(_APPEND, name="bnhd_cache", layout="shared_heads", cache_layout="bnhd"),
    replace(_APPEND, name="strided_heads", layout="bhdn", cache_layout="bhdn", dtype=torch.float64, head_dim=96),
    replace(_APPEND, name="head_dim_256", head_dim=256, num_kv_heads=1, dtype=torch.bfloat16),
    # Below the checks: nothing may land outside [0, max_len), and what is inside lands where it should.
    replace(_APPEND, name="overflow", lengths=(33, 39, 40, 41, 1000)),
    replace(_APPEND, name="negative", lengths=(-1, -7, -8, -9, -1000), dtype=torch.bfloat16),
    replace(_APPEND, name="extremes", lengths=(_INT32 - 1, -_INT32, _INT32 - 8), dtype=torch.float16),
    replace(
        _APPEND,
        name="int64_extremes",
        lengths=(_INT64 - 1, -_INT64, 2**32 + 3, -(2**32) + 3, 2),
        lengths_dtype=torch.int64,
    ),
    replace(
        _APPEND, name="overflow_in_gaps", lengths=(38, -2), layout="bhdn", cache_layout="gaps", dtype=torch.float16
    ),
)
APPEND_CASES_LARGE: tuple[AppendCase, ...] = (
    AppendCase("large", tuple(range(0, 8192, 512)), 16, 8, 128, torch.bfloat16, max_len=8300),
    AppendCase("large_prefill", (0, 1, 4000), 4096, 8, 128, torch.float16, max_len=8300),
)


def check_append_kv(
    case: AppendCase, device: torch.device | str = "cpu", backend: ops.Backend | None = None
) -> ParityResult:
    """`append_kv` writes exactly the slots `lengths[b] + j` inside `[0, max_len)`, bit for bit, and nothing else.

    Raises: as `caches.check_caches`.
    """
    k_cache, v_cache, k, v = random_bits(case, device, case.max_len, case.max_len, case.num_new, case.num_new)
    caches = [guarded(cache, case.cache_layout) for cache in (k_cache, v_cache)]
    new = [guarded(fresh, case.layout) for fresh in (k, v)]
    lengths = guarded(torch.tensor(case.lengths, dtype=case.lengths_dtype, device=device))
    expected = [_appended(case, cache, fresh.tensor) for cache, fresh in zip(caches, new, strict=True)]
    operands = {"k": new[0], "v": new[1], "lengths": lengths}
    return check_caches("append_kv", case, device, backend, caches, expected, operands)


def _appended(case: AppendCase, cache: Guarded, new: Tensor) -> Tensor:
    """The bits of a cache's whole buffer after the append, slot by slot from the operator's definition."""
    memory = bits(cache.buffer).clone()
    slots = slots_of(cache, memory)
    for b, length in enumerate(case.lengths):
        for j in range(case.num_new):
            if 0 <= length + j < case.max_len:
                slots[b, :, length + j] = bits(new)[b, :, j]
    return memory
