"""Every operator that is measured, by name."""

from __future__ import annotations

from .core.operands import Operands
from .decoding.decoder_step import DecoderStep
from .decoding.slots import TokenSlots
from .operators.attention import Attention
from .operators.kv import AppendKV, CompactKV, RotaryAppend
from .operators.projection import Projection
from .operators.step_attention import StepAttention
from .operators.stored import StoredAttention
from .operators.verify import Verify

OPERATORS: dict[str, type[Operands]] = {
    cls.operator: cls
    for cls in (
        StepAttention, StoredAttention, AppendKV, CompactKV, RotaryAppend, Verify, Projection, DecoderStep, TokenSlots,
        Attention,
    )
}  # fmt: skip
# What is measured together: a part of a results file, and the operators in it.
PARTS: dict[str, tuple[str, ...]] = {
    "step": ("step_attention",),
    "stored": ("step_stored",),
    "operators": ("append_kv", "compact_kv", "rotary_append", "verify", "projection"),
    "decoder_step": ("decoder_step",),
    "token_slots": ("token_slots",),
    "training": ("attention",),
}
