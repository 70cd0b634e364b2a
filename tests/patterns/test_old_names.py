"""Names of patterns that were others: the old ones work for a release, and say so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tidar_kernels import Pattern, patterns
from tidar_kernels.testing import irregular_pattern

TREE = patterns.tree([-1, 0, 0])


def test_bits_is_the_tree_mask() -> None:
    with pytest.warns(FutureWarning, match=r"^Pattern.bits: use Pattern.tree_mask$"):
        assert TREE.bits is TREE.tree_mask
    with pytest.warns(FutureWarning, match=r"^Pattern.bits_on: use the last of Pattern.rows_on$"):
        assert TREE.bits_on("cpu") is TREE.tree_mask


def test_bits_as_a_keyword() -> None:
    old = r"^bits: the keyword is now tree_mask; its old name goes in the next release$"
    with pytest.warns(FutureWarning, match=old) as seen:
        made = Pattern(TREE.lead, TREE.own, TREE.positions, 3, bits=TREE.tree_mask)  # type: ignore[call-arg]
    assert seen[0].filename == __file__
    assert made.tree_mask is TREE.tree_mask
    other = torch.tensor([[1], [3], [7]], dtype=torch.int32)
    with pytest.warns(FutureWarning, match=old):
        assert replace(TREE, bits=other).tree_mask is other  # type: ignore[call-arg]
    with pytest.warns(FutureWarning, match=r"^with_bits: the keyword is now with_tree_mask"):
        assert irregular_pattern(5, 5, with_bits=True).tree_mask is not None  # type: ignore[call-arg]


def test_the_order_of_the_fields() -> None:
    fields = (TREE.lead, TREE.own, TREE.positions, 3, TREE.roles, TREE.predicts, "tree", None, None, TREE.tree_mask)
    made = Pattern(*fields)
    assert torch.equal(made.dense(), TREE.dense())
    assert made.name == "tree"
