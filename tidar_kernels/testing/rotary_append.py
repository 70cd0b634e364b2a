"""Cases and check of `rotary_append`: rotated q and k by the budget rule, every slot of the cache bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..nn.rotary import RotaryEmbedding, apply_rotary
from ..ops import Backend, rotary_append
from .caches import CacheKind, make_cache
from .harness import (
    ParityResult,
    budget,
    check_case,
    generator_of,
    guarded,
    naming,
    poisoned_allocations,
    result_of,
)

__all__ = ["ROTARY_CASES", "ROTARY_CASES_LARGE", "RotaryCase", "check_rotary_append"]


@dataclass(frozen=True)
class RotaryCase:
    """One call of `rotary_append`.

    Args:
        name: for messages; `id` adds the dtype.
        lengths: tokens of context of each sequence; their number is the batch size.
        rows: in-flight rows.
        keep: rows whose K/V is written.
        num_heads, num_kv_heads, head_dim, dtype, max_len: of the operands.
        layout: strides of q, k, v and, without `cache`, of the caches (`tidar_kernels.testing.LAYOUTS`).
        own_positions: every sequence has positions of its own.
        cache: pages, layout, dtype and scales of the cache.
        ragged: the rows of each sequence, of a ragged call; `rows` is their sum.
        kept: of each sequence the rows whose K/V is written, in place of `keep`.
    """

    name: str
    lengths: tuple[int, ...]
    rows: int
    keep: int
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    max_len: int = 40
    layout: str = "bnhd"
    own_positions: bool = True
    cache: CacheKind | None = None
    ragged: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens written for each sequence."""
        rows = self.ragged or (self.rows,) * len(self.lengths)
        return tuple(map(min, rows, self.kept or (self.keep,) * len(self.lengths)))

    @property
    def id(self) -> str:
        """Name and dtype."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


_SLOTS = CacheKind(3, "hnd", torch.float8_e4m3fn, "slot")
_STEP = RotaryCase("step_B4", (3, 21, 0), 20, 4, num_heads=6, head_dim=16)
_CASES = (
    RotaryCase("decode", (0,), 1, 1, num_kv_heads=1, layout="bhnd"),
    _STEP,
    RotaryCase("full_cache", (7, 22), 17, 17, num_heads=2, head_dim=80, layout="gaps"),
    RotaryCase("keeps_none", (1, 2), 5, 0, num_heads=7, num_kv_heads=1, head_dim=128, layout="bhdn"),
    RotaryCase("at_capacity", (40,), 3, 0, num_heads=2, num_kv_heads=1, head_dim=32),
)
ROTARY_CASES: tuple[RotaryCase, ...] = (
    *(
        replace(case, name=case.name + ("" if own else "_shared_positions"), dtype=dtype, own_positions=own)
        for case in _CASES
        for dtype in (torch.float32, torch.float16)
        for own in (True, False)
    ),
    replace(_STEP, name="pages", cache=CacheKind(16, "packed_hnd")),
    replace(_STEP, name="pages_of_1", cache=CacheKind(1, "nhd"), dtype=torch.float16, layout="gaps"),
    replace(_STEP, name="pages_of_64", cache=CacheKind(64, "packed_nhd"), head_dim=80),
    replace(_STEP, name="bad_entries", cache=CacheKind(1, "hnd", bad_entries=True)),
    replace(_STEP, name="e4m3", cache=CacheKind(0, "bhnd", torch.float8_e4m3fn), dtype=torch.float16),
    replace(_STEP, name="e5m2_head", cache=CacheKind(16, "tokens", torch.float8_e5m2, "head"), own_positions=False),
    replace(_STEP, name="e4m3_slot", cache=CacheKind(16, "packed_nhd", torch.float8_e4m3fn, "slot"), head_dim=80),
    replace(_STEP, name="kept", kept=(4, 1, 0), dtype=torch.float16),
    replace(_STEP, name="ragged", rows=41, ragged=(20, 17, 4), kept=(4, 17, 5), keep=41),
    replace(
        _STEP,
        name="ragged_pages",
        rows=37,
        ragged=(20, 0, 17),
        kept=(4, 4, 17),
        dtype=torch.float16,
        cache=CacheKind(16, "pair_nhd"),
    ),
    replace(_STEP, name="ragged_e4m3", rows=37, ragged=(20, 0, 17), cache=_SLOTS),
)
_LARGE = RotaryCase("large_B8", (4000, 17, 0, 4088), 72, 8, 32, 8, 128, torch.bfloat16, 4096)
ROTARY_CASES_LARGE: tuple[RotaryCase, ...] = (
    _LARGE,
    replace(_LARGE, name="large_fp32", dtype=torch.float32),
    replace(_LARGE, name="large_pages", cache=CacheKind(16, "packed_nhd")),
    replace(_LARGE, name="large_e4m3", cache=CacheKind(64, "packed_hnd", torch.float8_e4m3fn, "slot")),
    replace(_LARGE, name="large_B16", lengths=(100,), rows=272, keep=16, num_heads=28, num_kv_heads=4),
)


def check_rotary_append(
    case: RotaryCase, device: torch.device | str = "cpu", backend: Backend | None = None
) -> ParityResult:
    """`rotary_append` against rotation in float64 by the budget rule; the memory of cache and operands bit for bit.

    Raises:
        ParityError: any of it fails.
    """
    check_case(case, RotaryCase, device)
    draw, batch = generator_of(case), len(case.lengths) if case.ragged is None else 1

    def normal(heads: int, rows: int) -> Tensor:
        return torch.randn(batch, heads, rows, case.head_dim, generator=draw, device="cpu").to(device, case.dtype)

    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    q, k, v = (guarded(normal(h, case.rows), case.layout) for h in heads)
    lengths = torch.tensor(case.lengths, device=device)
    needed = [(length, length + count) for length, count in zip(case.lengths, case.counts, strict=True)]
    kind = case.cache or CacheKind(layout=case.layout)
    shape = (case.num_kv_heads, case.max_len, case.head_dim)
    cache = make_cache(kind, lengths, needed, shape, case.dtype, draw, device)
    positions_shape = (batch, case.rows) if case.own_positions and case.ragged is None else (case.rows,)
    positions = torch.randint(0, 5000, positions_shape, generator=draw, device="cpu").to(device)
    rotary = RotaryEmbedding(case.head_dim).to(device)(positions, case.dtype)

    def plainly(x: Tensor, dtype: torch.dtype) -> Tensor:
        cos, sin = rotary
        return apply_rotary(x.to(dtype).transpose(1, 2), (cos.to(dtype), sin.to(dtype))).transpose(1, 2)

    rows, cu_rows = (q.tensor, k.tensor, v.tensor), None
    if case.ragged is not None:
        rows = (q.tensor[0].transpose(0, 1), k.tensor[0].transpose(0, 1), v.tensor[0].transpose(0, 1))
        cu_rows = torch.tensor([0, *case.ragged], device=device).cumsum(0).to(torch.int32)
    kept = case.keep if case.kept is None else torch.tensor(case.kept, dtype=torch.int32, device=device)
    caches = (cache.cached.k_cache, cache.cached.v_cache)
    with naming("rotary_append", case, device):
        with poisoned_allocations():
            if kind.bad_entries:  # below the checks, which on the CPU read the table
                tables = (x.squeeze(-2).expand(batch, case.rows, case.head_dim) for x in rotary)
                turned = torch.ops.tidar_kernels.rotary_append(
                    *rows, *tables, *caches, lengths, case.keep, **cache.options
                )
            else:
                turned = rotary_append(
                    *rows, rotary, *caches, lengths, kept, **cache.options, cu_rows=cu_rows, backend=backend
                )
        if case.ragged is not None:
            turned = tuple(x.transpose(0, 1)[None] for x in turned)
        measures = [
            budget(found, plainly(x.tensor, torch.float64), plainly(x.tensor, case.dtype), name)
            for name, found, x in zip("qk", turned, (q, k), strict=True)
        ]
        first = 0
        for b, (length, count) in enumerate(zip(case.lengths, case.counts, strict=True)):
            of, start = (b, 0) if case.ragged is None else (0, first)
            for j in range(count):
                cache.write(b, length + j, turned[1][of, :, start + j], v.tensor[of, :, start + j])
            first += 0 if case.ragged is None else case.ragged[b]
        cache.check()
        for name, operand in zip("qkv", (q, k, v), strict=True):
            operand.check(name)
    return result_of("rotary_append", case, device, measures)
