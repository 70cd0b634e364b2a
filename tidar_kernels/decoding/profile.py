"""Measure what `strategies.auto` chooses by: a model's acceptance on given prompts, and this machine's cost of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .decoder import Decoder
from .session import DecoderModel, Session, StepConfig
from .strategies import Profile, tidar
from .strategies.levels import acceptance_of, latencies

__all__ = ["profile"]


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
    decoder = Decoder(model, max_block_size, mask_token_id)
    accepted: list[int] = []
    for prompt in prompts:
        result = decoder.generate([list(prompt)], new_tokens, **sampling)
        accepted += result.accepted[0][:-1]  # the last count is cut short by the length
    if context_len is None:
        context_len = sum(map(len, prompts)) // len(prompts) + new_tokens // 2

    def step(block_size: int, levels: Sequence[int] | None) -> Callable[[], Any]:
        chosen = StepConfig(tidar(block_size, levels=levels), decoder.mask_token_id)
        session = Session(model, chosen, batch_size, context_len + block_size)
        session.cache.k.normal_()
        session.cache.v.normal_()
        session.cache.lengths.fill_(context_len)
        session.cache.lengths_known([context_len] * batch_size)
        run = session.replayed()

        def call() -> None:
            with torch.inference_mode():
                run()

        return call

    sizes = sorted({1, 2, 4, 8, 16, 32} & set(range(1, max_block_size + 1)) | {max_block_size})
    shapes = [(b, levels) for b in sizes for levels in ([1], [1, max(2, b // 2)], None) if levels is None or b > 2]
    on_gpu = next(iter(model.parameters())).device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    rows, seconds = latencies(step, shapes, repeats, synchronize)
    return Profile(acceptance_of(accepted, max_block_size), rows, seconds)
