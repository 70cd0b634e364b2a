"""Rotary positions on the way into the cache: rotated q and k by the budget rule, every cache slot bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tidar_kernels import ops
from tidar_kernels.rotary import RotaryEmbedding, apply_rotary, rotary_append
from tidar_kernels.testing import Guarded, budget, check_equal, guarded, poisoned_allocations

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cpu", id="interpreter", marks=pytest.mark.interpret),
    pytest.param("cuda", id="triton", marks=pytest.mark.cuda),
]
CASES = [
    # lengths, rows, keep, heads, kv heads, head dim, layout
    ((0,), 1, 1, 4, 1, 64, "bhnd"),
    ((3, 21, 0), 20, 4, 6, 2, 16, "bnhd"),
    ((7, 22), 17, 17, 2, 2, 80, "gaps"),
    ((1, 2), 5, 0, 7, 1, 128, "bhdn"),
    ((40,), 3, 0, 2, 1, 32, "bnhd"),
]
MAX_LEN = 40


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("own_positions", [True, False])
def test_parity(case: Any, dtype: torch.dtype, own_positions: bool, device: str) -> None:
    lengths, rows, keep, num_heads, num_kv_heads, head_dim, layout = case
    batch = len(lengths)

    def place(*shape: int) -> Guarded:
        return guarded(torch.randn(shape).to(device, dtype), layout)

    q, k, v = (place(batch, h, rows, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads))
    caches = [place(batch, num_kv_heads, MAX_LEN, head_dim) for _ in range(2)]
    before = [cache.tensor.clone() for cache in caches]
    positions = torch.randint(0, 5000, (batch, rows) if own_positions else (rows,), device=device)
    rotary = RotaryEmbedding(head_dim).to(device)(positions, dtype)
    at = torch.tensor(lengths, device=device)
    with poisoned_allocations():
        turned = rotary_append(q.tensor, k.tensor, v.tensor, rotary, caches[0].tensor, caches[1].tensor, at, keep)

    def plainly(x: Tensor, wide: torch.dtype) -> Tensor:
        tables = tuple(t.to(wide) for t in rotary)
        return apply_rotary(x.to(wide).transpose(1, 2), tables).transpose(1, 2)

    for name, found, x in zip("qk", turned, (q, k), strict=True):
        assert bool(found.isfinite().all())
        measure = budget(found, plainly(x.tensor, torch.float64), plainly(x.tensor, dtype), name)
        assert measure.error <= measure.budget, name
    for cache, old, new in zip(caches, before, (turned[1], v.tensor), strict=True):
        for b, length in enumerate(lengths):
            old[b, :, length : length + keep] = new[b, :, :keep]
        check_equal(cache.tensor, old, "every slot of the cache")
        cache.check("cache", written=True)
    for name, operand in zip("qkv", (q, k, v), strict=True):
        operand.check(name)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_values_enter_the_cache_as_they_are(device: str) -> None:
    k_cache, v_cache = torch.zeros(2, 1, 2, 8, 16, dtype=torch.bfloat16, device=device)
    q, k, v = torch.randn(3, 1, 2, 3, 16, device=device).bfloat16()
    rotary = RotaryEmbedding(16).to(device)(torch.arange(3, device=device), torch.bfloat16)
    _, turned = rotary_append(q, k, v, rotary, k_cache, v_cache, torch.tensor([4], device=device), 2)
    assert torch.equal(v_cache[:, :, 4:6], v[:, :, :2])
    assert torch.equal(k_cache[:, :, 4:6], turned[:, :, :2])
    assert not k_cache[:, :, 6:].any()


@pytest.mark.parametrize("path", ["cpu", pytest.param("interpreter", marks=pytest.mark.interpret)])
def test_opcheck(path: str) -> None:
    q, k, v = torch.randn(2, 4, 3, 8), *torch.randn(2, 2, 2, 3, 8)
    caches = torch.zeros(2, 2, 2, 9, 8).unbind(0)
    args = (q, k, v, torch.randn(1, 3, 8), torch.randn(2, 3, 8), *caches, torch.tensor([1, 5]), 2)
    torch.library.opcheck(torch.ops.tidar_kernels.rotary_append.default, args)


def arguments() -> dict[str, Any]:
    tables = torch.ones(3, 1, 8)
    return {
        "q": torch.zeros(2, 4, 3, 8),
        **{name: torch.zeros(2, 2, 3, 8) for name in "kv"},
        "rotary": (tables, tables),
        **{name: torch.ones(2, 2, 9, 8) for name in ("k_cache", "v_cache")},
        "lengths": torch.tensor([0, 6]),
        "keep": 3,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(4, 3, 8)}, ValueError, r"^q: expected 4 dimensions"),
        ({"k": torch.zeros(2, 2, 2, 8)}, ValueError, r"^k: expected shape \[2, 2, 3, 8\], got \[2, 2, 2, 8\]$"),
        ({"v": torch.zeros(2, 2, 3, 8).half()}, TypeError, r"^v: expected dtype torch.float32"),
        ({"rotary": (torch.ones(3, 1, 8), torch.ones(3, 1, 4))}, ValueError, r"^sin: expected shape \[1, 3, 1, 8\]"),
        ({"rotary": (torch.ones(3, 3, 1, 8),) * 2}, ValueError, r"^cos: expected shape \[2, 3, 1, 8\]"),
        ({"keep": 4}, ValueError, r"^keep: expected 0 <= keep <= 3 rows, got 4$"),
        ({"lengths": torch.tensor([0, 7])}, ValueError, r"^lengths: expected 0 <= .* = 6, got 7 in sequence 1$"),
        ({"backend": "triton"}, ValueError, r"^backend: expected CUDA tensors"),
    ],
)
def test_bad_input_writes_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = arguments() | change
    with pytest.raises(error, match=message):
        rotary_append(**given)
    assert all(bool((given[name] == 1).all()) for name in ("k_cache", "v_cache"))


def test_compiles_for_every_chip() -> None:
    pytest.importorskip("triton")
    from tidar_kernels.kernels.configs import CHIPS
    from tidar_kernels.kernels.rotary_append import plan_rotary_append
    from tidar_kernels.testing.compilation import compile_report

    assert not ops.interpreting()
    for cc, head_dim, dtype in itertools.product(CHIPS, (80, 128), (torch.bfloat16, torch.float32)):

        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        k, cache, table = meta(2, 8, 72, head_dim), meta(2, 8, 4096, head_dim), meta(2, 72, head_dim)
        lengths = meta(2, dtype=torch.int32)
        launch, *_ = plan_rotary_append(meta(2, 32, 72, head_dim), k, k, table, table, cache, cache, lengths, 8)
        report = compile_report(launch, cc)
        assert (report.stack_bytes, report.local_accesses, report.spill_bytes) == (0, 0, 0)
