"""Nemotron-Labs-Diffusion (arXiv 2607.05722): autoregression, block diffusion and self-speculation in one model.

Its layers are those of Ministral 3, named `encoder`, with an lm_head named `diffusion_head`. Three ways to decode:

    linear self-speculation       SelfSpeculation(32, adapted_seed=True), with `linear_spec_lora`
    quadratic self-speculation    tidar(32), beta = `ar_mix_weight`
    diffusion                     BlockDiffusion(32, 0.9): causal context, the first token of a block is autoregressive
"""

from __future__ import annotations

from transformers import Ministral3Config

from ....decoding.strategies import SelfSpeculation, Strategy, by_name
from .system import Config, System, as_built_in

__all__ = ["NemotronLabsDiffusion"]


class NemotronLabsDiffusion(System):
    name = "nemotron-labs-diffusion"
    title = "Nemotron-Labs-Diffusion"
    strategies = ("self_speculation", "tidar", "block_diffusion")
    adapter = "linear_spec_lora"
    renames = ((r"^encoder\.", "model."), (r"^diffusion_head\.", "lm_head."))

    def recognises(self, config: Config) -> bool:
        return config.get("model_type") == "nemotron_labs_diffusion"

    def built_in(self, config: Config) -> Ministral3Config:
        found = as_built_in(Ministral3Config, config, without=("attention_bias", "mlp_bias", "sliding_window"))
        return found  # type: ignore[return-value]

    def strategy(self, name: str, size: int) -> Strategy:
        return SelfSpeculation(size, adapted_seed=True) if name == "self_speculation" else by_name(name, size)

    def beta(self, config: Config) -> float | None:
        beta: float | None = config.get("ar_mix_weight")
        return beta
