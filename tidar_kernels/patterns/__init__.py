"""Attention patterns: what a pattern is (`Pattern`), and a constructor for every system of the field, a file each.

causal             autoregressive rows
tidar              TiDAR: prefill, step, training
idlm               I-DLM, FLARE: training, the strided step
block_diffusion    block diffusion, set block decoding: training, one pass over a block, block-causal tokens
dflash             DFlash: training
jacobi_forcing     Jacobi forcing: training
tree               token trees
packing            several patterns as one
batch              ragged batches: every request its pattern and number of rows (`PatternBatch`)
"""

from __future__ import annotations

from .arguments import check_int
from .batch import PatternBatch, PatternTable, batch
from .block_diffusion import block_causal, block_diffusion_training, block_step, set_block_training
from .causal import causal
from .dflash import dflash_training
from .idlm import idlm_training, isd_step
from .jacobi_forcing import jacobi_forcing_training
from .packing import packed
from .pattern import Pattern
from .rows import Role
from .tidar import tidar_prefill, tidar_step, tidar_training
from .tree import tree

__all__ = [
    "Pattern",
    "PatternBatch",
    "PatternTable",
    "Role",
    "batch",
    "block_causal",
    "block_diffusion_training",
    "block_step",
    "causal",
    "check_int",
    "dflash_training",
    "idlm_training",
    "isd_step",
    "jacobi_forcing_training",
    "packed",
    "set_block_training",
    "tidar_prefill",
    "tidar_step",
    "tidar_training",
    "tree",
]
