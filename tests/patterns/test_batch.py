"""Ragged batches: what each request sees, what the device knows of it, and bad input by name."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils import _pytree

from tests.paths import DEVICES
from tidar_kernels import patterns
from tidar_kernels.patterns import Pattern, PatternBatch

STEP, CHUNK, TREE = patterns.tidar_step(3), patterns.causal(7), patterns.tree([-1, 0, 0, 1, 2])
NO_ROWS = Pattern(STEP.lead[:0], STEP.own[:0], STEP.positions[:0], 0)
MIX: list[Pattern | None] = [STEP, CHUNK, None, TREE, STEP, patterns.causal(7), NO_ROWS]
ROWS = [STEP.q_len, 5, 0, 5, 4, 7, 0]


def visible(given: PatternBatch, request: int, row: int, key: int) -> bool:
    """The rule for an in-flight key, from what the device has and nothing else."""
    first, end = given.cu_rows[request : request + 2].tolist()
    at = int(given.table.offsets[given.kinds[request]]) + row
    (lead_lo, lead_hi), (own_lo, own_hi) = given.table.lead[at].tolist(), given.table.own[at].tolist()
    tree = given.table.tree_mask is not None and int(given.table.tree_mask[at, key // 32]) >> key % 32 & 1
    return key < end - first and (lead_lo <= key < lead_hi or own_lo <= key < own_hi or bool(tree))


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("device", [DEVICES[0], DEVICES[2]])
def test_the_device_knows_what_each_request_sees(device: str, window: int | None) -> None:
    given = patterns.batch(MIX, ROWS, device=device)
    given = given if window is None else given.windowed(window)
    assert given.cu_rows.tolist() == [0, 12, 17, 17, 22, 26, 33, 33]
    assert given.kinds.tolist() == [0, 1, -1, 2, 0, 1, 3]
    lengths = [0, 3, 5, 1, 2, 0, 9]
    for request, mask in enumerate(given.dense(lengths)):
        context, rows = lengths[request], ROWS[request]
        assert mask.shape == (rows, context + rows)
        for row in range(rows):
            expected = [visible(given, request, row, key) for key in range(rows)]
            assert mask[row, context:].tolist() == expected
            reach = context
            if given.table.reach is not None:
                reach = int(given.table.reach[given.table.offsets[given.kinds[request]] + row])
            assert mask[row, :context].tolist() == [n >= context - reach for n in range(context)]


@pytest.mark.parametrize("device", [DEVICES[0], DEVICES[2]])
def test_whole_patterns_see_what_they_see_alone(device: str) -> None:
    given = patterns.batch([STEP, TREE.windowed(2), CHUNK], device=device)
    for pattern, mask, found in zip((STEP, TREE.windowed(2), CHUNK), given.dense([2, 3, 4]), range(3), strict=True):
        assert torch.equal(mask, pattern.dense(2 + found))


@pytest.mark.parametrize("device", [DEVICES[0], DEVICES[2]])
def test_rows_positions_and_kept_rows(device: str) -> None:
    given = patterns.batch([CHUNK, None, STEP, STEP], [2, 0, 5, 2], num_rows=11, device=device)
    request, token = given.rows_of()
    assert request.tolist() == [0, 0, 2, 2, 2, 2, 2, 3, 3, 4, 4]
    assert token.tolist()[:9] == [0, 1, 0, 1, 2, 3, 4, 0, 1]
    assert given.positions().tolist() == [0, 1, 0, 1, 2, 1, 2, 0, 1, 0, 0]
    lengths = torch.tensor([10, 20, 30, 40], device=device)
    assert given.positions(lengths).tolist() == [10, 11, 30, 31, 32, 31, 32, 40, 41, 0, 0]
    assert given.kept.tolist() == [2, 0, 3, 2]
    assert given.kept.dtype == torch.int32


@pytest.mark.parametrize("rows", range(13))
def test_a_cut_step_has_the_rows_that_it_has(rows: int) -> None:
    given = patterns.batch([STEP], [rows])
    assert torch.equal(given.dense([2])[0], STEP.dense(2)[:rows, : 2 + rows])
    assert given.pattern(0).kept_len == int(given.kept) == min(3, rows)


def test_equal_patterns_are_one_kind() -> None:
    named = replace(patterns.causal(7), name="another name")
    given = patterns.batch([CHUNK, patterns.causal(7), named, patterns.causal(6), CHUNK.windowed(3)])
    assert given.kinds.tolist() == [0, 0, 0, 1, 2]
    assert given.table.offsets.tolist() == [0, 7, 13, 20]


def test_idle_requests_alone() -> None:
    given = patterns.batch([None, None], num_rows=3)
    assert given.kept.tolist() == [0, 0]
    assert given.positions(torch.tensor([4, 5])).tolist() == [0, 0, 0]
    assert [mask.shape for mask in given.dense([4, 5])] == [(0, 4), (0, 5)]


@pytest.mark.parametrize("device", [DEVICES[0], DEVICES[2]])
def test_a_batch_takes_over_another_mix_in_place(device: str) -> None:
    table = [STEP, CHUNK]
    held = patterns.batch([STEP, STEP], table=table, num_rows=30, device=device)
    windowed = held.windowed(2)
    kinds, cu_rows = held.kinds, held.cu_rows
    assert held.copy_(patterns.batch([CHUNK, None], [4, 0], table=table)) is held
    assert held.kinds is kinds
    assert held.cu_rows is cu_rows
    assert windowed.cu_rows.tolist() == held.cu_rows.tolist() == [0, 4, 4]
    assert torch.equal(held.dense([3, 3])[0], patterns.causal(4).dense(3))
    assert torch.equal(windowed.dense([3, 3])[0], patterns.causal(4).windowed(2).dense(3))
    with pytest.raises(ValueError, match=r"^other: expected the same patterns"):
        held.copy_(patterns.batch([CHUNK, None]))
    with pytest.raises(ValueError, match=r"^other: expected 2 requests, got 1$"):
        held.copy_(patterns.batch([CHUNK], table=table))
    with pytest.raises(ValueError, match=r"^other: expected at most 30 rows, got 31$"):
        held.copy_(patterns.batch([CHUNK, None], table=table, num_rows=31))


def same(one: PatternBatch, other: PatternBatch) -> bool:
    fields = torch.equal(one.kinds, other.kinds) and torch.equal(one.cu_rows, other.cu_rows)
    pairs = zip(one.table, other.table, strict=True)
    table = all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
    return fields and table and one.num_rows == other.num_rows


def test_copies_pickles_and_trees() -> None:
    given = patterns.batch(MIX, ROWS)
    for other in (copy.copy(given), copy.deepcopy(given), pickle.loads(pickle.dumps(given)), replace(given)):
        assert other is not given
        assert same(other, given)
    leaves, tree = _pytree.tree_flatten([given])
    assert leaves == [given]
    assert _pytree.tree_unflatten(leaves, tree) == [given]
    assert given.to(torch.float16) is given
    assert given.to("meta").table.lead.device.type == "meta"


def test_a_batch_made_in_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        given = patterns.batch(MIX, ROWS)
        given = replace(given, kinds=given.kinds.clone())
    assert not any(x.is_inference() for x in (given.kinds, given.cu_rows, *given.table) if x is not None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"patterns": []}, ValueError, r"^patterns: expected at least one request, got none$"),
        ({"patterns": [STEP, 3]}, TypeError, r"^patterns: expected tidar_kernels.Pattern, got int at 1$"),
        (
            {"patterns": [Pattern(STEP.lead, STEP.own, STEP.positions, 30)]},
            ValueError,
            r"^patterns: expected as many keys as rows, got 30 keys of 12 rows in pattern at 0$",
        ),
        ({"patterns": [STEP], "rows": [1, 2]}, ValueError, r"^rows: expected 1 numbers of rows, got 2$"),
        ({"patterns": [STEP], "rows": [13]}, ValueError, r"^rows: expected at most the 12 rows .*, got 13 in 0$"),
        ({"patterns": [None], "rows": [1]}, ValueError, r"^rows: expected at most the 0 rows"),
        ({"patterns": [STEP], "rows": [-1]}, ValueError, r"^rows: expected >= 0, got -1$"),
        ({"patterns": [STEP], "rows": [1.0]}, TypeError, r"^rows: expected an int, got float$"),
        ({"patterns": [STEP], "num_rows": 11}, ValueError, r"^num_rows: expected at least the 12 rows"),
        ({"patterns": [STEP], "table": [CHUNK]}, ValueError, r"^table: expected the patterns of all requests"),
    ],
)
def test_bad_input(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patterns.batch(**call)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kinds": [0]}, TypeError, r"^kinds: expected an int32 tensor of one dimension, got list$"),
        (
            {"cu_rows": torch.zeros(2)},
            TypeError,
            r"^cu_rows: expected an int32 tensor of one dimension, got torch.float",
        ),
        ({"cu_rows": torch.zeros(3).int()}, ValueError, r"^cu_rows: expected shape \[2\], got \[3\]$"),
        ({"cu_rows": torch.zeros(2, device="meta").int()}, ValueError, r"^cu_rows: expected device cpu like kinds"),
        ({"num_rows": None}, TypeError, r"^num_rows: expected an int, got NoneType$"),
        ({"patterns": ()}, ValueError, r"^patterns: expected at least one, got none$"),
        ({"patterns": (1,)}, TypeError, r"^patterns: expected tidar_kernels.Pattern, got int at 0$"),
    ],
)
def test_bad_fields(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(patterns.batch([STEP]), **changes)


def test_a_context_length_for_every_request() -> None:
    with pytest.raises(ValueError, match=r"^context_lens: expected 2 lengths, got 1$"):
        patterns.batch([STEP, None]).dense([3])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_batch_takes_over_a_mix_that_came_from_elsewhere(copied: Any) -> None:
    """Equal patterns are the same ones, also where another process has sent them."""
    table = [STEP, TREE, CHUNK.windowed(2)]
    held, other = (patterns.batch(mix, table=table) for mix in ([STEP, TREE], [TREE, None]))
    held.copy_(copied(other))
    assert held.kinds.tolist() == [1, -1]
    with pytest.raises(ValueError, match=r"^other: expected the same patterns"):
        held.copy_(copied(patterns.batch([STEP, TREE], table=[*table[:2], CHUNK])))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: b.copy_(3), TypeError, r"^other: expected a PatternBatch, got int$"),
        (lambda b: b.pattern(1), ValueError, r"^request: expected 0 <= request < 1, got 1$"),
        (lambda b: b.pattern(-1), ValueError, r"^request: expected >= 0, got -1$"),
        (lambda b: b.pattern(None), TypeError, r"^request: expected an int, got NoneType$"),
        (lambda b: b.positions(torch.zeros(2)), ValueError, r"^lengths: expected shape \[1\], got \[2\]$"),
        (lambda b: patterns.batch(3), TypeError, r"^patterns: expected a sequence of patterns, got int$"),  # type: ignore[arg-type]
        (lambda b: patterns.batch([STEP], table=[3]), TypeError, r"^table: expected tidar_kernels.Pattern, got int at"),
        (lambda b: patterns.batch([STEP], num_rows=2**31), ValueError, r"^num_rows: expected < 2\*\*31"),
    ],
)
def test_bad_calls(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(patterns.batch([STEP]))
