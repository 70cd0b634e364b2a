"""Jacobi forcing: a noisy and a clean copy of a response that continue one prompt."""

from __future__ import annotations

import torch

from .arguments import check_int
from .halves import next_token, of_rows
from .pattern import Pattern
from .rows import intervals

__all__ = ["jacobi_forcing_training"]


def jacobi_forcing_training(prompt_len: int, response_len: int) -> Pattern:
    """Jacobi forcing, `[prompt (n) | noisy (S) | clean (S)]`: each copy of the response continues the prompt causally.

    Noisy rows see the prompt, earlier noisy blocks and their own block up to themselves, which together is causal, so
    the block length changes the tokens and not the mask. Clean rows see the prompt and the clean copy, causally.
    Both predict the next token of `[prompt | response]`; of the prompt's rows only the last does.

    Raises:
        TypeError, ValueError: `prompt_len` is not an int >= 0 or `response_len` not an int >= 1.
    """
    n, s = check_int("prompt_len", prompt_len, 0), check_int("response_len", response_len, 1)
    row = torch.arange(n + 2 * s, device="cpu")
    noisy, clean = (row >= n) & (row < n + s), row >= n + s
    lead = intervals(torch.zeros_like(row), torch.where(clean, n, row + 1), row >= 0)
    own = intervals(torch.full_like(row, n + s), row + 1, clean)
    name = f"jacobi_forcing_training(prompt_len={n}, response_len={s})"
    positions = torch.where(clean, row - s, row)
    predicts = torch.where(row >= n - 1, next_token(positions, n + s), -1)
    return of_rows(lead, own, positions, noisy, predicts, len(row), name)
