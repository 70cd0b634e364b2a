"""What the tests of training transformers models share: tiny models, and documents to train on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import tidar_kernels.integrations.transformers  # noqa: E402, F401  (registers the attention)
from tidar_kernels.integrations.transformers.collator import TiDARCollator  # noqa: E402

VOCAB, MASK, BLOCK = 40, 39, 4

# peft asks the newest transformers by a name that it deprecates.
old_name_in_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Documents of different lengths, with and without prompts: a first one that is all prompt but one token.
EXAMPLES: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9], "prompt_length": 4},
    {"input_ids": list(range(1, 14))},
    {"input_ids": [20, 21, 22, 23, 24, 25, 26], "labels": [-100, -100, 22, 23, -100, 25, 26]},
]


def tiny(kind: str = "Qwen3", implementation: str = "tidar", seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of two layers, of the real class."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": implementation,
    }
    config = getattr(transformers, f"{kind}Config")(**shape | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # logits that differ, so that a wrong one shows
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def batch_of(examples: list[dict[str, Any]] = EXAMPLES, **options: Any) -> dict[str, Any]:
    return TiDARCollator(BLOCK, MASK, **options)(examples)
