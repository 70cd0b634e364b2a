"""Block length and levels by the running acceptance: tokens do not depend on it; and what is chosen."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.toys import Chain, chain_law, distance, toy
from tidar_kernels import Decoder, SamplingParams
from tidar_kernels.decoding import decoder as decoder_module
from tidar_kernels.decoding.session import Session, StepConfig
from tidar_kernels.decoding.strategies import Adaptive, Profile, Strategy, adaptive, tidar
from tidar_kernels.decoding.strategies.adaptive import FIRST_SHARE, PERIOD, RunningChoice
from tidar_kernels.models import ByteTokenizer, Transformer, load_shipped

ROWS = (1, 8, 16, 32, 72)
FREE, DEAR = Profile((), ROWS, (1.0,) * 5), Profile((), ROWS, tuple(float(rows) for rows in ROWS))
BETWEEN = Profile((), ROWS, tuple(1.0 + 0.05 * rows for rows in ROWS))
STEEP = Profile((), ROWS, tuple(1.0 + 0.1 * rows for rows in ROWS))
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_shipped()[0]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    text = ByteTokenizer().encode(TEXT)
    return [text[i : i + 12 + i] for i in range(20)]


def switched_at_random(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[str]:
    """Any setting may take any step; returns the list of those that did."""
    draw, taken = random.Random(seed), []

    def settle(self: RunningChoice) -> None:
        taken.append(self.strategy.label)
        self._setting = draw.choice(self._settings)
        self.strategy = self._setting.strategy

    monkeypatch.setattr(RunningChoice, "settle", settle)
    return taken


@pytest.mark.parametrize(
    ("temperature", "exact"),
    [
        (0.9, False),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((0.0, False), (0.0, True), (0.9, True))),
    ],
)
def test_tokens_do_not_depend_on_the_settings(
    model: Transformer, prompts: list[list[int]], temperature: float, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty requests, each with a seed of its own: as without drafts, and as with one setting throughout."""
    options: dict[str, Any] = {"temperature": temperature, "seed": 5}
    expected = Decoder(model, mode="autoregressive", exact=exact).generate(prompts, 24, **options).tokens
    fixed = Decoder(model, strategy=tidar(4, levels=[1, 2]), exact=exact).generate(prompts, 24, **options)
    assert fixed.tokens == expected
    strategy = adaptive(FREE, 8)
    assert Decoder(model, strategy=strategy, exact=exact).generate(prompts, 24, **options).tokens == expected
    taken = switched_at_random(monkeypatch, seed=1)
    result = Decoder(model, strategy=strategy, exact=exact).generate(prompts, 24, **options)
    assert result.tokens == expected
    assert len(set(taken)) > 5
    assert result.forwards < 24, "no draft was accepted"


def test_exact_bits_do_not_depend_on_the_settings(
    model: Transformer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Decoder(model, mode="autoregressive", exact=True).generate(prompts[:3], 20).cache
    switched_at_random(monkeypatch, seed=2)
    found = Decoder(model, strategy=adaptive(FREE, 8), exact=True).generate(prompts[:3], 20).cache
    for b, prompt in enumerate(prompts[:3]):
        length = len(prompt) + 19
        for name in ("k", "v"):
            ours, theirs = (getattr(cache, name)[:, b, :, :length] for cache in (found, expected))
            assert torch.equal(ours, theirs)


class Served(Chain):
    """A chain that a session can decode."""

    def __init__(self, chain: Chain) -> None:
        vars(self).update(vars(chain))

    def parameters(self) -> Iterator[Any]:
        yield torch.zeros(1)


@pytest.mark.parametrize("rule", ["rejection", "point_mass"])
def test_the_law_does_not_depend_on_the_settings(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, size = toy(3, 8), 1200
    switched_at_random(monkeypatch, seed=3)
    session = Session(Served(chain), StepConfig(adaptive(FREE, 4), chain.mask, rule), size, 32, cuda_graph=False)
    for seed in range(size):
        session.add([0], 4, SamplingParams(1.0, seed=seed))
    requests = dict(session.requests)
    while session.requests:
        session.step()
    tokens = torch.tensor([requests[i].tokens for i in range(size)])
    off, noise = distance(tokens, chain_law(chain.tables[:: chain.offsets, :3], 0, 4, SamplingParams(1.0)))
    assert off < noise


# What is chosen.


def fed(choice: RunningChoice, steps: int, share: float) -> list[str]:
    """Settings of so many steps in which each draft stays with the same probability."""
    draw, taken, drafts = random.Random(0), [], 1
    for _ in range(steps):
        setting = choice._setting
        drafts = min(drafts, setting.block_size)
        accepted = 1
        while accepted < drafts and draw.random() < share:
            accepted += 1
        choice.saw(0, drafts, accepted)
        drafts = setting.block_size - choice._skipped[0]
        choice.settle()
        taken.append(choice.strategy.label)
    return taken


def test_settings_are_those_that_profiles_time() -> None:
    found = [(setting.block_size, setting.levels, setting.seconds) for setting in adaptive(BETWEEN, 4).settings]
    rows = [1, 6, 8, 12, 20]
    assert [seconds for _, _, seconds in found] == [pytest.approx(1 + 0.05 * n) for n in rows]
    assert [of[:2] for of in found] == [(1, (1,)), (2, (1, 2)), (4, (1,)), (4, (1, 2)), (4, (1, 2, 3, 4))]
    assert [setting.strategy.pattern.q_len for setting in adaptive(BETWEEN, 4).settings] == rows


def test_free_rows_are_taken_and_dear_ones_are_not() -> None:
    assert all("B = 8" in label for label in fed(RunningChoice(adaptive(FREE, 8)), 200, 0.8))
    assert set(fed(RunningChoice(adaptive(DEAR, 8)), 40, 0.95)) == {"autoregressive"}


def test_the_choice_follows_the_acceptance_down_and_up() -> None:
    choice = RunningChoice(adaptive(BETWEEN, 8))
    low = fed(choice, 200, 0.0)
    assert low[-1] == "autoregressive"
    # Now and then it asks whether drafts are worth it again, and soon knows.
    again = fed(choice, 400, 0.0)
    assert 0 < sum(label != "autoregressive" for label in again) < 0.5 * len(again)
    high = fed(choice, 400, 0.97)
    assert high[-1].startswith("TiDAR, B = 8")
    assert fed(choice, 200, 0.0)[-1] == "autoregressive"


def test_shares_are_counted_by_their_place() -> None:
    """Drafts that are known to lie further out, after a level without a block, are judged as what they are."""
    choice = RunningChoice(Adaptive(Profile((0.5, 0.4), ROWS, (1.0,) * 5), 4))
    assert choice.shares == pytest.approx([0.5, 0.4, 0.4])
    choice._setting = next(setting for setting in choice._settings if setting.levels == (1,) and setting.block_size > 1)
    choice.saw(7, 4, 3)  # the first two stayed, the third did not; the next drafts lie two further out: one is left
    assert (choice._judged, choice._stayed) == ([1, 1, 1], [1, 1, 0])
    choice.saw(7, 2, 1)
    assert (choice._judged, choice._stayed) == ([1, 1, 2], [1, 1, 0])
    choice.saw(7, 4, 3)
    choice.began(7)
    choice.saw(7, 2, 2)
    assert (choice._judged, choice._stayed) == ([3, 2, 3], [3, 2, 0])
    assert choice.shares == pytest.approx([(3 + 2.0) / 7, (2 + 1.6) / 6, 4 * 0.6 / 7])
    assert RunningChoice(adaptive(FREE, 3)).shares == [FIRST_SHARE] * 2


def test_a_session_changes_over_in_mid_run(model: Transformer) -> None:
    """By the rule itself: a loop of one line, that the model guesses well, then samples, that it guesses less well."""
    session = Session(model, StepConfig(adaptive(STEEP, 8), model.config.mask_token_id), 1, 512)
    used: list[list[int]] = []
    for params in (SamplingParams(), SamplingParams(1.0, seed=1)):
        session.add(ByteTokenizer().encode(TEXT[:30]), 200, params)
        used.append([])
        while session.requests:
            session.step()
            used[-1].append(session._runner._choice.strategy.drafts)
    assert set(used[0]) == {8}
    assert used[1][0] == 8
    assert sum(size < 8 for size in used[1]) > len(used[1]) / 2
    changes = [i for i, size in enumerate(used[1][1:], 1) if size != used[1][i - 1]]
    assert len(changes) < len(used[1]) / PERIOD


# Graphs.


def test_each_setting_is_captured_once_and_replayed_as_itself(
    model: Transformer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a `torch.cuda` whose graphs run the step again, and notice if it is another one than was captured."""
    captured: list[str] = []
    pools: list[Any] = []

    class Thing:
        wait_stream = record = synchronize = lambda self, *_: None

        def pool(self) -> str:
            return "the pool"

        def replay(self) -> None:
            assert runner._choice.strategy.label == self.label
            bounds = runner.cache.length_bounds.copy()
            runner._device_step(runner._batch, runner._active, runner._report)
            runner.cache.length_bounds[:] = bounds

    @contextmanager
    def using(thing: Any, pool: Any = None) -> Iterator[None]:
        yield

    @contextmanager
    def graph(thing: Any, pool: Any = None) -> Iterator[None]:
        thing.label = runner._choice.strategy.label
        captured.append(thing.label)
        pools.append(pool)
        yield

    for name, fake in {
        "Stream": Thing, "Event": Thing, "CUDAGraph": Thing, "stream": using, "graph": graph, "current_stream": Thing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    taken = switched_at_random(monkeypatch, seed=4)
    step = StepConfig(adaptive(FREE, 4), model.config.mask_token_id)
    outputs = []
    for cuda_graph in (False, True):
        session = Session(model, step, 2, 128, cuda_graph=cuda_graph)
        runner = session._runner
        for i in range(2):
            session.add(prompts[i], 40, SamplingParams(0.8, seed=i))
        requests = dict(session.requests)
        while session.requests:
            session.step()
        outputs.append([request.tokens for request in requests.values()])
    assert outputs[0] == outputs[1]
    assert len(captured) == len(set(captured)) > 3
    assert set(captured) <= set(taken)
    assert pools == [None, *["the pool"] * (len(captured) - 1)]


# The decoder's option.


def test_auto_measures_rows_once_for_each_number_of_sequences(
    model: Transformer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    costs = decoder_module.row_costs

    def counted(*args: Any) -> Any:
        found = costs(*args)
        measured.append((args[3], found))
        return found

    monkeypatch.setattr(decoder_module, "row_costs", counted)
    monkeypatch.setattr(decoder_module, "AUTO_CONTEXT", 32)
    monkeypatch.setattr(decoder_module, "AUTO_REPEATS", 1)
    decoder = Decoder(model, "auto")
    assert decoder.block_size == model.config.block_size == 8
    assert repr(decoder) == "Decoder(TiDAR, B <= 8, by the running acceptance)"
    assert not measured
    expected = Decoder(model, mode="autoregressive").generate(prompts[:2], 30).tokens
    assert decoder.generate(prompts[:2], 30).tokens == expected
    assert decoder.generate(prompts[:2], 30).tokens == expected
    copied = copy.deepcopy(decoder)
    assert copied.generate(prompts[:2], 30).tokens == expected
    assert decoder.generate(prompts[:1], 30).tokens == expected[:1]
    assert [batch for batch, _ in measured] == [2, 1]
    rows, seconds = measured[0][1]
    assert rows == (1, 6, 8, 12, 16, 20, 24, 72)
    assert all(second > 0 for second in seconds)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: Decoder(m, "auto", strategy="isd"),
            r'^block_size: expected a number for strategy "isd", got "auto"$',
        ),
        (lambda m: Decoder(m, "auto", strategy=tidar(4)), r'^block_size: expected a number for strategy "tidar", got'),
        (lambda m: Decoder(m, "auto", beta=0.5), r"^beta: expected 1 "),
        (lambda m: Decoder(m, 4, strategy=adaptive(FREE, 8)), r"^block_size: expected that of the strategy, 8, got 4$"),
        (lambda m: adaptive(FREE, 0), r"^max_block_size: expected >= 1, got 0$"),
    ],
)
def test_bad_input(model: Transformer, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(model)


def test_single_tokens_alone(model: Transformer, prompts: list[list[int]]) -> None:
    strategy: Strategy = adaptive(FREE, 1)
    result = Decoder(model, strategy=strategy).generate(prompts[:2], 10)
    assert result.tokens == Decoder(model, mode="autoregressive").generate(prompts[:2], 10).tokens
    assert result.forwards == 10
