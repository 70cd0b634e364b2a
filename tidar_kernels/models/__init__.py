"""A small decoder in plain PyTorch, its training, and the checkpoint that the package ships.

Names are imported when they are first used: what the command asks about training needs no PyTorch. What makes a model
is in `training/`, whose modules are imported by name: decoding does not need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, save_checkpoint
    from .shipped import load_shipped, load_shipped_adapter, shipped_figures
    from .tensor_parallel import tensor_parallel
    from .tokenizer import ByteTokenizer
    from .transformer import Transformer, TransformerConfig

__all__ = [
    "ByteTokenizer",
    "Transformer",
    "TransformerConfig",
    "load_checkpoint",
    "load_shipped",
    "load_shipped_adapter",
    "save_checkpoint",
    "shipped_figures",
    "tensor_parallel",
]

_MODULES = {
    "checkpoint": ("load_checkpoint", "save_checkpoint"),
    "shipped": ("load_shipped", "load_shipped_adapter", "shipped_figures"),
    "tensor_parallel": ("tensor_parallel",),
    "tokenizer": ("ByteTokenizer",),
    "transformer": ("Transformer", "TransformerConfig"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
