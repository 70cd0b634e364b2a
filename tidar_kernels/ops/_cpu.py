"""What the CPU paths share: a memo, the merge by log-sum-exp, sinks, and attention with capped logits, not in ATen."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .operands import Keys

T = TypeVar("T")

# Beyond these, products overflow in float32: of a key with ordinary rows, of two such factors.
LARGEST_KEY = 1e30
LARGEST_FACTOR = 1e15
# Scores a head that capped attention holds at a time: 256 rows by 512 keys are 512 kB in float32.
CAPPED_ROWS = 256
CAPPED_KEYS = 512


class TensorMemo:
    """What is computed from tensors that rarely change, those of a pattern: kept while the first of them is alive.

    It is computed anew once another tensor stands beside the first, or one of them was written into. Nothing is kept of
    inference tensors, which do not count writes, and what is kept is never an inference tensor itself.
    """

    def __init__(self) -> None:
        # first tensor -> (the others, versions of all, what was computed); the first may be among the others
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(self, key: Hashable, compute: Callable[[], T], first: Tensor, *others: Tensor | None) -> T:
        """`compute()`, or what it returned before for this key and these tensors."""
        kept = self._kept_of(first, others)
        if key not in kept:
            with torch.inference_mode(False):
                kept[key] = compute()
        return kept[key]

    def _kept_of(self, first: Tensor, others: tuple[Tensor | None, ...]) -> dict[Hashable, Any]:
        tensors = [x for x in (first, *others) if x is not None]
        if any(x.is_inference() for x in tensors):
            return {}
        versions = [x._version for x in tensors]
        found = self._kept.get(first)
        if found is not None and found[1] == versions and all(a() is b for a, b in zip(found[0], others, strict=True)):
            return found[2]
        kept: dict[Hashable, Any] = {}
        self._kept[first] = [_nothing if x is None else TensorWeakRef(x) for x in others], versions, kept
        return kept


def _nothing() -> None:
    """The weak reference of a tensor that is not given."""


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if its last stride is not 1: ATen's fused attention takes that stride for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def all_below(x: Tensor, limit: float = math.inf) -> bool:
    """Whether every element is in `(-limit, limit)`: one pass, and False for NaN."""
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x)
    return -limit < low.item() and high.item() < limit


def broken_keys(keys: Keys) -> Tensor | None:
    """The keys in flight that must not enter a product with weight 0, bool `[batch, kv_heads, kv_len]`; None if none.

    ATen adds masks to scores and multiplies values by weights of 0, and neither -inf + NaN nor 0 * NaN leaves nothing.
    """
    if all_below(keys.k, LARGEST_KEY) and all_below(keys.v):
        return None
    return ~((keys.k.abs() < LARGEST_KEY).all(-1) & keys.v.isfinite().all(-1))


def without(keys: Keys, broken: Tensor) -> Keys:
    """`keys` with 0 in the broken ones."""
    return Keys(*(x.masked_fill(broken.unsqueeze(-1), 0.0) for x in keys))


def share(part_lse: Tensor, other_lse: Tensor) -> Tensor:
    """How much of a row's softmax its part has, the rest being the other: in [0, 1], 0 if the part saw no key."""
    # exp(part_lse) : exp(other_lse), as a sigmoid of their difference: no overflow
    return torch.where(part_lse == -math.inf, 0.0, torch.sigmoid(part_lse - other_lse))


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Give the softmax of every row of `out [batch, heads, rows, d]` its head's sink, in place; `lse` too."""
    sink = sinks.to(lse.dtype)[:, None].expand(lse.shape)
    out.mul_(share(lse, sink).unsqueeze(-1))
    torch.logaddexp(lse, sink, out=lse)


def _blocks(rows: int, keys: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, rows, CAPPED_ROWS):
        for key in range(0, keys, CAPPED_KEYS):
            yield slice(row, row + CAPPED_ROWS), slice(key, key + CAPPED_KEYS)


def _masked(scores: Tensor, mask: Tensor | None, rows: slice, keys: slice) -> Tensor:
    return scores if mask is None else scores.add_(mask[..., rows, keys])


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention whose logits are `softcap * tanh(scale * q.k / softcap)`: `(out, lse)`, float32 at least.

    Args:
        q: `[.., rows, d]`.
        k, v: `[.., keys, d]`; expanded heads are not copied but block by block.
        scale, softcap: positive.
        mask: added to the logits, `[.., rows, keys]`; a row without a key is 0 with lse = -inf.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_zeros(q.shape, dtype=wide), q.new_full(q.shape[:-1], -math.inf, dtype=wide)
    for rows, keys in _blocks(q.shape[-2], k.shape[-2]):
        logits = q[..., rows, :].to(wide) @ k[..., keys, :].to(wide).transpose(-1, -2)
        logits = _masked(logits.mul_(scale / softcap).tanh_().mul_(softcap), mask, rows, keys)
        part_lse = logits.logsumexp(-1)
        probs = logits.sub_(part_lse.masked_fill(part_lse == -math.inf, 0.0).unsqueeze(-1)).exp_()
        weight = share(part_lse, lse[..., rows]).unsqueeze(-1)
        out[..., rows, :] = out[..., rows, :].lerp(probs @ v[..., keys, :].to(wide), weight)
        lse[..., rows] = torch.logaddexp(lse[..., rows], part_lse)
    return out, lse


def capped_attention_backward(
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` of `capped_attention`, float32 at least, from rows that may see other keys besides.

    Args:
        grad_out: `[.., rows, d]`.
        delta: `[.., rows]`, the sum of `grad_out * out` less the gradient of lse, over all that the rows see.
        q, k, v, scale, softcap, mask: of the forward pass.
        lse: `[.., rows]`, over all that the rows see; +inf for rows that see nothing.
    """
    wide = lse.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device="cpu") for x in (q, k, v))
    for rows, keys in _blocks(q.shape[-2], k.shape[-2]):
        q_part, k_part, grad_part = q[..., rows, :].to(wide), k[..., keys, :].to(wide), grad_out[..., rows, :].to(wide)
        capped = (q_part @ k_part.transpose(-1, -2)).mul_(scale / softcap).tanh_()
        probs = _masked(capped * softcap, mask, rows, keys).sub_(lse[..., rows].unsqueeze(-1)).exp_()
        dv[..., keys, :] += probs.transpose(-1, -2) @ grad_part
        slope = capped.square_().neg_().add_(1.0).mul_(scale)
        grad_logits = grad_part @ v[..., keys, :].to(wide).transpose(-1, -2)
        grad_scores = grad_logits.sub_(delta[..., rows].unsqueeze(-1)).mul_(probs).mul_(slope)
        dq[..., rows, :] += grad_scores @ k_part
        dk[..., keys, :] += grad_scores.transpose(-1, -2) @ q_part
    return dq, dk, dv
