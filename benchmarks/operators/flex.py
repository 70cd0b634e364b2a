"""FlexAttention as a peer: the block mask of a pattern, and the compiled attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tidar_kernels import Pattern

ROOM = 1024  # further keys that a step's mask is built for, to be sliced at each length


def compiled_flex_attention() -> Callable[..., Any]:
    """FlexAttention, compiled anew for fixed shapes: nothing that was specialised for an earlier case is left."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def predicate(pattern: Pattern, device: str, *, has_context: bool) -> Callable[..., Tensor]:
    """What a row sees of keys in flight, which come first, and of the context after them."""
    # Looked up by row: on the CPU that took two thirds of the time of a predicate that divides by the block length.
    lead, own, _ = pattern.on(device)
    lead_start, lead_end, own_start, own_end = (x.contiguous() for pair in (lead, own) for x in pair.unbind(1))

    def in_step(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        leading = (key >= lead_start[row]) & (key < lead_end[row])
        return (key >= pattern.q_len) | leading | ((key >= own_start[row]) & (key < own_end[row]))

    def in_training(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:  # where leads start at 0
        return (key < lead_end[row]) | ((key >= own_start[row]) & (key < own_end[row]))

    return in_step if has_context else in_training


@functools.lru_cache(maxsize=1)
def plan(case: Any, device: str) -> tuple[Callable[..., Any], Any]:
    """The compiled attention and its block mask, once for all sets of operands of a case.

    With a `context_len`, as TiDAR uses it: in-flight keys before the context, so that one mask, built for the longest
    length, is sliced at every step.
    """
    rows, context_len = case.pattern.q_len, getattr(case, "context_len", None)
    visible = predicate(case.pattern, device, has_context=context_len is not None)
    length = rows if context_len is None else rows + context_len + ROOM
    mask = create_block_mask(visible, None, None, rows, length, device=device)
    if context_len is not None:
        mask = mask._adjust(rows, rows + context_len)
        mask.seq_lengths = (rows, rows + context_len)  # PyTorch 2.11 rounds them up to whole blocks
    return compiled_flex_attention(), mask
