"""The reference for pages and quantised caches: where a key lies, what its value is, and bad input by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tidar_kernels.ops import checks, paging
from tidar_kernels.ops.operands import Cached

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


def cached(batch: int = 2, page_size: int = 4, columns: int = 3, **changes: Any) -> Cached:
    """Pages of which sequence b has `columns`, in descending order, and one that nobody has."""
    pages = batch * columns
    k_cache, v_cache = torch.randn(2, pages + 1, 2, page_size, 8).unbind(0)
    table = torch.arange(pages, 0, -1, dtype=torch.int32).view(batch, columns)
    fields = {"k_cache": k_cache, "v_cache": v_cache, "lengths": torch.tensor([5, 12][:batch]), "block_table": table}
    return Cached(**(fields | changes))


def test_keys_lie_where_the_table_says() -> None:
    places = paging.locate(cached(), torch.tensor([[0, 3, 4, 11, 12, -1], [5, 2**62, -(2**62), 8, 2, 0]]))
    assert places.page.tolist() == [[6, 6, 5, 4, 0, 0], [2, 0, 0, 1, 3, 3]]
    assert places.slot.tolist() == [[0, 3, 0, 3, 0, 0], [1, 0, 0, 0, 2, 0]]
    assert places.exists.tolist() == [[True] * 4 + [False] * 2, [True, False, False, True, True, True]]


def test_a_cache_without_pages_is_one_page_a_sequence() -> None:
    k_cache, v_cache = torch.randn(2, 2, 2, 12, 8).unbind(0)
    places = paging.locate(Cached(k_cache, v_cache, torch.tensor([1, 2])), torch.tensor([[0, 11], [12, 3]]))
    assert places.page.tolist() == [[0, 0], [0, 1]]
    assert places.slot.tolist() == [[0, 11], [0, 3]]
    assert places.exists.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("entry", [-1, 7, 2**31 - 1, -(2**31)])
def test_entries_that_name_no_page_are_no_places(entry: int) -> None:
    given = cached()
    assert given.block_table is not None
    given.block_table[1, 1] = entry
    places = paging.locate(given, torch.arange(12).expand(2, 12))
    assert places.exists.tolist() == [[True] * 12, [True] * 4 + [False] * 4 + [True] * 4]
    assert not places.page[1, 4:8].any()


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_dense_reads_what_is_committed_and_nothing_else(page_size: int) -> None:
    columns = -(-12 // page_size)
    given = cached(page_size=page_size, columns=columns)
    assert given.block_table is not None
    expected = torch.zeros(2, 2, 2, columns * page_size, 8)
    used = torch.zeros(len(given.k_cache), page_size, dtype=torch.bool)
    for b, length in enumerate(given.lengths.tolist()):
        for n in range(length):
            page, slot = int(given.block_table[b, n // page_size]), n % page_size
            used[page, slot] = True
            expected[0, b, :, n], expected[1, b, :, n] = given.k_cache[page, :, slot], given.v_cache[page, :, slot]
        given.block_table[b, -(-length // page_size) :] = -(2**31)
    for cache in (given.k_cache, given.v_cache):
        cache.masked_fill_(~used[:, None, :, None], math.nan)
    k, v = paging.dense(given)
    assert torch.equal(k, expected[0])
    assert torch.equal(v, expected[1])
    k, v = paging.dense(given, 7, torch.float64)
    assert torch.equal(k, expected[0][:, :, :7].double())
    assert torch.equal(v, expected[1][:, :, :7].double())


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1), (1, 2), (2, 2), (7, 2, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_values_are_stored_times_scale(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    plain = cached()
    k_scale, v_scale = torch.rand(2, *shape) + 0.5
    given = plain._replace(
        k_cache=plain.k_cache.to(dtype), v_cache=plain.v_cache.to(dtype), k_scale=k_scale, v_scale=v_scale
    )
    checks.caches(given.k_cache, given.v_cache, 2, 2, 8, given.block_table, k_scale, v_scale)
    assert paging.slot_scales(k_scale) == (len(shape) == 3)
    for found, stored, scale in zip(paging.dense(given), given[:2], (k_scale, v_scale), strict=True):
        by_slot = scale if len(shape) == 3 else None
        for b, length in enumerate(given.lengths.tolist()):
            for n in range(12):
                page, slot = int(given.block_table[b, n // 4]), n % 4
                factor = by_slot[page, :, slot] if by_slot is not None else scale.expand(2, 2)[b]
                expected = stored[page, :, slot].float() * factor[:, None] if n < length else torch.zeros(2, 8)
                assert torch.equal(found[b, :, n], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_rounds_to_the_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = every[every.isfinite()].unique()  # ascending; -0.0 and 0.0 are one
    assert torch.equal(paging.quantise(numbers, torch.tensor(1.0), dtype)[0].float(), numbers)
    middle = (numbers[1:] + numbers[:-1]) / 2
    below, above = (torch.nextafter(middle, torch.tensor(end)) for end in (-math.inf, math.inf))
    assert torch.equal(paging.quantise(below, torch.tensor(1.0), dtype)[0].float(), numbers[:-1])
    assert torch.equal(paging.quantise(above, torch.tensor(1.0), dtype)[0].float(), numbers[1:])
    tied = paging.quantise(middle, torch.tensor(1.0), dtype)[0]
    assert not (tied.view(torch.uint8) & 1).any()
    assert bool(((tied.float() == numbers[1:]) | (tied.float() == numbers[:-1])).all())


@pytest.mark.parametrize(("dtype", "largest"), list(zip(DTYPES, (448.0, 57344.0), strict=True)))
def test_quantising_saturates_and_keeps_nan(dtype: torch.dtype, largest: float) -> None:
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf, 2 * largest, math.nan, 0.0, -0.0])
    stored = paging.quantise(x, torch.tensor(1.0), dtype)[0].float()
    assert stored[:5].tolist() == [largest, -largest, largest, -largest, largest]
    assert stored[5].isnan()
    assert stored[6:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_and_head_has_the_scale_of_its_largest_value(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 8).to(torch.bfloat16)
    x[1, 1] = 0
    stored, scale = paging.quantise(x, None, dtype)
    assert scale.shape == (3, 2)
    largest = stored.float().abs().amax(-1)
    assert torch.equal(largest, torch.tensor([[1.0, 1], [1, 0], [1, 1]]) * torch.finfo(dtype).max)
    assert torch.equal(stored[1, 1].float(), torch.zeros(8))
    step = 2.0 ** (-4 if dtype == torch.float8_e4m3fn else -3)  # half of the last place
    error = (paging.dequantise(stored, scale) - x.float()).abs()
    assert bool((error <= 1.01 * step * x.abs().float() + scale[..., None] * 2.0**-6).all())


CACHES = {
    "k_cache": torch.zeros(7, 2, 4, 8),
    "v_cache": torch.zeros(7, 2, 4, 8),
    "block_table": torch.zeros(2, 3, dtype=torch.int32),
    "k_scale": None,
    "v_scale": None,
}
QUANTISED = CACHES | {
    "k_cache": CACHES["k_cache"].to(DTYPES[0]),
    "v_cache": CACHES["k_cache"].to(DTYPES[0]),
    "k_scale": torch.ones(()),
    "v_scale": torch.ones(2, 2),
}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (CACHES | {"block_table": [[0]]}, TypeError, r"^block_table: expected a torch\.Tensor, got list$"),
        (CACHES | {"block_table": torch.zeros(2, 3)}, TypeError, r"^block_table: expected dtype int32, got"),
        (CACHES | {"block_table": torch.zeros(2, 3).long()}, TypeError, r"^block_table: expected dtype int32"),
        (CACHES | {"block_table": torch.zeros(6).int()}, ValueError, r"^block_table: expected 2 dimensions, got"),
        (CACHES | {"block_table": torch.zeros(3, 3).int()}, ValueError, r"^block_table: expected shape \[2, 3\], got"),
        (
            CACHES | {"block_table": torch.zeros(2, 3, dtype=torch.int32, device="meta")},
            ValueError,
            r"^block_table: expected device cpu like the other operands, got meta$",
        ),
        (
            CACHES | {"k_cache": torch.zeros(7, 2, 0, 8)},
            ValueError,
            r"^k_cache: expected at least one page .* page size of at least 1 .*, got shape \[7, 2, 0, 8\]$",
        ),
        (CACHES | {"k_cache": torch.zeros(0, 2, 4, 8)}, ValueError, r"^k_cache: expected at least one page"),
        (CACHES | {"k_cache": torch.zeros(7, 3, 4, 8)}, ValueError, r"^k_cache: expected shape \[7, 2, 4, 8\], got"),
        (CACHES | {"v_cache": torch.zeros(6, 2, 4, 8)}, ValueError, r"^v_cache: expected shape \[7, 2, 4, 8\], got"),
        (CACHES | {"block_table": None}, ValueError, r"^k_cache: expected shape \[2, 2, 4, 8\], got"),
        (CACHES | {"k_scale": torch.ones(())}, TypeError, r"^k_cache: expected dtype float8_e4m3fn or .* with k_scale"),
        (CACHES | {"v_scale": torch.ones(())}, TypeError, r"^k_cache: expected dtype float8_e4m3fn or .* with v_scale"),
        (QUANTISED | {"k_scale": None}, TypeError, r"^k_scale: expected a torch\.Tensor with a k_cache of .*float8"),
        (QUANTISED | {"v_scale": None}, TypeError, r"^v_scale: expected a torch\.Tensor with a v_cache of .*float8"),
        (QUANTISED | {"v_scale": 1.0}, TypeError, r"^v_scale: expected a torch\.Tensor .* got float$"),
        (QUANTISED | {"k_scale": torch.ones(()).half()}, TypeError, r"^k_scale: expected dtype float32, got"),
        (
            QUANTISED | {"k_scale": torch.ones(3, 2)},
            ValueError,
            r"^k_scale: expected a shape broadcastable to \[2, 2\], or \[7, 2, 4\], got \[3, 2\]$",
        ),
        (QUANTISED | {"k_scale": torch.ones(1, 2, 4)}, ValueError, r"^k_scale: expected a shape broadcastable"),
        (QUANTISED | {"k_scale": torch.ones(1, 1, 1, 1)}, ValueError, r"^k_scale: expected a shape broadcastable"),
        (QUANTISED | {"k_scale": torch.ones(7, 2, 4)}, ValueError, r"^v_scale: expected a scale by slot exactly if"),
        (QUANTISED | {"v_scale": torch.ones((), device="meta")}, ValueError, r"^v_scale: expected device cpu like"),
        (
            CACHES | {"v_cache": CACHES["v_cache"].to(torch.float8_e5m2)},
            TypeError,
            r"^v_cache: expected dtype torch\.float32 like k_cache, got torch\.float8_e5m2$",
        ),
        (QUANTISED | {"v_cache": torch.zeros(7, 2, 4, 8)}, TypeError, r"^v_cache: expected dtype torch\.float8_e4m3fn"),
        (
            QUANTISED | {"v_cache": torch.zeros(7, 2, 4, 8).to(torch.float8_e5m2)},
            TypeError,
            r"^v_cache: expected dtype torch\.float8_e4m3fn like k_cache, got torch\.float8_e5m2$",
        ),
    ],
)
def test_caches_that_do_not_fit(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        checks.caches(batch=2, num_kv_heads=2, head_dim=8, **given)


def test_the_capacity() -> None:
    assert checks.caches(batch=2, num_kv_heads=2, head_dim=8, **CACHES) == 12
    assert checks.caches(batch=2, num_kv_heads=2, head_dim=8, **QUANTISED) == 12
    assert checks.caches(torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 4), 2, 2, 8, head_dim_v=4) == 9
    assert cached().capacity == 12
    assert cached(block_table=None).capacity == 4


def test_only_entries_in_use_are_checked() -> None:
    table = torch.tensor([[3, -1, 99, 4], [0, 6, 7, -5]], dtype=torch.int32)
    cache = torch.zeros(7, 2, 4, 8)
    for first, end in (((0, 0), (4, 8)), ((12, 3), (16, 8)), ((5, 9), (5, 9)), ((7, 0), (3, 0))):
        checks.entries(table, cache, torch.tensor(first), torch.tensor(end))
    for first, end, entry, sequence, value in (
        ((3, 0), (5, 0), 1, 0, -1),
        ((0, 0), (0, 9), 2, 1, 7),
        ((11, 0), (12, 0), 2, 0, 99),
        ((0, 12), (0, 13), 3, 1, -5),
    ):
        message = f"^block_table: expected pages 0 <= page < 7 .* got {value} in entry {entry} of sequence {sequence}$"
        with pytest.raises(ValueError, match=message):
            checks.entries(table, cache, torch.tensor(first), torch.tensor(end))


def test_float8_caches_are_no_operands_of_another_dtype() -> None:
    k = torch.zeros(1, dtype=torch.float16)
    eight = torch.zeros(1, dtype=torch.float8_e4m3fn)
    checks.operands(1, k_cache=eight, v_cache=eight, k=k, v=k)
    checks.operands(1, q=k, k=k, k_cache=eight, v_cache=eight)
    checks.operands(1, k_cache=eight, v_cache=eight)
    for values in ({"q": eight, "k": eight}, {"k_cache": eight, "v_cache": eight, "k": eight, "v": eight}):
        with pytest.raises(TypeError, match=r"^dtype: expected float32, float16, bfloat16 or float64, got"):
            checks.operands(1, **values)
    with pytest.raises(TypeError, match=r"^v: expected dtype torch.float16 like the other operands, got"):
        checks.operands(1, k_cache=eight, v_cache=eight, k=k, v=k.float())
    with pytest.raises(ValueError, match=r"^v_cache: expected device cpu like the other operands, got meta$"):
        checks.operands(1, k_cache=eight, v_cache=eight.to("meta"), k=k, v=k)
