"""Append: every slot, touched and untouched, bit for bit; and nothing outside the cache, whatever lengths say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.paths import DEVICES, HERE, on_every_path
from tidar_kernels import eager, ops, testing


@pytest.mark.parametrize(("device", "case"), on_every_path("append_kv"))
def test_every_slot(device: str, case: testing.AppendCase) -> None:
    testing.check_append_kv(case, device)


@pytest.mark.parametrize("case", [case for case in testing.APPEND_CASES if case.fits], ids=lambda case: case.id)
def test_the_twin_too(case: testing.AppendCase) -> None:
    """The harness takes its expectation from the definition, not from the twin; so the twin is checked as well."""
    testing.check_append_kv(case, "cpu", backend="eager")


# A GPU's lengths are not read by the host: there it is `KVCache` that knows the bounds.
@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(("lengths", "sequence"), [((33, 0), 0), ((0, -1), 1), ((32, 41), 1)])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_overflow_raises_before_anything_is_written(
    device: str, lengths: tuple[int, int], sequence: int, backend: ops.Backend | None
) -> None:
    k_cache, v_cache = torch.randn(2, 2, 2, 40, 16, device=device).unbind(0)
    before = k_cache.clone(), v_cache.clone()
    k, v = torch.randn(2, 2, 2, 8, 16, device=device).unbind(0)
    message = f"^lengths: expected 0 <= length <= .*32, got {lengths[sequence]} in sequence {sequence}$"
    with pytest.raises(ValueError, match=message):
        ops.append_kv(k_cache, v_cache, k, v, torch.tensor(lengths, device=device), backend=backend)
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


@pytest.mark.parametrize("device", DEVICES)
def test_rejected_slots_are_overwritten_by_the_next_append(device: str) -> None:
    """Two steps of 8 drafts of which 3 are accepted: after the accepted ones lie those of the second step."""
    k_cache, v_cache = torch.zeros(2, 1, 2, 24, 16, device=device).unbind(0)
    first, second = torch.randn(2, 2, 1, 2, 8, 16, device=device).unbind(0)
    lengths = torch.tensor([5], dtype=torch.int32, device=device)
    ops.append_kv(k_cache, v_cache, *first, lengths)
    ops.append_kv(k_cache, v_cache, *second, lengths + 3)
    for cache, old, new in zip((k_cache, v_cache), first, second, strict=True):
        expected = torch.zeros_like(cache)
        expected[:, :, 5:8], expected[:, :, 8:16] = old[:, :, :3], new
        assert torch.equal(cache, expected)


def test_twin_drops_what_lies_outside() -> None:
    k_cache, v_cache = torch.zeros(2, 1, 1, 4, 2).unbind(0)
    k, v = torch.ones(2, 1, 1, 3, 2).unbind(0)
    eager.append_kv(k_cache, v_cache, k, v, torch.tensor([2]))
    eager.append_kv(k_cache, v_cache, k, v, torch.tensor([-2]))
    assert k_cache[0, 0, :, 0].tolist() == [1.0, 0.0, 1.0, 1.0]


EIGHT = torch.float8_e4m3fn


def operands(**changes: Any) -> dict[str, Any]:
    """Valid arguments: three sequences, six pages of four slots, float8 with a scale a head; with changes."""
    caches = {name: torch.ones(6, 2, 4, 16).to(EIGHT) for name in ("k_cache", "v_cache")}
    new = {name: torch.randn(3, 2, 5, 16) for name in "kv"}
    lengths = torch.tensor([0, 3, 2], dtype=torch.int32)
    table = torch.tensor([[5, 0], [1, 4], [3, 2]], dtype=torch.int32)
    scales = {name: torch.ones(3, 2) for name in ("k_scale", "v_scale")}
    return {**caches, **new, "lengths": lengths, "block_table": table, **scales, **changes}


RAGGED = {"k": torch.randn(7, 2, 16), "v": torch.randn(7, 2, 16), "cu_rows": torch.tensor([0, 2, 2, 7]).int()}


@pytest.mark.parametrize("path", ["cpu", pytest.param("interpreter", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("scale", [None, (), (3, 2), (6, 2, 4)])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck_with_pages_and_scales(path: str, scale: tuple[int, ...] | None, ragged: bool) -> None:
    scales = None if scale is None else torch.ones(scale)
    given = operands(k_scale=scales, v_scale=None if scales is None else scales.clone())
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if scale is None:  # on the CPU torch cannot compare float8, which `test_schema` does
        given |= {name: torch.ones(6, 2, 4, 16) for name in ("k_cache", "v_cache")}
        tests.append("test_schema")
    if ragged:
        given |= {name: x[None].transpose(1, 2) if name in "kv" else x for name, x in RAGGED.items()}
        given["kept"] = torch.tensor([1, 0, 4], dtype=torch.int32)
    by_slot = scale is not None and len(scale) == 3
    op = torch.ops.tidar_kernels.append_kv_scaling if by_slot else torch.ops.tidar_kernels.append_kv
    torch.library.opcheck(op.default, (), given, test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [(), (1, 2), (6, 2, 4)])
def test_fullgraph_with_pages_and_scales(device: str, scale: tuple[int, ...]) -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(given: dict[str, Any]) -> None:
        ops.append_kv(**given)

    torch.manual_seed(0)
    given = {name: x.to(device) for name, x in operands().items()}
    given |= {name: torch.full(scale, 0.5, device=device) for name in ("k_scale", "v_scale")}
    if scale == (1, 2):  # as vLLM hands one scale to all
        given |= {name: torch.full((), 0.5, device=device).expand(3, 2) for name in ("k_scale", "v_scale")}
    plain = {name: x.clone() for name, x in given.items()}
    run(given)
    ops.append_kv(**plain)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert torch.equal(given[name].float(), plain[name].float())
    assert not torch.equal(given["k_cache"].float(), operands()["k_cache"].float().to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_ragged_rows_are_those_of_each_sequence_alone(device: str, backend: ops.Backend | None) -> None:
    given = {name: x.to(device) for name, x in operands(**RAGGED, keep=torch.tensor([1, 3, 4]).int()).items()}
    alone = {name: x.clone() for name, x in given.items()}
    ops.append_kv(**given, backend=backend)
    for b, (first, end) in enumerate(((0, 1), (2, 2), (2, 6))):
        some = {name: alone[name][first:end].transpose(0, 1)[None] for name in "kv"}
        some |= {name: alone[name][b : b + 1] for name in ("lengths", "block_table", "k_scale", "v_scale")}
        ops.append_kv(**{**some, "k_cache": alone["k_cache"], "v_cache": alone["v_cache"]}, backend=backend)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name].float(), alone[name].float())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_past_the_last_sequence_are_nobodys(device: str) -> None:
    """A captured graph has rows to spare; on a GPU the host does not know where the last sequence ends."""
    given = {name: x.to(device) for name, x in operands(**RAGGED).items()}
    given["cu_rows"] = torch.tensor([0, 2, 2, 4], dtype=torch.int32, device=device)
    fewer = {name: x.clone() for name, x in given.items()} | {name: given[name][:4] for name in "kv"}
    given |= {name: given[name].transpose(0, 1)[None] for name in "kv"}
    torch.ops.tidar_kernels.append_kv(**given)
    ops.append_kv(**fewer)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name].float(), fewer[name].float())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_table": torch.zeros(3, 2)}, TypeError, r"^block_table: expected dtype int32, got torch.float32$"),
        ({"block_table": torch.zeros(2, 2).int()}, ValueError, r"^block_table: expected shape \[3, 2\], got \[2, 2\]$"),
        (
            {"block_table": torch.tensor([[5, 6], [1, 4], [3, 2]]).int()},
            ValueError,
            r"^block_table: expected pages 0 <= page < 6 where slots are used, got 6 in entry 1 of sequence 0$",
        ),
        (
            {"block_table": torch.tensor([[5], [1], [3]]).int()},
            ValueError,
            r"^lengths: expected 0 <= length <= max_pages \* page_size - 5 new tokens = -1, got 0 in sequence 0$",
        ),
        ({"k_cache": torch.zeros(6, 2, 0, 16)}, ValueError, r"^k_cache: expected at least one page"),
        ({"lengths": torch.tensor([0, 4, 2])}, ValueError, r"^lengths: expected .* = 3, got 4 in sequence 1$"),
        ({"k_scale": None}, TypeError, r"^k_scale: expected a torch.Tensor with a k_cache of torch.float8_e4m3fn"),
        ({"v_scale": torch.ones(2, 2)}, ValueError, r"^v_scale: expected a shape broadcastable to \[3, 2\], or \[6, 2"),
        ({"k": torch.zeros(3, 2, 5, 16).to(EIGHT)}, TypeError, r"^dtype: expected float32, float16"),
        ({"k": torch.zeros(3, 3, 5, 16)}, ValueError, r"^k: expected shape \[3, 2, 5, 16\], got \[3, 3, 5, 16\]$"),
        ({"keep": torch.ones(2).int()}, ValueError, r"^keep: expected shape \[3\], got \[2\]$"),
        ({"keep": torch.ones(3)}, TypeError, r"^keep: expected an int, or dtype int32, got torch.float32$"),
        ({"keep": -torch.ones(3).int()}, ValueError, r"^keep: expected >= 0 rows, got \[-1, -1, -1\]$"),
        (RAGGED | {"cu_rows": torch.tensor([0, 2, 2, 7])}, TypeError, r"^cu_rows: expected dtype int32, got"),
        (
            RAGGED | {"cu_rows": torch.tensor([0, 2, 7]).int()},
            ValueError,
            r"^cu_rows: expected shape \[4\], got \[3\]$",
        ),
        (
            RAGGED | {"cu_rows": torch.tensor([0, 2, 2, 6]).int()},
            ValueError,
            r"^cu_rows: expected to ascend from 0 to the number of rows = 7, got \[0, 2, 2, 6\]$",
        ),
        (RAGGED | {"cu_rows": torch.tensor([0, 3, 2, 7]).int()}, ValueError, r"^cu_rows: expected to ascend from 0"),
        (
            RAGGED | {"lengths": torch.tensor([7, 0, 0])},
            ValueError,
            r"^lengths: expected 0 <= length <= max_pages \* page_size - 2 new tokens = 6, got 7 in sequence 0$",
        ),
        ({"cu_rows": RAGGED["cu_rows"]}, ValueError, r"^k: expected 3 dimensions, got shape \[3, 2, 5, 16\]$"),
    ],
)
def test_bad_pages_scales_and_rows_write_nothing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = operands(**changes)
    with pytest.raises(error, match=message):
        ops.append_kv(**given)
    assert all(bool((given[name].float() == 1).all()) for name in ("k_cache", "v_cache") if given[name].numel())


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("device", DEVICES)
def test_values_may_be_narrower_than_keys(device: str, backend: ops.Backend | None) -> None:
    k_cache, v_cache = torch.zeros(5, 2, 4, 24, device=device), torch.zeros(5, 2, 4, 16, device=device)
    k, v = torch.randn(2, 2, 3, 24, device=device), torch.randn(2, 2, 3, 16, device=device)
    table = torch.tensor([[4, 0], [2, 1]], dtype=torch.int32, device=device)
    ops.append_kv(k_cache, v_cache, k, v, torch.tensor([0, 4], device=device), block_table=table, backend=backend)
    for cache, x in ((k_cache, k), (v_cache, v)):
        expected = torch.zeros_like(cache)
        expected[4, :, :3], expected[1, :, :3] = x[0], x[1]
        assert torch.equal(cache, expected)


@pytest.mark.parametrize(
    ("chip", "eight"), [(80, EIGHT), (80, torch.float8_e5m2), (90, None), (90, EIGHT), (100, EIGHT)]
)
def test_pages_and_float8_compile_for_every_chip(chip: int, eight: torch.dtype | None) -> None:
    """Also where no instruction converts to float8; a table, scales by slot and ragged rows at once."""
    pytest.importorskip("triton")
    from benchmarks.static.compilation import compile_report
    from tidar_kernels.ops.kv.operands import Turned, Written
    from tidar_kernels.ops.kv.triton import plan_append_kv, plan_compact_kv, plan_rotary_append
    from tidar_kernels.ops.operands import Cached, Keys

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def integers(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=torch.int32)

    cache, scale = meta(500, 8, 16, 128, dtype=eight or torch.bfloat16), None
    if eight is not None:
        scale = meta(500, 8, 16, dtype=torch.float32)
    cached = Cached(cache, cache, integers(4), 0, integers(4, 64), scale, scale)
    k = meta(1, 72, 8, 128).transpose(1, 2)
    turned = Turned(meta(1, 72, 32, 128).transpose(1, 2), meta(1, 72, 128), meta(1, 72, 128))
    written = Written(integers(5), integers(4))
    for launch in (
        plan_append_kv(cached, Keys(k, k), written),
        plan_rotary_append(turned, Keys(k, k), cached, 72, written)[0],
        plan_compact_kv(cached, integers(4, 12)),
    ):
        report = compile_report(launch, chip)
        assert (report.stack_bytes, report.local_accesses, report.spill_bytes) == (0, 0, 0)
