"""What training patterns share: `[noisy | clean]` copies of a sequence, and rows made a `Pattern`."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_int
from .pattern import Pattern
from .rows import Role

__all__ = ["next_token", "noisy_then_clean", "of_rows"]


def noisy_then_clean(seq_len: int, block_size: int) -> tuple[int, int, Tensor, Tensor, Tensor]:
    """`(S, B, token of each row, whether it is noisy, first token of its block)` of `[x_t (S) | x_0 (S)]`."""
    s, block = check_int("seq_len", seq_len, 1), check_int("block_size", block_size, 1)
    row = torch.arange(2 * s, device="cpu")
    return s, block, row % s, row < s, row % s // block * block


def next_token(token: Tensor, num_tokens: int) -> Tensor:
    """What an autoregressive row predicts: the next token, or nothing (-1) at the end."""
    return torch.where(token < num_tokens - 1, token + 1, -1)


def of_rows(
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
