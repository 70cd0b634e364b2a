"""transformers models on these kernels: `import tidar_kernels.integrations.transformers` registers them.

    AutoModelForCausalLM.from_pretrained(path, attn_implementation="tidar")    # training and ordinary use
    tidar_kernels.Decoder.from_transformers(model)                             # TiDAR decoding
    model.generate(**inputs, custom_generate=tidar_generation)                 # the same, as a generation strategy
    model.generate(**inputs, past_key_values=TiDARCache(model.config, 1024))   # the cache alone
    TiDARTrainer(model=model, data_collator=TiDARCollator(..), ..)             # training; compute_loss for other loops
    convert(path, out_path, block_size=8)                                      # a mask token for a checkpoint

docs/transformers.md has a table of the models, docs/guide_transformers.md goes from a checkpoint to decoding.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError("transformers: expected version >= 5, got none: pip install 'tidar-kernels[hf]'") from error

from .attention import register, tidar_attention_forward, tidar_mask
from .cache import TiDARCache
from .collator import TiDARCollator, pack
from .conversion import add_mask_token, convert
from .generation import generate, tidar_generation
from .model import TransformersModel

if TYPE_CHECKING:
    from .training import TiDARTrainer, compute_loss, count_labels

__all__ = [
    "TiDARCache",
    "TiDARCollator",
    "TiDARTrainer",
    "TransformersModel",
    "add_mask_token",
    "compute_loss",
    "convert",
    "count_labels",
    "generate",
    "pack",
    "register",
    "tidar_attention_forward",
    "tidar_generation",
    "tidar_mask",
]

# Imported when one of them is first used: the trainer needs Accelerate.
_TRAINING = ("TiDARTrainer", "compute_loss", "count_labels")

register()


def __getattr__(name: str) -> Any:
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(".training", __name__), name)
    return value
