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


@pytest.mark.parametrize("lengths", [(4, 4), (0, 5)], ids=["one_length", "lengths_differ"])
@pytest.mark.parametrize("keep", [0, 2, 3])
def test_the_bits_of_the_twin_on_the_cpu(keep: int, lengths: tuple[int, int]) -> None:
    q, k, v = (torch.randn(2, 3, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    rotary = RotaryEmbedding(16)(torch.tensor(lengths)[:, None] + torch.arange(3), torch.float32)
    found, expected = torch.zeros(2, 2, 2, 2, 9, 16)
    turned = rotary_append(q, k, v, rotary, *found, torch.tensor(lengths), keep)
    twin = rotary_append(q, k, v, rotary, *expected, torch.tensor(lengths), keep, backend="eager")
    assert torch.equal(found, expected)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(turned, twin, strict=True))


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


def paged(**changes: Any) -> dict[str, Any]:
    """Valid arguments: two sequences of two pages of five slots each, float8 with scales; with changes."""
    eight = torch.float8_e4m3fn
    caches = {name: torch.ones(5, 2, 5, 8).to(eight) for name in ("k_cache", "v_cache")}
    table = torch.tensor([[4, 0], [2, 1]], dtype=torch.int32)
    scales = {name: torch.ones(2, 2) for name in ("k_scale", "v_scale")}
    return {**arguments(), **caches, "block_table": table, **scales, **changes}


@pytest.mark.parametrize("path", ["cpu", pytest.param("interpreter", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("scale", [None, (), (5, 2, 5)])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck_with_pages_and_scales(path: str, scale: tuple[int, ...] | None, ragged: bool) -> None:
    batch, rows = (1, 6) if ragged else (2, 3)
    given = {"q": torch.randn(batch, 4, rows, 8), "k": torch.randn(batch, 2, rows, 8)}
    given |= {"v": torch.randn(batch, 2, rows, 8), "cos": torch.randn(1, rows, 8), "sin": torch.randn(1, rows, 8)}
    given |= {name: value for name, value in paged().items() if "c" in name or "lengths" in name}
    given |= {"keep": 2, "k_scale": None, "v_scale": None}
    if scale is not None:
        given |= {name: torch.ones(scale) for name in ("k_scale", "v_scale")}
    if ragged:
        given |= {"cu_rows": torch.tensor([0, 2, 6]).int(), "kept": torch.tensor([1, 2]).int()}
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if scale is None:  # on the CPU torch cannot compare float8, which `test_schema` does
        given |= {name: torch.ones(5, 2, 5, 8) for name in ("k_cache", "v_cache")}
        tests.append("test_schema")
    by_slot = scale is not None and len(scale) == 3
    op = torch.ops.tidar_kernels.rotary_append_scaling if by_slot else torch.ops.tidar_kernels.rotary_append
    torch.library.opcheck(op.default, (), given, test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [(), (5, 2, 5)])
def test_fullgraph_with_pages_and_scales(device: str, scale: tuple[int, ...]) -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return rotary_append(**given)

    torch.manual_seed(0)
    drawn = {name: torch.randn_like(x) for name, x in arguments().items() if name in "qkv"}
    given = paged(**drawn, k_scale=torch.full(scale, 0.5), v_scale=torch.full(scale, 0.5))
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    given["rotary"] = tuple(x.to(device) for x in given["rotary"])
    plain = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
    for one, other in zip(run(given), rotary_append(**plain), strict=True):
        assert torch.equal(one, other)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert torch.equal(given[name].float(), plain[name].float())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_table": torch.zeros(2, 2)}, TypeError, r"^block_table: expected dtype int32, got torch.float32$"),
        ({"block_table": torch.zeros(1, 2).int()}, ValueError, r"^block_table: expected shape \[2, 2\], got \[1, 2\]$"),
        (
            {"block_table": torch.tensor([[4, 9], [2, 5]]).int()},
            ValueError,
            r"^block_table: expected pages 0 <= page < 5 .*, got 5 in entry 1 of sequence 1$",
        ),
        ({"block_table": torch.zeros(2, 1).int()}, ValueError, r"^lengths: expected .* - 3 new tokens = 2, got 6"),
        ({"k_scale": None}, TypeError, r"^k_scale: expected a torch.Tensor"),
        ({"keep": torch.ones(3).int()}, ValueError, r"^keep: expected shape \[2\], got \[3\]$"),
        ({"keep": torch.ones(2).long()}, TypeError, r"^keep: expected an int, or dtype int32, got torch.int64$"),
        (
            {"cu_rows": torch.tensor([0, 1, 3]).int()},
            ValueError,
            r"^q: expected 3 dimensions, got shape \[2, 4, 3, 8\]$",
        ),
    ],
)
def test_bad_pages_and_scales_write_nothing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = paged(**changes)
    with pytest.raises(error, match=message):
        rotary_append(**given)
    assert all(bool((given[name].float() == 1).all()) for name in ("k_cache", "v_cache"))


@pytest.mark.parametrize("device", DEVICES)
def test_ragged_rows_are_those_of_each_sequence_alone(device: str) -> None:
    rows, cu_rows = 7, torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=device)
    q, k, v = torch.randn(rows, 4, 16, device=device), *torch.randn(2, rows, 2, 16, device=device)
    rotary = RotaryEmbedding(16).to(device)(torch.tensor([5, 6, 7, 0, 1, 1, 2], device=device), q.dtype)
    k_cache, v_cache = torch.zeros(2, 3, 2, 12, 16, device=device)
    lengths, keep = torch.tensor([5, 0, 0], device=device), torch.tensor([3, 0, 2], dtype=torch.int32, device=device)
    turned = rotary_append(q, k, v, rotary, k_cache, v_cache, lengths, keep, cu_rows=cu_rows)
    assert [x.shape for x in turned] == [q.shape, k.shape]
    for b, (first, end) in ((0, (0, 3)), (2, (3, 7))):
        caches = torch.zeros(2, 1, 2, 12, 16, device=device)
        alone = rotary_append(
            *(x[first:end].transpose(0, 1)[None] for x in (q, k, v)), tuple(x[first:end] for x in rotary),
            *caches, lengths[b : b + 1], int(keep[b]),
        )  # fmt: skip
        assert torch.equal(alone[0][0].transpose(0, 1), turned[0][first:end])
        assert torch.equal(alone[1][0].transpose(0, 1), turned[1][first:end])
        assert torch.equal(caches[0][0], k_cache[b])
        assert torch.equal(caches[1][0], v_cache[b])
    assert not k_cache[1].any()
