"""docs/masks.md: pictures and text drawings of the patterns, and the tables of their sizes."""

from __future__ import annotations

import inspect
from functools import partial

import torch

from sections import Picture, Section
from tidar_kernels import patterns
from tidar_kernels.decoding import strategies
from tidar_kernels.patterns import (
    Pattern,
    Role,
    block_step,
    causal,
    drawing,
    isd_step,
    tidar_prefill,
    tidar_step,
    tidar_training,
    tree,
)


def block_diffusion(block_size: int) -> Pattern:
    """One denoising pass of block diffusion: the block sees the context and, both ways, itself."""
    nothing = torch.zeros(block_size, 2, dtype=torch.int32)
    return Pattern(
        lead=nothing,
        own=nothing + torch.tensor([0, block_size], dtype=torch.int32),
        positions=torch.arange(block_size, dtype=torch.int32),
        kv_len=block_size,
        roles=torch.full((block_size,), Role.MASK, dtype=torch.int8),
        name=f"block_diffusion(block_size={block_size})",
    )


def _visible(pattern: Pattern) -> int:
    """Visible in-flight pairs. Disjoint intervals, so their lengths add up; no dense mask of a long sequence needed."""
    return int((pattern.lead[:, 1] - pattern.lead[:, 0] + pattern.own[:, 1] - pattern.own[:, 0]).sum())


def _table(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---:"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ruler, *rows])


def step_figures() -> str:
    """Sizes of the decode step."""
    rows = []
    for block in (1, 2, 4, 8, 16, 32):
        pattern = tidar_step(block)
        visible, square = _visible(pattern), pattern.q_len * pattern.kv_len
        held = sum(t.numel() * t.element_size() for t in (pattern.lead, pattern.own, pattern.positions))
        share = f"{100 * visible / square:.1f} %"
        rows.append([f"{block}", f"{pattern.q_len:,}", f"{visible:,}", share, f"{held:,}", f"{square:,}"])
    head = ["B", "rows", "visible in-flight pairs", "of the square", "bytes of the pattern", "bytes of a boolean mask"]
    return _table(head, rows)


def training_figures() -> str:
    """Sizes of the doubled training sequence."""
    rows = []
    for length, block in ((16, 4), (14, 4), (1024, 8), (1024, 16), (4096, 16)):
        pattern = tidar_training(length, block)
        visible, square = _visible(pattern), pattern.q_len * pattern.kv_len
        share = f"{100 * visible / square:.1f} %"
        rows.append([f"{length:,}", f"{block}", f"{pattern.q_len:,}", f"{visible:,}", share])
    return _table(["S", "B", "rows", "visible pairs", "of the square"], rows)


def own_pattern() -> str:
    """The source of `block_diffusion` above, which also draws its picture."""
    imports = "import torch\n\nfrom tidar_kernels.patterns import Pattern, Role\n\n\n"
    return f"```python\n{imports}{inspect.getsource(block_diffusion)}```"


def _listing(pattern: Pattern, context_len: int) -> str:
    return f"```text\n{drawing.as_text(pattern, context_len)}```"


def _picture(pattern: Pattern, context_len: int) -> Picture:
    return Picture(
        save=partial(drawing.save_png, pattern, context_len=context_len),
        description=partial(drawing.as_text, pattern, context_len),
    )


SECTIONS: dict[str, Section] = {
    "step-figures": step_figures,
    "training-figures": training_figures,
    "text-causal": partial(_listing, causal(4), 4),
    "text-prefill": partial(_listing, tidar_prefill(4, 3), 0),
    "text-step": partial(_listing, tidar_step(3), 4),
    "text-training": partial(_listing, tidar_training(5, 2), 0),
    "text-tree": partial(_listing, tree([-1, 0, 0, 1, 1, 2]), 4),
    "own-pattern": own_pattern,
    "text-own-pattern": partial(_listing, block_diffusion(4), 4),
}

PICTURES: dict[str, Picture] = {
    "images/causal.png": _picture(causal(8), 4),
    "images/tidar_prefill.png": _picture(tidar_prefill(6, 4), 0),
    "images/tidar_step_4.png": _picture(tidar_step(4), 6),
    "images/tidar_step_4_causal_blocks.png": _picture(tidar_step(4, bidirectional=False), 6),
    "images/tidar_step_8.png": _picture(tidar_step(8), 12),
    "images/tidar_step_16.png": _picture(tidar_step(16), 4096),
    "images/tidar_training.png": _picture(tidar_training(16, 4), 0),
    "images/tidar_training_documents.png": _picture(tidar_training(16, 4, [7, 9], [0, 3]), 0),
    "images/idlm_training.png": _picture(patterns.idlm_training(12, 4), 0),
    "images/block_diffusion_training.png": _picture(patterns.block_diffusion_training(12, 4), 0),
    "images/set_block_training.png": _picture(patterns.set_block_training(12, 4), 0),
    "images/dflash_training.png": _picture(patterns.dflash_training(12, [3, 7, 12], 4), 0),
    "images/jacobi_forcing_training.png": _picture(patterns.jacobi_forcing_training(4, 8), 0),
    "images/tidar_step_levels.png": _picture(tidar_step(6, levels=[1, 3]), 6),
    "images/isd_step.png": _picture(isd_step(4), 6),
    "images/flare_step.png": _picture(isd_step(4, bidirectional=True), 6),
    "images/block_step.png": _picture(block_step(6), 6),
    "images/tree.png": _picture(tree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 7]), 6),
    "images/tree_step.png": _picture(strategies.tree(8).pattern, 6),
    "images/packed.png": _picture(patterns.packed([tidar_training(s, 4) for s in (8, 5, 3)]), 0),
}
