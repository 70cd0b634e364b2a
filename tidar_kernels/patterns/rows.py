"""What pattern files write rows with: roles, intervals and tree masks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from .arguments import check_ints

__all__ = ["Role", "check_documents", "intervals", "ordinary", "pack_tree_mask", "unpack_tree_mask"]


class Role(IntEnum):
    """What the token of an in-flight row is. Attention never reads it; drawing and decoding do."""

    CLEAN = 0  # a known token: a prompt token, or the clean half of training
    DRAFT = 1  # a drafted token that this forward pass verifies
    MASK = 2  # a mask token that this forward pass fills


def check_documents(seq_len: int, document_lengths: Sequence[int] | None) -> Tensor:
    """Tokens of each document in a sequence, int64 `[documents]`; None is one document.

    Raises:
        TypeError, ValueError: a length is not an int >= 1, or they do not sum to `seq_len`.
    """
    lengths = [seq_len] if document_lengths is None else check_ints("document_lengths", document_lengths, 1)
    if sum(lengths) != seq_len:
        raise ValueError(f"document_lengths: expected a sum of seq_len = {seq_len}, got {sum(lengths)}")
    return torch.tensor(lengths, device="cpu")


def ordinary(x: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """`x` on `device`, as a tensor that may be kept: never an inference tensor, which would later end a training step.

    Whoever keeps a tensor beyond the call keeps what this returns.
    """
    with torch.inference_mode(False):
        moved = x.to(device)
        return moved.clone() if moved.is_inference() else moved


def intervals(lo: Tensor, hi: Tensor, live: Tensor) -> Tensor:
    """Stack `[lo, hi)`, written as `[0, 0)` where `live` is false."""
    return torch.where(live[:, None], torch.stack([lo, hi], dim=1), 0).to(torch.int32)


def pack_tree_mask(seen: Tensor) -> Tensor:
    """Booleans `[rows, keys]` as `Pattern.tree_mask`: int32 `[rows, ceil(keys / 32)]`."""
    words = -(-seen.shape[1] // 32)
    padded = torch.nn.functional.pad(seen, (0, 32 * words - seen.shape[1])).view(len(seen), words, 32)
    values = (padded.long() << torch.arange(32, device=seen.device)).sum(-1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def unpack_tree_mask(tree_mask: Tensor, kv_len: int) -> Tensor:
    """`Pattern.tree_mask` as booleans `[rows, kv_len]`, on the same device."""
    key = torch.arange(kv_len, device=tree_mask.device)
    return (tree_mask[:, key // 32] >> (key % 32).to(tree_mask.dtype)) & 1 != 0
