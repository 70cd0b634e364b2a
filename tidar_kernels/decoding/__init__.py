"""Decoding: the exact rows of a step, strategies, sessions that requests join and leave, the decoder around them."""

from __future__ import annotations

from .._moved import moved_name
from .decoder import GenerationResult, Mode, ModelDecoder
from .session import Session

__all__ = ["GenerationResult", "Mode", "ModelDecoder", "Session"]

__getattr__ = moved_name(__name__, {"Decoder": "integrations.decoder"})
