"""Cases and check of `append_kv`: the slots that are written, and everything around them that is not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import ops
from .caches import CacheKind, make_cache
from .harness import ParityResult, check_case, generator_of, guarded, naming, result_of

__all__ = ["APPEND_CASES", "APPEND_CASES_LARGE", "AppendCase", "check_append_kv"]


@dataclass(frozen=True)
class AppendCase:
    """One call of `append_kv`. Lengths for which not all new tokens fit are given to the operator below its checks.

    Args:
        name: for messages; `id` adds the dtype.
        lengths: where the new tokens go, one entry a sequence; any integer.
        num_new: new tokens a sequence.
        num_kv_heads, head_dim, dtype, max_len: of the cache.
        layout: strides of the new K/V (`tidar_kernels.testing.LAYOUTS`).
        cache: pages, layout, dtype and scales of the cache.
        lengths_dtype: int32 or int64.
        rows: of a ragged append, the new tokens of each sequence, in place of `num_new`.
        keep: the leading rows of each sequence that are written; None for all.
    """

    name: str
    lengths: tuple[int, ...]
    num_new: int
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    max_len: int = 40
    layout: str = "bnhd"
    cache: CacheKind = field(default=CacheKind())
    lengths_dtype: torch.dtype = torch.int32
    rows: tuple[int, ...] | None = None
    keep: tuple[int, ...] | None = None

    @property
    def id(self) -> str:
        """Name and dtype."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def fits(self) -> bool:
        """All new tokens of all sequences have a slot, and a page."""
        counts = zip(self.lengths, self.counts, strict=True)
        return not self.cache.bad_entries and all(0 <= length <= self.max_len - count for length, count in counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens written for each sequence."""
        rows = self.rows if self.rows is not None else (self.num_new,) * len(self.lengths)
        return rows if self.keep is None else tuple(map(min, rows, self.keep))


_APPEND = AppendCase("append", lengths=(0, 7, 32), num_new=8)
_INT32, _INT64 = 2**31, 2**63
_PACKED_1 = CacheKind(1, "packed_nhd", bad_entries=True)
_SLOTS = CacheKind(16, "hnd", torch.float8_e4m3fn, "slot")
APPEND_CASES: tuple[AppendCase, ...] = (
    _APPEND,
    replace(_APPEND, name="one_token", num_new=1, lengths=(0, 39, 16), dtype=torch.float16),
    replace(_APPEND, name="one_tile", num_new=16, lengths=(24, 1), dtype=torch.bfloat16),
    replace(_APPEND, name="two_tiles", num_new=17, lengths=(23, 5, 0), head_dim=80, dtype=torch.bfloat16),
    replace(_APPEND, name="whole_cache", num_new=40, lengths=(0, 0), dtype=torch.float64),
    replace(_APPEND, name="nothing", num_new=0, lengths=(0, 40)),
    replace(_APPEND, name="int64_lengths", lengths_dtype=torch.int64, num_kv_heads=3, dtype=torch.float16),
    replace(_APPEND, name="contiguous", layout="bhnd", head_dim=16, dtype=torch.bfloat16),
    replace(_APPEND, name="gaps", layout="gaps", cache=CacheKind(layout="gaps"), head_dim=80, dtype=torch.float16),
    replace(_APPEND, name="gaps_bf16", layout="gaps", cache=CacheKind(layout="gaps"), head_dim=5, dtype=torch.bfloat16),
    replace(_APPEND, name="bnhd_cache", layout="shared_heads", cache=CacheKind(layout="bnhd")),
    replace(
        _APPEND, name="strided_heads", layout="bhdn", cache=CacheKind(layout="bhdn"), dtype=torch.float64, head_dim=96
    ),
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
        _APPEND,
        name="overflow_in_gaps",
        lengths=(38, -2),
        layout="bhdn",
        cache=CacheKind(layout="gaps"),
        dtype=torch.float16,
    ),
    *(
        replace(_APPEND, name=f"pages_{size}_{layout}", dtype=dtype, cache=CacheKind(size, layout))
        for size, layout, dtype in (
            (1, "nhd", torch.float16),
            (16, "hnd", torch.float32),
            (16, "packed_hnd", torch.bfloat16),
            (32, "packed_nhd", torch.float16),
            (64, "pair_nhd", torch.float32),
            (3, "tokens", torch.bfloat16),
            (40, "hnd", torch.float32),
            (256, "packed_hnd", torch.float16),
        )
    ),
    replace(_APPEND, name="pages_bad_entries", num_new=40, lengths=(0, 0), cache=_PACKED_1, dtype=torch.float16),
    replace(_APPEND, name="pages_overflow", lengths=(33, 39, 40, 1000, -3), cache=CacheKind(8, "nhd")),
    replace(_APPEND, name="pages_extremes", lengths=(_INT32 - 1, -_INT32, 8), cache=CacheKind(8, "hnd")),
    *(
        replace(_APPEND, name=f"{kind}_{scale}_{size}", dtype=dtype, cache=CacheKind(size, layout, eight, scale))
        for kind, eight in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2))
        for scale, size, layout, dtype in (
            ("tensor", 0, "bhnd", torch.float16),
            ("head", 16, "packed_nhd", torch.bfloat16),
            ("slot", 0, "bnhd", torch.float32),
            ("slot", 16, "packed_hnd", torch.float16),
        )
    ),
    replace(_APPEND, name="e4m3_odd_dim", head_dim=80, num_new=17, lengths=(3, 23), cache=_SLOTS),
    replace(_APPEND, name="keep", keep=(3, 0, 8)),
    replace(_APPEND, name="ragged", lengths=(0, 7, 32, 5, 11), rows=(17, 0, 1, 8, 0), dtype=torch.float16),
    replace(
        _APPEND,
        name="ragged_pages",
        lengths=(0, 7, 32, 5),
        rows=(40, 20, 8, 0),
        keep=(40, 4, 9, 3),
        cache=CacheKind(16, "packed_nhd"),
        dtype=torch.bfloat16,
    ),
    replace(_APPEND, name="ragged_e4m3", lengths=(0, 7, 32), rows=(5, 20, 8), keep=(9, 4, 8), cache=_SLOTS),
    replace(
        _APPEND,
        name="ragged_many",
        lengths=tuple(range(30)) * 3,
        rows=(0, 1, 2) * 30,
        head_dim=16,
        cache=CacheKind(16, "hnd", torch.float8_e5m2, "head"),
        dtype=torch.bfloat16,
    ),
)
_LARGE = AppendCase("large", tuple(range(0, 8192, 512)), 16, 8, 128, torch.bfloat16, max_len=8300)
APPEND_CASES_LARGE: tuple[AppendCase, ...] = (
    _LARGE,
    AppendCase("large_prefill", (0, 1, 4000), 4096, 8, 128, torch.float16, max_len=8300),
    replace(_LARGE, name="large_pages", cache=CacheKind(16, "packed_nhd")),
    replace(_LARGE, name="large_e4m3", cache=CacheKind(64, "packed_hnd", torch.float8_e4m3fn, "head")),
    replace(
        _LARGE,
        name="large_ragged_e4m3",
        rows=(512, 16, 0, 1) * 4,
        keep=(512, 8, 8, 8) * 4,
        cache=CacheKind(1, "nhd", torch.float8_e4m3fn, "slot"),
    ),
)


def check_append_kv(
    case: AppendCase, device: torch.device | str = "cpu", backend: ops.Backend | None = None
) -> ParityResult:
    """`append_kv` writes exactly the slots `lengths[b] + j` inside `[0, max_len)`, bit for bit, and nothing else.

    Values are random bit patterns, NaN payloads included. All of the memory is compared: written and unwritten slots,
    what lies between strided slots, and guard bands. A case that does not fit runs below the operator's checks, which
    would have raised.

    Raises:
        ParityError: any bit differs.
        ValueError: a case that does not fit, with a backend by name: only the default has checks to go below.
    """
    check_case(case, AppendCase, device)
    if backend is not None and not case.fits:
        raise ValueError(f"backend: expected None for a case that does not fit, got {backend!r}")
    draw, batch = generator_of(case), len(case.lengths)
    lengths = guarded(torch.tensor(case.lengths, dtype=case.lengths_dtype, device=device))
    needed = [(length, length + count) for length, count in zip(case.lengths, case.counts, strict=True)]
    shape = (case.num_kv_heads, case.max_len, case.head_dim)
    cache = make_cache(case.cache, lengths.tensor, needed, shape, case.dtype, draw, device)
    total = case.num_new if case.rows is None else sum(case.rows)

    def noise() -> Tensor:
        size = (batch if case.rows is None else 1, case.num_kv_heads, total, case.head_dim)
        if case.cache.dtype is not None:  # over all of the range, and with what has no float8
            x = torch.randn(size, generator=draw, device="cpu") * torch.randn(size, generator=draw, device="cpu").exp2()
            x.view(-1)[3::101], x.view(-1)[5::103] = float("inf"), -1e5
            return x.to(device, case.dtype)
        raw = torch.randint(
            256, (*size[:3], case.head_dim * case.dtype.itemsize), generator=draw, dtype=torch.uint8, device="cpu"
        )
        return raw.view(case.dtype).to(device)

    new = [guarded(noise(), case.layout) for _ in "kv"]
    k, v = (memory.tensor for memory in new)
    row = 0
    for b, (length, count) in enumerate(zip(case.lengths, case.counts, strict=True)):
        of = (b, 0) if case.rows is None else (0, row)
        for j in range(count):
            cache.write(b, length + j, k[of[0], :, of[1] + j], v[of[0], :, of[1] + j])
        row += 0 if case.rows is None else case.rows[b]
    ragged = None
    if case.rows is not None:
        ragged = torch.tensor([0, *case.rows], device=device).cumsum(0).to(torch.int32)
        k, v = (x[0].transpose(0, 1) for x in (k, v))
    keep = None if case.keep is None else torch.tensor(case.keep, dtype=torch.int32, device=device)
    caches = (cache.cached.k_cache, cache.cached.v_cache)
    with naming("append_kv", case, device):
        if case.fits:
            ops.append_kv(*caches, k, v, lengths.tensor, **cache.options, cu_rows=ragged, keep=keep, backend=backend)
        else:
            torch.ops.tidar_kernels.append_kv(*caches, k, v, lengths.tensor, **cache.options, kept=keep)
        cache.check()
        for name, untouched in zip(("k", "v", "lengths"), (*new, lengths), strict=True):
            untouched.check(name)
    return result_of("append_kv", case, device)
