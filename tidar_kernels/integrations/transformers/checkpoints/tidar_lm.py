"""TiDAR-LM (arXiv 2511.08923): the layers of Qwen3 (8B) or Qwen2 (1.5B), and the step of the paper.

The configuration is that of the base model but for the name of its class: the mask token is the tokenizer's, the block
size the caller's, unless config.json has them.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from .system import Config, System, architecture, as_built_in

__all__ = ["TiDARLM"]

_KINDS: dict[str, type[PreTrainedConfig]] = {"TiDARForCausalLM": Qwen3Config, "TiDARSmallForCausalLM": Qwen2Config}


class TiDARLM(System):
    name = "tidar-lm"
    title = "TiDAR-LM"
    strategies = ("tidar",)

    def recognises(self, config: Config) -> bool:
        return architecture(config) in _KINDS

    def built_in(self, config: Config) -> PreTrainedConfig:
        return as_built_in(_KINDS.get(architecture(config), Qwen3Config), config)
