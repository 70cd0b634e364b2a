"""Patterns against predicates written from the papers' block arithmetic, never from intervals.

Each `*_visible(q, k, ...)` below is the definition in TiDAR (arXiv 2511.08923) for one query row and one in-flight
key, on NumPy index grids.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tidar_kernels import patterns
from tidar_kernels.patterns import Pattern, Role, causal, tidar_prefill, tidar_step, tidar_training

BLOCK_SIZES = range(1, 33)


def causal_visible(q: Any, k: Any) -> Any:
    """A token sees itself and what came before."""
    return k <= q


def prefill_visible(q: Any, k: Any, n: int) -> Any:
    """`[prompt (n) | M x B]`: the prompt is causal and blind to masks; masks see the prompt and each other."""
    q_is_mask, k_is_mask = q >= n, k >= n
    return (~q_is_mask & ~k_is_mask & (k <= q)) | q_is_mask


def step_visible(q: Any, k: Any, block: int, bidirectional: bool = True) -> Any:
    """`[d_0 .. d_{B-1} | block 1 | ... | block B]`: block g sees the g drafts it assumes accepted, and itself."""
    q_group, k_group = q // block, k // block
    draft_sees_draft = (q_group == 0) & (k_group == 0) & (q % block >= k % block)
    mask_sees_draft = (q_group > 0) & (k_group == 0) & (k % block + 1 <= q_group)
    mask_sees_mask = (q_group > 0) & (k_group == q_group)
    if not bidirectional:
        mask_sees_mask = mask_sees_mask & (q % block >= k % block)
    return draft_sees_draft | mask_sees_draft | mask_sees_mask


def training_visible(q: Any, k: Any, s: int, block: int) -> Any:
    """`[x_0 .. x_{S-1} | M x S]`: masks see strictly earlier clean blocks and their own block of masks."""
    q_is_mask, k_is_mask = q >= s, k >= s
    q_block, k_block = q % s // block, k % s // block
    clean_sees_clean = ~q_is_mask & ~k_is_mask & (k <= q)
    mask_sees_clean = q_is_mask & ~k_is_mask & (k_block < q_block)
    mask_sees_mask = q_is_mask & k_is_mask & (k_block == q_block)
    return clean_sees_clean | mask_sees_clean | mask_sees_mask


def training_lengths(block: int) -> list[int]:
    """Sequence lengths that B divides, does not divide, and exceeds."""
    return sorted({1, max(1, block - 1), block, block + 1, 3 * block, 3 * block + block // 2 + 1})


def check_dense(pattern: Pattern, visible: Any, *args: Any) -> None:
    """`dense` equals the predicate over all pairs, after all-true context columns, at P = 0 and P > 0."""
    q, k = np.arange(pattern.q_len)[:, None], np.arange(pattern.kv_len)[None, :]
    expected = np.broadcast_to(visible(q, k, *args), (pattern.q_len, pattern.kv_len))
    for context_len in (0, 7):
        dense = pattern.dense(context_len)
        assert dense.dtype == torch.bool
        assert dense.shape == (pattern.q_len, context_len + pattern.kv_len)
        assert dense[:, :context_len].all()
        np.testing.assert_array_equal(dense[:, context_len:].numpy(), expected, err_msg=pattern.name)


def check_reads_a_prefix(pattern: Pattern) -> None:
    """Every row reads positions 0, 1, .., n-1 of its sequence, each exactly once, its own among them.

    This ties positions to visibility: a row that saw two tokens of one position, or skipped one, would be wrong in
    any of these systems, whatever the layout of the rows.
    """
    dense = pattern.dense().numpy()
    positions = pattern.positions.numpy()
    seen = np.zeros((pattern.q_len, positions.max() + 1), dtype=np.int64)
    for key in range(pattern.kv_len):
        seen[:, positions[key]] += dense[:, key]
    length = seen.sum(axis=1)
    np.testing.assert_array_equal(seen, np.arange(seen.shape[1]) < length[:, None], err_msg=pattern.name)
    assert dense[np.arange(pattern.q_len), np.arange(pattern.q_len)].all()


@pytest.mark.parametrize("length", [1, 2, 3, 17, 32, 100])
def test_causal(length: int) -> None:
    pattern = causal(length)
    check_dense(pattern, causal_visible)
    check_reads_a_prefix(pattern)
    assert pattern.q_len == pattern.kv_len == pattern.causal_len == pattern.lead_end == length
    assert pattern.positions.tolist() == list(range(length))
    assert set(pattern.roles.tolist()) == {Role.CLEAN}


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_tidar_prefill(block: int) -> None:
    for n in (1, 2, block, 2 * block + 3):
        pattern = tidar_prefill(prompt_len=n, block_size=block)
        check_dense(pattern, prefill_visible, n)
        check_reads_a_prefix(pattern)
        assert pattern.q_len == pattern.kv_len == n + block
        assert pattern.causal_len == pattern.lead_end == n  # with B = 1, too: a lone mask row must not be committed
        assert pattern.positions.tolist() == list(range(n + block))
        assert pattern.roles.tolist() == [Role.CLEAN] * n + [Role.MASK] * block
        assert int(pattern.dense().sum()) == n * (n + 1) // 2 + block * n + block * block
        assert not pattern.dense()[:n, n:].any()


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_tidar_step(block: int, bidirectional: bool) -> None:
    pattern = tidar_step(block_size=block, bidirectional=bidirectional)
    check_dense(pattern, step_visible, block, bidirectional)
    assert pattern.q_len == pattern.kv_len == block + block * block
    assert pattern.causal_len == pattern.lead_end == block
    assert pattern.roles.tolist() == [Role.DRAFT] * block + [Role.MASK] * block**2
    starts = range(block + 1)  # the drafts start at P, block g one position after the g drafts it assumes accepted
    assert pattern.positions.tolist() == [start + m for start in starts for m in range(block)]
    own = block**3 if bidirectional else block * block * (block + 1) // 2
    assert int(pattern.dense().sum()) == block * (block + 1) ** 2 // 2 + own
    assert int(pattern.dense(100).sum()) == 100 * block * (block + 1) + block * (block + 1) ** 2 // 2 + own


@pytest.mark.parametrize("block", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_tidar_step_reads_a_prefix(block: int, bidirectional: bool) -> None:
    check_reads_a_prefix(tidar_step(block, bidirectional))


@pytest.mark.parametrize(("block", "q_len", "percent"), [(4, 20, 28.5), (8, 72, 16.1), (16, 272, 8.7), (32, 1056, 4.5)])
def test_tidar_step_published_figures(block: int, q_len: int, percent: float) -> None:
    pattern = tidar_step(block)
    assert pattern.q_len == q_len
    assert round(100 * pattern.dense().float().mean().item(), 1) == percent


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_tidar_training(block: int) -> None:
    for s in training_lengths(block):
        pattern = tidar_training(seq_len=s, block_size=block)
        check_dense(pattern, training_visible, s, block)
        check_reads_a_prefix(pattern)
        assert pattern.q_len == pattern.kv_len == 2 * s
        assert pattern.causal_len == pattern.lead_end == s
        assert pattern.positions.tolist() == [*range(s), *range(s)]
        assert pattern.roles.tolist() == [Role.CLEAN] * s + [Role.MASK] * s
        dense = pattern.dense()
        assert not dense[:s, s:].any(), "a clean row sees a mask"
        assert not dense[s : s + block, :s].any(), "block 0's masks see a clean token"
        if s % block == 0:
            assert int(dense.sum()) == s * s + s * (block + 1) // 2


def test_tidar_training_is_a_quarter_live() -> None:
    assert tidar_training(512, 8).dense().float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_training_mask_row_equals_decode_rows() -> None:
    """What training teaches is what decoding asks: a mask row in training reads the same tokens as in a step.

    Training's block b conditions on b*B clean tokens; a step at P = b*B - g whose first g drafts were accepted
    conditions on the same tokens. So both must see equally many tokens, and have the same position.
    """
    block, s = 4, 16
    training, step = tidar_training(s, block), tidar_step(block)
    for b in range(1, s // block):
        for g in range(1, block + 1):
            context_len = b * block - g
            for m in range(block):
                in_training, in_step = s + b * block + m, g * block + m
                assert training.positions[in_training] == context_len + step.positions[in_step]
                assert training.dense()[in_training].sum() == step.dense(context_len)[in_step].sum()


BUILDERS = {
    "length": lambda value: causal(length=value),
    "prompt_len": lambda value: tidar_prefill(prompt_len=value, block_size=4),
    "block_size": lambda value: tidar_prefill(prompt_len=4, block_size=value),
    "block_size of a step": lambda value: tidar_step(block_size=value),
    "seq_len": lambda value: tidar_training(seq_len=value, block_size=4),
    "block_size of training": lambda value: tidar_training(seq_len=4, block_size=value),
    "context_len": lambda value: causal(4).dense(value),
}


@pytest.mark.parametrize("argument", BUILDERS)
@pytest.mark.parametrize("value", [2.0, "4", None, True, np.float32(4)])
def test_sizes_must_be_ints(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{argument.split()[0]}: expected an int, got {type(value).__name__}$"):
        BUILDERS[argument](value)


@pytest.mark.parametrize("argument", BUILDERS)
@pytest.mark.parametrize("below", [1, 100])
def test_sizes_must_not_be_too_small(argument: str, below: int) -> None:
    least = 0 if argument == "context_len" else 1
    with pytest.raises(ValueError, match=rf"^{argument.split()[0]}: expected >= {least}, got {least - below}$"):
        BUILDERS[argument](least - below)


def test_bidirectional_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match=r"^bidirectional: expected a bool, got str$"):
        tidar_step(4, bidirectional="no")  # type: ignore[arg-type]


def fields(**changed: Any) -> dict[str, Any]:
    """A sound pattern of two rows over three keys, with some fields changed."""
    sound: dict[str, Any] = {
        "lead": torch.tensor([[0, 1], [0, 2]], dtype=torch.int32),
        "own": torch.tensor([[1, 3], [2, 3]], dtype=torch.int32),
        "positions": torch.tensor([0, 1], dtype=torch.int32),
        "kv_len": 3,
        "roles": torch.tensor([0, 2], dtype=torch.int8),
    }
    return sound | changed


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kv_len": 3.0}, TypeError, "kv_len: expected an int, got float"),
        ({"kv_len": True}, TypeError, "kv_len: expected an int, got bool"),
        ({"lead": [[0, 1], [0, 2]]}, TypeError, "lead: expected an int32 CPU tensor, got list"),
        ({"own": torch.zeros(2, 2)}, TypeError, "own: expected an int32 CPU tensor, got torch.float32 on cpu"),
        ({"own": int32([0, 0], [0, 0]).to("meta")}, TypeError, "own: .* got torch.int32 on meta"),
        ({"positions": torch.arange(2)}, TypeError, "positions: expected an int32 CPU tensor, got torch.int64 on cpu"),
        ({"roles": torch.zeros(2)}, TypeError, "roles: expected an int8 CPU tensor, got torch.float32 on cpu"),
        ({"roles": [0, 2]}, TypeError, "roles: expected an int8 CPU tensor, got list"),
        ({"roles": torch.zeros(3, dtype=torch.int8)}, ValueError, r"roles: expected shape \[2\], got \[3\]"),
        ({"roles": torch.tensor([0, 3], dtype=torch.int8)}, ValueError, r"roles: expected .*, got \[0, 3\]"),
        ({"lead": int32([0, 1])}, ValueError, r"lead: expected shape \[2, 2\], got \[1, 2\]"),
        ({"own": int32([0, 0, 0], [0, 0, 0])}, ValueError, r"own: expected shape \[2, 2\], got \[2, 3\]"),
        ({"positions": int32([0, 1])}, ValueError, r"positions: expected shape \[2\], got \[1, 2\]"),
        ({"lead": int32([0, 1], [2, 1])}, ValueError, r"lead: expected .* kv_len = 3, got \[2, 1\) in row 1"),
        ({"lead": int32([-1, 1], [0, 2])}, ValueError, r"lead: expected .* got \[-1, 1\) in row 0"),
        ({"own": int32([1, 4], [2, 3])}, ValueError, r"own: expected .* kv_len = 3, got \[1, 4\) in row 0"),
        ({"own": int32([1, 3], [1, 3])}, ValueError, r"own: .* disjoint .* lead \[0, 2\] and own \[1, 3\] in row 1"),
    ],
)
def test_pattern_refuses_bad_fields(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    Pattern(**fields())
    with pytest.raises(error, match=message):
        Pattern(**fields(**changed))


def test_roles_default_to_clean_and_fields_are_frozen() -> None:
    pattern = Pattern(**fields(roles=None))
    assert pattern.roles.dtype == torch.int8
    assert pattern.roles.tolist() == [0, 0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.kv_len = 5  # type: ignore[misc]


def test_a_row_that_sees_nothing_is_sound() -> None:
    pattern = Pattern(**fields(lead=int32([0, 0], [3, 3]), own=int32([2, 2], [0, 0])))
    assert not pattern.dense().any()
    assert pattern.lead_end == pattern.causal_len == 0


def test_causal_len_stops_at_the_first_row_that_is_not_plainly_causal() -> None:
    good = causal(4)
    lead, positions = good.lead.clone(), good.positions.clone()
    lead[2, 1] = 2
    assert Pattern(lead, good.own, positions, 4).causal_len == 2
    positions[1] = 5
    assert Pattern(good.lead, good.own, positions, 4).causal_len == 1


def test_on_copies_once_per_device() -> None:
    pattern = tidar_step(4)
    first = pattern.on("cpu")
    assert all(a is b for a, b in zip(first, pattern.on(torch.device("cpu")), strict=True))
    for tensor, source in zip(first, (pattern.lead, pattern.own, pattern.positions), strict=True):
        assert tensor.dtype == torch.int32
        assert torch.equal(tensor, source)
    assert pattern.on("meta")[0].device.type == "meta"


def test_int32_holds_the_largest_training_sequence() -> None:
    """Intervals of a doubled 2^17-token sequence, read off without a dense mask."""
    s, block = 1 << 17, 16
    pattern = tidar_training(s, block)
    pairs = (pattern.lead[:, 1] - pattern.lead[:, 0]).sum() + (pattern.own[:, 1] - pattern.own[:, 0]).sum()
    assert int(pairs) == s * s + s * (block + 1) // 2


DOCUMENTS = [([1], [0]), ([5, 1, 9], [0, 0, 0]), ([7, 4, 8], [3, 4, 0]), ([6, 6], [6, 1]), ([13, 2, 3], [2, 1, 2])]


@pytest.mark.parametrize("block", [1, 2, 4, 16])
@pytest.mark.parametrize(("lengths", "prompts"), DOCUMENTS)
def test_packed_documents_and_prompts(lengths: list[int], prompts: list[int], block: int) -> None:
    """(document, position) of every row, and from these alone what it may see."""
    tokens = [(d, at) for d, length in enumerate(lengths) for at in range(length)]
    masks = [(d, at) for d, at in tokens if at >= prompts[d]]
    rows = [(*token, False) for token in tokens] + [(*mask, True) for mask in masks]

    def block_of(document: int, at: int) -> int:
        return (at - prompts[document]) // block

    def visible(q: int, k: int) -> bool:
        (q_document, q_at, q_mask), (k_document, k_at, k_mask) = rows[q], rows[k]
        if q_document != k_document or (k_mask and not q_mask):
            return False
        if not q_mask:
            return k_at <= q_at
        same = block_of(k_document, k_at) == block_of(q_document, q_at)
        return same if k_mask else k_at < prompts[q_document] + block * block_of(q_document, q_at)

    pattern = tidar_training(sum(lengths), block, lengths, prompts)
    expected = [[visible(q, k) for k in range(len(rows))] for q in range(len(rows))]
    assert pattern.dense().tolist() == expected
    assert pattern.positions.tolist() == [at for _, at, _ in rows]
    assert pattern.roles.tolist() == [Role.MASK if mask else Role.CLEAN for *_, mask in rows]

    def predicted(document: int, at: int, mask: bool) -> int:
        wanted = (document, at if mask else at + 1)
        return tokens.index(wanted) if wanted in masks else -1

    assert pattern.predicts.tolist() == [predicted(*row) for row in rows]


@pytest.mark.parametrize(
    ("documents", "prompts", "message"),
    [
        ([3, 2], None, r"^document_lengths: expected a sum of seq_len = 6, got 5$"),
        ([], None, r"^document_lengths: expected a sum of seq_len = 6, got 0$"),
        ([6, 0], None, r"^document_lengths: expected >= 1, got 0$"),
        ([2, 4], [1], r"^prompt_lengths: expected one for each of 2 documents, got 1$"),
        ([2, 4], [3, 0], r"^prompt_lengths: expected <= the document's length 2, got 3$"),
        (None, [-1], r"^prompt_lengths: expected >= 0, got -1$"),
    ],
)
def test_bad_documents(documents: list[int] | None, prompts: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tidar_training(6, 2, documents, prompts)


EVERY_KIND = [
    causal(9),
    tidar_prefill(7, 4),
    tidar_step(4),
    tidar_step(5, bidirectional=False),
    tidar_training(13, 4),
    tidar_training(20, 3, [7, 4, 9], [3, 4, 0]),
    patterns.idlm_training(9, 4),
    patterns.block_diffusion_training(9, 4),
    patterns.block_causal(7, 3),
    patterns.set_block_training(9, 4),
    patterns.dflash_training(9, [0, 3, 9], 4),
    patterns.jacobi_forcing_training(4, 7),
    patterns.block_step(5, shared_window=True),
]
EVERY_KIND.append(patterns.packed(EVERY_KIND))


@pytest.mark.parametrize("pattern", [*EVERY_KIND, patterns.tree([-1, 0, 0, 1, 2])], ids=lambda p: p.name[:40])
def test_a_subset_has_the_rows_that_it_names(pattern: Pattern) -> None:
    rows = torch.randperm(pattern.q_len)[: pattern.q_len // 2]
    some = pattern.subset(rows)
    assert torch.equal(some.dense(), pattern.dense()[rows])
    for same in ("positions", "roles", "predicts"):
        assert torch.equal(getattr(some, same), getattr(pattern, same)[rows])
    if pattern.tree_mask is None:
        assert torch.equal(some.windowed(3).dense(2), pattern.windowed(3).dense(2)[rows])
    assert some.kv_len == pattern.kv_len
    assert pattern.subset(rows[:0]).q_len == 0
    for wrong, error in ((rows.int(), TypeError), (rows[None], ValueError), (rows + pattern.q_len, ValueError)):
        with pytest.raises(error, match=r"^rows: expected"):
            pattern.subset(wrong)


def within(pattern: Pattern, window: int, context_len: int) -> torch.Tensor:
    """The mask of a window, from absolute positions: a query sees keys less than `window` positions before it."""
    keys = torch.cat([torch.arange(context_len), context_len + pattern.key_positions.long()])
    at = pattern.positions if pattern.window_positions is None else pattern.window_positions
    distance = (context_len + at.long())[:, None] - keys
    return pattern.dense(context_len) & (distance < window)


@pytest.mark.parametrize("pattern", EVERY_KIND, ids=lambda pattern: pattern.name[:40])
def test_windows(pattern: Pattern) -> None:
    for window in (1, 2, 3, 4, 5, 7, 11, 30, 2**40):
        windowed = pattern.windowed(window)
        for context_len in (0, 1, 5, 17):
            assert torch.equal(windowed.dense(context_len), within(pattern, window, context_len))
            both = windowed.windowed(4).dense(context_len)
            assert torch.equal(both, within(pattern, min(window, 4), context_len))
        assert windowed.causal_len == pattern.causal_len
        assert (windowed.q_len, windowed.kv_len) == (pattern.q_len, pattern.kv_len)
        for same in ("positions", "roles", "predicts", "key_positions"):
            assert torch.equal(getattr(windowed, same), getattr(pattern, same))


@pytest.mark.parametrize("context_len", [0, 2, 9])
@pytest.mark.parametrize("window", [1, 3, 6, 40])
def test_the_rows_of_a_canvas_share_a_window(window: int, context_len: int) -> None:
    """A rectangle, not a staircase: all of the canvas, and `window - 1` tokens before it."""
    canvas = patterns.block_step(5, shared_window=True)
    expected = torch.ones(5, context_len + 5, dtype=torch.bool)
    expected[:, : max(0, context_len - (window - 1))] = False
    for rows in (slice(None), slice(1, 4)):
        assert torch.equal(canvas.subset(torch.arange(5)[rows]).windowed(window).dense(context_len), expected[rows])
    both = patterns.packed([causal(2), canvas]).windowed(window)
    assert torch.equal(both.dense()[2:, 2:], expected[:, context_len:])
    assert torch.equal(patterns.batch([canvas], device="cpu").windowed(window).dense([context_len])[0], expected)
    staircase = patterns.block_step(5).windowed(window).dense(context_len)
    assert torch.equal(staircase, expected) == (window > context_len + 4)


def test_a_window_is_made_once() -> None:
    pattern = tidar_step(4)
    with torch.inference_mode():
        windowed = pattern.windowed(6)
    assert pattern.windowed(6) is windowed
    assert windowed.name == "tidar_step(block_size=4).windowed(6)"
    assert not windowed.lead.is_inference()
    assert pattern.rows_on("cpu")[2] is pattern.reach is None
    assert windowed.reach is not None
    assert torch.equal(windowed.rows_on("cpu")[2], windowed.reach)
    assert windowed.reach.tolist() == [max(0, 5 - at) for at in pattern.positions.tolist()]
    assert [x.device.type for x in (*windowed.on("meta"), windowed.rows_on("meta")[2])] == ["meta"] * 4


def test_causal_rows_share_one_window() -> None:
    good = causal(6).windowed(3)
    fields = {"lead": good.lead, "own": good.own, "positions": good.positions, "kv_len": 6}
    assert Pattern(**fields, reach=good.reach).causal_len == 6
    assert Pattern(**fields).causal_len == 3  # without a reach, rows that do not see key 0 are not causal
    for row, more in ((1, 1), (4, 1)):
        reach = good.reach.clone()
        reach[row] += more
        assert Pattern(**fields, reach=reach).causal_len == row
    lead = good.lead.clone()
    lead[5, 0] -= 1
    assert Pattern(**{**fields, "lead": lead}, reach=good.reach).causal_len == 5


def test_packed_sequences_keep_their_reach() -> None:
    parts = [causal(2), causal(3).windowed(2)]
    packed = patterns.packed(parts)
    assert packed.reach is not None
    assert packed.reach.tolist() == [2**31 - 1, 2**31 - 1, 1, 0, 0]
    own = [part.dense(3)[:, :3] for part in parts]
    assert torch.equal(packed.dense(3)[:, :3], torch.cat(own))
    unknown = Pattern(int32([0, 2]), int32([0, 0]), torch.tensor([1], dtype=torch.int32), 2)
    assert patterns.packed([unknown, causal(2)]).key_positions is None


@pytest.mark.parametrize(
    ("pattern", "window", "error", "message"),
    [
        (causal(3), 0, ValueError, r"^window: expected >= 1, got 0$"),
        (causal(3), 2.0, TypeError, r"^window: expected an int, got float$"),
        (
            Pattern(int32([0, 3]), int32([0, 0]), torch.tensor([2], dtype=torch.int32), 3),
            2,
            ValueError,
            r"^window: expected a pattern with key_positions, which 3 keys of 1 rows need, got pattern without$",
        ),
        (
            Pattern(*(int32([0, 0], [0, 2]), int32([0, 0], [0, 0])), torch.tensor([3, 3], dtype=torch.int32), 2),
            2,
            ValueError,
            r"^window: expected keys whose positions ascend by one in lead, got \[3, 3\] in row 1 of pattern$",
        ),
    ],
)
def test_bad_windows(pattern: Pattern, window: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pattern.windowed(window)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reach": torch.zeros(2)}, TypeError, r"^reach: expected an int32 CPU tensor, got torch.float32 on cpu$"),
        ({"reach": torch.zeros(3, dtype=torch.int32)}, ValueError, r"^reach: expected shape \[2\], got \[3\]$"),
        ({"reach": torch.tensor([1, -2], dtype=torch.int32)}, ValueError, r"^reach: expected >= 0, got -2$"),
        ({"key_positions": [0]}, TypeError, r"^key_positions: expected an int32 CPU tensor, got list$"),
        ({"key_positions": torch.zeros(2, dtype=torch.int32)}, ValueError, r"^key_positions: expected shape \[3\]"),
    ],
)
def test_bad_reach_and_key_positions(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pattern(**fields(**change))
