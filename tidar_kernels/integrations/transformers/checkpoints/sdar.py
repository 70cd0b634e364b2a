"""SDAR (block diffusion on the layers of Qwen3, dense or with experts) and I-DLM, whose checkpoints have its class.

SDAR's blocks start at multiples of their length and see themselves whole, as clean tokens too; its generate.py fixes
what is more probable than 0.85. I-DLM is causal throughout (`use_regular_causal`), and its masks predict the token
after theirs.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from ....decoding.strategies import BlockDiffusion, Strategy, by_name
from .system import Config, System, architecture, as_built_in

__all__ = ["IDLM", "SDAR"]

_KINDS: dict[str, type[PreTrainedConfig]] = {"SDARForCausalLM": Qwen3Config, "SDARMoeForCausalLM": Qwen3MoeConfig}
_THRESHOLD = 0.85
_STRIDE = 4  # of the published server configuration and of the paper's main figures


class IDLM(System):
    """I-DLM (arXiv 2604.11035)."""

    name = "i-dlm"
    title = "I-DLM"
    strategies = ("isd",)

    def recognises(self, config: Config) -> bool:
        return architecture(config) in _KINDS and config.get("use_regular_causal") is True

    def built_in(self, config: Config) -> PreTrainedConfig:
        return as_built_in(_KINDS.get(architecture(config), Qwen3Config), config)

    def block_size(self, config: Config, strategy: str) -> int:
        return _STRIDE

    def strategy(self, name: str, size: int) -> Strategy:
        return by_name(name, size, shifted=True)


class SDAR(System):
    """SDAR (arXiv 2510.06303)."""

    name = "sdar"
    title = "SDAR"
    strategies = ("block_diffusion",)

    def recognises(self, config: Config) -> bool:
        return architecture(config) in _KINDS and not config.get("use_regular_causal")

    def built_in(self, config: Config) -> PreTrainedConfig:
        # A window would leave clean tokens of a block half seen: that is no mask of theirs.
        return as_built_in(_KINDS.get(architecture(config), Qwen3Config), config, without=("use_sliding_window",))

    def strategy(self, name: str, size: int) -> Strategy:
        return BlockDiffusion(size, _THRESHOLD, aligned=True) if name == "block_diffusion" else by_name(name, size)
