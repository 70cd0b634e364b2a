"""Published checkpoints by system: `Decoder.from_transformers(folder)` recognises, reads and decodes them.

nemotron     Nemotron-Labs-Diffusion
tidar_lm     TiDAR-LM
sdar         SDAR; I-DLM, which has its class
fast_dllm    Fast-dLLM v2
llada2       LLaDA 2.x
dflash       DFlash drafters, beside their target
refused      what cannot be decoded here, and why
reading      recognition, weights, tokenizers, adapters
preparation  from a folder or a model to what a decoder takes

No code of a checkpoint is run. Where a system's own code has the layers of a class that transformers has, the weights
are read into that class; what is missing, left over or of another shape is an error by name. docs/checkpoints.md has a
table of the systems.
"""

from __future__ import annotations

from .preparation import Prepared, Recognised, load_any, prepared
from .reading import SYSTEMS, read_checkpoint, recognised_system

__all__ = [
    "SYSTEMS",
    "Prepared",
    "Recognised",
    "load_any",
    "prepared",
    "read_checkpoint",
    "recognised_system",
]
