"""Training masks of the wider family, as patterns: each is lead and own intervals of a few lines.

All of them train a model that drafts a block at once. They differ in what a drafting row may condition on, and in the
order in which the clean and the noisy copy of the sequence are stored. The one mask in the field that is not two
intervals a row is a draft tree (Medusa, EAGLE), whose rows see scattered ancestors: `tidar_kernels.patterns.tree`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pattern import Pattern, Role, check_int, intervals, pack_bits, unpack_bits

__all__ = [
    "block_diffusion_training",
    "dflash_training",
    "idlm_training",
    "jacobi_forcing_training",
    "packed",
    "set_block_training",
]


def _noisy_then_clean(seq_len: int, block_size: int) -> tuple[int, int, Tensor, Tensor, Tensor]:
    """`(S, B, token of each row, whether it is noisy, first token of its block)` of `[x_t (S) | x_0 (S)]`."""
    s, block = check_int("seq_len", seq_len, 1), check_int("block_size", block_size, 1)
    row = torch.arange(2 * s)
    return s, block, row % s, row < s, row % s // block * block


def _next(token: Tensor, num_tokens: int) -> Tensor:
    """What an autoregressive row predicts: the next token, or nothing (-1) at the end."""
    return torch.where(token < num_tokens - 1, token + 1, -1)


def _pattern(
    lead: Tensor,
    own: Tensor,
    positions: Tensor,
    noisy: Tensor,
    predicts: Tensor,
    kv_len: int,
    name: str,
    key_positions: Tensor | None = None,
) -> Pattern:
    roles = torch.where(noisy, int(Role.MASK), int(Role.CLEAN)).to(torch.int8)
    keys = None if key_positions is None else key_positions.to(torch.int32)
    return Pattern(
        lead, own, positions.to(torch.int32), kv_len, roles, predicts.to(torch.int32), name, key_positions=keys
    )


def idlm_training(seq_len: int, block_size: int) -> Pattern:
    """I-DLM (arXiv 2604.11035), `[x_t | x_0]`: noisy rows are causal in their block and see earlier clean blocks.

    Clean rows are causal and never see noisy ones. Both halves predict the next token.

    Raises:
        TypeError, ValueError: `seq_len` or `block_size` is not an int >= 1.
    """
    s, block, token, noisy, start = _noisy_then_clean(seq_len, block_size)
    lead = intervals(torch.full_like(token, s), s + torch.where(noisy, start, token + 1), token >= 0)
    own = intervals(start, token + 1, noisy)
    predicts = _next(token, s)
    return _pattern(lead, own, token, noisy, predicts, 2 * s, f"idlm_training(seq_len={s}, block_size={block})")


def block_diffusion_training(seq_len: int, block_size: int) -> Pattern:
    """Block diffusion (BD3-LM, SDAR, Fast-dLLM v2, LLaDA 2), `[x_t | x_0]`: both halves bidirectional in their block.

    Noisy rows see their own noisy block and earlier clean blocks, and predict their token; clean rows see clean blocks
    up to their own, and predict nothing.

    Raises:
        TypeError, ValueError: `seq_len` or `block_size` is not an int >= 1.
    """
    s, block, token, noisy, start = _noisy_then_clean(seq_len, block_size)
    end = (start + block).clamp(max=s)
    lead = intervals(torch.full_like(token, s), s + torch.where(noisy, start, end), token >= 0)
    own = intervals(start, end, noisy)
    predicts = torch.where(noisy, token, -1)
    return _pattern(
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
    s, block, token, noisy, start = _noisy_then_clean(seq_len, block_size)
    lead = intervals(torch.full_like(token, s), s + torch.where(noisy, start, token + 1), token >= 0)
    own = intervals(start, (start + block).clamp(max=s), noisy)
    predicts = torch.where(noisy, token, _next(token, s))
    return _pattern(lead, own, token, noisy, predicts, 2 * s, f"set_block_training(seq_len={s}, block_size={block})")


def dflash_training(context_len: int, anchors: Sequence[int], block_size: int) -> Pattern:
    """DFlash: the rows are blocks drafted at anchors; the keys are the context, then the blocks.

    Row m of block j, at position `anchors[j] + m`, sees the context before its anchor and its own block, both ways, and
    predicts the context token at its position, if there is one. There are `len(anchors) * block_size` rows, and as
    many keys behind the `context_len` keys of the context.

    Raises:
        TypeError, ValueError: `context_len` is not an int >= 0, `block_size` not an int >= 1, or an anchor not an int
            in `[0, context_len]`.
    """
    n, block = check_int("context_len", context_len, 0), check_int("block_size", block_size, 1)
    for anchor in anchors:
        if check_int("anchors", anchor, 0) > n:
            raise ValueError(f"anchors: expected <= context_len = {n}, got {anchor}")
    row = torch.arange(len(anchors) * block)
    anchor_of = torch.tensor(list(anchors), dtype=torch.int64)[row // block]
    noisy, own_start = row >= 0, n + row // block * block
    lead, own = intervals(torch.zeros_like(row), anchor_of, noisy), intervals(own_start, own_start + block, noisy)
    name = f"dflash_training(context_len={n}, {len(anchors)} anchors, block_size={block})"
    positions = anchor_of + row % block
    predicts, keys = torch.where(positions < n, positions, -1), torch.cat([torch.arange(n), positions])
    return _pattern(lead, own, positions, noisy, predicts, n + len(row), name, keys)


def jacobi_forcing_training(prompt_len: int, response_len: int) -> Pattern:
    """Jacobi forcing, `[prompt (n) | noisy (S) | clean (S)]`: each copy of the response continues the prompt causally.

    Noisy rows see the prompt, earlier noisy blocks and their own block up to themselves, which together is causal, so
    the block length changes the tokens and not the mask. Clean rows see the prompt and the clean copy, causally.
    Both predict the next token of `[prompt | response]`; of the prompt's rows only the last does.

    Raises:
        TypeError, ValueError: `prompt_len` is not an int >= 0 or `response_len` not an int >= 1.
    """
    n, s = check_int("prompt_len", prompt_len, 0), check_int("response_len", response_len, 1)
    row = torch.arange(n + 2 * s)
    noisy, clean = (row >= n) & (row < n + s), row >= n + s
    lead = intervals(torch.zeros_like(row), torch.where(clean, n, row + 1), row >= 0)
    own = intervals(torch.full_like(row, n + s), row + 1, clean)
    name = f"jacobi_forcing_training(prompt_len={n}, response_len={s})"
    positions = torch.where(clean, row - s, row)
    predicts = torch.where(row >= n - 1, _next(positions, n + s), -1)
    return _pattern(lead, own, positions, noisy, predicts, len(row), name)


def packed(patterns: Sequence[Pattern]) -> Pattern:
    """Several sequences, each with its own pattern, as one: rows and keys one after another, none sees another's.

    A batch of different lengths, `[1, heads, total, head_dim]`, costs what its sequences cost: tiles between sequences
    are never visited. Positions restart with every sequence. The clean tokens that `predicts` counts are those of the
    sequences one after another, of each up to the last that it predicts.

    Raises:
        TypeError: an entry is not a `Pattern`. ValueError: there is none.
    """
    if not patterns:
        raise ValueError("patterns: expected at least one, got none")
    for index, pattern in enumerate(patterns):
        if not isinstance(pattern, Pattern):
            raise TypeError(f"patterns: expected tidar_kernels.Pattern, got {type(pattern).__name__} at {index}")
    lengths = torch.tensor([pattern.kv_len for pattern in patterns])
    offsets = (lengths.cumsum(0) - lengths).repeat_interleave(torch.tensor([pattern.q_len for pattern in patterns]))
    shifted = []
    for both in (torch.cat([pattern.lead for pattern in patterns]), torch.cat([p.own for p in patterns])):
        lo, hi = both.unbind(1)
        shifted.append(intervals(lo + offsets, hi + offsets, lo < hi))
    predicts, tokens = [], 0
    for pattern in patterns:
        predicts.append(torch.where(pattern.predicts < 0, -1, pattern.predicts + tokens))
        tokens += pattern.num_labels
    reach, keys = None, [pattern.key_positions for pattern in patterns]
    if any(pattern.reach is not None for pattern in patterns):
        everything = torch.iinfo(torch.int32).max
        reach = torch.cat([torch.full_like(p.positions, everything) if p.reach is None else p.reach for p in patterns])
    bits = None
    if any(pattern.bits is not None for pattern in patterns):
        seen = [
            torch.zeros(p.q_len, p.kv_len, dtype=torch.bool) if p.bits is None else unpack_bits(p.bits, p.kv_len)
            for p in patterns
        ]
        bits = pack_bits(torch.block_diag(*seen))
    return Pattern(
        shifted[0],
        shifted[1],
        torch.cat([pattern.positions for pattern in patterns]),
        int(lengths.sum()),
        torch.cat([pattern.roles for pattern in patterns]),
        torch.cat(predicts),
        f"packed({', '.join(pattern.name for pattern in patterns)})",
        reach,
        None if any(key is None for key in keys) else torch.cat([key for key in keys if key is not None]),
        bits,
    )
