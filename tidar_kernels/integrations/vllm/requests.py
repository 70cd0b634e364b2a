"""What a request may not ask for: refused by name when it arrives, before it reaches a model."""

from __future__ import annotations

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

__all__ = ["Refusals"]


class Refusals(LogitsProcessor):
    """A logits processor that leaves logits alone: vLLM asks these whether a request's parameters are good."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for what cannot be right with several tokens a step."""
        if getattr(sampling_params, "thinking_token_budget", None) is not None:
            raise ValueError("thinking_token_budget: expected none with several tokens a step, got one")

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        return logits
