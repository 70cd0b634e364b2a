"""Cases and check of `rotary_append`: rotated q and k by the budget rule, every slot of the cache bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..nn.rotary import RotaryEmbedding, apply_rotary
from ..ops import Backend, rotary_append
from .harness import ParityResult, budget, check_equal, generator_of, guarded, naming, poisoned_allocations, result_of

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
        layout: strides of q, k, v and the caches (`tidar_kernels.testing.LAYOUTS`).
        own_positions: every sequence has positions of its own.
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

    @property
    def id(self) -> str:
        """Name and dtype."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


_CASES = (
    RotaryCase("decode", (0,), 1, 1, num_kv_heads=1, layout="bhnd"),
    RotaryCase("step_B4", (3, 21, 0), 20, 4, num_heads=6, head_dim=16),
    RotaryCase("full_cache", (7, 22), 17, 17, num_heads=2, head_dim=80, layout="gaps"),
    RotaryCase("keeps_none", (1, 2), 5, 0, num_heads=7, num_kv_heads=1, head_dim=128, layout="bhdn"),
    RotaryCase("at_capacity", (40,), 3, 0, num_heads=2, num_kv_heads=1, head_dim=32),
)
ROTARY_CASES: tuple[RotaryCase, ...] = tuple(
    replace(case, name=case.name + ("" if own else "_shared_positions"), dtype=dtype, own_positions=own)
    for case in _CASES
    for dtype in (torch.float32, torch.float16)
    for own in (True, False)
)
_LARGE = RotaryCase("large_B8", (4000, 17, 0, 4088), 72, 8, 32, 8, 128, torch.bfloat16, 4096)
ROTARY_CASES_LARGE: tuple[RotaryCase, ...] = (
    _LARGE,
    replace(_LARGE, name="large_fp32", dtype=torch.float32),
    replace(_LARGE, name="large_B16", lengths=(100,), rows=272, keep=16, num_heads=28, num_kv_heads=4),
)


def check_rotary_append(
    case: RotaryCase, device: torch.device | str = "cpu", backend: Backend | None = None
) -> ParityResult:
    """`rotary_append` against rotation in float64 by the budget rule; all slots and all operands bit for bit.

    Raises:
        ParityError: any of it fails.
    """
    draw, batch = generator_of(case), len(case.lengths)

    def normal(heads: int, rows: int) -> Tensor:
        return torch.randn(batch, heads, rows, case.head_dim, generator=draw, device="cpu").to(device, case.dtype)

    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    q, k, v = (guarded(normal(h, case.rows), case.layout) for h in heads)
    caches = [guarded(normal(case.num_kv_heads, case.max_len), case.layout) for _ in "kv"]
    slots = [cache.tensor.clone() for cache in caches]
    shape = (batch, case.rows) if case.own_positions else (case.rows,)
    positions = torch.randint(0, 5000, shape, generator=draw, device="cpu").to(device)
    rotary = RotaryEmbedding(case.head_dim).to(device)(positions, case.dtype)
    lengths = torch.tensor(case.lengths, device=device)

    def plainly(x: Tensor, dtype: torch.dtype) -> Tensor:
        cos, sin = rotary
        return apply_rotary(x.to(dtype).transpose(1, 2), (cos.to(dtype), sin.to(dtype))).transpose(1, 2)

    with naming("rotary_append", case, device):
        with poisoned_allocations():
            turned = rotary_append(
                *(q.tensor, k.tensor, v.tensor, rotary, caches[0].tensor, caches[1].tensor, lengths, case.keep),
                backend=backend,
            )
        measures = [
            budget(found, plainly(x.tensor, torch.float64), plainly(x.tensor, case.dtype), name)
            for name, found, x in zip("qk", turned, (q, k), strict=True)
        ]
        for name, cache, expected, new in zip("kv", caches, slots, (turned[1], v.tensor), strict=True):
            for b, length in enumerate(case.lengths):
                expected[b, :, length : length + case.keep] = new[b, :, : case.keep]
            check_equal(cache.tensor, expected, f"slots of {name}_cache")
            cache.check(f"{name}_cache", written=True)
        for name, operand in zip("qkv", (q, k, v), strict=True):
            operand.check(name)
    return result_of("rotary_append", case, device, measures)
