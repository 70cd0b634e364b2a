"""LLaDA 2's layers in plain PyTorch, written from what its public code computes; nothing of transformers is used.

Names of modules are those of its checkpoints. A whole forward pass under a dense mask, nothing is cached.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + 0.2 * torch.randn(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def linear(width: int, out: int) -> nn.Linear:
    layer = nn.Linear(width, out, bias=False)
    nn.init.normal_(layer.weight, std=0.2)
    return layer


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, d = config, config["head_dim"]
        heads, width = config["num_attention_heads"], config["hidden_size"]
        self.query_key_value = linear(width, (heads + 2 * config["num_key_value_heads"]) * d)
        self.query_layernorm = Norm(d, config["rms_norm_eps"])
        self.key_layernorm = Norm(d, config["rms_norm_eps"])
        self.dense = linear(heads * d, width)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        rows = self.query_key_value(x).unflatten(-1, (-1, self.config["head_dim"]))
        q, k, v = rows[:, :, :heads], rows[:, :, heads : heads + groups], rows[:, :, heads + groups :]
        q, k = self.rotated(self.query_layernorm(q), positions), self.rotated(self.key_layernorm(k), positions)
        k, v = (part.repeat_interleave(heads // groups, 2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.config["head_dim"] ** 0.5 + mask
        return self.dense(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """The first part of a head turns, in pairs of features that lie half of it apart."""
        half = int(self.config["head_dim"] * self.config["partial_rotary_factor"]) // 2
        angle = positions[..., None, None] / self.config["rope_theta"] ** (torch.arange(half) / half)
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        return torch.cat([*turned, x[..., 2 * half :]], -1)


class Dense(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(width, inner), linear(width, inner), linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config["num_experts"], config["hidden_size"]))
        self.register_buffer("expert_bias", 0.5 * torch.randn(config["num_experts"]))


class Experts(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, width, inner = config, config["hidden_size"], config["moe_intermediate_size"]
        self.gate = Gate(config)
        self.experts = nn.ModuleList(Dense(width, inner) for _ in range(config["num_experts"]))
        self.shared_experts = Dense(width, inner * config["num_shared_experts"])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.stack([self.row(row) for row in rows]) for rows in x]) + self.shared_experts(x)

    def row(self, x: Tensor) -> Tensor:
        """One token: the bias has a say in which experts are chosen, and none in what they are worth."""
        count, groups = self.config["num_experts"], self.config["n_group"]
        worth = (self.gate.weight @ x).sigmoid()
        choice = (worth + self.gate.expert_bias).view(groups, count // groups)
        best_groups = choice.sort(1, descending=True).values[:, :2].sum(1).argsort(descending=True)
        allowed = [group * (count // groups) + i for group in best_groups[: self.config["topk_group"]].tolist()
                   for i in range(count // groups)]  # fmt: skip
        chosen = sorted(allowed, key=lambda i: -float(choice.flatten()[i]))[: self.config["num_experts_per_tok"]]
        total = sum(worth[i] for i in chosen)
        scale = self.config["routed_scaling_factor"]
        return sum(scale * worth[i] / total * self.experts[i](x) for i in chosen)


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], index: int) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)
        self.attention = Attention(config)
        is_dense = index < config["first_k_dense_replace"]
        self.mlp = Dense(width, config["intermediate_size"]) if is_dense else Experts(config)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), positions, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_hidden_layers"]))
        self.norm = Norm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = self.word_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.norm(x)


class LLaDA2(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.lm_head = Body(config), linear(config["hidden_size"], config["vocab_size"])

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids, position_ids, attention_mask)))
