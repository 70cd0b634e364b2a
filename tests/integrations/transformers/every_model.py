"""Every causal model type of the installed transformers, as a tiny random model: equal to `generate`, or refused.

A type that decodes otherwise, or raises anything but a refusal that names the model, is a fault.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tidar_kernels import Decoder
from tidar_kernels.integrations.transformers.attention import NAME as OURS

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

VOCAB_SIZE, MASK_TOKEN_ID, NEW_TOKENS, MOST_PARAMETERS = 97, 3, 24, 100_000_000
PROMPTS = [list(range(5, 10)), list(range(20, 29))]
STRATEGIES: tuple[dict[str, Any], ...] = ({"block_size": 4}, {"strategy": "isd", "stride": 3})

# Set where the type's configuration has the name: the sizes of everything, and what is special about attention.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "sliding_window": 8, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
    "is_decoder": True, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 64, "n_shared_experts": 1,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "dim_ff": 64, "ffn_dim": 64, "hidden_size_per_layer_input": 16, "embedding_size": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "zero_expert_num": 2,
    "expert_ffn_hidden_size": 32,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "dense_intermediate_size": 96, "ffn_hidden_size": 64, "q_lora_rank": 16, "kv_lora_rank": 16,
    "global_head_dim": 32, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 4, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 8, "head_dim": 16}

# What else single types need to be built.
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "gemma3n_text": _SHARED,
    "gemma4_text": _SHARED,
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": _LINEAR,
    "mamba2": {"num_heads": 8},
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp": _LINEAR,
    "qwen4_exp_text": _LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8]},
    "xlnet": {"d_head": 16, "d_model": 64, "n_head": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
_WITHOUT: dict[str, tuple[str, ...]] = {
    "cwm": ("bos_token_id",),
    "emu3": ("bos_token_id",),
    "falcon": ("head_dim",),
    "mllama": ("bos_token_id",),
    "modernbert-decoder": ("bos_token_id",),
    "prophetnet": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings",),
}


@dataclass(frozen=True)
class Row:
    """What became of one type: "equal", "refused" or "not built"; a fault is "wrong" or "raised"."""

    kind: str
    model: str
    verdict: str
    reason: str = ""


def options(kind: str) -> dict[str, Any]:
    """The configuration of a tiny model of this type."""
    default = CONFIG_MAPPING[kind]()
    small = {name: value for name, value in _SMALL.items() if _has(default, name)}
    if hasattr(default, "qk_rope_head_dim"):
        small |= {name: value for name, value in _LATENT.items() if _has(default, name)}
    for name in _WITHOUT.get(kind, ()):
        small.pop(name, None)
    inner = getattr(default, "text_config", None)
    if inner is None or inner is default:
        return {**small, **_OPTIONS.get(kind, {})}
    own = options(inner.model_type) if inner.model_type in CONFIG_MAPPING else small
    return {"text_config": {**own, **_OPTIONS.get(kind, {})}}


def _has(config: Any, name: str) -> bool:
    """Whether a configuration has a value of this name; some raise of their own where it differs by layer."""
    try:
        return hasattr(config, name)
    except Exception:
        return True


def build(kind: str) -> Any:
    """A random model in evaluation mode, float32, with weights so large that a wrong mask or position shows."""
    config = transformers.AutoConfig.for_model(kind, **options(kind))
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters at its smallest here")
    config = transformers.AutoConfig.for_model(kind, **options(kind))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers logs about configurations that nobody has seen before."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def generated(model: Any) -> list[list[int]]:
    """Greedy tokens of `model.generate`, a prompt at a time."""
    found = []
    for prompt in PROMPTS:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


def judged(kind: str) -> Row:
    """Build a model of a type, generate and decode."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    name = name if isinstance(name, str) else name[0]
    with quiet():
        try:
            model = build(kind)
            expected = generated(model)
        except Exception as error:
            return Row(kind, name, "not built", f"{type(error).__name__}: {_line(error)}")
        name, before = type(model).__name__, model.config._attn_implementation
        if any(len(tokens) != NEW_TOKENS for tokens in expected):
            return Row(kind, name, "not built", "generate ends before its 24 tokens")
        for strategy in STRATEGIES:
            label = strategy.get("strategy", "tidar")
            try:
                decoder = Decoder.from_transformers(model, mask_token_id=MASK_TOKEN_ID, **strategy)
            except (TypeError, ValueError) as error:
                if name not in str(error):
                    return Row(
                        kind, name, "raised", f"without the model's name, {type(error).__name__}: {_line(error)}"
                    )
                after = model.config._attn_implementation
                if after != before or model.training or generated(model) != expected:
                    return Row(kind, name, "wrong", f"not as it was after its refusal: {before}, {after}")
                return Row(kind, name, "refused", _line(error))
            except Exception as error:
                return Row(kind, name, "raised", f"{label}: {type(error).__name__}: {_line(error)}")
            try:
                result = decoder.generate(PROMPTS, NEW_TOKENS)
            except Exception as error:
                return Row(kind, name, "raised", f"{label}: {type(error).__name__}: {_line(error)}")
            if result.tokens != expected:
                return Row(kind, name, "wrong", f"{label}: other tokens")
        if generated(model) != expected:
            return Row(kind, name, "wrong", f'generate under "{OURS}" gives other tokens')
    return Row(kind, name, "equal")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:3])[:300] if lines else ""


def write(folder: Path, rows: Sequence[Row]) -> Path:
    """The table as `models-transformers-VERSION.json`, one row a line; docs/transformers.md is generated from it."""
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    head = {"transformers": transformers.__version__, "torch": torch.__version__, "date": today}
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in sorted(rows, key=lambda row: row.kind))
    path = folder / f"models-transformers-{transformers.__version__}.json"
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    return path
