"""Block diffusion (BD3-LM, SDAR, Fast-dLLM v2, LLaDA 2) and set block decoding: training masks, and a block's pass."""

from __future__ import annotations

import torch

from .arguments import check_bool, check_int
from .halves import next_token, noisy_then_clean, of_rows
from .pattern import Pattern
from .rows import Role, intervals

__all__ = ["block_causal", "block_diffusion_training", "block_step", "set_block_training"]


def block_diffusion_training(seq_len: int, block_size: int) -> Pattern:
    """Block diffusion (BD3-LM, SDAR, Fast-dLLM v2, LLaDA 2), `[x_t | x_0]`: both halves bidirectional in their block.

    Noisy rows see their own noisy block and earlier clean blocks, and predict their token; clean rows see clean blocks
    up to their own, and predict nothing.

    Raises:
        TypeError, ValueError: `seq_len` or `block_size` is not an int >= 1.
    """
    s, block, token, noisy, start = noisy_then_clean(seq_len, block_size)
    end = (start + block).clamp(max=s)
    lead = intervals(torch.full_like(token, s), s + torch.where(noisy, start, end), token >= 0)
    own = intervals(start, end, noisy)
    predicts = torch.where(noisy, token, -1)
    return of_rows(
        lead, own, token, noisy, predicts, 2 * s, f"block_diffusion_training(seq_len={s}, block_size={block})"
    )


def set_block_training(seq_len: int, block_size: int) -> Pattern:
    """Set block decoding and Nemotron-Labs-Diffusion, `[x_t | x_0]`: block diffusion with a token-causal clean half.

    These are TiDAR's intervals with the halves in the other order: for `[x_0 | x_t]` take
    `tidar_kernels.patterns.tidar_training`. Here x_t may keep some clean tokens of the block.
    Noisy rows predict their token, clean rows the next one.

    Raises:
        TypeError, ValueError: `seq_len` or `block_size` is not an int >= 1.
    """
    s, block, token, noisy, start = noisy_then_clean(seq_len, block_size)
    lead = intervals(torch.full_like(token, s), s + torch.where(noisy, start, token + 1), token >= 0)
    own = intervals(start, (start + block).clamp(max=s), noisy)
    predicts = torch.where(noisy, token, next_token(token, s))
    return of_rows(lead, own, token, noisy, predicts, 2 * s, f"set_block_training(seq_len={s}, block_size={block})")


def block_step(length: int, shared_window: bool = False) -> Pattern:
    """A bidirectional block after the context: a denoising pass of block diffusion, or self-speculation's draft pass.

    No row is causal, not even of a block of one: nothing of it enters the cache.

    Args:
        length: rows of the block.
        shared_window: in layers with a sliding window all rows see what the first one sees, the whole block and the
            last `window - 1` tokens before it (the canvas of DiffusionGemma). Default: each row has its own window.

    Raises:
        TypeError, ValueError: `length` is not an int >= 1, or `shared_window` not a bool.
    """
    check_bool("shared_window", shared_window)
    row = torch.arange(check_int("length", length, 1), device="cpu")
    zero = torch.zeros_like(row)
    return Pattern(
        lead=intervals(zero, zero, row < 0),
        own=intervals(zero, zero + length, row >= 0),
        positions=row.to(torch.int32),
        kv_len=length,
        roles=torch.full((length,), int(Role.MASK), dtype=torch.int8, device="cpu"),
        name=f"block_step(length={length}{', shared_window=True' * shared_window})",
        window_positions=zero.to(torch.int32) if shared_window else None,
    )


def block_causal(length: int, block_size: int) -> Pattern:
    """Clean rows that see the context and in-flight blocks up to the end of their own (SDAR, Fast-dLLM v2, LLaDA 2).

    A chunk of prefill, or the pass that commits a full block: its K/V enters the cache (`Pattern.kept_len`). Blocks
    start at row 0, so the context must end where a block does.

    Raises:
        TypeError, ValueError: `length` or `block_size` is not an int >= 1.
    """
    row = torch.arange(check_int("length", length, 1), device="cpu")
    block = check_int("block_size", block_size, 1)
    zero = torch.zeros_like(row)
    return Pattern(
        lead=intervals(zero, ((row // block + 1) * block).clamp(max=length), row >= 0),
        own=intervals(zero, zero, row < 0),
        positions=row.to(torch.int32),
        kv_len=length,
        name=f"block_causal(length={length}, block_size={block})",
    )
