"""Decoding: the exact rows of a step, strategies, sessions that requests join and leave, the decoder around them."""

from __future__ import annotations

from .decoder import Decoder, GenerationResult, Mode
from .session import Session

__all__ = ["Decoder", "GenerationResult", "Mode", "Session"]
