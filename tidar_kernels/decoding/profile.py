"""Measure what `strategies.auto` and `adaptive` choose by: a model's acceptance on prompts, and what rows cost here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..patterns.arguments import check_int
from .costs import row_costs
from .decoder import ModelDecoder
from .prompts import as_prompts
from .session import DecoderModel, StepConfig
from .strategies import Profile, tidar
from .strategies.levels import acceptance_of, shapes

__all__ = ["profile"]

_MOST = 2**20  # of any of the numbers: beyond it a measurement would not end


def profile(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_block_size: int = 16,
    mask_token_id: int | None = None,
    new_tokens: int = 64,
    context_len: int | None = None,
    batch_size: int = 1,
    repeats: int = 20,
    **sampling: Any,
) -> Profile:
    """Decode the prompts with a block for every acceptance, then time steps of several sizes.

    Args:
        model: its rows are timed on its device, captured as graphs on CUDA.
        prompts: token ids of each; what they are like is what the choice is good for.
        max_block_size: the longest block that `auto` may choose, >= 1.
        mask_token_id: default the model's own.
        new_tokens: decoded after each prompt.
        context_len: committed tokens while rows are timed; default the middle of the generations.
        batch_size: sequences a step while rows are timed.
        repeats: of each timing.
        sampling: temperature and the like, see `Decoder.generate`.

    Raises:
        TypeError, ValueError: as `Decoder` and `Decoder.generate`.
    """
    check_int("max_block_size", max_block_size, 1, _MOST)
    check_int("new_tokens", new_tokens, 1, _MOST)
    check_int("batch_size", batch_size, 1, _MOST)
    check_int("repeats", repeats, 1, _MOST)
    if context_len is not None:
        check_int("context_len", context_len, 0, _MOST)
    decoder = ModelDecoder(model, max_block_size, mask_token_id)
    prompts = as_prompts("prompts", prompts, decoder.model.config.vocab_size)
    accepted: list[int] = []
    for prompt in prompts:
        result = decoder.generate([prompt], new_tokens, **sampling)
        accepted += result.accepted[0][:-1]  # the last count is cut short by the length
    if context_len is None:
        context_len = sum(map(len, prompts)) // len(prompts) + new_tokens // 2

    timed = [tidar(block_size, levels=levels) for block_size, levels in shapes(max_block_size)]
    step = StepConfig(timed[-1], decoder.mask_token_id)
    rows, seconds = row_costs(model, step, timed, batch_size, context_len, repeats)
    return Profile(acceptance_of(accepted, max_block_size), rows, seconds)
