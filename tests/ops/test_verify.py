"""Sampling and verification: the definition, the law of what comes out, and the kernel against its twin."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.paths import DEVICES, KERNELS, on_every_path
from tests.toys import chain_law, distance
from tidar_kernels import eager, ops, testing
from tidar_kernels.ops.declaration import Backend
from tidar_kernels.ops.verify import RULES, SamplingParams, cpu, noise, sample, sampling_tensors, verify
from tidar_kernels.ops.verify.api import verify_operator

GREEDY = SamplingParams()


# The noise.


def test_philox_is_philox() -> None:
    """The published known answer of Philox-4x32-10, and the same in unbounded integers."""
    zero = torch.zeros((), dtype=torch.int64)
    assert noise.philox(zero, zero, zero, 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]

    def scalar_philox(seed: int, c0: int, c1: int, c2: int) -> list[int]:
        c, (k0, k1) = [c0, c1, c2, 0], (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k1, a & 0xFFFFFFFF]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        return c

    for seed, token, position, stream in ((1, 2, 3, 1), (-1, 262_143, 2**31 - 1, 3), (2**62 + 5, 0, 77, 2)):
        words = (torch.tensor(x) for x in (seed, token, position))
        assert noise.philox(*words, stream).tolist() == scalar_philox(seed % 2**64, token, position, stream)


def test_noise_of_a_token_is_one_word_of_philox() -> None:
    """Token t has word t % 4 of counter t // 4, asked for alone or with the whole vocabulary, for each sequence."""
    seeds, positions = torch.tensor([3, -5]), torch.tensor([[10, 11, 12], [7, 8, 9]])
    all_ = noise.gumbel_of_all(seeds[:, None], 50, positions, 1)
    assert all_.shape == (2, 3, 50)
    words = torch.stack([noise.philox(seeds[1], torch.tensor(c), torch.tensor(8), 1) for c in range(13)])
    assert torch.equal(all_[1, 1], noise.gumbel_of_words(words.flatten())[:50])
    token = torch.tensor([49, 0, 17, 18])
    assert torch.equal(noise.gumbel(seeds[1], token, positions[1, 1], 1), all_[1, 1, token])


def test_bounds_of_the_noise() -> None:
    """What the CPU path leaves out can win in no case: the variates of the least and of the largest word."""
    least, largest = noise.gumbel_of_words(torch.tensor([2**32 - 1, 0])).tolist()
    assert noise.LEAST < least < noise.LEAST + 0.02
    assert noise.LARGEST - 0.05 < largest < noise.LARGEST


def test_gumbel_has_its_moments_and_no_infinities() -> None:
    g = noise.gumbel(torch.tensor(3), torch.arange(2**20), torch.tensor(5), 0).double()
    assert g.isfinite().all()
    assert g.mean().item() == pytest.approx(0.5772156649, abs=4 * math.pi / 6**0.5 / 2**10)
    assert g.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    # Far out, where one in 2^17 lies: the law of the maximum needs the tail.
    share = (g > -math.log(-math.log1p(-(2.0**-17)))).double().mean().item()
    assert share == pytest.approx(2.0**-17, abs=4 * 2.0**-18.5)


def test_streams_positions_and_seeds_are_independent() -> None:
    token = torch.arange(2**16)
    draws = torch.stack(
        [
            noise.gumbel(torch.tensor(s), token, torch.tensor(p), w)
            for s, p, w in itertools.product((0, 1), (7, 8), (0, 1))
        ]
    )
    correlation = torch.corrcoef(draws.double()) - torch.eye(8)
    assert correlation.abs().max() < 5 / 2**8


# The definition of what is kept, in plain Python.


def kept_by_definition(x: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Top-k, then top-p of what is left, then min-p; tied tokens share their fate."""
    values = sorted(x, reverse=True)
    edge = values[top_k - 1] if 0 < top_k <= len(x) else -math.inf
    kept = [v for v in values if v >= edge]
    if top_p < 1.0:
        weights = [math.exp(v - values[0]) for v in kept]
        mass, total = 0.0, math.fsum(weights)
        for value, weight in zip(kept, weights, strict=True):
            mass, edge = mass + weight, value
            if mass >= top_p * total:
                break
    if min_p > 0.0:
        edge = max(edge, values[0] + math.log(min_p))
    return {token for token, value in enumerate(x) if value >= edge}


SHAPES = [
    ([0.3, -1.0, 2.0, 0.3, 1.7], 3, 1.0, 0.0),
    ([0.3, -1.0, 2.0, 0.3, 1.7], 4, 0.8, 0.0),
    ([0.3, -1.0, 2.0, 0.3, 1.7], 0, 0.62, 0.0),
    ([0.3, -1.0, 2.0, 0.3, 1.7], 0, 1.0, 0.3),
    ([0.3, -1.0, 2.0, 0.3, 1.7], 4, 0.95, 0.2),
    ([1.0] * 6, 0, 0.1, 0.0),  # all equal: all stay
    ([1.0] * 6, 2, 0.5, 0.9),
    ([0.0, 60.0, 0.0], 0, 0.999, 0.0),  # one-hot
    ([0.0, 60.0, 0.0], 0, 1e-6, 0.0),
    ([5.0, 5.0, 1.0, 1.0], 0, 0.5, 0.0),  # a tie at the edge
    ([5.0, 5.0, 1.0, 1.0], 3, 1.0, 0.0),
    ([2.0, -math.inf, 1.0], 0, 0.9, 0.0),
    ([2.0, 1.0], 7, 1.0, 1.0),  # k beyond the vocabulary
]


@pytest.mark.parametrize(("x", "top_k", "top_p", "min_p"), SHAPES)
def test_what_is_kept(x: list[float], top_k: int, top_p: float, min_p: float) -> None:
    knobs, _ = sampling_tensors([SamplingParams(1.0, top_k, top_p, min_p)], "cpu")
    shaped = eager.shaped_scores(torch.tensor([[x]]).double(), knobs.double())[0, 0]
    assert {i for i, v in enumerate(shaped.tolist()) if v > -math.inf} == kept_by_definition(x, top_k, top_p, min_p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("x", "top_k", "top_p", "min_p"), SHAPES)
def test_samples_are_of_what_is_kept(x: list[float], top_k: int, top_p: float, min_p: float, device: str) -> None:
    """Temperature 4 makes every kept token likely: 60 draws see all of few, and never another."""
    rows = 12 if ops.interpreting() else 60
    params = SamplingParams(4.0, top_k, top_p, min_p, seed=11)
    tokens = sample(torch.tensor(x, device=device).expand(1, rows, -1), torch.tensor([0]), params)
    scaled = [v / 4.0 for v in x]
    allowed = kept_by_definition(scaled, top_k, top_p, min_p) - {i for i, v in enumerate(x) if v == -math.inf}
    assert set(tokens[0].tolist()) <= allowed
    if 60.0 not in x and rows == 60:
        assert set(tokens[0].tolist()) == allowed


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_lowest_of_ties(device: str) -> None:
    logits = torch.tensor([[[0.0, 2.0, 2.0, -1.0], [-math.inf, -math.inf, 3.0, 3.0]]], device=device)
    assert sample(logits, torch.tensor([0]), GREEDY).tolist() == [[1, 2]]


def test_repetition_penalty_by_definition() -> None:
    logits = torch.tensor([[[2.0, -2.0, 1.0, 3.0]] * 2])
    seen = torch.tensor([[True, True, False, False]])
    knobs, _ = sampling_tensors([SamplingParams(repetition_penalty=2.0)], "cpu")
    shaped = eager.shaped_scores(logits, knobs, seen[:, None].expand(-1, 2, -1))
    assert shaped[0, 0].tolist() == [1.0, -4.0, 1.0, 3.0]
    # Row 1 has seen draft 1 = token 3 too: 3 / 2 loses to nothing but ties; row 0 has only seen draft 0 = token 2.
    drafts = torch.tensor([[2, 3]])
    accepted, following, _ = verify(
        logits, drafts, torch.tensor([0]), SamplingParams(repetition_penalty=4.0), seen=seen
    )
    assert (accepted.tolist(), following.tolist()) == ([2], [3])


# The law of what comes out.


def speculate(
    table: Tensor, draft_table: Tensor, block: int, length: int, params: list[SamplingParams], rule: Any
) -> Tensor:
    """Decode `length` tokens of the chain for a batch of requests: TiDAR's loop, with logits from two tables.

    Draft i of a block is drawn from row `[last committed token, i]` of `draft_table [vocab, block, vocab]`: like a mask
    row it knows nothing of the drafts beside it.
    """
    batch, vocab = len(params), table.shape[0]
    state = sampling_tensors(params, "cpu")
    stream = noise.Stream.TOKEN if rule == "coupled" else noise.Stream.DRAFT
    out = torch.full((batch, length + block), -1)
    filled, last = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    following = sample(table[last][:, None], filled, state)[:, 0]
    while int(filled.min()) < length:
        draft_logits = draft_table[last]
        drafted = (
            draft_logits.argmax(-1) if rule == "point_mass" else sample(draft_logits, filled, state, stream=stream)
        )
        drafts = torch.cat([following[:, None], drafted[:, 1:]], dim=1)
        logits = table[drafts]
        found = verify(
            logits, drafts, filled + 1, state, rule=rule, draft_logits=draft_logits if rule == "rejection" else None
        )
        open_ = filled < length
        for i in range(block):
            take = open_ & (i < found.accepted)
            out[take, filled[take] + i] = drafts[take, i]
        last = torch.where(open_, drafts.gather(1, found.accepted[:, None] - 1)[:, 0], last)
        filled = torch.where(open_, filled + found.accepted, filled)
        following = torch.where(open_, found.next_tokens, following)
    assert vocab > int(out[:, :length].max())
    return out[:, :length]


CHUNK = 4_000  # requests at a time: what they need fits a cache


def in_chunks(
    table: Tensor, drafts: Tensor, block: int, length: int, params: list[SamplingParams], rule: Any
) -> Tensor:
    """`speculate` of many requests."""
    parts = [params[start : start + CHUNK] for start in range(0, len(params), CHUNK)]
    return torch.cat([speculate(table, drafts, block, length, part, rule) for part in parts])


SAMPLES = 100_000
SHAPINGS = {
    "plain": {"temperature": 1.0},
    "top_k": {"temperature": 1.3, "top_k": 2},
    "top_p": {"temperature": 0.8, "top_p": 0.75},
}


def toy(vocab: int, block: int) -> tuple[Tensor, Tensor]:
    """A chain, and drafts that are like it but wrong: accepted often, not always."""
    generator = torch.Generator().manual_seed(vocab * 10 + block)
    table = torch.randn(vocab, vocab, generator=generator) * 1.5
    drafts = table[:, None] + torch.randn(vocab, block, vocab, generator=generator)
    return table, drafts


@pytest.mark.parametrize(
    ("vocab", "block", "shaping"),
    [
        *((5, 2, shaping) for shaping in SHAPINGS),
        *(pytest.param(3, 4, shaping, marks=pytest.mark.thorough) for shaping in SHAPINGS),
        (3, 1, "plain"),
        (8, 3, "top_p"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_law_of_the_first_four_tokens(rule: str, vocab: int, block: int, shaping: str) -> None:
    table, drafts = toy(vocab, block)
    params = [SamplingParams(**SHAPINGS[shaping], seed=seed) for seed in range(SAMPLES)]
    tokens = in_chunks(table, drafts, block, 4, params, rule)
    found, limit = distance(tokens, chain_law(table, 0, 4, params[0]))
    assert found <= limit
    if rule == "coupled":
        alone = speculate(table, drafts[:, :1], 1, 4, params[:CHUNK], rule)
        assert torch.equal(tokens[:CHUNK], alone)


@pytest.mark.parametrize("rule", ["rejection", "point_mass"])
def test_a_replacement_drawn_from_p_is_seen(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public bug: after a rejection the token comes from p instead of norm(max(p - q, 0)). The test must be red."""
    table, drafts = toy(5, 3)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(SAMPLES)]
    right = verify_operator.cpu

    def wrong(target: Any, drafted: Any, requests: Any) -> Any:
        accepted, following, bad = right(target, drafted, requests)
        of_p = eager.sample(target.logits, *requests[:3], stream=noise.Stream.RESIDUAL)
        return accepted, of_p.gather(1, accepted[:, None] - 1)[:, 0], bad

    monkeypatch.setattr(verify_operator, "cpu", wrong)
    found, limit = distance(in_chunks(table, drafts, 3, 4, params, rule), chain_law(table, 0, 4, params[0]))
    assert found > 2 * limit


# The kernel against its twin.


@pytest.mark.parametrize(("device", "case"), on_every_path("verify"))
def test_kernel_parity(device: str, case: testing.VerifyCase) -> None:
    testing.check_verify(case, device)


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("rule", RULES)
def test_kernel_parity_of_many_decisions(rule: Any, device: str) -> None:
    """A small vocabulary and drafts that are often wrong: acceptances and replacements of every kind."""
    generator = torch.Generator().manual_seed(0)
    logits, draft_logits = torch.randn(2, 64, 2, 8, generator=generator).to(device)
    drafts = torch.randint(8, (64, 2), generator=generator).to(device)
    drafts[::8, 1] = -1  # missing: the token that follows is a sample of p itself, whatever draft_logits hold
    draft_logits[8, 1] = math.nan
    params = [SamplingParams(1.0, seed=seed) for seed in range(64)]
    options: dict[str, Any] = {"rule": rule} | ({"draft_logits": draft_logits} if rule == "rejection" else {})
    positions = torch.arange(64, device=device)
    found = verify(logits, drafts, positions, params, **options)
    expected = verify(logits, drafts, positions, params, backend="eager", **options)
    assert 5 < found.accepted.eq(2).sum() < 59
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.tolist() == b.tolist(), name


KNOBS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},  # noise for the whole vocabulary
    "cold": {"temperature": 0.05},  # noise for the few tokens that can win
    "top_k": {"temperature": 0.8, "top_k": 50},
    "all": {"temperature": 0.8, "top_k": 3000, "top_p": 0.95, "min_p": 1e-3, "repetition_penalty": 1.2},
    "top_p": {"temperature": 1.0, "top_p": 0.95},
    "small_top_p": {"temperature": 1.0, "top_p": 1e-3},
    "nearly_all": {"temperature": 2.0, "top_p": 0.9999},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", KNOBS)
def test_cpu_path_over_a_large_vocabulary(name: str, rule: Any) -> None:
    """262,144 tokens, with ties, -inf, drafts that stay and one that does not: the twin's decisions."""
    vocab = 262_144
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 3, vocab, generator=generator).mul(4).round(decimals=1).mul(0.5)
    logits[..., ::7] = -math.inf
    draft_logits = logits.roll(1, 1) + torch.randn(1, 3, vocab, generator=generator).mul(0.1)
    seen = torch.rand(1, vocab, generator=generator) < 0.2 if "repetition_penalty" in KNOBS[name] else None
    params, positions = SamplingParams(**KNOBS[name], seed=9), torch.tensor([40])
    options: dict[str, Any] = {"rule": rule} | ({"draft_logits": draft_logits} if rule == "rejection" else {})
    picks = sample(logits, positions, params, seen=seen, backend="eager")
    assert sample(logits, positions, params, seen=seen).tolist() == picks.tolist()
    for wrong in (1, 2):
        drafts = torch.cat([picks[:, :1], picks[:, :-1]], dim=1)
        drafts[0, wrong] = (drafts[0, wrong] + 1) % vocab
        found = verify(logits, drafts, positions, params, seen=seen, **options)
        expected = verify(logits, drafts, positions, params, seen=seen, backend="eager", **options)
        assert [x.tolist() for x in found] == [x.tolist() for x in expected]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shaping", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2, "repetition_penalty": 1.5}])
def test_cpu_path_of_many_decisions(rule: Any, shaping: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row as for a large vocabulary, over a small one: every kind of verdict, bad rows too."""
    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(cpu, "_COUNTERS", 1)  # chunks of 4 tokens
    generator = torch.Generator().manual_seed(1)
    logits, draft_logits = torch.randn(2, 96, 3, 11, generator=generator)
    logits[5, 0, 3], logits[6, 1, 4], logits[7, 0], draft_logits[9, 1] = math.nan, math.inf, -math.inf, math.nan
    params = [SamplingParams(1.0 if seed % 5 else 0.0, **shaping, seed=seed) for seed in range(96)]
    seen = torch.rand(96, 11, generator=generator) < 0.3
    options: dict[str, Any] = {"rule": rule, "seen": seen, "mix": logits.roll(1, 2), "beta": 0.7, "check": False}
    options |= {"draft_logits": draft_logits} if rule == "rejection" else {}
    positions = torch.arange(96)
    picks = sample(0.7 * logits + 0.3 * options["mix"], positions, params, seen=seen, backend="eager")
    right = torch.randint(4, (96, 1), generator=generator) > torch.arange(3)
    right[6] = True  # comes to its bad row
    drafts = torch.where(right, picks.roll(1, 1), torch.randint(11, (96, 3), generator=generator))
    drafts[::8, 1] = -1
    found = verify(logits, drafts, positions, params, **options)
    expected = verify(logits, drafts, positions, params, backend="eager", **options)
    assert min(found.accepted.bincount(minlength=4)[1:].tolist()) >= 5
    assert found.bad_rows.ge(0).sum() >= (3 if rule == "coupled" else 2)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.tolist() == b.tolist(), name
    tokens = sample(logits, positions, params, seen=seen)
    assert tokens.tolist() == sample(logits, positions, params, seen=seen, backend="eager").tolist()


@pytest.mark.interpret
@pytest.mark.thorough
@pytest.mark.parametrize("rule", ["rejection", "coupled", "point_mass"])
def test_chunks_are_one_vocabulary(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four chunks of 16 tokens and of two tiles each: the same decisions, with ties and lists across chunks."""
    from tidar_kernels.ops.verify import triton

    monkeypatch.setattr(triton, "CHUNK", 16)
    monkeypatch.setattr(triton, "BLOCK_V", 8)
    monkeypatch.setattr(triton, "BLOCK_L", 4)
    generator = torch.Generator().manual_seed(2)
    shapings: list[dict[str, Any]] = [
        {}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.6}, {"min_p": 0.3}, {"top_k": 1}, {"top_p": 0.999},
        {"top_k": 49, "min_p": 0.01},
    ]  # fmt: skip
    params = [SamplingParams(0.9, **shaping, seed=seed) for seed, shaping in enumerate(shapings)]
    logits = torch.randn(len(params), 2, 50, generator=generator).mul(2).round(decimals=1)
    logits[..., ::9] = -math.inf
    draft_logits, positions = logits.roll(1, 1).mul(0.9), torch.arange(len(params))
    options: dict[str, Any] = {"rule": rule} | ({"draft_logits": draft_logits} if rule == "rejection" else {})
    picks = sample(logits, positions, params, backend="eager")
    assert sample(logits, positions, params).tolist() == picks.tolist()
    for drafts in (picks.roll(1, 1), draft_logits.argmax(-1)):
        found = verify(logits, drafts, positions, params, **options)
        expected = verify(logits, drafts, positions, params, backend="eager", **options)
        assert [x.tolist() for x in found] == [x.tolist() for x in expected]


def operands(vocab: int, rows: int, dtype: torch.dtype, seed: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(2, rows, vocab, generator=generator) * scale

    logits = normal(3.0)
    tensors = {"logits": logits, "draft_logits": logits + normal(0.7), "mix": logits + normal(1.0)}
    tensors = {name: x.to(device, dtype) for name, x in tensors.items()}
    return tensors | {"seen": (torch.rand(2, vocab, generator=generator) < 0.2).to(device)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_batch_mates_change_nothing(rule: Any, device: str) -> None:
    at = operands(40, 4, torch.float32, 5, device)
    params = [SamplingParams(0.9, seed=1), SamplingParams(1.1, top_k=7, seed=2)]
    positions, drafts = torch.tensor([10, 90], device=device), at["draft_logits"].argmax(-1)

    def run(rows: slice) -> list[list[int]]:
        q = {"draft_logits": at["draft_logits"][rows]} if rule == "rejection" else {}
        return [
            x.tolist() for x in verify(at["logits"][rows], drafts[rows], positions[rows], params[rows], rule=rule, **q)
        ]

    together, alone = run(slice(0, 2)), [run(slice(b, b + 1)) for b in range(2)]
    assert together == [[x[0] for x in pair] for pair in zip(*alone, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits(temperature: float, value: float, device: str) -> None:
    """Sequence 1 is bad at row 1, which its drafts reach; sequence 0 goes on; row 2 of sequence 2 is not reached."""
    logits = torch.randn(4, 3, 9, device=device)
    params = SamplingParams(temperature, seed=4)
    positions = torch.tensor([1, 1, 1, 1], device=device)
    good = sample(logits, positions, params)
    drafts = torch.cat([good[:, :1] * 0, good[:, :-1]], dim=1)
    drafts[2, 1] = (drafts[2, 1] + 1) % 9
    logits[1, 1, 4] = value
    logits[2, 2, 4] = value
    logits[3] = -math.inf
    found = verify(logits, drafts, positions, params, check=False)
    assert found.accepted.tolist() == [3, 2, 1, 1]
    assert found.bad_rows.tolist() == [-1, 1, -1, 0]
    assert found.next_tokens.tolist() == [good[0, 2], -1, good[2, 0], -1]
    with pytest.raises(ValueError, match=r"^logits: expected finite numbers, got NaN, inf .* in sequence 1, row 1$"):
        verify(logits, drafts, positions, params)
    assert sample(logits, positions, params)[1].tolist() == [good[1, 0], -1, good[1, 2]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_what_a_greedy_draft_was_drawn_from_does_not_matter(backend: Any, device: str) -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0]] * 2], device=device)
    drafts, nowhere = torch.tensor([[0, 1]], device=device), torch.full_like(logits, math.nan)
    found = verify(
        logits,
        drafts,
        torch.tensor([0], device=device),
        GREEDY,
        rule="rejection",
        draft_logits=nowhere,
        backend=backend,
    )
    assert (found.accepted.tolist(), found.next_tokens.tolist(), found.bad_rows.tolist()) == ([2], [1], [-1])


@pytest.mark.parametrize("path", ["cpu", pytest.param("interpreter", marks=pytest.mark.interpret)])
def test_opcheck(path: str) -> None:
    at = operands(12, 3, torch.float32, 0, "cpu")
    knobs, seeds = sampling_tensors([SamplingParams(1.0)] * 2, "cpu")
    positions, drafts = torch.tensor([1, 2]), torch.randint(12, (2, 3))
    args = (at["logits"], drafts, positions, knobs, seeds, at["seen"], at["draft_logits"], at["mix"], 0.5, 1)
    torch.library.opcheck(torch.ops.tidar_kernels.verify.default, args)
    torch.library.opcheck(torch.ops.tidar_kernels.sample.default, (at["logits"], positions, knobs, seeds, None, 0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, r"^temperature: expected 0, or a number in \[1e-4, 1e4\], got -1.0$"),
        ({"temperature": math.nan}, ValueError, r"^temperature: expected 0, or a number in \[1e-4, 1e4\], got nan$"),
        ({"temperature": "1"}, TypeError, r"^temperature: expected a number, got str$"),
        ({"top_k": -1}, ValueError, r"^top_k: expected >= 0, got -1$"),
        ({"top_k": 1.5}, TypeError, r"^top_k: expected an int, got float$"),
        ({"top_p": 0.0}, ValueError, r"^top_p: expected a number in \(0, 1\], got 0.0$"),
        ({"min_p": 1.5}, ValueError, r"^min_p: expected a number in \[0, 1\], got 1.5$"),
        ({"repetition_penalty": 0}, ValueError, r"^repetition_penalty: expected a number in \[1e-4, 1e4\], got 0$"),
        ({"seed": 2**64}, ValueError, r"^seed: expected a 64-bit int, got 18446744073709551616$"),
    ],
)
def test_bad_params(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(**change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, ValueError, r"^logits: expected 3 dimensions, got shape \[2, 3\]$"),
        ({"drafts": torch.zeros(2, 4).long()}, ValueError, r"^drafts: expected shape \[2, 3\], got \[2, 4\]$"),
        ({"drafts": torch.zeros(2, 3)}, TypeError, r"^drafts: expected int64 on cpu, got torch.float32 on cpu$"),
        ({"positions": torch.zeros(3).long()}, ValueError, r"^positions: expected shape \[2\], got \[3\]$"),
        ({"positions": torch.zeros(2)}, TypeError, r"^positions: expected int32 or int64, got torch.float32$"),
        ({"params": [GREEDY]}, ValueError, r"^params: expected one for each of 2 sequences, got 1$"),
        ({"rule": "lossy"}, ValueError, r"^rule: expected one of coupled, rejection, point_mass, got 'lossy'$"),
        ({"rule": "rejection"}, ValueError, r'^draft_logits: expected for rule "rejection" and no other, got none'),
        ({"draft_logits": torch.zeros(2, 3, 5)}, ValueError, r"^draft_logits: expected .* got some for 'coupled'$"),
        ({"beta": 0.5}, ValueError, r"^beta: expected a number in \[0, 1\], and 1 without mix, got 0.5$"),
        ({"mix": torch.zeros(2, 3, 4)}, ValueError, r"^mix: expected shape \[2, 3, 5\], got \[2, 3, 4\]$"),
        ({"seen": torch.zeros(2, 5)}, TypeError, r"^seen: expected dtype bool, got torch.float32$"),
        (
            {"seen": torch.zeros(2, 5, dtype=torch.bool, device="meta")},
            ValueError,
            r"^seen: expected device cpu like the logits, got meta$",
        ),
        ({"backend": "triton"}, ValueError, r"^backend: expected CUDA tensors"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(2, 3, 5),
        "drafts": torch.zeros(2, 3, dtype=torch.int64),
        "positions": torch.zeros(2, dtype=torch.int64),
        "params": GREEDY,
    }
    with pytest.raises(error, match=message):
        verify(**arguments | change)


GOOD = sampling_tensors([GREEDY] * 2, "cpu")


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (
            GOOD._replace(knobs=GOOD.knobs.double()),
            TypeError,
            r"^params.knobs: expected dtype torch.float32, got .*64$",
        ),
        (GOOD._replace(knobs=GOOD.knobs[:1]), ValueError, r"^params.knobs: expected shape \[2, 5\], got \[1, 5\]$"),
        (GOOD._replace(knobs=GOOD.knobs.tolist()), TypeError, r"^params.knobs: expected a torch.Tensor, got list$"),
        (GOOD._replace(knobs=GOOD.knobs.to("meta")), ValueError, r"^params.knobs: expected device cpu .*, got meta$"),
        (GOOD._replace(seeds=GOOD.seeds[:1]), ValueError, r"^params.seeds: expected shape \[2\], got \[1\]$"),
        (GOOD._replace(seeds=GOOD.seeds[:, None]), ValueError, r"^params.seeds: expected 1 dimensions, got shape"),
        (GOOD._replace(seeds=GOOD.seeds.float()), TypeError, r"^params.seeds: expected dtype torch.int64, got .*32$"),
        (GOOD._replace(seeds=None), TypeError, r"^params.seeds: expected a torch.Tensor, got NoneType$"),
        (GOOD._replace(seeds=GOOD.seeds.to("meta")), ValueError, r"^params.seeds: expected device cpu .*, got meta$"),
    ],
)
def test_parameters_as_tensors_that_do_not_fit(
    params: Any, error: type[Exception], message: str, backend: Backend | None
) -> None:
    positions = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(error, match=message):
        sample(torch.zeros(2, 3, 5), positions, params, backend=backend)
    with pytest.raises(error, match=message):
        verify(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), positions, params, backend=backend)
