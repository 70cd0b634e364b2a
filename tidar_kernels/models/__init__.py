"""A small decoder in plain PyTorch, its training, and the checkpoint that the package ships.

`train`, `evaluate` and `publish` make the shipped model; they are imported by name, for decoding does not need them.
"""

from .checkpoint import load_checkpoint, save_checkpoint
from .shipped import load_shipped, shipped_figures
from .tokenizer import ByteTokenizer
from .transformer import Transformer, TransformerConfig

__all__ = [
    "ByteTokenizer",
    "Transformer",
    "TransformerConfig",
    "load_checkpoint",
    "load_shipped",
    "save_checkpoint",
    "shipped_figures",
]
