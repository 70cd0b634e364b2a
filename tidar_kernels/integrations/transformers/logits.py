"""What causal language models of transformers do to their logits after the lm_head: mostly nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LogitShape"]


@dataclass(frozen=True)
class LogitShape:
    """Gemma caps its logits, `softcap * tanh(x / softcap)`; Granite divides and Cohere multiplies them, `scale`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitShape:
        """That of a text configuration."""
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    @property
    def is_plain(self) -> bool:
        return self == LogitShape()

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
