"""Ragged batches in `step_attention`: the twin by hand, each request's bits alone and in any mix, and bad input."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.paths import DEVICES, HERE, KERNELS
from tidar_kernels import eager, ops, patterns, testing
from tidar_kernels.ops.operands import Cached, Keys, Scores
from tidar_kernels.ops.step_attention.api import rows_of
from tidar_kernels.patterns import Pattern, PatternBatch
from tidar_kernels.testing.caches import CacheKind

# A prefill chunk, a step, an idle request, a cut step, a single token; and three rows that are nobody's. In the
# interpreter a row tile has 32 rows of the 2 heads, and a split 64 keys.
STEP, CHUNK, TREE, TOKEN = patterns.tidar_step(3), patterns.causal(40), testing.random_tree(40), patterns.causal(1)
PLAIN = [STEP, CHUNK, TOKEN]
MIX: list[Pattern | None] = [CHUNK, STEP, None, STEP, TOKEN]
ROWS, NUM_ROWS = [17, 12, 0, 5, 1], 38
LENGTHS = (70, 0, 9, 63, 64)
OTHER_MIX: list[Pattern | None] = [TOKEN, None, STEP, CHUNK, None]
OTHER_ROWS = [1, 0, 11, 19, 0]


def mixed(
    mix: list[Pattern | None], rows: list[int], device: str, table: list[Pattern] = PLAIN, num_rows: int = NUM_ROWS
) -> PatternBatch:
    return patterns.batch(mix, rows, table=table, num_rows=num_rows, device=device)


class Given:
    """Operands of one launch of five requests, and what each is alone."""

    def __init__(self, device: str, cache: CacheKind | None = None, **changes: Any) -> None:
        case = testing.StepCase("ragged", TOKEN, LENGTHS, 2, 1, 16, max_len=90, cache=cache)
        self.case = replace(case, **changes)
        self.memory = testing.step_operands(self.case, device)
        _, _, _, *self.cached = self.memory.tensors
        draw = testing.harness.generator_of(self.case)
        self.new = [
            torch.randn(NUM_ROWS, heads, 16, generator=draw).to(device, self.case.dtype)
            for heads in (self.case.num_heads, self.case.num_kv_heads, self.case.num_kv_heads)
        ]

    def run(self, batch: PatternBatch, **options: Any) -> tuple[Tensor, Tensor]:
        options = {"softcap": self.case.softcap, **self.memory.options, **options}
        with testing.poisoned_allocations():
            out, lse = ops.step_attention(*self.new, *self.cached, batch, return_lse=True, **options)
        return out, lse

    def alone(self, request: int, first: int, end: int, pattern: Pattern, **options: Any) -> tuple[Tensor, Tensor]:
        """`(out [rows, heads, d], lse)` of one request as a batch of one."""
        one, pages = slice(request, request + 1), self.memory.block_table is not None
        k_cache, v_cache, lengths = self.cached
        options = {"softcap": self.case.softcap, **self.memory.options, **options}
        for name in ("block_table", "k_scale", "v_scale"):
            value = options[name]
            if value is not None and value.ndim and not (pages and value.ndim == 3):
                options[name] = value[one]
        caches = (k_cache, v_cache) if pages else (k_cache[one], v_cache[one])
        new = (x[first:end].transpose(0, 1)[None] for x in self.new)
        out, lse = ops.step_attention(*new, *caches, lengths[one], pattern, return_lse=True, **options)
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)

    def check_each_alone(self, batch: PatternBatch, found: tuple[Tensor, Tensor]) -> None:
        ends = batch.cu_rows.tolist()
        for request, (first, end) in enumerate(itertools.pairwise(ends)):
            for a, b in zip(found, self.alone(request, first, end, batch.pattern(request)), strict=True):
                assert torch.equal(a[first:end], b), f"request {request}"
        out, lse = found
        assert not out[ends[-1] :].any()
        sinks = self.memory.options["sinks"]
        nobodys = torch.full_like(lse[ends[-1] :], -math.inf) if sinks is None else sinks.expand_as(lse[ends[-1] :])
        assert torch.allclose(lse[ends[-1] :], nobodys.to(lse.dtype))


def by_hand(given: Given, batch: PatternBatch, request: int, row: int, head: int, first: int) -> Tensor:
    """One row of one head, key by key from what the batch's table says."""
    (q, k, v), (k_cache, v_cache, lengths) = given.new, given.cached
    table, context = batch.table, int(lengths[request])
    k, v, k_cache, v_cache = k[:, 0], v[:, 0], k_cache[request, 0], v_cache[request, 0]
    count = int(batch.cu_rows[request + 1]) - first
    at = int(table.offsets[batch.kinds[request]]) + row
    reach = context if table.reach is None else int(table.reach[at])
    keys, values = ([x[n] for n in range(max(0, context - reach), context)] for x in (k_cache, v_cache))
    for key in range(count):
        intervals = (table.lead[at].tolist(), table.own[at].tolist())
        word = 0 if table.tree_mask is None or key // 32 >= table.tree_mask.shape[1] else table.tree_mask[at, key // 32]
        if any(low <= key < high for low, high in intervals) or int(word) >> key % 32 & 1:
            keys.append(k[first + key])
            values.append(v[first + key])
    scores = torch.stack(keys) @ q[first + row, head] / 4
    return torch.softmax(scores, 0) @ torch.stack(values)


@pytest.mark.parametrize("window", [None, 20])
def test_the_twin_by_hand(window: int | None) -> None:
    given = Given("cpu", dtype=torch.float64)
    for mix, rows in (([CHUNK, STEP, None, STEP, TOKEN], ROWS), ([None, STEP, TREE, None, TOKEN], [0, 5, 31, 0, 1])):
        batch = mixed(mix, rows, "cpu", [STEP, CHUNK, TREE, TOKEN])
        batch = batch if window is None else batch.windowed(window)
        out, _ = given.run(batch, backend="eager")
        ends = batch.cu_rows.tolist()
        for request, (first, end) in enumerate(itertools.pairwise(ends)):
            for row in range(end - first):
                expected = by_hand(given, batch, request, row, row % 2, first)
                assert torch.allclose(out[first + row, row % 2], expected, rtol=1e-9, atol=1e-12)
        assert not out[ends[-1] :].any()


CACHES = {
    "contiguous": None,
    "pages": CacheKind(5, "packed_nhd"),
    "pages of a tile": CacheKind(16, "hnd"),
    "float8": CacheKind(0, "bhnd", torch.float8_e4m3fn, "head"),
    "float8 pages": CacheKind(16, "packed_hnd", torch.float8_e5m2, "slot"),
}
THOROUGH = {"pages of a tile", "float8"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "cache", [pytest.param(name, marks=pytest.mark.thorough if name in THOROUGH else []) for name in CACHES]
)
def test_a_request_has_the_bits_that_it_has_alone(device: str, cache: str) -> None:
    """Of two mixes in one batch, written in place: nothing but the device knows what a launch is made of."""
    given, batch = Given(device, CACHES[cache], dtype=torch.float16), mixed(MIX, ROWS, device)
    given.check_each_alone(batch, given.run(batch))
    batch.copy_(mixed(OTHER_MIX, OTHER_ROWS, device))
    given.check_each_alone(batch, given.run(batch))


@pytest.mark.parametrize("device", DEVICES)
def test_with_windows_caps_sinks_and_trees_too(device: str) -> None:
    """Those of a tree alone have the tiles of a tree, which in this batch all have (`tables.py`)."""
    given = Given(device, softcap=2.0, sinks=True)
    irregular = testing.irregular_pattern(40, 40, 3, with_tree_mask=True)  # cut, its rows miss keys after them
    mix: list[Pattern | None] = [TREE, STEP, None, irregular, TOKEN]
    batch = mixed(mix, [2, 2, 0, 33, 1], device, [irregular, STEP, TREE, TOKEN]).windowed(30)
    given.check_each_alone(batch, given.run(batch))


@pytest.mark.parametrize("device", KERNELS)
def test_one_split_has_no_partial_results(device: str) -> None:
    given, batch = Given(device, lengths=(0, 3, 1, 5, 2), max_len=5), mixed(MIX, ROWS, device)
    kernel = import_module("tidar_kernels.ops.step_attention.triton")
    chip = kernel.chip_of(given.new[0].device)
    q, k, v = (x.transpose(0, 1)[None] for x in given.new)
    cached = Cached(*given.cached, 5)
    planned, _, _ = kernel.plan_step_attention(rows_of(q, batch), Keys(k, v), cached, Scores(0.25), chip)
    assert [one.kernel.__name__ for one in planned] == ["sound_keys_kernel", "step_attention_kernel"]
    given.check_each_alone(batch, given.run(batch))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity(device: str, dtype: torch.dtype) -> None:
    given, batch = Given(device, CACHES["pages"], dtype=dtype, sinks=True), mixed(MIX, ROWS, device)
    out, lse = given.run(batch)
    given.memory.check_untouched()

    def twin(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        operands = [x.to(dtype) if x.is_floating_point() else x for x in (*given.new, *given.cached)]
        options = {name: x.to(dtype) if name == "sinks" else x for name, x in given.memory.options.items()}
        return eager.step_attention(*operands, batch, return_lse=True, **options)

    (reference, reference_lse), (plain, plain_lse) = twin(torch.float64), twin(dtype)
    testing.budget(out, reference, plain)
    testing.budget(out, reference, plain, "worst row of out", by_row=True)
    testing.budget(lse, reference_lse, plain_lse, "lse")


@pytest.mark.parametrize("device", DEVICES)
def test_a_request_that_sees_nan_keeps_it(device: str) -> None:
    """What one request's mask rows hold is nobody else's business."""
    given, batch = Given(device), mixed(MIX, ROWS, device)
    out, _ = given.run(batch)
    given.new[2][24] = torch.nan  # of request 1, seen by the second of its blocks
    broken, _ = given.run(batch)
    seen = broken.isnan().flatten(1).any(1)
    assert seen.nonzero().flatten().tolist() == [23, 24, 25]
    assert torch.equal(broken[~seen], out[~seen])


@pytest.mark.parametrize("device", KERNELS)
def test_whatever_the_device_holds_stays_inside(device: str, pytestconfig: pytest.Config) -> None:
    """On a GPU nobody reads a batch before the kernel does. Rows of its requests are then wrong, and no others."""
    if pytestconfig.pluginmanager.hasplugin("tidar_kernels.testing.pytest_sanitizer"):
        pytest.skip("requests that overlap have rows that two programs write: a race, which is inside all the same")
    given, batch = Given(device), mixed(MIX, ROWS, device)
    q, k, v = (x.transpose(0, 1)[None] for x in given.new)
    table, guard = batch.table, [testing.guarded(x) for x in (q, k, v)]
    for changes in ({2: 2**31 - 1}, {3: -(2**31), 5: 10**6}, {1: 36, 2: 0}):
        cu_rows = batch.cu_rows.clone()
        for at, value in changes.items():
            cu_rows[at] = value
        for kinds in (batch.kinds, torch.tensor([9, -5, 2**31 - 1, 2, 2], dtype=torch.int32, device=device)):
            out, _ = torch.ops.tidar_kernels.step_attention(
                *(one.tensor for one in guard), *given.cached, table.lead, table.own, 0.25, 90,
                cu_rows=cu_rows, kinds=kinds, offsets=table.offsets, max_rows=38,
            )  # fmt: skip
            assert out.shape == (1, 2, NUM_ROWS, 16)
    for one in guard:
        one.check("an operand")


def test_the_grid_is_that_of_the_largest_mix() -> None:
    """Planned without values: what a launch is made of is not read."""
    kernel = import_module("tidar_kernels.ops.step_attention.triton")

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch = patterns.batch([None] * 8, table=PLAIN, num_rows=1000, device="meta")
    rows = rows_of(meta(1, 32, 1000, 128), batch)
    cached = Cached(*(meta(8, 8, 4096, 128) for _ in "kv"), meta(8, dtype=torch.int32), 4096)
    launches, out, lse = kernel.plan_step_attention(rows, Keys(*[meta(1, 8, 1000, 128)] * 2), cached, Scores(0.1), 90)
    assert [one.grid for one in launches] == [(8, 63), ((4000 // 128 + 9) * 8, 1)]
    few = rows._replace(q=rows.q[:, :16, :100], max_rows=12)
    cached = cached._replace(**{name: getattr(cached, name)[:, :4] for name in ("k_cache", "v_cache")})
    launches, _, _ = kernel.plan_step_attention(few, Keys(*[meta(1, 4, 100, 128)] * 2), cached, Scores(0.1), 90)
    assert [one.grid for one in launches] == [(4, 7), ((400 // 128 + 9) * 4, 9), (16, 50)]
    assert out[0].transpose(0, 1).is_contiguous()
    assert lse.shape == (1, 32, 1000)


@pytest.mark.parametrize("rows", [[1, 0, 0], [0, 0, 0], [127, 1, 2], [32, 32, 32], [16, 0, 111], [15, 17, 33]])
@pytest.mark.parametrize("group", [1, 2, 7])
def test_every_row_is_in_one_tile(rows: list[int], group: int) -> None:
    """The search for the request of a row tile, on paper: `_row_tile_of` in Python."""
    ends, block = [0, *itertools.accumulate(rows)], 32
    starts = [end * group // block + request for request, end in enumerate(ends)]
    found = []
    for index in range(130 * group // block + len(rows) + 1):
        request = sum(start <= index for start in starts) - 1
        count = (ends[request + 1] if request < len(rows) else 130) - ends[request]
        tile = index - starts[request]
        found += [(request, packed) for packed in range(tile * block, min((tile + 1) * block, count * group))]
    counts = [*rows, 130 - ends[-1]]
    assert sorted(found) == [(request, i) for request, count in enumerate(counts) for i in range(count * group)]


def test_no_requests_and_no_rows() -> None:
    given = Given("cpu")
    nothing = mixed([None] * 5, [0] * 5, "cpu", num_rows=0)
    given.new = [x[:0] for x in given.new]
    out, lse = given.run(nothing)
    assert (out.shape, lse.shape) == ((0, 2, 16), (0, 2))


@pytest.mark.cuda
def test_one_cuda_graph_serves_every_mix() -> None:
    given, batch = Given("cuda", CACHES["pages"], dtype=torch.bfloat16), mixed(MIX, ROWS, "cuda")
    run = lambda: ops.step_attention(*given.new, *given.cached, batch, **given.memory.options)  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for mix, rows in ((OTHER_MIX, OTHER_ROWS), (MIX, ROWS), ([None] * 5, [0] * 5)):
        batch.copy_(mixed(mix, rows, "cuda"))
        graph.replay()
        assert torch.equal(out, run())


def arguments(given: Given, batch: PatternBatch) -> tuple[Any, ...]:
    q, k, v = (x.transpose(0, 1)[None] for x in given.new)
    lead, own, reach, tree_mask = batch.table.lead, batch.table.own, batch.table.reach, batch.table.tree_mask
    more = (batch.cu_rows, batch.kinds, batch.table.offsets, NUM_ROWS)
    options = (reach, None, given.memory.options["sinks"], tree_mask, given.memory.options["block_table"])
    return (q, k, v, *given.cached, lead, own, 0.25, 90, *options, None, None, 0, *more)


@pytest.mark.parametrize("path", ["cpu", pytest.param("interpreter", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("cache", ["contiguous", pytest.param("pages", marks=pytest.mark.thorough)])
def test_opcheck(path: str, cache: str) -> None:
    given, batch = Given("cpu", CACHES[cache]), mixed(MIX, ROWS, "cpu")
    torch.library.opcheck(torch.ops.tidar_kernels.step_attention.default, arguments(given, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fake_tensors_have_the_shapes_of_real_ones(dtype: torch.dtype) -> None:
    given, batch = Given("cpu", dtype=dtype), mixed(MIX, ROWS, "cpu")
    real = given.run(batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        new, cached = ([mode.from_tensor(x) for x in part] for part in (given.new, given.cached))
        fake = ops.step_attention(*new, *cached, batch, return_lse=True)
    for got, expected in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("device", HERE[:1])
def test_compiles_without_a_graph_break(device: str) -> None:
    given, batch = Given(device, CACHES["float8"]), mixed(MIX, ROWS, device)

    options = given.memory.options

    def layer(q: Tensor, k: Tensor, v: Tensor, *cached: Tensor) -> Any:
        return ops.step_attention(2.0 * q, k, v, *cached, batch, return_lse=True, **options)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mix, rows in ((MIX, ROWS), (OTHER_MIX, OTHER_ROWS)):
        batch.copy_(mixed(mix, rows, device))
        for a, b in zip(compiled(*given.new, *given.cached), layer(*given.new, *given.cached), strict=True):
            assert torch.equal(a, b)


def with_cu_rows(*cu_rows: int) -> PatternBatch:
    return replace(mixed(MIX, ROWS, "cpu"), cu_rows=torch.tensor(cu_rows, dtype=torch.int32))


WRONG_KIND = replace(mixed(MIX, ROWS, "cpu"), kinds=torch.tensor([1, 0, 9, 4, 2], dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.randn(1, 2, 38, 16)}, ValueError, r"^q: expected 3 dimensions, got shape \[1, 2, 38, 16\]$"),
        ({"q": torch.randn(37, 2, 16)}, ValueError, r"^k: expected shape \[37, 1, 16\], got \[38, 1, 16\]$"),
        ({"k": torch.randn(38, 3, 16)}, ValueError, r"^q: expected a multiple of 3 kv_heads in dimension 1, got 2"),
        ({"v": torch.randn(38, 2, 16)}, ValueError, r"^v: expected shape \[38, 1, 16\], got \[38, 2, 16\]$"),
        ({"v": torch.randn(38, 1, 16).half()}, TypeError, r"^v: expected dtype torch.float32 like"),
        (
            {name: torch.randn(30, heads, 16) for name, heads in (("q", 2), ("k", 1), ("v", 1))},
            ValueError,
            r"^q: expected 38 rows for the batch of 5 requests, got 30$",
        ),
        ({"lengths": torch.tensor([3, 4])}, ValueError, r"^lengths: expected shape \[5\], got \[2\]$"),
        ({"k_cache": torch.randn(6, 1, 90, 16)}, ValueError, r"^k_cache: expected shape \[5, 1, 90, 16\]"),
        ({"block_table": torch.zeros(6, 2).int()}, ValueError, r"^block_table: expected shape \[5, 2\], got \[6, 2\]$"),
        ({"pattern": mixed(MIX, ROWS, "meta")}, ValueError, r"^pattern: expected device cpu like .*, got meta$"),
        (
            {"pattern": with_cu_rows(0, 17, 29, 29, 34, 39)},
            ValueError,
            r"^cu_rows: expected to ascend from 0 to at most the number of rows = 38, got \[0, 17, .*, 39\]$",
        ),
        ({"pattern": with_cu_rows(1, 17, 29, 29, 34, 35)}, ValueError, r"^cu_rows: expected to ascend from 0"),
        ({"pattern": with_cu_rows(0, 17, 16, 29, 34, 35)}, ValueError, r"^cu_rows: expected to ascend from 0"),
        (
            {"pattern": with_cu_rows(0, 17, 30, 30, 34, 35)},
            ValueError,
            r"^cu_rows: expected at most the 12 rows of tidar_step.* in request 1, got 13$",
        ),
        ({"pattern": WRONG_KIND}, ValueError, r"^kinds: expected a pattern 0 <= kind < 3, got 4 in request 3$"),
    ],
)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_bad_batches(changes: dict[str, Any], error: type[Exception], message: str, backend: Any) -> None:
    given = Given("cpu")
    names = ("q", "k", "v", "k_cache", "v_cache", "lengths")
    operands = dict(zip(names, (*given.new, *given.cached), strict=True)) | {"pattern": mixed(MIX, ROWS, "cpu")}
    with pytest.raises(error, match=message):
        ops.step_attention(**{**operands, **changes}, backend=backend)


def test_exact_rows_are_of_one_pattern() -> None:
    from tidar_kernels.decoding.exact import exact_rows

    given, batch = Given("cpu"), mixed(MIX, ROWS, "cpu")
    with (
        exact_rows(STEP),
        pytest.raises(ValueError, match=r"^pattern: expected a Pattern for exact rows, got a ragged batch$"),
    ):
        ops.step_attention(*given.new, *given.cached, batch)
