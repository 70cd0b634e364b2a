"""Checkpoints for vLLM: the shipped model as a Llama of transformers, and small random models of other kinds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tidar_kernels.models import load_shipped
from tidar_kernels.models.tokenizer import EOS_ID, MASK_ID

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def shipped(folder: Path, *, entry: bool = True) -> Path:
    """The shipped model, 1.5 million parameters; without `entry`, nothing says that it is more than a Llama."""
    model, _ = load_shipped()
    config = model.config
    folder.mkdir(parents=True)
    weights = {f"model.{name}": x.contiguous() for name, x in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
    }
    if entry:
        values["tidar"] = {"block_size": config.block_size, "mask_token_id": MASK_ID}
    (folder / "config.json").write_text(json.dumps(values))
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    """The shipped model's tokenizer: a token a byte, and two more."""
    letters = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    rest = [b for b in range(256) if b not in letters.values()]
    vocabulary = letters | {chr(256 + n): b for n, b in enumerate(rest)}  # GPT-2's alphabet of bytes
    tokenizer = Tokenizer(models.BPE(vocabulary | {"<|mask|>": MASK_ID, "<|eos|>": EOS_ID}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|mask|>", "<|eos|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|eos|>",
        "mask_token": "<|mask|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """A random model of two layers: "llama", "mistral", "qwen2" or "qwen3"."""
    import transformers

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    more = {"mistral": {"sliding_window": None, "head_dim": 32}, "qwen3": {"head_dim": 32}, "llama": {"head_dim": 32}}
    config = getattr(transformers, f"{names[kind]}Config")(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
        tidar={"block_size": 4, "mask_token_id": 299},
        **more.get(kind, {}),
    )
    torch.manual_seed(seed)
    getattr(transformers, f"{names[kind]}ForCausalLM")(config).save_pretrained(folder)
    return folder


def adapter(folder: Path, checkpoint: Path, seed: int, *, lm_head: bool = False) -> Path:
    """A random LoRA adapter of every projection of a checkpoint, or of its (tied) lm_head alone, as PEFT saves it."""
    from safetensors import safe_open

    rank, noise, tensors, names = 8, torch.Generator().manual_seed(seed), {}, set()
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        for key in weights.keys():  # noqa: SIM118, it is no dict
            module = key.removesuffix(".weight")
            if lm_head:
                module = module.replace("model.embed_tokens", "lm_head")
            name = module.rpartition(".")[2]
            if name == "lm_head" if lm_head else name.endswith("_proj"):
                out, width = weights.get_slice(key).get_shape()
                tensors[f"base_model.model.{module}.lora_A.weight"] = 0.1 * torch.randn(rank, width, generator=noise)
                tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(out, rank, generator=noise)
                names.add(name)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values | {"target_modules": sorted(names)}))
    return folder
