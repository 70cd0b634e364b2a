"""The TiDAR training objective from hidden states, in chunks: `[rows, vocab]` logits never exist at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import tensor
from .patterns import Pattern, Role

__all__ = ["TiDARLoss", "tidar_loss"]


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
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * grad.to(grad_head.dtype),
            None,
            None,
            None,
        )


def tidar_loss(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    pattern: Pattern,
    *,
    alpha: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int = 1024,
) -> TiDARLoss:
    """`(alpha * mean CE_AR + mean CE_Diff) / (1 + alpha)` (TiDAR, arXiv 2511.08923, training objective).

    Which token a row predicts is the pattern's (`Pattern.predicts`): clean rows the next one, never across documents;
    mask rows the one they hide. Each mean is over the rows of its kind that have a label; one without any counts 0.

    Args:
        hidden: `[batch, pattern.q_len, hidden_size]`, the model's output before the lm_head.
        head: `[vocab_size, hidden_size]`, the lm_head's weight, in the dtype of `hidden`.
        tokens: int64 `[batch, S]`, the clean tokens that the rows predict; `ignore_index` where none should
            (padding, prompts).
        pattern: a training pattern.
        alpha: weight of the autoregressive mean, >= 0.
        ignore_index: the label that counts for nothing.
        chunk_size: rows whose logits exist at a time; memory `chunk_size * vocab_size * 4` bytes.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit, the pattern predicts nothing, a label outside the
            vocabulary (checked on the CPU only, where reading is free), or `alpha` is negative.
    """
    tensor("hidden", hidden, 3)
    tensor("head", head, 2)
    tensor("tokens", tokens, 2)
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern: expected a tidar_kernels.Pattern, got {type(pattern).__name__}")
    if head.dtype != hidden.dtype:
        raise TypeError(f"head: expected dtype {hidden.dtype} like hidden, got {head.dtype}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens: expected dtype int64, got {tokens.dtype}")
    if hidden.shape[1] != pattern.q_len or hidden.shape[2] != head.shape[1]:
        expected = f"[batch, {pattern.q_len}, {head.shape[1]}]"
        raise ValueError(f"hidden: expected shape {expected} for {pattern.name}, got {list(hidden.shape)}")
    if pattern.num_labels < 1:
        raise ValueError(f"pattern: expected a training pattern, whose rows predict tokens, got {pattern.name}")
    if tokens.shape[0] != hidden.shape[0] or tokens.shape[1] < pattern.num_labels:
        expected = f"[{hidden.shape[0]}, >= {pattern.num_labels}]"
        raise ValueError(f"tokens: expected shape {expected}, got {list(tokens.shape)}")
    if not alpha >= 0.0:
        raise ValueError(f"alpha: expected >= 0, got {alpha}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected >= 1, got {chunk_size}")

    index = pattern.predicts.to(tokens.device, torch.int64)
    labels = torch.where(index >= 0, tokens[:, index.clamp(min=0)], ignore_index)
    known = labels != ignore_index
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[known & ((labels < 0) | (labels >= head.shape[0]))]
        if wrong.numel():
            raise ValueError(f"tokens: expected labels in [0, {head.shape[0]}) or {ignore_index}, got {int(wrong[0])}")
    mask_rows = (pattern.roles == int(Role.MASK)).to(tokens.device)
    kinds = torch.stack([known & ~mask_rows, known & mask_rows]).float()
    # Rows of a kind share its weight equally; a kind without rows has none to share.
    share = kinds / kinds.sum(dim=(1, 2), keepdim=True).clamp(min=1.0)
    weights = (alpha * share[0] + share[1]) / (1.0 + alpha)
    loss, losses = _ChunkedCrossEntropy.apply(
        hidden.flatten(0, 1), head, torch.where(known, labels, 0).flatten(), weights.flatten(), chunk_size
    )
    means = (losses.view(labels.shape) * share).sum(dim=(1, 2))
    return TiDARLoss(loss, means[0], means[1])
