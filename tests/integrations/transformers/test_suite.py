"""What transformers' own tests need to run under "tidar": the plugin, and what they ask of "eager" alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AttentionInterface

from tests.integrations.transformers.compatibility import MODELS, VOCAB_SIZE, padded_inputs, with_few_tokens
from tidar_kernels.integrations.transformers import tidar_attention_forward
from tidar_kernels.integrations.transformers.testing import SdpaAsTidar

pytest_plugins = ["pytester"]

BY_NAME = {model.name: model for model in MODELS}

TESTS = """
    import pytest, torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    CONFIG = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)

    @pytest.mark.parametrize("given, got", [(None, "tidar"), ("sdpa", "tidar"), ("eager", "eager")])
    def test_default(given, got):
        model = LlamaModel(LlamaConfig(**CONFIG, attn_implementation=given))
        assert model.config._attn_implementation == got
        model(torch.ones(1, 4, dtype=torch.long))

    def test_switch():
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager"))
        model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == "tidar"
"""


def test_the_plugin_puts_tidar_in_the_place_of_sdpa_and_counts(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    plugin = "tidar_kernels.integrations.transformers.testing"
    result = pytester.runpytest_subprocess("-p", plugin, "-p", "no:benchmark", "--junitxml=out.xml")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(['tests that ran attention under "tidar": 2'])
    report = (pytester.path / "out.xml").read_text()
    assert [report.count(f'name="tidar_calls" value="{calls}"') for calls in (0, 2)] == [2, 2]


def test_the_plugin_leaves_nothing_behind() -> None:
    model, plugin = BY_NAME["Llama"].build(), SdpaAsTidar()
    plugin.install()
    try:
        model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == "tidar"
        assert AttentionInterface()["tidar"] == plugin.attention
    finally:
        plugin.remove()
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    assert AttentionInterface()["tidar"] is tidar_attention_forward


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize("draft", ["prompt_lookup", "assistant", "itself"])
def test_assisted_generation_gives_the_tokens_of_greedy(name: str, draft: str) -> None:
    # transformers' tests of it ask for attention weights, hence for "eager".
    model, assistant = (with_few_tokens(BY_NAME[name].build()) for _ in range(2))
    with torch.no_grad():
        for weight in assistant.model.parameters():  # often right, not always
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": assistant},
        "itself": {"assistant_model": model},
    }[draft]
    inputs = {name: value[:1].repeat(1, 3) for name, value in padded_inputs("left").items()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    # An end that is never chosen: transformers 5.0.0 looks prompts up only where there is one.
    options.update(max_new_tokens=32, do_sample=False, eos_token_id=VOCAB_SIZE - 1)
    model.set_attn_implementation("sdpa")
    expected = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    for one in (model, assistant):
        one.set_attn_implementation("tidar")
    assert torch.equal(model.generate(**inputs, **options), expected)
