"""Every strategy: its rows against a predicate of its own, its output against autoregressive decoding, its law."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from typing import Any, get_args

import pytest
import torch

from tests.paths import REPOSITORY
from tests.toys import PROMPTS, Chain, certain, chain_law, decode_chain, distance, sharp_model, toy
from tidar_kernels import Decoder, patterns
from tidar_kernels.decoding import session as session_module
from tidar_kernels.decoding import strategies as strategies_module
from tidar_kernels.decoding.session import Session, StepConfig
from tidar_kernels.decoding.strategies import (
    Batch,
    BlockDiffusion,
    SelfSpeculation,
    StepResult,
    Strategy,
    StrategyName,
    autoregressive,
    base,
    by_name,
    class_of,
    isd,
    tidar,
)
from tidar_kernels.decoding.strategies.head import one_pass_rows
from tidar_kernels.decoding.strategies.isd import acceptance_of, expected_tokens
from tidar_kernels.models import Transformer, load_shipped
from tidar_kernels.nn.adapters import GatedLoRA, add_gated_lora
from tidar_kernels.ops.verify import RULES, SamplingParams
from tidar_kernels.patterns import Pattern, Role


def strategies() -> dict[str, Strategy]:
    """Those whose output is that of autoregressive decoding."""
    return {
        "tidar_causal": tidar(4, bidirectional=False),
        "tidar_levels_1": tidar(4, levels=[1]),
        "tidar_levels_1_3": tidar(4, levels=[1, 3]),
        "tidar_levels_1_2_6": tidar(6, levels=[1, 2, 6]),
        "isd_2": isd(2),
        "isd_4": isd(4),
        "isd_4_unshifted": isd(4, shifted=False),
        "flare_2": isd(2, bidirectional=True),
        "flare_4_unshifted": isd(4, bidirectional=True, shifted=False),
        "self_speculation_2": SelfSpeculation(2),
        "self_speculation_5": SelfSpeculation(5),
    }


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharp_model()


# The rows.


def check(pattern: Pattern, visible: Any, positions: list[int], masks: int) -> None:
    rows = len(positions)
    expected = torch.tensor([[visible(q, k) for k in range(rows)] for q in range(rows)])
    assert torch.equal(pattern.dense(), expected)
    assert pattern.positions.tolist() == positions
    assert pattern.roles.tolist() == [Role.DRAFT] * (rows - masks) + [Role.MASK] * masks


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_isd_is_strictly_causal(stride: int) -> None:
    """I-DLM: 2N - 1 rows at consecutive positions; masks see earlier masks."""
    rows = 2 * stride - 1
    pattern = patterns.isd_step(stride)
    check(pattern, lambda q, k: k <= q, list(range(rows)), stride - 1)
    assert pattern.causal_len == stride  # no K/V of a mask row may enter the cache, causal as it is


@pytest.mark.parametrize("stride", [2, 3, 8])
@pytest.mark.parametrize("shifted", [True, False])
def test_flare_masks_see_all_before_and_each_other(stride: int, shifted: bool) -> None:
    rows = 2 * stride - shifted
    pattern = patterns.isd_step(stride, bidirectional=True, shifted=shifted)
    check(pattern, lambda q, k: k <= q or (q >= stride and k >= stride), list(range(rows)), rows - stride)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_block_sees_itself_and_is_never_committed(length: int) -> None:
    pattern = patterns.block_step(length)
    check(pattern, lambda q, k: True, list(range(length)), length)
    assert pattern.causal_len == 0


@pytest.mark.parametrize(("block", "levels"), [(1, [1]), (4, [1]), (4, [1, 3]), (6, [1, 2, 6]), (5, [1, 2, 3, 4, 5])])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_sparse_levels(block: int, levels: list[int], bidirectional: bool) -> None:
    """Blocks of the chosen levels only: each sees that many drafts, and starts after them."""
    rows = [(0, m, m) for m in range(block)] + [(level, m, level + m) for level in levels for m in range(block)]

    def visible(q: int, k: int) -> bool:
        (q_level, q_m, _), (k_level, k_m, _) = rows[q], rows[k]
        if k_level == 0:
            return k_m < q_level if q_level else k_m <= q_m
        return q_level == k_level and (bidirectional or k_m <= q_m)

    pattern = patterns.tidar_step(block, bidirectional, levels)
    check(pattern, visible, [position for *_, position in rows], len(levels) * block)
    if levels == list(range(1, block + 1)):
        for name in ("lead", "own", "positions", "roles"):
            assert torch.equal(getattr(pattern, name), getattr(patterns.tidar_step(block, bidirectional), name))


@pytest.mark.parametrize("block", [1, 2, 5])
def test_every_level_is_the_bonus_form(block: int) -> None:
    """`[last | k drafts | k + 1 blocks of k + 1]`: block i at positions L + 1 + i + m, lead `[0, i + 1)`."""
    k, step = block - 1, tidar(block)
    assert step.pattern.q_len == 1 + k + (k + 1) ** 2
    for i in range(k + 1):
        for m in range(k + 1):
            row = 1 + k + i * (k + 1) + m
            assert step.pattern.positions[row] == 1 + i + m
            assert step.pattern.lead[row].tolist() == [0, i + 1]
    assert step.sources.tolist() == [[-1] * k] + [[a * block + m for m in range(1, block)] for a in range(1, block + 1)]


# The output.


@pytest.mark.parametrize("name", strategies())
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.9, "seed": 7}, {"temperature": 1.1, "repetition_penalty": 1.3}]
)
def test_output_is_autoregressive(model: Transformer, name: str, params: dict[str, Any]) -> None:
    expected = Decoder(model, mode="autoregressive").generate(PROMPTS, 33, **params)
    found = Decoder(model, strategy=strategies()[name]).generate(PROMPTS, 33, **params)
    assert found.tokens == expected.tokens
    for b, tokens in enumerate(expected.tokens):
        # Committed is what causal rows wrote, and nothing else. The last token's K/V may be there or not.
        length = len(PROMPTS[b]) + len(tokens)
        assert int(found.cache.lengths[b]) == length
        for mine, plain in ((found.cache.k, expected.cache.k), (found.cache.v, expected.cache.v)):
            torch.testing.assert_close(mine[:, b, :, :length], plain[:, b, :, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rule"), [("tidar_causal", "rejection"), ("tidar_levels_1_3", "coupled"), ("flare_4_unshifted", "coupled")]
)
def test_one_lm_head_pass_or_two(model: Transformer, name: str, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 seeds: the tokens are the same, and the lm_head of a step runs as often as said."""
    prompts, passes, logits = [PROMPTS[i % 3] for i in range(20)], [0], Transformer.logits

    def counted(self: Transformer, hidden: torch.Tensor) -> torch.Tensor:
        passes[0] += 1
        return logits(self, hidden)

    monkeypatch.setattr(Transformer, "logits", counted)
    found = []
    for most in (0, 20 * strategies()[name].pattern.q_len):  # type: ignore[attr-defined]
        monkeypatch.setattr(base, "one_pass_rows", lambda device, most=most: most)
        session = Session(model, StepConfig(strategies()[name], model.config.mask_token_id, rule), 20, 64)
        for seed, tokens in enumerate(prompts):
            session.add(tokens, 8, SamplingParams(0.9, seed=seed))
        requests = dict(session.requests)
        before = passes[0]
        while session.requests:
            session.step()
        found.append([request.tokens for request in requests.values()])
        assert passes[0] - before == session.forwards * (1 if most else 2)
    assert found[0] == found[1]


def test_rows_of_one_lm_head_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence of B = 8 has 64 rows; a CPU, and a chip that nobody has looked up, take two passes."""
    assert one_pass_rows(torch.device("cpu")) == 0
    for capability, expected in (((9, 0), 64), ((7, 5), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, at=capability: at)
        assert one_pass_rows(torch.device("cuda", 1)) == expected


@pytest.mark.parametrize("name", ["tidar_levels_1_3", "isd_4", "self_speculation_5"])
def test_adapters_run_on_mask_rows_alone(model: Transformer, name: str) -> None:
    """R-ISD: with any adapter the output is that of the base model; the drafts are others."""
    settings: dict[str, Any] = {"temperature": 0.9, "seed": 3}
    base = Decoder(model, mode="autoregressive").generate(PROMPTS, 24, **settings)
    drafted = Decoder(model, strategy=strategies()[name]).generate(PROMPTS, 24, **settings)
    adapted_model = copy.deepcopy(model)
    add_gated_lora(adapted_model, 4, 8.0)
    torch.manual_seed(0)
    for module in adapted_model.modules():
        if isinstance(module, GatedLoRA):
            torch.nn.init.normal_(module.lora_b)
    adapted = Decoder(adapted_model, strategy=strategies()[name]).generate(PROMPTS, 24, **settings)
    plain = Decoder(adapted_model, mode="autoregressive").generate(PROMPTS, 24, **settings)
    assert adapted.tokens == plain.tokens == base.tokens
    assert adapted.accepted != drafted.accepted


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        # From a cold start: one token, then as many as there are drafts.
        ("tidar_levels_1", [1, 4, 1, 4]),  # after 4 of 4 the block of level 1 knows nothing more
        ("tidar_levels_1_3", [1, 4, 3, 4, 3]),
        ("tidar_levels_1_2_6", [1, 6, 6, 6]),
        ("isd_4_unshifted", [1, 4, 4, 4]),
        ("flare_4_unshifted", [1, 4, 4, 4]),
        ("self_speculation_5", [5, 5, 5]),
    ],
)
def test_right_drafts_are_accepted(name: str, accepted: list[int]) -> None:
    """Each slot gets the guess for its own position: one row off, and the guess is for another token."""
    model, chain = certain(7, 12)
    strategy, steps = strategies()[name], []
    step = strategy.step

    def counted(batch: Batch) -> StepResult:
        outcome = step(batch)
        steps.append(int(outcome.verified.accepted))
        return outcome

    strategy.step = counted
    tokens, _ = decode_chain(model, strategy, [SamplingParams()], sum(accepted))
    assert tokens[0].tolist() == chain[: sum(accepted)]
    assert steps == accepted


def test_shifted_masks_guess_one_further() -> None:
    """The same for masks that predict the token after their position."""
    model, chain = certain(7, 12)
    tables = model.tables.view(7, model.offsets, -1)
    tables[:, 1:-1] = tables[:, 2:].clone()
    tokens, forwards = decode_chain(model, isd(4), [SamplingParams()], 21)
    assert tokens[0].tolist() == chain[:21]
    assert forwards == 1 + 5


def test_block_diffusion_with_certain_tokens() -> None:
    """Every block comes out right in one pass and a commit; or one token a pass, if the threshold is out of reach."""
    model, chain = certain(7, 4)
    tokens, forwards = decode_chain(model, BlockDiffusion(4), [SamplingParams()] * 2, 12)
    assert tokens.tolist() == [chain[:12]] * 2
    assert forwards == 3 * 2
    tokens, forwards = decode_chain(model, BlockDiffusion(4, threshold=1.0), [SamplingParams()], 12)
    assert tokens.tolist() == [chain[:12]]
    assert forwards == 3 * 4


def test_block_diffusion_in_a_batch_is_what_it_is_alone(model: Transformer) -> None:
    decoder = Decoder(model, strategy=BlockDiffusion(4, threshold=0.5))
    together = decoder.generate(PROMPTS, 21)
    assert together.tokens == [decoder.generate(prompt, 21).tokens[0] for prompt in PROMPTS]
    assert 0 < together.tokens_per_forward < 4


# The law.

SAMPLES = 100_000


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("tidar_levels_1_3", "rejection"),
        ("isd_4", "rejection"),
        ("isd_4", "point_mass"),
        ("self_speculation_5", "rejection"),
    ],
)
def test_law_of_the_first_four_tokens(name: str, rule: str) -> None:
    model = toy(4, 12)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(SAMPLES)]
    tokens, _ = decode_chain(model, strategies()[name], params, 4, rule)
    table = model.tables.view(4, model.offsets, 5)[:, 0, :4]
    found, limit = distance(tokens, chain_law(table, 0, 4, params[0]))
    assert found <= limit


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_isd_tokens_a_forward(stride: int) -> None:
    """`(2 + p + .. + p^(N-2)) / (2 - p^(N-1))` (I-DLM), where every draft is accepted with the same probability p."""
    p_row, q_row = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.3, 0.1])
    p = torch.minimum(p_row, q_row).sum().item()
    model = Chain(p_row.log().expand(3, 3).clone(), q_row.log().expand(3, 2 * stride, 3).clone())
    length, batch = 600, 64
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(batch)]
    strategy, steps = isd(stride), []
    step = strategy.step

    def counted(batch: Batch) -> StepResult:
        outcome = step(batch)
        steps.append(outcome.verified.accepted[batch.cache.lengths < length])
        return outcome

    strategy.step = counted
    decode_chain(model, strategy, params, length, "rejection")
    accepted = torch.cat(steps).double()
    expected = expected_tokens(p, stride)
    assert expected == pytest.approx(sum((2, *(p**i for i in range(1, stride - 1)))) / (2 - p ** (stride - 1)))
    # Cycles of a verifying and maybe a cold step are the independent trials: no more than half of the steps.
    error = accepted.std() / (len(accepted) / 2) ** 0.5
    assert accepted.mean().item() == pytest.approx(expected, abs=4 * error.item())


@pytest.mark.parametrize("stride", [2, 4])
def test_isd_tokens_a_forward_of_the_shipped_model(stride: int) -> None:
    """At the acceptance that was measured; drafts are not all equally likely to stay, which moves it a little."""
    model, tokenizer = load_shipped()
    prompts = [
        tokenizer.encode(text) for text in ("def main(argv=None):\n    ", "class Reader:\n    def ", "import os\n")
    ]
    result = Decoder(model, strategy=isd(stride, shifted=False)).generate(prompts, 120)
    passes = sum(map(len, result.accepted))
    kept = [acceptance_of(accepted, stride) for accepted in result.accepted]
    expected = sum(len(a) * expected_tokens(p, stride) for a, p in zip(result.accepted, kept, strict=True)) / passes
    # The last pass is cut short by the number of tokens that were asked for.
    assert sum(map(sum, result.accepted)) / passes == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("accepted", [[], [1]])
def test_acceptance_without_a_judged_draft(accepted: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^accepted: expected passes that judge drafts, got \["):
        acceptance_of(accepted, 3)


# Bad input.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: isd(1), ValueError, r"^stride: expected >= 2, got 1$"),
        (lambda: isd(2.0), TypeError, r"^stride: expected an int, got float$"),
        (lambda: isd(2, shifted=1), TypeError, r"^shifted: expected a bool, got int$"),
        (lambda: SelfSpeculation(1), ValueError, r"^length: expected >= 2, got 1$"),
        (lambda: BlockDiffusion(0), ValueError, r"^length: expected >= 1, got 0$"),
        (lambda: BlockDiffusion(2, 1.5), ValueError, r"^threshold: expected a number in \[0, 1\], got 1.5$"),
        (lambda: tidar(4, levels=[]), ValueError, r"^levels: expected ascending ints from 1 to at most 4, got \[\]$"),
        (lambda: tidar(4, levels=[2, 3]), ValueError, r"^levels: .* got \[2, 3\]$"),
        (lambda: tidar(4, levels=[1, 3, 2]), ValueError, r"^levels: .* got \[1, 3, 2\]$"),
        (lambda: tidar(4, levels=[1, 1]), ValueError, r"^levels: .* got \[1, 1\]$"),
        (lambda: tidar(4, levels=[1, 5]), ValueError, r"^levels: .* got \[1, 5\]$"),
        (lambda: by_name("medusa", 2), ValueError, r"^strategy: expected a Strategy or one of tidar, .* got 'medusa'$"),
    ],
)
def test_bad_strategies(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "isd"}, r"^block_size: expected an int, got NoneType$"),
        ({"strategy": "isd", "stride": 1}, r"^stride: expected >= 2, got 1$"),
        ({"strategy": "isd", "stride": 3, "block_size": 3}, r'^stride: expected for strategy "isd" or "flare" without'),
        ({"stride": 3}, r'^stride: expected for strategy "isd" or "flare"'),
        ({"strategy": tidar(4), "block_size": 5}, r"^block_size: expected that of the strategy, 4, got 5$"),
        ({"strategy": "isd", "stride": 3, "beta": 0.5}, r'^beta: expected 1 for strategies but "tidar"'),
        ({"strategy": tidar(4, levels=[1, 3]), "beta": 0.5}, r'^beta: expected 1 for strategies but "tidar"'),
    ],
)
def test_bad_decoder_arguments(model: Transformer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Decoder(model, **arguments)


@pytest.mark.parametrize("name", ["strategies", "exact"])
def test_the_pages_python_runs(name: str) -> None:
    page = REPOSITORY / "docs" / f"{name}.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    if name == "strategies":
        assert len(blocks) == 2
        assert names["result"].tokens == names["plain"].tokens
        assert 1 <= names["chosen"].block_size <= 8
    else:
        assert len(blocks) == 1
        assert names["tidar"].tokens == names["plain"].tokens
        assert torch.equal(*(names[x].cache.k[..., : names["length"], :] for x in ("tidar", "plain")))


# What a strategy says of itself.


def test_a_strategy_says_what_is_true_of_it() -> None:
    """By its class before one is made, and by itself: the same, and what `StepConfig` and `Decoder` go by."""
    made = {name: by_name(name, 4) for name in get_args(StrategyName)}
    for name, strategy in made.items():
        kind = class_of(name)
        assert type(strategy) is kind
        assert strategy.name == name
        for fact in ("title", "symbol", "options", "rules", "equals_autoregression", "can_be_exact", "graphable"):
            assert getattr(strategy, fact) == getattr(kind, fact)
        assert strategy.label.startswith(f"{kind.title}, {kind.symbol} = 4")
        for rule in RULES:
            with nullcontext() if rule in kind.rules else pytest.raises(ValueError, match=r"^sampling: expected"):
                StepConfig(strategy, rule=rule)
        with nullcontext() if kind.can_be_exact else pytest.raises(ValueError, match=r"^exact: expected False"):
            StepConfig(strategy, exact=True)
    assert len({kind.title for kind in map(type, made.values())}) == len(made)
    assert {name for name, strategy in made.items() if strategy.takes_beta} == {"tidar"}
    assert {name for name, kind in made.items() if not kind.equals_autoregression} == {"block_diffusion"}
    assert tidar(8, levels=[1, 2, 4]).label == "TiDAR, B = 8, levels 1 2 4"
    assert not tidar(8, levels=[1, 2, 4]).takes_beta
    assert BlockDiffusion(8, 0.5).label == "block diffusion, L = 8, threshold 0.5"
    assert autoregressive().label == "autoregressive"


def test_old_names_warn() -> None:
    with pytest.warns(FutureWarning, match=r"Outcome is StepResult now"):
        assert strategies_module.Outcome is StepResult
    with pytest.warns(FutureWarning, match=r"Step is StepConfig now"):
        assert session_module.Step is StepConfig
    for module in (strategies_module, session_module):
        with pytest.raises(AttributeError, match=r"has no attribute 'Absent'"):
            _ = module.Absent


def test_a_block_that_nothing_can_follow_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN after its last token alone: the request ends with all of the block, as one by one it would."""
    model = sharp_model()
    given = Session(model, StepConfig(BlockDiffusion(3), mask_token_id=29), 1, 40, cuda_graph=False)
    request = given.requests[given.add([5, 6, 7], 9)]
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden) * (torch.nan if hidden.shape[1] == 1 else 1.0))
    given.step()
    assert (len(request.tokens), request.finish_reason) == (3, "error")
    assert request.error == "expected finite logits, got NaN, inf or nothing above -inf for position 6"
