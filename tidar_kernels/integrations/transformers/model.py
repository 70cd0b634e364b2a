"""A transformers model as the decoder wants it: `Decoder.from_transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ... import patterns
from ...cache import KVCache
from ...nn.adapters import lora_gate
from ...patterns import Pattern
from .attention import NAME

__all__ = ["DecoderConfig", "TransformersModel", "decoder_model"]


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder asks of a model's configuration; the last two are defaults, None if the model has none."""

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int | None = None
    mask_token_id: int | None = None


class TransformersModel:
    """A causal language model of transformers as a `tidar_kernels.DecoderModel`.

    The model is switched to `attn_implementation="tidar"` and stays so, whatever it was loaded with. Three tokens are
    run once both ways, to be sure that every layer takes patterns and that these logits are the model's own.

    Args:
        model: with a language modelling head, in evaluation mode, on one device; or a PEFT model around one.
        block_size, mask_token_id: defaults for the decoder.

    Raises:
        TypeError: not a transformers model.
        ValueError: an encoder-decoder, a model in training mode or on several devices, layers that are not plain
            softmax attention, an embedding that does not fit the vocabulary, or a class that does not go through
            transformers' attention interface.
    """

    def __init__(self, model: Any, block_size: int | None = None, mask_token_id: int | None = None) -> None:
        model = _unwrapped(model)
        text = model.config.get_text_config(decoder=True)
        _check_kind(model, text)
        self.model, self._decoder, self._head = model, model.get_decoder(), model.get_output_embeddings()
        self.config = DecoderConfig(
            vocab_size=text.vocab_size,
            num_layers=text.num_hidden_layers,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            block_size=block_size,
            mask_token_id=mask_token_id,
        )
        # Gemma caps its logits; Granite divides them, Cohere multiplies them.
        self._softcap = getattr(text, "final_logit_softcapping", None)
        self._scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1.0)
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        if text._attn_implementation != NAME:
            raise ValueError(f"model: expected a class with transformers' attention interface, got {_name(model)}")
        self._check_by_running()

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache | None = None) -> Tensor:
        """Hidden states `[batch, q_len, hidden]` of `tokens [batch, q_len]`; see `DecoderModel`."""
        positions = pattern.on(tokens.device)[2].expand(len(tokens), -1)
        if cache is not None:
            positions = cache.lengths[:, None] + positions
        hidden: Tensor = self._decoder(
            input_ids=tokens, position_ids=positions.long(), use_cache=False, tidar_pattern=pattern, tidar_cache=cache
        ).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The lm_head and what the model does to its logits behind it."""
        logits: Tensor = self._head(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def parameters(self) -> Iterator[Any]:
        return self.model.parameters()

    @torch.no_grad()
    @lora_gate(False)  # gated adapters, if there are any, are not in question
    def _check_by_running(self) -> None:
        """Three tokens and two masks through a poisoned cache, against the model's own forward pass."""
        weight = next(self.parameters())
        tokens = torch.arange(5, device=weight.device)[None] % self.config.vocab_size
        cache = KVCache(
            num_layers=self.config.num_layers,
            batch_size=1,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            max_len=3,
            dtype=weight.dtype,
            device=weight.device,
        )
        cache.k.fill_(torch.nan)
        try:
            logits = self.logits(self(tokens, patterns.tidar_prefill(3, 2), cache)[:, :3]).float()
        except TypeError as refused:
            expected = "a class that hands `tidar_pattern` on to its layers"
            raise ValueError(f"model: expected {expected}, got {_name(self.model)}") from refused
        for layer, written in enumerate(cache.k.isfinite().all(-1).all(-1).all(-1).all(-1).tolist()):
            if not written:
                raise ValueError(
                    f"model: expected every layer's attention to take `tidar_pattern`, got {_name(self.model)}, "
                    f"whose layer {layer} does not"
                )
        own = self.model(input_ids=tokens[:, :3], use_cache=False).logits.float()
        error = float((logits - own).norm() / own.norm())
        if not error <= 0.05:  # half precision stays far below, another formula far above
            raise ValueError(f"model: expected logits as {_name(self.model)} computes them, got {error:.3g} off")


def decoder_model(
    model: Any,
    tokenizer: Any = None,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    needs_mask: bool = True,
) -> TransformersModel:
    """`model` with its defaults for decoding: from the arguments, else the config's entry `tidar`, else the tokenizer.

    Raises:
        TypeError, ValueError: no mask token is to be found but `needs_mask`, the tokenizer knows more tokens than the
            model, or the model does not suit (`TransformersModel`).
    """
    config = _unwrapped(model).config
    entry = getattr(config, "tidar", None) or {}
    block_size = entry.get("block_size") if block_size is None else block_size
    mask_token_id = entry.get("mask_token_id") if mask_token_id is None else mask_token_id
    mask_token_id = getattr(tokenizer, "mask_token_id", None) if mask_token_id is None else mask_token_id
    if needs_mask and mask_token_id is None:
        raise ValueError(
            "mask_token_id: expected a token id here, in the config's entry `tidar` (converted checkpoints have it), "
            "or as the tokenizer's mask token, got none"
        )
    vocab_size = config.get_text_config(decoder=True).vocab_size
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer: expected at most the model's {vocab_size} tokens, got {len(tokenizer)}")
    return TransformersModel(model, block_size, mask_token_id)


def _name(model: Any) -> str:
    return type(model).__name__


def _unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model itself; adapters that PEFT put into its layers stay there."""
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("model: expected PEFT adapters inside its layers, got prompt learning")
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {_name(model)}")
    return model


def _check_kind(model: PreTrainedModel, text: Any) -> None:
    """Raise for what is plainly no decoder of softmax attention layers, ready to decode."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder-only model, got {_name(model)}")
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call model.eval()")
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None:
        raise ValueError(f"model: expected one with a language modelling head, got {_name(model)}")
    for what, rows in (("embedding", embedding.weight.shape[0]), ("lm_head", head.weight.shape[0])):
        if rows != text.vocab_size:
            raise ValueError(f"vocab_size: expected {text.vocab_size} rows as in the config, got {rows} in the {what}")
    other = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(f"model: expected layers of full or sliding attention, got {', '.join(other)}")
    devices = sorted({str(x.device) for x in model.parameters()})
    if len(devices) != 1 or devices[0] == "meta":
        raise ValueError(f"model: expected all parameters on one device, got {', '.join(devices)}")
