"""What an adapter that only drafts is trained on: the rows of decoding, and what the frozen model itself would say.

R-ISD (arXiv 2604.11035): the base model is frozen, mask rows alone run the adapter, and they learn the distribution
that verification will compare them with. So the output is the base model's, whatever the adapter holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import patterns
from ..ops import checks
from ..patterns import Pattern, Role
from ..patterns.arguments import check_instance, check_int
from ..patterns.rows import intervals
from .loss import check_logits

__all__ = ["adapter_pattern", "clean_then_masks", "distillation_loss"]


def adapter_pattern(kind: str, seq_len: int, block_size: int, document_lengths: Sequence[int] | None = None) -> Pattern:
    """Rows of a window: tokens, which predict nothing here, and masks, which predict the token at their position.

    Args:
        kind: "isd", masks are a chain after the tokens before their block; "tidar", a block sees itself both ways.
        seq_len, block_size: tokens of the window and of a block.
        document_lengths: tokens of each document of the window, which do not see each other; default one document.

    Raises:
        ValueError: `kind` is neither "isd" nor "tidar".
    """
    if kind == "isd":
        pattern = patterns.idlm_training(seq_len, block_size, document_lengths)
    elif kind == "tidar":
        pattern = patterns.tidar_training(seq_len, block_size, document_lengths)
    else:
        raise ValueError(f'pattern: expected "isd" or "tidar", got {kind!r}')
    is_mask = pattern.roles == int(Role.MASK)
    token = torch.arange(seq_len, dtype=torch.int32, device="cpu").repeat(2)  # of each row
    return replace(pattern, predicts=torch.where(is_mask, token, -1), name=f"{kind}_adapter")


def clean_then_masks(pattern: Pattern) -> tuple[Pattern, Pattern, Pattern]:
    """`(whole, clean, masks)`: the pattern with its clean rows and keys first, and the two halves of its rows.

    Clean rows see no mask row: `clean` is over the clean keys alone, so that they can be run by themselves, without
    gradients, and leave their keys to the mask rows. `masks` is over all keys.

    Args:
        pattern: of `adapter_pattern`; no interval of it spans both halves.

    Raises:
        TypeError: it is no Pattern.
    """
    check_instance("pattern", pattern, Pattern)
    is_mask = pattern.roles == int(Role.MASK)
    order = torch.cat([(~is_mask).nonzero().flatten(), is_mask.nonzero().flatten()])
    place = order.argsort()

    def moved(interval: Tensor) -> Tensor:
        lo, hi = interval.long().unbind(1)
        return intervals(place[lo.clamp(max=len(place) - 1)], place[(hi - 1).clamp(min=0)] + 1, lo < hi)

    keys = pattern.positions[order]
    over = replace(pattern, lead=moved(pattern.lead), own=moved(pattern.own), key_positions=keys)
    count = len(order) - int(is_mask.sum())
    clean, masks = over.subset(order[:count]), over.subset(order[count:])
    return over.subset(order), replace(clean, kv_len=count, key_positions=keys[:count]), masks


def distillation_loss(
    hidden: Tensor, head: Callable[[Tensor], Tensor], pattern: Pattern, *, chunk_size: int = 256
) -> Tensor:
    """Mean cross entropy of the mask rows from the model's own distribution at their positions, nats a row.

    The row of the token before a position says what the model expects there; the first token of a document has none.
    Logits exist for `chunk_size` rows of either kind at a time, and are made again in the backward pass.

    Args:
        hidden: `[batch, pattern.q_len, hidden_size]`, before the lm_head; the clean rows' are not differentiated.
        head: from rows `[n, hidden_size]` to logits.
        pattern: of `adapter_pattern`.
        chunk_size: >= 1.

    Raises:
        TypeError, ValueError: an argument is of another type, or hidden has other rows than the pattern.
    """
    checks.tensor("hidden", hidden, 3)
    checks.shape(
        "hidden", hidden, (hidden.shape[0], check_instance("pattern", pattern, Pattern).q_len, hidden.shape[2])
    )
    if not callable(head):
        raise TypeError(f"head: expected a function from rows to logits, got {type(head).__name__}")
    check_int("chunk_size", chunk_size, 1)
    roles = pattern.roles.to(hidden.device)
    is_mask = roles == int(Role.MASK)
    asked = pattern.positions.to(hidden.device)[is_mask] > 0
    token = pattern.predicts.to(hidden.device)[is_mask][asked].long()
    drafting = hidden[:, is_mask][:, asked].flatten(0, 1)
    teaching = hidden[:, ~is_mask].detach()[:, token - 1].flatten(0, 1)

    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def summed(draft: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            expected = check_logits(head(teacher), teacher).to(dtype).softmax(-1)
        return -(expected * check_logits(head(draft), draft).to(dtype).log_softmax(-1)).sum()

    total = hidden.new_zeros((), dtype=dtype)
    for rows in zip(drafting.split(chunk_size), teaching.split(chunk_size), strict=True):
        total = total + checkpoint(summed, *rows, use_reentrant=False)
    return total / max(1, len(drafting))  # nothing is asked where every document is one token
