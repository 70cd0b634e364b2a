"""Fast-dLLM v2 (arXiv 2509.26328): block diffusion on the layers of Qwen2, a row predicts the token after its own.

Blocks of 32 start at multiples of 32 and see themselves whole; they are filled in by parts of 8, and the last row of a
finished block gives the first token of the next. The mask token `|<MASK>|` of its tokenizer is not in config.json.
"""

from __future__ import annotations

from transformers import Qwen2Config

from ....decoding.strategies import BlockDiffusion, Strategy, by_name
from .system import Config, System, architecture, as_built_in

__all__ = ["FastDLLM"]

_MASK = 151665
_THRESHOLD = 0.95
_PART = 8


class FastDLLM(System):
    name = "fast-dllm-v2"
    title = "Fast-dLLM v2"
    strategies = ("block_diffusion",)

    def recognises(self, config: Config) -> bool:
        return architecture(config) == "Fast_dLLM_QwenForCausalLM"

    def built_in(self, config: Config) -> Qwen2Config:
        return as_built_in(Qwen2Config, config, without=("use_sliding_window",))  # type: ignore[return-value]

    def block_size(self, config: Config, strategy: str) -> int | None:
        size: int | None = config.get("bd_size")
        return size

    def mask_token_id(self, config: Config) -> int | None:
        token: int | None = config.get("mask_token_id", _MASK if config.get("vocab_size", 0) > _MASK else None)
        return token

    def strategy(self, name: str, size: int) -> Strategy:
        if name != "block_diffusion":
            return by_name(name, size)
        part = _PART if size % _PART == 0 else size
        return BlockDiffusion(size, _THRESHOLD, aligned=True, shifted=True, part=part)
