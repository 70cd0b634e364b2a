"""The formulas of docs/distributed.md: against memory that was measured, and numbers worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.core import record
from benchmarks.long_sequences import SMALL, Shape, measured
from tests.paths import REPOSITORY


@pytest.mark.distributed
def test_memory_is_what_the_formula_says() -> None:
    """To the byte, with shards of one length."""
    assert measured(2, [96, 200], SMALL) == [SMALL.attention(seq_len, 2) for seq_len in (96, 200)]


def test_measured_memory_is_what_the_formula_says() -> None:
    (part,) = record.newest(REPOSITORY / "benchmarks" / "results", "long_sequences", "cpu")[:1]
    assert len(part["rows"]) == 9
    for row in part["rows"]:
        assert row["most_bytes"] == SMALL.attention(row["seq_len"], row["ranks"])


def test_numbers_by_hand() -> None:
    shape = Shape()
    assert shape.gathered(2**15) == 2**16 * 8 * 128 * 2 == 128 * 2**20  # 128 MiB
    assert shape.passing(2**15) == 512 * 2**20
    assert shape.received(2**15, 8) == 6 * 128 * 2**20 * 7 // 8
    assert shape.checkpoints(2**15, 8) == 36 * 2**13 * 4096 * 2
    assert shape.states(8) == 16 * 8_190_000_000 // 8


def test_the_meshes_have_one_loss_curve() -> None:
    (part,) = record.newest(REPOSITORY / "benchmarks" / "results", "meshes", "cpu")[:1]
    first, *others = (row["losses"] for row in part["rows"])
    assert len(first) == 200
    assert len(others) == 4
    for losses in others:
        assert len(losses) == 200
        for step, (one, other) in enumerate(zip(first, losses, strict=True)):
            # Losses are noted to 1e-4.
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 3e-4, step
