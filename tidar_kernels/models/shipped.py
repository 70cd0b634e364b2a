"""The trained model that comes with the package; `docs/model.md` says how it was made and what it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..nn.adapters import load_peft_adapter
from .checkpoint import load_checkpoint
from .tokenizer import ByteTokenizer
from .transformer import Transformer

__all__ = ["load_shipped", "load_shipped_adapter", "shipped_figures"]

FOLDER = Path(__file__).parent / "shipped"
WEIGHTS = "model.safetensors"
FIGURES = "training.json"
ADAPTER = FOLDER / "adapter"


def load_shipped(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Transformer, ByteTokenizer]:
    """The shipped model, in eval mode, and its tokenizer.

    Args:
        dtype: of the weights in memory; they are stored in float16.

    Raises:
        FileNotFoundError: the package was installed without its data files.
        ValueError: the file is damaged.
    """
    return load_checkpoint(FOLDER / WEIGHTS, dtype=dtype, device=device), ByteTokenizer()


def load_shipped_adapter(model: Transformer) -> Transformer:
    """Put the shipped gated adapter on the shipped model, in place, and return it: its mask rows then draft better.

    What the model says does not change (R-ISD; `tidar_kernels.nn.adapters`).

    Raises:
        FileNotFoundError: the package was installed without its data files. ValueError: the model is another one.
    """
    load_peft_adapter(model, ADAPTER)
    return model


def shipped_figures() -> dict[str, Any]:
    """Configuration, loss curve and held-out figures of the shipped model, as measured when it was made."""
    return json.loads((FOLDER / FIGURES).read_text(encoding="utf-8"))
