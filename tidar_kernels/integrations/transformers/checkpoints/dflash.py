"""DFlash drafters (arXiv 2602.06036), each beside its target: `Decoder.from_transformers(TARGET, drafter=FOLDER)`.

A few layers of Qwen3 without embedding and lm_head, which are the target's. `fc` and `hidden_norm` bring the hidden
states of the target's layers `dflash_config.target_layer_ids`, those of one token side by side, to the drafter's width;
each layer's k_proj and v_proj (and k_norm, and the rotation) make the K/V of that token from it. The block's own rows
see these and each other; in layers of sliding attention they are causal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

from .... import patterns
from ....cache import KVCache
from ....patterns import Pattern
from ....patterns.arguments import check_int, check_ints, check_number
from ..attention import NAME, append_kept
from ..loading import check_name
from ..model import TransformersModel
from .reading import config_of, read_checkpoint
from .system import Config, System, architecture, as_built_in

__all__ = ["DFlashConfig", "DFlashDrafter", "read_drafter"]

_BLOCK_SIZE = 16  # of a configuration that does not say
# What `dflash_config` may say of a drafter of this kind, and what says of others of the family that they are some.
_KEYS = (
    *("target_layer_ids", "num_target_layers", "block_size", "mask_token", "mask_token_id"),
    *("input_embedding_scale", "output_multiplier", "final_logit_softcapping"),
)
_OTHERS = ("is_causal", "projector_type", "sample_from_anchor")
_ROTARY = ("default", "linear", "llama3", "yarn")  # whose tables do not depend on the length


@dataclass(frozen=True)
class DFlashConfig:
    """What decoding asks of a drafter (`tidar_kernels.strategies.Drafter`), and what is done to its ends.

    The target's embeddings are multiplied by `embedding_scale`, its lm_head's logits by `logit_scale`, and capped at
    `softcap` unless it is 0.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    target_layers: tuple[int, ...]
    block_size: int
    mask_token_id: int | None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float = 0.0


class DFlashLayers(Qwen3PreTrainedModel):
    """The drafter's own weights, by the names of its checkpoint."""

    base_model_prefix = ""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.layers: Any = nn.ModuleList(Qwen3DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, eps=config.rms_norm_eps)
        self.post_init()


class _DFlash(System):
    """The layers of a drafter's checkpoint."""

    name = "dflash"
    title = "a DFlash drafter"
    strategies = ("dflash",)
    layers = DFlashLayers

    def recognises(self, config: Config) -> bool:
        return architecture(config) == "DFlashDraftModel"

    def built_in(self, config: Config) -> PreTrainedConfig:
        found = as_built_in(Qwen3Config, config)
        found.target_layer_ids = list(_layers_of(config))
        return found


class DFlashDrafter:
    """A drafter and the embedding and lm_head of its target; a `tidar_kernels.strategies.Drafter`.

    Args:
        layers: its own weights.
        config: of them.
        target: whose embedding and lm_head it shares.
    """

    def __init__(self, layers: DFlashLayers, config: DFlashConfig, target: TransformersModel) -> None:
        self.layers, self.config, self._target = layers, config, target
        self._causal: dict[int, Pattern] = {}  # by number of rows; kept, for a captured step cannot make one

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache) -> Tensor:
        """Hidden states `[batch, q_len, hidden]` of `tokens [batch, q_len]` after the context; see `Drafter`."""
        embedding: Any = self._target.model.get_input_embeddings()
        hidden = F.embedding(tokens, embedding.weight) * self.config.embedding_scale  # without what a target does to it
        rotary = self.layers.rotary_emb(hidden, cache.lengths[:, None] + pattern.on(tokens.device)[2])
        if pattern.q_len not in self._causal:
            self._causal[pattern.q_len] = patterns.causal(pattern.q_len)
        kinds: Any = self.layers.config.layer_types
        for layer, kind in zip(self.layers.layers, kinds, strict=True):
            hidden = layer(
                hidden,
                attention_mask=None,
                position_embeddings=rotary,
                # Causal rows are written after the committed tokens, where those of the target's pass replace them.
                tidar_pattern=self._causal[pattern.q_len] if kind == "sliding_attention" else pattern,
                tidar_cache=cache,
            )
        found: Tensor = self.layers.norm(hidden)
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """The target's lm_head, without what the target does to its logits after it."""
        head: Any = self._target.model.get_output_embeddings()
        logits: Tensor = head(hidden) * self.config.logit_scale
        softcap = self.config.softcap
        return logits if softcap == 0.0 else softcap * torch.tanh(logits / softcap)

    def remember(self, features: Tensor, cache: KVCache) -> None:
        """Write K/V of `features [batch, rows, len(target_layers) * hidden]` after the committed tokens."""
        context = self.layers.hidden_norm(self.layers.fc(features))
        rows = context.shape[1]
        positions = cache.lengths[:, None] + torch.arange(rows, device=context.device)
        cos, sin = (x.unsqueeze(1) for x in self.layers.rotary_emb(context, positions))
        for index, layer in enumerate(self.layers.layers):
            attention = layer.self_attn
            heads = -1, attention.head_dim
            k = attention.k_norm(attention.k_proj(context).unflatten(-1, heads)).transpose(1, 2)
            v = attention.v_proj(context).unflatten(-1, heads).transpose(1, 2)
            append_kept(cache, index, k * cos + rotate_half(k) * sin, v, rows)

    def parameters(self) -> Iterator[Any]:
        return self.layers.parameters()


def read_drafter(
    source: str | os.PathLike[str], target: TransformersModel, mask_token_id: int | None = None
) -> DFlashDrafter:
    """The drafter in a folder, or of a name on the Hub, for a target: in its dtype, on its device.

    Args:
        mask_token_id: default that of its configuration.

    Raises:
        TypeError, ValueError: it is no DFlash drafter or not one of this target, by the layers or the width of it; its
            configuration has no mask token, or asks for what others of the family do; tensors are missing, left over or
            of other shapes. FileNotFoundError, OSError: there is none, or it cannot be read.
    """
    source = check_name(source, "drafter")
    content, system = config_of(source), _DFlash()
    if not system.recognises(content):
        found = architecture(content) or content.get("model_type") or "no configuration"
        raise ValueError(f"drafter: expected a checkpoint of DFlashDraftModel, got {found}")
    own = content.get("dflash_config") or {}
    if not isinstance(own, dict):
        raise TypeError(f"dflash_config: expected an object in config.json of a drafter, got {type(own).__name__}")
    others = [key for key in own if key not in _KEYS and own[key] is not None]
    others += [key for key in _OTHERS if content.get(key) is not None]
    if others:
        raise ValueError(f"drafter: expected the rule of DFlash in config.json, got {others[0]}")
    width, layers = target.model.config.get_text_config(decoder=True).hidden_size, target.config.num_layers
    for name, expected in (("hidden_size", width), ("num_target_layers", layers)):
        found = _said(content, name, expected)
        if found != expected:
            raise ValueError(f"drafter: expected {name} {expected} as its target has, got {found}")
    try:
        built_in: Any = system.built_in(content)
    except StrictDataclassError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"drafter: expected a configuration of layers of Qwen3, got {reason}") from error
    kinds = sorted(set(built_in.layer_types) - {"full_attention", "sliding_attention"})
    if kinds:
        raise ValueError(f"drafter: expected layers of full or sliding attention, got {kinds[0]}")
    config = _settings(content, built_in, mask_token_id)
    beyond = [layer for layer in config.target_layers if layer >= layers]
    if beyond:
        raise ValueError(f"drafter: expected target_layer_ids below the target's {layers} layers, got {beyond[0]}")
    weight = next(target.parameters())
    read: DFlashLayers = read_checkpoint(source, system, content, weight.dtype, name="drafter")
    read = read.to(weight.device)
    read.set_attn_implementation(NAME)
    if read.rotary_emb.rope_type not in _ROTARY:
        raise ValueError(f"drafter: expected rotary positions {', '.join(_ROTARY)}, got {read.rotary_emb.rope_type}")
    target.check_layers(config.target_layers, width)
    return DFlashDrafter(read, config, target)


def _said(config: Config, name: str, default: Any = None) -> Any:
    """A key of `dflash_config`, or beside it."""
    found = (config.get("dflash_config") or {}).get(name, config.get(name))
    return default if found is None else found


def _layers_of(config: Config) -> tuple[int, ...]:
    layers = check_ints("target_layer_ids", _said(config, "target_layer_ids"), 0)
    if not layers:
        raise ValueError("target_layer_ids: expected at least one in config.json of a DFlash drafter, got none")
    return tuple(layers)


def _settings(config: Config, layers: Any, mask_token_id: int | None) -> DFlashConfig:
    """The numbers of a drafter's config.json, whose layers are those of the configuration `layers`.

    Raises:
        TypeError, ValueError: one of them is missing or no number.
    """
    mask_token_id = _said(config, "mask_token_id") if mask_token_id is None else mask_token_id
    if mask_token_id is None:
        raise ValueError("mask_token_id: expected a token id here or in config.json of a DFlash drafter, got none")
    return DFlashConfig(
        num_layers=check_int("num_hidden_layers", layers.num_hidden_layers, 1),
        num_kv_heads=check_int("num_key_value_heads", layers.num_key_value_heads, 1),
        head_dim=check_int("head_dim", layers.head_dim, 1),
        target_layers=_layers_of(config),
        block_size=check_int("block_size", _said(config, "block_size", _BLOCK_SIZE), 2),
        mask_token_id=check_int("mask_token_id", mask_token_id, 0),
        embedding_scale=check_number("input_embedding_scale", _said(config, "input_embedding_scale", 1.0), 0.0),
        logit_scale=check_number("output_multiplier", _said(config, "output_multiplier", 1.0), 0.0),
        softcap=check_number("final_logit_softcapping", _said(config, "final_logit_softcapping", 0.0), 0.0),
    )
