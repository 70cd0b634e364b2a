"""Continuous batching of transformers: `generate_batch` under "tidar" gives the tokens that it gives under "sdpa"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import tidar_kernels.integrations.transformers  # noqa: F401  # registers "tidar"
from tidar_kernels import ops

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [9], [2, 7, 1, 8, 2, 8], [1, 6, 1, 8]]
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
}


def generated(model: Any, implementation: str, max_batch_tokens: int = 64) -> list[list[int]]:
    model.set_attn_implementation(implementation)
    outputs = model.generate_batch(
        inputs=PROMPTS,
        generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=64, block_size=32, max_batch_tokens=max_batch_tokens, auto_switch_to_flash=False
        ),
        progress_bar=False,
    )
    return [list(output.generated_tokens) for _, output in sorted(outputs.items(), key=lambda item: str(item[0]))]


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_of_sdpa(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    expected = generated(model, "sdpa")
    calls, step = [], ops.step_attention

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["block_table"].shape)
        return step(*args, **kwargs)

    monkeypatch.setattr(ops, "step_attention", counting)
    assert generated(model, "tidar") == expected
    assert [len(tokens) for tokens in expected] == [8] * 4
    assert calls
    assert model.config._attn_implementation == "tidar"
