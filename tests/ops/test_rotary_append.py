"""Rotary positions on the way into the cache: rotated q and k by the budget rule, every cache slot bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.paths import DEVICES, on_every_path
from tidar_kernels import ops, testing
from tidar_kernels.nn.rotary import RotaryEmbedding
from tidar_kernels.ops import rotary_append


@pytest.mark.parametrize(("device", "case"), on_every_path("rotary_append"))
def test_parity(device: str, case: testing.RotaryCase) -> None:
    testing.check_rotary_append(case, device)


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


def test_compiles_where_the_head_dim_is_no_power_of_two() -> None:
    pytest.importorskip("triton")
    from benchmarks.static.compilation import compile_report
    from tidar_kernels.ops.kv.operands import Turned
    from tidar_kernels.ops.kv.triton import plan_rotary_append
    from tidar_kernels.ops.operands import Cached, Keys

    assert not ops.interpreting()

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    k, cache, table = meta(2, 8, 72, 80), meta(2, 8, 4096, 80), meta(2, 72, 80)
    lengths = meta(2, dtype=torch.int32)
    launch, *_ = plan_rotary_append(
        Turned(meta(2, 32, 72, 80), table, table), Keys(k, k), Cached(cache, cache, lengths), 8
    )
    report = compile_report(launch, 90)
    assert (report.stack_bytes, report.local_accesses, report.spill_bytes) == (0, 0, 0)


def test_a_backward_pass_is_an_error_by_name() -> None:
    q = torch.randn(1, 2, 3, 16, requires_grad=True)
    k, cache = torch.randn(1, 1, 3, 16), torch.zeros(1, 1, 8, 16)
    rotary, lengths = RotaryEmbedding(16)(torch.arange(3)[None], q.dtype), torch.tensor([2])
    turned, _ = rotary_append(q, k, k, rotary, cache, cache.clone(), lengths, 2)
    with pytest.raises(RuntimeError, match=r"^rotary_append: expected no backward pass .* apply_rotary"):
        turned.sum().backward()
    turned, _ = rotary_append(q, k, k, rotary, cache, cache.clone(), lengths, 2, backend="eager")
    turned.sum().backward()
    assert q.grad is not None
