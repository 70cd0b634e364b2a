"""The TiDAR training objective from hidden states, in chunks: `[rows, vocab]` logits never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..distributed import ContextParallel
from ..distributed.collectives import all_reduced
from ..ops.checks import shape, tensor
from ..patterns import Pattern, Role
from ..patterns.arguments import FLOAT_DTYPES, check_int, check_number

__all__ = ["TiDARLoss", "check_logits", "label_counts", "tidar_loss"]


class TiDARLoss(NamedTuple):
    """`loss` is differentiable; `autoregressive` and `diffusion` are its two means, detached, in nats a token."""

    loss: Tensor
    autoregressive: Tensor
    diffusion: Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`sum_r weight_r * CE(h_r W^T, label_r)` and each row's CE; gradients are made chunk by chunk in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if wants_head else None
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, labels.numel(), chunk_size):
            rows = slice(start, start + chunk_size)
            probs = (hidden[rows] @ head.t()).float()
            label = labels[rows, None]
            lse = torch.logsumexp(probs, dim=1, keepdim=True)
            losses[rows] = (lse - probs.gather(1, label)).squeeze(1)
            if not (wants_hidden or wants_head):
                continue
            # d loss / d logits = weight * (softmax - onehot), in place of the logits
            probs.sub_(lse).exp_().scatter_add_(1, label, torch.full_like(lse, -1.0)).mul_(weights[rows, None])
            grad_logits = probs.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ head
            if grad_head is not None:
                grad_head += grad_logits.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # The gradients were made in the forward pass: a graph through them would say that they depend on nothing.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("tidar_loss: expected at most first derivatives, got create_graph=True")
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * grad.to(grad_head.dtype),
            None,
            None,
            None,
        )


def check_logits(logits: Any, rows: Tensor) -> Tensor:
    """`logits`, if a head gave a tensor `[rows, vocab]` for its rows."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(rows):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"head: expected logits [{len(rows)}, vocab] of its rows, got {got}")
    return logits


def _chunked_by_head(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, weights: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The same sum and rows for any head: a chunk's logits are made again in the backward, not kept for it."""

    def losses_of(rows: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(check_logits(head(rows), rows).float(), label, reduction="none")

    chunks = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    if torch.is_grad_enabled():
        losses = torch.cat([checkpoint(losses_of, rows, label, use_reentrant=False) for rows, label in chunks])
    else:
        losses = torch.cat([losses_of(rows, label) for rows, label in chunks])
    return (losses * weights).sum(), losses.detach()


def _labels(tokens: Tensor, pattern: Pattern, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The label of every row, `[batch, q_len]`, and as float32 `[2, batch, q_len]` which rows of a kind have one."""
    index = pattern.predicts.to(tokens.device, torch.int64)
    labels = torch.where(index >= 0, tokens[:, index.clamp(min=0)], ignore_index)
    known = labels != ignore_index
    mask_rows = (pattern.roles == int(Role.MASK)).to(tokens.device)
    return labels, torch.stack([known & ~mask_rows, known & mask_rows]).float()


def label_counts(tokens: Tensor, pattern: Pattern | ContextParallel, *, ignore_index: int = -100) -> Tensor:
    """How many clean rows and how many mask rows have a label: float32 `[2]` on the device of `tokens`.

    Summed over the batches of an accumulated step, and over devices, they are what `tidar_loss` divides by there. Of a
    `ContextParallel` the rows of all its ranks are counted.

    Raises:
        TypeError, ValueError: an argument is of another type, or there are fewer tokens than the pattern predicts.
    """
    _check_labels(tokens, pattern, ignore_index)
    return _labels(tokens, _whole(pattern), ignore_index)[1].sum(dim=(1, 2))


def _check_labels(tokens: Any, pattern: Any, ignore_index: Any) -> None:
    """Raise unless the rows of a training pattern find their labels in `tokens`."""
    tensor("tokens", tokens, 2)
    if not isinstance(pattern, (Pattern, ContextParallel)):
        raise TypeError(f"pattern: expected a tidar_kernels.Pattern, got {type(pattern).__name__}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens: expected dtype int64, got {tokens.dtype}")
    whole = _whole(pattern)
    if whole.num_labels < 1:
        raise ValueError(f"pattern: expected a training pattern, whose rows predict tokens, got {whole.name}")
    if tokens.shape[1] < whole.num_labels:
        raise ValueError(f"tokens: expected shape [{len(tokens)}, >= {whole.num_labels}], got {list(tokens.shape)}")
    check_int("ignore_index", ignore_index, -(2**63))


def _whole(pattern: Pattern | ContextParallel) -> Pattern:
    return pattern.pattern if isinstance(pattern, ContextParallel) else pattern


def tidar_loss(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    tokens: Tensor,
    pattern: Pattern | ContextParallel,
    *,
    alpha: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int = 1024,
    counts: Tensor | None = None,
) -> TiDARLoss:
    """`(alpha * mean CE_AR + mean CE_Diff) / (1 + alpha)` (TiDAR, arXiv 2511.08923, training objective).

    Which token a row predicts is the pattern's (`Pattern.predicts`): clean rows the next one, never across documents;
    mask rows the one they hide. Each mean is over the rows of its kind that have a label; one without any counts 0.

    Args:
        hidden: `[batch, pattern.q_len, hidden_size]`, the model's output before the lm_head; with a `ContextParallel`
            that of this rank's rows.
        head: `[vocab_size, hidden_size]`, the lm_head's weight, in the dtype of `hidden` (any under autocast); or a
            function from rows `[n, hidden_size]` to their logits, for heads that are more than a weight (it runs again
            in the backward).
        tokens: int64 `[batch, S]`, the clean tokens that the rows predict; `ignore_index` where none should
            (padding, prompts).
        pattern: a training pattern. With a `ContextParallel`, a collective, `loss` is the share of this rank's rows,
            and the shares of all ranks add up to the loss; the two means are over the rows of all ranks, on each.
        alpha: weight of the autoregressive mean, finite, >= 0.
        ignore_index: the label that counts for nothing.
        chunk_size: rows whose logits exist at a time; memory `chunk_size * vocab_size * 4` bytes.
        counts: `[2]`, clean and mask rows with a label that the sums are divided by; default those of this batch. With
            the `label_counts` of all batches of an accumulated step, its losses add up to the loss of them together.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, the pattern predicts nothing, a label outside the
            vocabulary (checked on the CPU only, where reading is free), or a number is out of range.
        RuntimeError: in the backward pass, if it is to build a graph itself (`create_graph`) and the head is a weight.
    """
    tensor("hidden", hidden, 3)
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(f"hidden: expected a float dtype, got {hidden.dtype}")
    _check_labels(tokens, pattern, ignore_index)
    local, whole = pattern.local if isinstance(pattern, ContextParallel) else pattern, _whole(pattern)
    vocab_size = None
    if isinstance(head, Tensor) or not callable(head):
        tensor("head", head, 2)
        # Under autocast a layer may give another dtype than the weights have; products are cast either way.
        if head.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"head: expected dtype {hidden.dtype} like hidden, got {head.dtype}")
        vocab_size = head.shape[0]
    for name, operand in (("head", head), ("tokens", tokens)):
        if isinstance(operand, Tensor) and operand.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} like hidden, got {operand.device}")
    hidden_size = head.shape[1] if isinstance(head, Tensor) else hidden.shape[2]
    if hidden.shape[1] != local.q_len or hidden.shape[2] != hidden_size:
        expected = f"[batch, {local.q_len}, {hidden_size}]"
        raise ValueError(f"hidden: expected shape {expected} for {local.name}, got {list(hidden.shape)}")
    if tokens.shape[0] != hidden.shape[0]:
        expected = f"[{hidden.shape[0]}, >= {whole.num_labels}]"
        raise ValueError(f"tokens: expected shape {expected}, got {list(tokens.shape)}")
    alpha = check_number("alpha", alpha, 0.0)
    check_int("chunk_size", chunk_size, 1)
    if counts is not None:
        tensor("counts", counts, 1)
        shape("counts", counts, (2,))
        if counts.device != hidden.device:
            raise ValueError(f"counts: expected device {hidden.device} like hidden, got {counts.device}")

    labels, kinds = _labels(tokens, local, ignore_index)
    known = labels != ignore_index
    if vocab_size is not None and tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[known & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ValueError(f"tokens: expected labels in [0, {vocab_size}) or {ignore_index}, got {int(wrong[0])}")
    # Rows of a kind share its weight equally; a kind without rows has none to share.
    own = kinds.sum(dim=(1, 2)) if local is whole else label_counts(tokens, whole, ignore_index=ignore_index)
    share = kinds / own.clamp(min=1.0).view(2, 1, 1)
    divisor = own if counts is None else counts.to(own)
    kind_weights = kinds / divisor.clamp(min=1.0).view(2, 1, 1)
    weights = (alpha * kind_weights[0] + kind_weights[1]) / (1.0 + alpha)
    rows = (torch.where(known, labels, 0).flatten(), weights.flatten(), chunk_size)
    if isinstance(head, Tensor):
        loss, losses = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), head, *rows)
    else:
        loss, losses = _chunked_by_head(hidden.flatten(0, 1), head, *rows)
    means = (losses.view(labels.shape) * share).sum(dim=(1, 2))
    if isinstance(pattern, ContextParallel):
        means = all_reduced(means, pattern.group)
    return TiDARLoss(loss, means[0], means[1])
