"""LLaDA 2.x ("LLaDA2.0: Scaling Up Diffusion Language Models to 100B"): block diffusion on the layers of GLM-4.5.

Blocks of 32 start at multiples of 32 and see themselves whole, as clean tokens too; a pass fixes what is more probable
than 0.95, and the most probable token at least. LLaDA 2.1 has the same layers and may also change tokens that are fixed
already; that is not done here.

Its layers, in transformers' words: RMS norm of each head's query and key, rotary positions on the first half of a head,
a first layer without experts, then a sigmoid router with a bias that only chooses, the best groups of experts before
the best experts, and a shared expert. The checkpoint keeps query, key and value as one weight.
"""

from __future__ import annotations

from typing import Any

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from ....decoding.strategies import BlockDiffusion, Strategy, by_name
from .system import Config, System, architecture, as_built_in

__all__ = ["LLaDA2"]

_BLOCK, _THRESHOLD, _MASK = 32, 0.95, 156895
_KEYS = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
# A router that scores otherwise, biases, windows, a normalised lm_head: no published checkpoint has them.
_WITHOUT = ("use_bias", "use_qkv_bias", "use_sliding_window", "norm_head")


class _LLaDA2Config(Glm4MoeConfig):  # of its own model type, under which transformers looks for names of tensors
    model_type = "llada2_moe"


class LLaDA2(System):
    name = "llada-2"
    title = "LLaDA 2.x"
    strategies = ("block_diffusion",)
    layers = Glm4MoeForCausalLM

    def recognises(self, config: Config) -> bool:
        return architecture(config) == "LLaDA2MoeModelLM"

    def built_in(self, config: Config) -> Glm4MoeConfig:
        _register_names()
        if config.get("score_function", "sigmoid") != "sigmoid":
            raise ValueError(
                f"score_function: expected sigmoid in config.json of {self.title}, got {config['score_function']!r}"
            )
        renamed = {_KEYS.get(key, key): value for key, value in config.items()}
        renamed |= {"use_qk_norm": True, "norm_topk_prob": config.get("num_experts_per_tok", 8) > 1}
        return as_built_in(_LLaDA2Config, renamed, without=_WITHOUT)  # type: ignore[return-value]

    def block_size(self, config: Config, strategy: str) -> int:
        return _BLOCK

    def mask_token_id(self, config: Config) -> int | None:
        token: int | None = config.get("mask_token_id", _MASK if config.get("vocab_size", 0) > _MASK else None)
        return token

    def strategy(self, name: str, size: int) -> Strategy:
        return BlockDiffusion(size, _THRESHOLD, aligned=True) if name == "block_diffusion" else by_name(name, size)


def _register_names() -> None:
    """Tell transformers how a checkpoint's tensors become those of `layers`.

    Raises:
        ValueError: this version of transformers has no such conversions.
    """
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
        from transformers.core_model_loading import Split, WeightConverter, WeightRenaming
    except ImportError as error:
        raise ValueError(
            f"transformers: expected a version that reads LLaDA 2.x, 5.23 for example, got: {error}"
        ) from None
    names: dict[str, str] = {
        r"^model\.word_embeddings\.": "model.embed_tokens.",
        r"\.attention\.": ".self_attn.",
        r"\.self_attn\.dense\.": ".self_attn.o_proj.",
        r"\.self_attn\.query_layernorm\.": ".self_attn.q_norm.",
        r"\.self_attn\.key_layernorm\.": ".self_attn.k_norm.",
        r"\.mlp\.gate\.expert_bias": ".mlp.gate.e_score_correction_bias",
    }
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    mapping: list[Any] = get_checkpoint_conversion_mapping("glm4_moe")
    mapping += [WeightRenaming(old, new) for old, new in names.items()]
    mapping.append(WeightConverter("self_attn.query_key_value.weight", parts, [Split(dim=0)]))
    register_checkpoint_conversion_mapping(_LLaDA2Config.model_type, mapping, overwrite=True)
