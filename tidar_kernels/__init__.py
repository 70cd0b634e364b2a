"""Fused kernels for models that draft by diffusion and verify autoregressively in one forward pass.

Names are imported when they are first used, so that importing the package, and asking its command for help, costs
nothing. The operators `torch.ops.tidar_kernels.*` are registered with the first name, or by `import tidar_kernels.ops`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import eager, patterns, strategies
    from .cache import KVCache
    from .decoding import Decoder, GenerationResult
    from .layers import TiDARAttention
    from .linear import gated_lora, row_invariant_linear
    from .lora import GatedLoRA, add_gated_lora, load_peft_adapter, lora_gate, save_adapter
    from .loss import TiDARLoss, tidar_loss
    from .ops import append_kv, attention, compact_kv, step_attention
    from .patching import patch, use_pattern
    from .patterns import Pattern
    from .rotary import rotary_append
    from .sampling import SamplingParams, sample, verify
    from .session import Session

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "GatedLoRA",
    "GenerationResult",
    "KVCache",
    "Pattern",
    "SamplingParams",
    "Session",
    "TiDARAttention",
    "TiDARLoss",
    "add_gated_lora",
    "append_kv",
    "attention",
    "compact_kv",
    "eager",
    "gated_lora",
    "load_peft_adapter",
    "lora_gate",
    "patch",
    "patterns",
    "rotary_append",
    "row_invariant_linear",
    "sample",
    "save_adapter",
    "step_attention",
    "strategies",
    "tidar_loss",
    "use_pattern",
    "verify",
]

_MODULES = {
    "cache": ("KVCache",),
    "decoding": ("Decoder", "GenerationResult"),
    "layers": ("TiDARAttention",),
    "linear": ("gated_lora", "row_invariant_linear"),
    "lora": ("GatedLoRA", "add_gated_lora", "load_peft_adapter", "lora_gate", "save_adapter"),
    "loss": ("TiDARLoss", "tidar_loss"),
    "ops": ("append_kv", "attention", "compact_kv", "step_attention"),
    "patching": ("patch", "use_pattern"),
    "patterns": ("Pattern",),
    "rotary": ("rotary_append",),
    "sampling": ("SamplingParams", "sample", "verify"),
    "session": ("Session",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("eager", "patterns", "strategies"):
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
