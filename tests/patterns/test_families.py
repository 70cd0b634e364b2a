"""Training masks of the family: every pattern's dense form against a predicate written from its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tidar_kernels import patterns
from tidar_kernels.patterns import Pattern, Role

FIELDS = ("lead", "own", "positions", "roles", "predicts")
SIZES = [(1, 1), (1, 4), (7, 3), (12, 4), (13, 1), (20, 32), (33, 8)]


def check(pattern: Pattern, visible: Callable[[int, int], bool], rows: int, keys: int) -> None:
    expected = torch.tensor([[visible(q, k) for k in range(keys)] for q in range(rows)], dtype=torch.bool)
    assert torch.equal(pattern.dense(), expected.view(rows, keys))


@pytest.mark.parametrize(("n", "block"), SIZES)
def test_idlm(n: int, block: int) -> None:
    def visible(q: int, k: int) -> bool:
        q_noisy, k_noisy, q_block, k_block = q < n, k < n, q % n // block, k % n // block
        if q_noisy and k_noisy:
            return q_block == k_block and q >= k
        if q_noisy:
            return k_block < q_block
        return not k_noisy and q >= k

    pattern = patterns.idlm_training(n, block)
    check(pattern, visible, 2 * n, 2 * n)
    assert pattern.positions.tolist() == [*range(n), *range(n)]
    assert pattern.roles.tolist() == [Role.MASK] * n + [Role.CLEAN] * n
    assert pattern.predicts.tolist() == [*range(1, n), -1] * 2


@pytest.mark.parametrize("lengths", [[1], [7], [3, 4], [1, 1, 5], [4, 9, 2, 6]])
@pytest.mark.parametrize("block", [1, 3, 4])
def test_idlm_documents(lengths: list[int], block: int) -> None:
    """Each document is the pattern of its own, in both halves; no row sees a key of another."""
    s = sum(lengths)
    pattern = patterns.idlm_training(s, block, lengths)
    expected = torch.zeros(2 * s, 2 * s, dtype=torch.bool)
    predicts, positions, first = [], [], 0
    for n in lengths:
        alone = patterns.idlm_training(n, block)
        rows = torch.cat([torch.arange(n), s + torch.arange(n)]) + first
        expected[rows[:, None], rows] = alone.dense()
        positions += alone.positions[:n].tolist()
        predicts += [-1 if p < 0 else p + first for p in alone.predicts[:n].tolist()]
        first += n
    assert torch.equal(pattern.dense(), expected)
    assert pattern.positions.tolist() == positions * 2
    assert pattern.predicts.tolist() == predicts * 2
    assert (pattern.num_labels, pattern.name) == (
        max(predicts) + 1,
        f"idlm_training(seq_len={s}, block_size={block}, {len(lengths)} documents)",
    )


@pytest.mark.parametrize(("n", "block"), SIZES)
def test_block_diffusion(n: int, block: int) -> None:
    def visible(q: int, k: int) -> bool:
        q_block, k_block = q % n // block, k % n // block
        if q < n:
            return q_block == k_block if k < n else k_block < q_block
        return k >= n and k_block <= q_block

    pattern = patterns.block_diffusion_training(n, block)
    check(pattern, visible, 2 * n, 2 * n)
    assert pattern.positions.tolist() == [*range(n), *range(n)]
    assert pattern.predicts.tolist() == [*range(n)] + [-1] * n


@pytest.mark.parametrize(("n", "block"), SIZES)
def test_block_causal(n: int, block: int) -> None:
    """Clean rows see whole blocks up to their own; only rows of blocks that are there whole may enter the cache."""
    pattern = patterns.block_causal(n, block)
    expected = [[k // block <= q // block for k in range(n)] for q in range(n)]
    assert pattern.dense().tolist() == expected
    assert pattern.positions.tolist() == list(range(n))
    assert (pattern.kept_len, pattern.causal_len) == (n, n if block == 1 else int(n == 1))
    assert not pattern.roles.any()


def test_rows_that_see_what_may_be_dropped_are_not_kept() -> None:
    """A block whose rows see a key in flight beyond them, a mask among them, or a position that is not their own."""
    whole = patterns.block_causal(6, 3)
    seen = torch.tensor([[0, 3]] * 3 + [[0, 6], [0, 7], [0, 6]], dtype=torch.int32)
    beyond = replace(whole, lead=seen, kv_len=7, key_positions=None)
    masked = replace(whole, roles=torch.tensor([0, 0, 0, 0, int(Role.MASK), 0], dtype=torch.int8))
    moved = replace(whole, positions=torch.tensor([0, 1, 2, 4, 5, 6], dtype=torch.int32))
    for pattern in (beyond, masked, moved):
        assert pattern.kept_len == 3
    assert whole.windowed(2).kept_len == 0


@pytest.mark.parametrize(("n", "block"), SIZES)
def test_set_block_is_tidar_with_the_halves_swapped(n: int, block: int) -> None:
    def visible(q: int, k: int) -> bool:
        q_block, k_block = q % n // block, k % n // block
        if q < n:
            return q_block == k_block if k < n else k_block < q_block
        return n <= k <= q

    pattern = patterns.set_block_training(n, block)
    check(pattern, visible, 2 * n, 2 * n)
    tidar = patterns.tidar_training(n, block)
    assert torch.equal(pattern.dense(), tidar.dense().roll((n, n), (0, 1)))
    for name in ("positions", "roles", "predicts"):
        assert torch.equal(getattr(pattern, name), getattr(tidar, name).roll(n))


@pytest.mark.parametrize(
    ("n", "anchors", "block"), [(20, [0, 3, 20, 7], 4), (1, [1], 1), (9, [2, 2, 8], 5), (0, [0], 3)]
)
def test_dflash(n: int, anchors: list[int], block: int) -> None:
    def visible(q: int, k: int) -> bool:
        return k < anchors[q // block] if k < n else (k - n) // block == q // block

    pattern = patterns.dflash_training(n, anchors, block)
    check(pattern, visible, len(anchors) * block, n + len(anchors) * block)
    positions = [anchor + m for anchor in anchors for m in range(block)]
    assert pattern.positions.tolist() == positions
    assert pattern.predicts.tolist() == [position if position < n else -1 for position in positions]


@pytest.mark.parametrize(("n", "blocks", "block"), [(5, 3, 4), (0, 2, 3), (7, 1, 1), (1, 4, 2)])
def test_jacobi_forcing(n: int, blocks: int, block: int) -> None:
    """The definition in blocks: noisy block j sees the prompt, noisy blocks before j, and itself causally."""
    s = blocks * block

    def part(x: int) -> tuple[str, int, int]:
        if x < n:
            return "prompt", 0, x
        copy, x = ("noisy", x - n) if x < n + s else ("clean", x - n - s)
        return copy, x // block, x % block

    def visible(q: int, k: int) -> bool:
        (q_copy, q_block, q_at), (k_copy, k_block, k_at) = part(q), part(k)
        if k_copy == "prompt":
            return q_copy != "prompt" or k_at <= q_at
        return q_copy == k_copy and (k_block < q_block or (k_block == q_block and k_at <= q_at))

    pattern = patterns.jacobi_forcing_training(n, s)
    check(pattern, visible, n + 2 * s, n + 2 * s)
    assert pattern.positions.tolist() == [*range(n + s), *range(n, n + s)]
    assert pattern.roles.tolist() == [Role.CLEAN] * n + [Role.MASK] * s + [Role.CLEAN] * s
    response = [*range(n + 1, n + s), -1]
    assert pattern.predicts.tolist() == ([-1] * (n - 1) + [n] if n else []) + response + response


def test_packed_patterns_are_block_diagonal() -> None:
    parts = [patterns.tidar_training(5, 2), patterns.causal(3), patterns.dflash_training(4, [2], 3)]
    whole = patterns.packed(parts)
    assert torch.equal(whole.dense(), torch.block_diag(*(part.dense() for part in parts)).bool())
    for name in ("positions", "roles"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    # 5 clean tokens of the first; causal rows predict nothing; of the third, tokens 2 and 3.
    assert whole.predicts.tolist() == [1, 2, 3, 4, -1, 0, 1, 2, 3, 4, -1, -1, -1, 7, 8, -1]


BAD = [
    (lambda: patterns.idlm_training(0, 1), ValueError, r"^seq_len: expected >= 1, got 0$"),
    (
        lambda: patterns.idlm_training(6, 1, [3, 2]),
        ValueError,
        r"^document_lengths: expected a sum of seq_len = 6, got 5$",
    ),
    (lambda: patterns.idlm_training(6, 1, [6, 0]), ValueError, r"^document_lengths: expected >= 1, got 0$"),
    (lambda: patterns.idlm_training(6, 1, [6.0]), TypeError, r"^document_lengths: expected an int, got float$"),
    (lambda: patterns.block_diffusion_training(4, 0), ValueError, r"^block_size: expected >= 1, got 0$"),
    (lambda: patterns.set_block_training(4.0, 1), TypeError, r"^seq_len: expected an int, got float$"),
    (lambda: patterns.dflash_training(4, [5], 1), ValueError, r"^anchors: expected <= context_len = 4, got 5$"),
    (lambda: patterns.jacobi_forcing_training(-1, 2), ValueError, r"^prompt_len: expected >= 0, got -1$"),
    (lambda: patterns.packed([]), ValueError, r"^patterns: expected at least one, got none$"),
    (lambda: patterns.packed([3]), TypeError, r"^patterns: expected tidar_kernels.Pattern, got int at 0$"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_input(build: Callable[[], Pattern], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
