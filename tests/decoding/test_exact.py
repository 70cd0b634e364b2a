"""Exact decoding: bits of what is committed, drafted and verified or one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.toys import sharp_model
from tidar_kernels import Decoder, patterns
from tidar_kernels.decoding.exact import exact_rows
from tidar_kernels.decoding.strategies import SelfSpeculation, Strategy, isd, tidar
from tidar_kernels.models import Transformer, TransformerConfig, load_shipped
from tidar_kernels.nn.adapters import GatedLoRA, add_gated_lora

# Products of smaller ones round alike for any number of rows, and would prove nothing.
CONFIG = TransformerConfig(
    vocab_size=50, hidden_size=256, intermediate_size=320, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16,
    qk_norm=True, mask_token_id=49, block_size=4,
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9] * 5]
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.cuda),
]


def make(device: str) -> Transformer:
    return sharp_model(CONFIG, by=6.0).to(device)


@contextmanager
def recorded_logits(model: Any) -> Iterator[list[Tensor]]:
    """The lm_head's results while the context is open."""
    seen: list[Tensor] = []
    inner = model.logits

    def logits(hidden: Tensor) -> Tensor:
        seen.append(inner(hidden))
        return seen[-1]

    model.logits = logits
    try:
        yield seen
    finally:
        del model.logits


def decode(model: Any, prompts: list[list[int]], strategy: Strategy | None, new_tokens: int = 24) -> Any:
    how: dict[str, Any] = {"mode": "autoregressive"} if strategy is None else {"strategy": strategy}
    return Decoder(model, exact=True, **how).generate(prompts, new_tokens, temperature=0.8, seed=5)


def assert_same_bits(found: Any, expected: Any) -> None:
    assert found.tokens == expected.tokens
    for b, length in enumerate(expected.cache.lengths.tolist()):
        length = min(length, int(found.cache.lengths[b]))
        for mine, plain in ((found.cache.k, expected.cache.k), (found.cache.v, expected.cache.v)):
            assert torch.equal(mine[:, b, :, :length], plain[:, b, :, :length])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "strategy",
    [tidar(1), tidar(4), tidar(8, levels=[1, 4]), isd(3), SelfSpeculation(4)],
    ids=lambda strategy: f"{strategy.name}{strategy.drafts}",
)
def test_committed_keys_and_values_are_those_of_autoregression(device: str, strategy: Strategy) -> None:
    """All layers' K/V, so all that went into them: every draft row of every step, in a ragged batch."""
    model = make(device)
    assert_same_bits(decode(model, PROMPTS, strategy), decode(model, PROMPTS, None))


@pytest.mark.interpret
def test_by_the_kernels() -> None:
    model, prompts = make("cpu"), PROMPTS[:1]
    assert_same_bits(decode(model, prompts, tidar(3), 4), decode(model, prompts, None, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_its_sequences(device: str) -> None:
    model = make(device)
    together = decode(model, PROMPTS, None)
    for b, prompt in enumerate(PROMPTS):
        alone = Decoder(model, mode="autoregressive", exact=True).generate([prompt], 24, temperature=0.8, seed=5 + b)
        assert alone.tokens[0] == together.tokens[b]
        length = int(alone.cache.lengths[0])
        assert torch.equal(alone.cache.k[:, 0, :, :length], together.cache.k[:, b, :, :length])


def test_logits_of_draft_rows_are_those_of_autoregression() -> None:
    model = make("cpu")
    with recorded_logits(model) as plain, torch.no_grad():
        expected = decode(model, PROMPTS[:1], None)
    with recorded_logits(model) as mine, torch.no_grad():
        found = decode(model, PROMPTS[:1], tidar(4))
    by_token = [x[0, 0] for x in plain]  # the prompt's, then one a token
    at = 1
    drafted = iter(mine[1:])
    for accepted in found.accepted[0]:
        rows = next(drafted)[0]
        for i in range(min(accepted, len(by_token) - at)):
            assert torch.equal(rows[i], by_token[at + i])
        at += accepted
        next(drafted)  # the chosen block's
    assert at > len(expected.tokens[0])


def test_without_it_bits_differ_and_the_tests_would_see_it() -> None:
    """If this fails, the platform's products do not depend on their number of rows, and exactness costs nothing."""
    model, bits = make("cpu"), []
    for strategy in (None, tidar(4)):
        how: dict[str, Any] = {"mode": "autoregressive"} if strategy is None else {"strategy": strategy}
        bits.append(Decoder(model, **how).generate(PROMPTS, 24, temperature=0.8, seed=5))
    with pytest.raises(AssertionError):
        assert_same_bits(bits[1], bits[0])


def test_the_shipped_model() -> None:
    model, tokenizer = load_shipped()
    prompt = tokenizer.encode("class Queue:\n    def __init__(self")
    expected = decode(model, [prompt], None, 40)
    for block_size in (4, 8):
        assert_same_bits(decode(model, [prompt], tidar(block_size), 40), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_leave_the_bits(device: str) -> None:
    """R-ISD: mask rows run adapters, and what is committed has the base model's bits."""
    model = make(device)
    base = decode(model, PROMPTS, None, 16)
    add_gated_lora(model, 4, 8.0)
    for module in model.modules():
        if isinstance(module, GatedLoRA):
            torch.nn.init.normal_(module.lora_b)
    for strategy in (None, tidar(4), isd(3)):
        assert_same_bits(decode(model, PROMPTS, strategy, 16), base)


def test_only_causal_rows_pay() -> None:
    """Operands with a step's rows are split; all others are exact as a whole; other calls pass."""
    weight, x = torch.randn(8, 16), torch.randn(2, 20, 16)
    with exact_rows(patterns.tidar_step(4)):
        split, whole = F.linear(x, weight), F.linear(x[:, :5], weight)
        assert torch.equal(torch.relu(x), x.clamp(min=0))
    with exact_rows():
        everything = F.linear(x, weight)
    assert torch.equal(split[:, :4], everything[:, :4])
    assert torch.equal(split[:, 4:], F.linear(x[:, 4:], weight))
    assert torch.equal(whole, everything[:, :5])


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"^exact: expected a bool, got str$"):
        Decoder(make("cpu"), exact="yes")  # type: ignore[arg-type]


# Operators called with keywords: the arguments of a call are matched by name.


def test_step_attention_with_keywords_inside_exact_rows() -> None:
    """`sinks` was dropped where an operator's arguments were taken apart by their place in the call."""
    pattern = patterns.tidar_step(3)
    rows = pattern.q_len
    q, k, v = (torch.randn(2, heads, rows, 16) for heads in (4, 2, 2))
    cached = [torch.randn(2, 2, 20, 16) for _ in range(2)]
    lengths, sinks = torch.tensor([7, 11], dtype=torch.int32), torch.randn(4) + 2.0
    step = torch.ops.tidar_kernels.step_attention
    before = (q, k, v, *cached, lengths, pattern.lead, pattern.own, 0.25, 20)
    named = dict(
        zip(
            ("q", "k", "v", "k_cache", "v_cache", "lengths", "lead", "own", "scale", "max_context"), before, strict=True
        )
    )
    with exact_rows(pattern):
        expected, _ = step(*before, None, None, sinks, None)
        without, _ = step(*before)
        assert torch.equal(step(*before, sinks=sinks)[0], expected)
        assert torch.equal(step(*before[:4], sinks=sinks, **dict(list(named.items())[4:]))[0], expected)
        assert torch.equal(step(**named, sinks=sinks, bits=None, reach=None, softcap=None)[0], expected)
        assert torch.equal(step(*before, softcap=5.0)[0], step(*before, None, 5.0)[0])
    assert float((without - expected).abs().max()) > 0.05
    torch.testing.assert_close(step(*before, sinks=sinks)[0], expected, rtol=1e-5, atol=1e-5)


def test_gated_lora_with_keywords_inside_exact_rows() -> None:
    x, weight, bias = torch.randn(18, 256), torch.randn(320, 256), torch.randn(320)
    a, b, gate = torch.randn(4, 256), torch.randn(320, 4), torch.rand(18)
    lora = torch.ops.tidar_kernels.gated_lora
    with exact_rows():
        expected, _ = lora(x, weight, bias, a, b, gate, 0.5, False)
        by_name = lora(x, weight, bias=bias, lora_b=b, lora_a=a, row_invariant=False, scale=0.5, gate=gate)
        assert torch.equal(by_name[0], expected)
        assert not torch.equal(
            lora(x, weight, bias=None, lora_a=a, lora_b=b, gate=gate, scale=0.5, row_invariant=False)[0], expected
        )
    assert torch.equal(lora(x, weight, bias, a, b, gate, 0.5, True)[0], expected)


def test_activations_of_exact_rows_are_those_of_each_row_alone() -> None:
    """A width that vectors do not divide; what writes into a tensor that it is given is left alone."""
    pattern = patterns.tidar_step(3)
    x, out = torch.randn(2, pattern.q_len, 37), torch.empty(2, pattern.q_len, 37)
    with exact_rows(pattern):
        found = torch.nn.functional.silu(x)
        torch.exp(x, out=out)
    for b in range(2):
        for row in range(3):
            assert torch.equal(found[b, row], torch.nn.functional.silu(x[b, row].clone()))
    torch.testing.assert_close(found, torch.nn.functional.silu(x))
    torch.testing.assert_close(out, x.exp())
