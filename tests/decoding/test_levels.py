"""The slot budget: what is expected of a choice of levels, against simulation; and what is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.toys import Chain, decode_chain
from tidar_kernels import Decoder
from tidar_kernels.decoding import strategies
from tidar_kernels.decoding.profile import profile
from tidar_kernels.decoding.strategies import Batch, Profile, StepResult, levels, tidar
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.ops.verify import SamplingParams

ROWS = (1, 8, 16, 64, 128)


def linear(cost: float) -> Profile:
    """Every row costs: `1 + cost * rows`."""
    return Profile((0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5), ROWS, tuple(1 + cost * rows for rows in ROWS))


@pytest.mark.parametrize(
    ("block", "chosen"), [(1, [1]), (2, [1]), (4, [1]), (4, [1, 2, 3, 4]), (6, [1, 4]), (6, [1, 2, 5])]
)
def test_expected_tokens_are_what_a_simulation_gives(block: int, chosen: list[int]) -> None:
    """Drafts of r positions out are accepted with probability sum min(p, q_r), whatever came before."""
    p = torch.tensor([0.5, 0.3, 0.2])
    q = torch.stack([torch.tensor([0.5 - 0.06 * r, 0.3, 0.2 + 0.06 * r]) for r in range(2 * block)])
    acceptance = torch.minimum(p, q).sum(1)
    model = Chain(p.log().expand(3, 3).clone(), q.log().expand(3, *q.shape).clone())
    strategy, counts = tidar(block, levels=chosen), []
    step = strategy.step

    def counted(batch: Batch) -> StepResult:
        outcome = step(batch)
        counts.append(outcome.verified.accepted[batch.cache.lengths < 200])
        return outcome

    strategy.step = counted
    decode_chain(model, strategy, [SamplingParams(temperature=1.0, seed=s) for s in range(60)], 200, "rejection")
    found = torch.cat(counts).double()
    # Offset o of the chain is o positions after the last token seen: draft r positions after the first is o = r + 1.
    expected = levels.expected_tokens(acceptance[1:].tolist(), block, chosen)
    assert found.mean().item() == pytest.approx(expected, abs=5 * found.std().item() / len(found) ** 0.5 + 0.01)


def test_all_levels_are_the_plain_sum() -> None:
    shares = [0.9, 0.5, 0.25]
    assert levels.expected_tokens(shares, 4, [1, 2, 3, 4]) == pytest.approx(1 + 0.9 + 0.45 + 0.1125)


def test_plan_weighs_rows_against_tokens() -> None:
    free, dear = strategies.plan(linear(0.0)), strategies.plan(linear(10.0))
    assert (free.block_size, free.tokens_per_second) == (8, pytest.approx(free.tokens_per_forward))
    assert free.tokens_per_forward == pytest.approx(levels.expected_tokens(linear(0.0).acceptance, 8, range(1, 9)))
    assert (dear.block_size, dear.levels) == (1, (1,))
    between = strategies.plan(linear(0.02))
    assert 1 < len(between.levels) < between.block_size
    # Nothing that was left out is better, of all level sets of that block size.
    best = between.tokens_per_second
    for bits in range(2 ** (between.block_size - 1)):
        chosen = [1] + [level for level in range(2, between.block_size + 1) if bits >> (level - 2) & 1]
        tokens = levels.expected_tokens(linear(0.02).acceptance, between.block_size, chosen)
        assert tokens / linear(0.02).latency(between.block_size * (1 + len(chosen))) <= best * 1.01
    strategy = strategies.auto(linear(0.02), max_block_size=4)
    assert strategy.drafts <= 4


def test_latency_between_and_beyond_measured_points() -> None:
    profile = Profile((), (2, 4, 10), (1.0, 2.0, 5.0))
    assert [profile.latency(rows) for rows in (1, 2, 3, 4, 7, 10, 12)] == [1.0, 1.0, 1.5, 2.0, 3.5, 5.0, 6.0]
    assert Profile((), (2,), (1.0,)).latency(100) == 1.0


def test_acceptance_of_counts() -> None:
    assert levels.acceptance_of([1, 1, 2, 3, 3, 3], 3) == (4 / 7, 3 / 5)


def test_profile_of_short_blocks() -> None:
    model = Transformer(TransformerConfig(20, 32, 48, 1, 2, 1, 16, mask_token_id=19))
    for block_size in (1, 2, 3):
        found = profile(model, [[1, 2]], max_block_size=block_size, new_tokens=8, repeats=1)
        assert strategies.plan(found).block_size <= block_size


def test_profile_and_auto_on_a_model() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(20, 32, 48, 1, 2, 1, 16, mask_token_id=19)
    model = Transformer(config)
    found = profile(model, [[1, 2, 3], [4]], max_block_size=6, new_tokens=12, repeats=1)
    assert len(found.acceptance) == 5
    assert found.rows == (2, 6, 8, 12, 18, 20, 42)
    strategy = strategies.auto(found)
    expected = Decoder(model, mode="autoregressive").generate([[5, 6]], 20).tokens
    assert Decoder(model, strategy=strategy).generate([[5, 6]], 20).tokens == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Profile((1.2,), (1,), (1.0,)), r"^acceptance: expected a number in \[0, 1\]"),
        (lambda: Profile((), (), ()), r"^rows: expected them to ascend"),
        (lambda: Profile((), (2, 1), (1.0, 1.0)), r"^rows: expected them to ascend"),
        (lambda: Profile((), (1, 2), (1.0,)), r"^rows: expected them to ascend"),
        (lambda: Profile((), (1,), (0.0,)), r"^seconds: expected > 0"),
        (lambda: levels.acceptance_of([], 3), r"^accepted: expected counts in \[1, 3\], got \[\]$"),
        (lambda: levels.acceptance_of([4], 3), r"^accepted: expected counts in \[1, 3\], got \[4\]$"),
        (lambda: strategies.plan(linear(1.0), 0), r"^max_block_size: expected >= 1, got 0$"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
