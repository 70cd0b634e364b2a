"""Exact decoding: draft rows whose bits are those of single-token decoding, whatever stands beside them.

Attention kernels give that by construction (`tidar_kernels.ops.step_attention`). Two things outside them do not: a
matrix product picks its order of summation by how many rows it is given, and the CPU's fused attention by how many
queries. Inside `exact_rows`, for a pattern's causal rows,

    torch.nn.functional.linear    runs as `tidar_kernels.row_invariant_linear`
    gated adapters                run on that as their base, mask rows too
    step attention on the CPU     runs row by row, each as the step of one token that it stands for

Mask rows only guess, and keep the fast paths. It is a mode over calls of PyTorch, so the model's code stays as it is;
what a model multiplies by other means than `linear` (some mixtures of experts) is outside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import cpu_exact, ops
from .linear import row_invariant_linear
from .patterns import Pattern

__all__ = ["exact_rows"]


class exact_rows(TorchFunctionMode):  # a context manager, used as a function
    """Context in which the causal rows of a step are exact; see the module.

    Args:
        pattern: of the forward pass inside. Operands `[batch, pattern.q_len, features]` are split at its causal rows.
            All rows of any other operand are exact; so they are without a pattern.

    Raises:
        ValueError: the pattern has bits: the keys of a token tree's row do not lie as in single-token decoding.
    """

    def __init__(self, pattern: Pattern | None = None) -> None:
        super().__init__()
        if pattern is not None and pattern.bits is not None:
            raise ValueError(f"pattern: expected one without bits for exact rows, got {pattern.name}")
        self.q_len = -1 if pattern is None else pattern.q_len
        self.exact = 0 if pattern is None else pattern.causal_len

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is torch.ops.tidar_kernels.gated_lora:
            return func(*args[:-1], True)  # row_invariant
        if func is torch.ops.tidar_kernels.step_attention and args[0].device.type == "cpu" and not ops.interpreting():
            *operands, max_context = args[:10]  # it only sizes launches
            return cpu_exact.step_attention(self.exact, *operands, *args[10:])
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.q_len or self.exact == self.q_len:
            return row_invariant_linear(x, weight, bias)
        exact = row_invariant_linear(x[:, : self.exact], weight, bias)
        return torch.cat([exact, F.linear(x[:, self.exact :], weight, bias)], dim=1)
