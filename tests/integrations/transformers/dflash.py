"""A DFlash drafter in the form of a published one, and its rule in plain PyTorch: whole passes, a dense mask, no cache.

Written from facts of the public code: which keys and tensors there are, that K/V of the context come from the target's
hidden states through each layer's projections, that the block sees the context and itself (in layers of sliding
attention causally, within the window), that row m drafts the token at its own position, and what a step keeps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from tests.integrations.transformers.published import MASK, VOCAB_SIZE

LAYERS = (0, 2)
BLOCK = 4

# A published drafter's configuration with small numbers.
CONFIG: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": BLOCK,
    "bos_token_id": 1,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": list(LAYERS)},
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_types": ["full_attention"] * 2,
    "max_position_embeddings": 40960,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_target_layers": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    layer = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,), "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner), "self_attn.q_proj": (heads, width),
        "self_attn.k_proj": (kv_heads, width), "self_attn.v_proj": (kv_heads, width),
        "self_attn.o_proj": (width, heads), "self_attn.q_norm": (size,), "self_attn.k_norm": (size,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()
    }
    features = width * len(config["dflash_config"]["target_layer_ids"])
    shapes |= {"fc": (width, features), "hidden_norm": (width,), "norm": (width,)}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }


def write_drafter(folder: Path, tensors: dict[str, Tensor], **changed: Any) -> Path:
    """A checkpoint; `changed` are keys of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def features_of(target: Any, tokens: Tensor, layers: tuple[int, ...] = LAYERS) -> Tensor:
    """What comes out of the target's layers, `[batch, rows, layers * width]`."""
    states = target.model(input_ids=tokens, output_hidden_states=True).hidden_states
    return torch.cat([states[layer + 1] for layer in layers], dim=-1)


def _rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions of `x [batch, rows, heads, head_dim]`, halves side by side."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def dense_logits(
    target: Any, tensors: dict[str, Tensor], features: Tensor, seeds: Tensor, config: dict[str, Any] = CONFIG
) -> Tensor:
    """Logits `[batch, L - 1, vocab]` of the drafts after `seeds [batch]`, the context being `features`."""
    eps, theta, size = config["rms_norm_eps"], config["rope_theta"], config["head_dim"]
    own = config["dflash_config"]

    def norm(x: Tensor, name: str) -> Tensor:
        weight = tensors[f"{name}.weight"]
        return rms_norm(x, weight.shape, weight, eps)

    def project(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T

    block, past = config["block_size"], features.shape[1]
    tokens = torch.full((len(seeds), block), own["mask_token_id"])
    tokens[:, 0] = seeds
    x = target.model.embed_tokens.weight[tokens] * own.get("input_embedding_scale", 1.0)
    context = norm(project(features, "fc"), "hidden_norm")
    at, everywhere = past + torch.arange(block), torch.arange(past + block)
    for i, kind in enumerate(config["layer_types"]):
        layer = f"layers.{i}"
        rows = norm(x, f"{layer}.input_layernorm")
        every = torch.cat([context, rows], dim=1)
        q, k, v = (
            project(rows if name == "q" else every, f"{layer}.self_attn.{name}_proj").unflatten(-1, (-1, size))
            for name in "qkv"
        )
        q = _rotated(norm(q, f"{layer}.self_attn.q_norm"), at, theta)
        k = _rotated(norm(k, f"{layer}.self_attn.k_norm"), everywhere, theta)
        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        visible = torch.ones(block, past + block, dtype=torch.bool)
        if kind == "sliding_attention":
            distance = at[:, None] - everywhere
            visible = (distance >= 0) & (distance < config["sliding_window"])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * size**-0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        x = x + project(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2), f"{layer}.self_attn.o_proj")
        rows = norm(x, f"{layer}.post_attention_layernorm")
        gate = silu(project(rows, f"{layer}.mlp.gate_proj"))
        x = x + project(gate * project(rows, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    logits = target.lm_head(norm(x[:, 1:], "norm")) * own.get("output_multiplier", 1.0)
    cap = own.get("final_logit_softcapping", 0.0)
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def decoded(
    target: Any, tensors: dict[str, Tensor], prompt: list[int], new_tokens: int, config: dict[str, Any] = CONFIG
) -> tuple[list[int], list[int]]:
    """The public loop, greedily: new tokens, and what each step kept."""
    layers = tuple(config["dflash_config"]["target_layer_ids"])

    def best(tokens: list[int]) -> list[int]:
        return target(input_ids=torch.tensor([tokens])).logits[0].argmax(-1).tolist()

    done, accepted = list(prompt), []
    seed = best(prompt)[-1]
    while len(done) < len(prompt) + new_tokens:
        features = features_of(target, torch.tensor([done]), layers)
        logits = dense_logits(target, tensors, features, torch.tensor([seed]), config)
        drafts = [seed, *logits[0].argmax(-1).tolist()]
        targets = best(done + drafts)[len(done) :]
        count = 1
        while count < len(drafts) and targets[count - 1] == drafts[count]:
            count += 1
        done, seed = done + drafts[:count], targets[count - 1]
        accepted.append(count)
    return done[len(prompt) :], accepted


def trained(target: Any, prompts: Tensor, steps: int = 60) -> dict[str, Tensor]:
    """A drafter that has learnt what the target says after these prompts `[batch, n]`."""
    with torch.no_grad():
        text = prompts
        for _ in range(16):
            text = torch.cat([text, target(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
        features = features_of(target, text)
    tensors = {name: tensor.requires_grad_() for name, tensor in random_tensors(CONFIG).items()}
    optimizer = torch.optim.Adam(tensors.values(), lr=1e-2)
    anchors = range(prompts.shape[1], text.shape[1] - BLOCK + 1)
    for step in range(steps):
        anchor = anchors[step % len(anchors)]
        logits = dense_logits(target, tensors, features[:, :anchor], text[:, anchor])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, anchor + 1 : anchor + BLOCK].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}
