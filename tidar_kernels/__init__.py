"""Fused kernels for models that draft by diffusion and verify autoregressively in one forward pass.

Names are imported when they are first used, so that importing the package, and asking its command for help, costs
nothing. The operators `torch.ops.tidar_kernels.*` are registered with the first name, or by `import tidar_kernels.ops`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import distributed, eager, patterns
    from .cache import KVCache
    from .decoding import GenerationResult, Session, strategies
    from .integrations.decoder import Decoder
    from .integrations.patch import patch, use_pattern
    from .nn.adapters import GatedLoRA, add_gated_lora, load_peft_adapter, lora_gate, save_adapter
    from .nn.attention import TiDARAttention
    from .nn.loss import TiDARLoss, tidar_loss
    from .ops import append_kv, attention, compact_kv, gated_lora, rotary_append, row_invariant_linear, step_attention
    from .ops.verify import SamplingParams, sample, verify
    from .patterns import Pattern

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
    "distributed",
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
    "decoding.decoder": ("GenerationResult",),
    "decoding.session": ("Session",),
    "integrations.decoder": ("Decoder",),
    "integrations.patch": ("patch", "use_pattern"),
    "nn.adapters": ("GatedLoRA", "add_gated_lora", "load_peft_adapter", "lora_gate", "save_adapter"),
    "nn.attention": ("TiDARAttention",),
    "nn.loss": ("TiDARLoss", "tidar_loss"),
    "ops": (
        "append_kv",
        "attention",
        "compact_kv",
        "gated_lora",
        "rotary_append",
        "row_invariant_linear",
        "step_attention",
    ),
    "ops.verify": ("SamplingParams", "sample", "verify"),
    "patterns": ("Pattern",),
}
_ROOMS = {
    "distributed": ".distributed",
    "eager": ".eager",
    "patterns": ".patterns",
    "strategies": ".decoding.strategies",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


class _OldNames:
    """The last finder: it is asked for modules that Python does not find, and knows those that have moved."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> Any:
        if not fullname.startswith(f"{__name__}."):
            return None
        return import_module("._moved", __name__).spec_of(fullname)


sys.meta_path.append(_OldNames)  # it has the method, not the base class, which is slow to import


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(_ROOMS[name], __name__)
    if name not in _MODULE_OF:
        if name in import_module("._moved", __name__).MOVED:
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
