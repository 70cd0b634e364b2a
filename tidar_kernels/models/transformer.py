"""A small Llama/Qwen-style decoder in plain PyTorch, the model that the package ships and tests itself with.

Pre-norm blocks of `TiDARAttention` and SwiGLU, RMSNorm, rotary positions, tied embeddings. The forward pass returns
hidden states; `logits` applies the lm_head to the rows that need it, which in a TiDAR step are few.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import KVCache
from ..distributed import ContextParallel
from ..nn.attention import RMSNorm, RotaryEmbedding, TiDARAttention
from ..ops import checks
from ..patterns import Pattern
from ..patterns.arguments import check_instance
from .settings import MODEL_SIZES, check_settings, setting

__all__ = ["Transformer", "TransformerConfig"]


def _size(name: str) -> Any:
    return setting(kind=int, low=1, high=MODEL_SIZES[name])


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a `Transformer`. `mask_token_id` and `block_size` are what the model was trained with.

    Raises:
        TypeError, ValueError: an entry is of the wrong type or out of range, or two do not fit together.
    """

    vocab_size: int = _size("vocab_size")
    hidden_size: int = _size("hidden_size")
    intermediate_size: int = _size("intermediate_size")
    num_layers: int = _size("num_layers")
    num_heads: int = _size("num_heads")
    num_kv_heads: int = _size("num_kv_heads")
    head_dim: int = _size("head_dim")
    rope_theta: float = setting(10_000.0, low=1e-6, high=1e30)
    qk_norm: bool = setting(False)
    norm_eps: float = setting(1e-6, high=1.0)
    mask_token_id: int | None = setting(None, kind=int)
    block_size: int | None = setting(None, kind=int, low=1, high=2**16)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary positions, got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            expected = f"a multiple of num_kv_heads = {self.num_kv_heads}"
            raise ValueError(f"num_heads: expected {expected}, got {self.num_heads}")
        if self.mask_token_id is not None and self.mask_token_id >= self.vocab_size:
            raise ValueError(f"mask_token_id: expected < vocab_size = {self.vocab_size}, got {self.mask_token_id}")

    @property
    def num_parameters(self) -> int:
        """Weights of a model of this shape, known without making it."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        layer = (heads * self.head_dim + 3 * self.intermediate_size) * self.hidden_size + norms
        return (self.vocab_size + 1) * self.hidden_size + self.num_layers * layer

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """Raises TypeError or ValueError naming an entry that is unknown, missing, or has a value that does not fit."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config: expected entries among {sorted(known)}, got {unknown}")
        missing = sorted(f.name for f in fields(cls) if f.default is MISSING and f.name not in values)
        if missing:
            raise ValueError(f"config: expected entries {missing}, got none")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: TransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = TiDARAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            layer_idx=layer_idx,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], pattern: Pattern | ContextParallel, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), pattern, rotary=rotary, cache=cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Decoder-only transformer whose attention takes a `Pattern` instead of a mask."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if not isinstance(config, TransformerConfig):
            raise TypeError(f"config: expected a TransformerConfig, got {type(config).__name__}")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal(0, 0.02), residual outputs scaled by 1/sqrt(2 * layers) as in GPT-2."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * self.config.num_layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor, pattern: Pattern | ContextParallel, cache: KVCache | None = None) -> Tensor:
        """Hidden states of every row of `pattern`.

        Args:
            tokens: int64 `[batch, pattern.q_len]`.
            pattern: the rows' intervals and positions. With a `ContextParallel`, tokens and result are those of this
                rank's rows, and there is no cache.
            cache: context keys and values; the pattern's causal rows are written after it, not yet committed.

        Returns:
            `[batch, q_len, hidden_size]`, after the final norm.

        Raises:
            TypeError, ValueError: an argument is of another type, or there are other rows than the pattern's.
        """
        rows = pattern.local if isinstance(pattern, ContextParallel) else check_instance("pattern", pattern, Pattern)
        checks.tensor("tokens", tokens, 2)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens: expected dtype int64, got {tokens.dtype}")
        if tokens.shape[1] != rows.q_len:
            raise ValueError(f"tokens: expected {rows.q_len} rows for {rows.name}, got shape {list(tokens.shape)}")
        if cache is not None:
            check_instance("cache", cache, KVCache)
        positions = rows.on(tokens.device)[2]
        if cache is not None:
            positions = cache.lengths[:, None] + positions
        rotary = self.rotary(positions, self.embed_tokens.weight.dtype)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rotary, pattern, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """lm_head, tied to the embedding: `[..., hidden_size] -> [..., vocab_size]`.

        Raises:
            TypeError, ValueError: `hidden` is no float tensor of this size.
        """
        checks.last_dim("hidden", hidden, self.config.hidden_size)
        return F.linear(hidden, self.embed_tokens.weight)

    def check_ready(self) -> None:
        """Raise if decoding would not be what the weights and the config say; a decoder asks before each run.

        Training mode alone changes nothing here, for these layers draw no random numbers.

        Raises:
            ValueError: the embedding has another number of rows than the config, two layers have one place in the
                cache, or some module drops out at random.
        """
        rows = self.embed_tokens.weight.shape[0]
        if rows != self.config.vocab_size:
            raise ValueError(f"vocab_size: expected {self.config.vocab_size} rows as in the config, got {rows}")
        places = [module.layer_idx for module in self.layers.modules() if isinstance(module, TiDARAttention)]
        if len(places) != len(self.layers) or len(set(places)) != len(places):
            raise ValueError(f"layers: expected one layer_idx each, got {places} of {len(self.layers)} layers")
        for name, module in self.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
                raise ValueError(f"model: expected evaluation mode, got dropout in {name}; call model.eval()")
