"""The CPU path of training attention: what it cuts a pattern into, that every cut is exact, and that it stays linear.

Most tests shrink the constants that say when a piece is worth a call, so that small patterns have all kinds of pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tidar_kernels as tk
from tidar_kernels import eager, patterns
from tidar_kernels.ops import _cpu as cpu_parts
from tidar_kernels.ops.attention import cpu as cpu_attention
from tidar_kernels.patterns import Pattern
from tidar_kernels.testing import irregular_pattern
from tidar_kernels.testing.attention import AttentionCase, check_attention

SMALL = {
    "MIN_STAIRCASE": 24,
    "MAX_BEHIND": 8,
    "CHUNK": 16,
    "MIN_RECTANGLE": 8,
    "TILE": 4,
    "EDGE_KEYS": 4,
    "GATHERED": 100,
    "MERGED": 1000,
    "KEPT_WIDTH": 20,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(cpu_attention, name, value)
    monkeypatch.setattr(cpu_parts, "CAPPED_ROWS", 7)
    monkeypatch.setattr(cpu_parts, "CAPPED_KEYS", 11)


def rising(first: list[int], start: int = 0, length: int = 40) -> Pattern:
    """Rows that see keys from `start` on: the first few `first`, then one more each."""
    seen = torch.tensor([*first, *range(first[-1] + 1, first[-1] + 1 + length)])
    lead = torch.stack([torch.full_like(seen, start), start + seen], dim=1).to(torch.int32)
    rows = len(seen)
    return Pattern(
        lead,
        torch.zeros_like(lead),
        torch.arange(rows, dtype=torch.int32),
        start + rows + max(first) + 1,
        name="rising",
    )


# In the names: what lies in the way of a staircase, at the small constants.
CUTS: dict[str, Callable[[], Pattern]] = {
    "tidar": lambda: patterns.tidar_training(60, 4),
    "tidar, B does not divide S": lambda: patterns.tidar_training(57, 7),
    "tidar, blocks of MAX_BEHIND": lambda: patterns.tidar_training(60, 8),
    "tidar, blocks beyond": lambda: patterns.tidar_training(70, 13),
    "block diffusion": lambda: patterns.block_diffusion_training(52, 6),
    "documents, long and short": lambda: patterns.tidar_training(77, 4, [30, 2, 5, 40], [0, 1, 0, 10]),
    "a prompt before every staircase": lambda: patterns.jacobi_forcing_training(15, 30),
    "prefill": lambda: patterns.tidar_prefill(50, 3),
    "causal": lambda: patterns.causal(24),
    "no staircase": lambda: patterns.causal(23),
    "late start": lambda: rising([1, 1, 1, 1, 2]),
    "late start and an offset": lambda: rising([3, 3, 3, 3, 3, 3, 3, 4], start=17),
    "some keys besides": lambda: rising([6]),
    "many keys besides": lambda: rising([11]),
    "irregular": lambda: irregular_pattern(50, 70),
}


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["group_1", "group_2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_parity_of_every_cut(name: str, dtype: torch.dtype, heads: tuple[int, int], small: None) -> None:
    case = AttentionCase(name, CUTS[name](), 2, *heads, head_dim=16, dtype=dtype, lse_grad=dtype != torch.bfloat16)
    check_attention(case, "cpu")


@pytest.mark.parametrize("name", CUTS)
def test_parity_with_a_cap_and_sinks(name: str, small: None) -> None:
    """A cap is computed in blocks of rows and keys within pieces; sinks meet the merged rows."""
    dtype = torch.bfloat16 if name == "prefill" else torch.float64
    case = AttentionCase(name, CUTS[name](), 2, 4, 2, 16, dtype, lse_grad=True, softcap=1.5, sinks=True)
    check_attention(case, "cpu")
    check_attention(replace(case, softcap=None), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "pattern", [patterns.tidar_training(300, 16), patterns.block_diffusion_training(300, 32)], ids=lambda p: p.name
)
def test_parity_at_full_size(pattern: Pattern, dtype: torch.dtype) -> None:
    check_attention(AttentionCase(pattern.name, pattern, 1, 2, 1, 16, dtype), "cpu")


def plan(pattern: Pattern) -> Any:
    return cpu_attention._plan_of(pattern.lead, pattern.own)


def counted(pattern: Pattern) -> Tensor:
    """How often the plan computes each (row, key) pair."""
    counts = torch.zeros(pattern.q_len, pattern.kv_len, dtype=torch.int64)
    for piece in plan(pattern).pieces:
        rows, keys = piece.rows, piece.keys
        shape = (rows.stop - rows.start, keys.stop - keys.start)
        counts[rows, keys] += torch.ones(shape, dtype=torch.int64).tril() if piece.causal else 1
    for edges in plan(pattern).edges:
        keys, mask, _ = edges.keys()
        for tile, start in enumerate(edges.starts.tolist()):
            visible = (mask[tile] == 0.0).to(torch.int64)
            rows = slice(start, start + edges.height)
            counts[rows].index_add_(1, keys.view(-1, edges.width)[tile], visible)
    return counts


@pytest.mark.parametrize("name", CUTS)
def test_every_visible_pair_is_computed_once(name: str, small: None) -> None:
    pattern = CUTS[name]()
    assert torch.equal(counted(pattern), pattern.dense().to(torch.int64))


@pytest.mark.parametrize(
    ("name", "causal", "rectangles"),
    [
        ("tidar", 2, 0),
        ("causal", 1, 0),
        ("no staircase", 0, 1),  # rows 16 .. 22 all see keys 0 .. 16
        ("a prompt before every staircase", 2, 2),  # prompt and noisy copy are one run; clean rows see the prompt too
        ("tidar, blocks beyond", 1, 4),  # of the mask half's chunks of 16 rows all but the first
        ("late start", 1, 0),
        ("some keys besides", 1, 0),
        ("many keys besides", 1, 1),
    ],
)
def test_pieces(name: str, causal: int, rectangles: int, small: None) -> None:
    pieces = plan(CUTS[name]()).pieces
    assert [sum(piece.causal is kind for piece in pieces) for kind in (True, False)] == [causal, rectangles]


@pytest.mark.parametrize("seq_len", [60, 57])
def test_a_clean_half_needs_no_merging(seq_len: int, small: None) -> None:
    alone = [piece.rows for piece in plan(patterns.tidar_training(seq_len, 4)).pieces if piece.alone]
    assert alone == [slice(0, seq_len)]


def test_few_pairs_are_computed_in_vain() -> None:
    """At S = 2048, B = 16: edges hold less than 10 % of the pairs that rows see."""
    pattern = patterns.tidar_training(2048, 16)
    edges = sum(len(part.starts) * part.height * part.width for part in plan(pattern).edges)
    assert edges < 0.1 * int((pattern.lead[:, 1] - pattern.lead[:, 0] + pattern.own[:, 1] - pattern.own[:, 0]).sum())


def test_a_pattern_that_was_written_to_is_cut_again() -> None:
    pattern = patterns.tidar_training(300, 8)
    q, k, v = (torch.randn(1, 1, 600, 8) for _ in "qkv")
    tk.attention(q, k, v, pattern)
    pattern.own[300:, 0] += 1
    expected = eager.attention(q.double(), k.double(), v.double(), pattern)
    torch.testing.assert_close(tk.attention(q, k, v, pattern).double(), expected, rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation allocates."""

    elements = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize(("heads", "softcap"), [((2, 2), None), ((4, 2), None), ((4, 2), 2.0)])
@pytest.mark.parametrize(
    "pattern_of",
    [
        lambda s: patterns.tidar_training(s, 16),
        lambda s: patterns.tidar_training(s, 300),
        lambda s: patterns.tidar_training(s, 8, [100] * (s // 100)),
        lambda s: patterns.packed([patterns.tidar_training(s // 2, 8)] * 2),
    ],
    ids=["tidar", "long_blocks", "documents", "packed"],
)
def test_no_tensor_is_quadratic(
    pattern_of: Callable[[int], Pattern], heads: tuple[int, int], softcap: float | None
) -> None:
    """The largest tensor of a forward and backward pass has a length times a constant: it is an operand or smaller.

    But for capped logits, whose blocks of scores have a constant number of elements.
    """

    def largest(s: int) -> int:
        pattern = pattern_of(s)
        shapes = ((pattern.q_len, heads[0]), (pattern.kv_len, heads[1]), (pattern.kv_len, heads[1]))
        leaves = [torch.randn(1, h, rows, 16, requires_grad=True) for rows, h in shapes]
        with LargestTensor() as seen:
            tk.attention(*leaves, pattern, softcap=softcap).square().sum().backward()
        return seen.elements

    short, long = largest(1000), largest(4000)
    assert long <= 4.2 * short
    if softcap is not None:
        assert long <= max(2 * 8000 * heads[0] * 16, heads[0] * cpu_parts.CAPPED_ROWS * cpu_parts.CAPPED_KEYS)
        return
    assert long < 2 * 8000 * heads[0] * 16
