"""Tiny checkpoints in the form of published ones: their configurations with small numbers, their names of tensors.

Weights are random. `reference` is the same model made directly in transformers, for a decode that shares nothing with
the loaders but its layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.integrations.transformers.llada2 import LLaDA2

VOCAB_SIZE, MASK = 64, 50

# Of every published configuration, in numbers that a CPU likes.
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.2,
    "torch_dtype": "float32",
}
_QWEN = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "max_window_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "transformers_version": "4.52.4",
}
_SDAR = {
    "model_type": "sdar",
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARForCausalLM",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "block_size": 4,
    "fuse_cross_entropy": True,
    "mask_token_id": MASK,
}


_LLADA2 = {
    "model_type": "llada2_moe",
    "architectures": ["LLaDA2MoeModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "max_window_layers": 28,
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 3,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 8,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "transformers_version": "4.52.3",
    "use_bias": False,
    "use_cache": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
}


@dataclass(frozen=True)
class Published:
    """A system's checkpoint: its configuration, the class of transformers with its layers, and its names of tensors.

    Without a class its layers are those of this folder, written from the public code.
    """

    config: dict[str, Any]
    built_in: str
    names: tuple[tuple[str, str], ...] = ()  # of transformers, of the system


PUBLISHED = {
    "nemotron": Published(
        {
            "architectures": ["NemotronLabsDiffusionModel"],
            "model_type": "nemotron_labs_diffusion",
            "auto_map": {
                "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
                "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
            },
            "ar_loss_weight": 1.0,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_implementation": "sdpa",
            "block_size": 8,
            "bos_token_id": 1,
            "dlm_loss_weight": None,
            "dlm_paradigm": "bidirectional",
            "dp_varying_mask_ratio": False,
            "eos_token_id": 11,
            "hidden_act": "silu",
            "mask_token_id": MASK,
            "max_position_embeddings": 1024,
            "mlp_bias": False,
            "rms_norm_eps": 1e-5,
            # The query scale grows at multiples of the original length: at 16, so that a few tokens reach it.
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 64.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
            },
            "sliding_window": None,
            "tie_word_embeddings": False,
            "transformers_version": "5.0.0",
        },
        "Ministral3",
        (("model.", "encoder."), ("lm_head.", "diffusion_head.")),
    ),
    "tidar": Published({"model_type": "qwen3", "architectures": ["TiDARForCausalLM"], **_QWEN}, "Qwen3"),
    "tidar small": Published({"model_type": "qwen2", "architectures": ["TiDARSmallForCausalLM"], **_QWEN}, "Qwen2"),
    "i-dlm": Published({**_QWEN, **_SDAR, "block_size": 3, "use_regular_causal": True}, "Qwen3"),
    "sdar": Published({**_QWEN, **_SDAR}, "Qwen3"),
    "fast-dllm": Published(
        {
            **_QWEN,
            "model_type": "Fast_dLLM_Qwen",
            "architectures": ["Fast_dLLM_QwenForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
                "AutoModel": "modeling.Fast_dLLM_QwenModel",
                "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
            },
            "bd_size": 16,
            "layer_types": ["full_attention"] * 2,
        },
        "Qwen2",
    ),
    "llada-2": Published(_LLADA2, ""),
    "qwen3": Published({**_QWEN, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "Qwen3"),
}

_NOT_OF_LAYERS = ("architectures", "auto_map", "model_type", "attn_implementation", "torch_dtype")


def reference(name: str, seed: int = 0, **changed: Any) -> Any:
    """The model itself, with plain attention; `changed` are keys of its configuration."""
    published = PUBLISHED[name]
    torch.manual_seed(seed)
    if not published.built_in:
        return _sharper(LLaDA2({**published.config, **_SMALL}))
    settings = {**published.config, **_SMALL, **changed}
    settings = {key: value for key, value in settings.items() if key not in _NOT_OF_LAYERS}
    config = getattr(transformers, f"{published.built_in}Config")(**settings)
    config._attn_implementation = "eager"
    return _sharper(getattr(transformers, f"{published.built_in}ForCausalLM")(config))


def _sharper(model: Any) -> Any:
    """Few tokens that are likely, so that drafts are right now and then."""
    with torch.no_grad():
        model.lm_head.weight[8:] *= 0.3
    return model.eval()


def write(name: str, folder: Path, model: Any, **changed: Any) -> Path:
    """A checkpoint of the system; `changed` are keys of its config.json, None takes one out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**PUBLISHED[name].config, **_SMALL, **changed}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None or k in _QWEN}))
    tensors = {}
    for key, tensor in model.state_dict().items():
        for own, published in PUBLISHED[name].names:
            if key.startswith(own):
                key = published + key.removeprefix(own)
        tensors[key] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(
    folder: Path, model: Any, prefix: str, targets: tuple[str, ...], rank: int = 4, **changed: Any
) -> dict[str, torch.Tensor]:
    """A LoRA adapter as PEFT saves it, on modules named after `prefix`; returns what it adds to each weight."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4 * rank, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    added, tensors = {}, {}
    for name, linear in model.named_modules():
        if name.endswith(targets):
            a, b = 0.2 * torch.randn(rank, linear.in_features), 0.2 * torch.randn(linear.out_features, rank)
            own = f"base_model.model.{prefix}{name.removeprefix('model.')}"
            tensors[f"{own}.lora_A.weight"], tensors[f"{own}.lora_B.weight"] = a, b
            added[name] = 4.0 * b @ a
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return added
