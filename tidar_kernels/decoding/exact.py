"""Exact decoding: draft rows whose bits are those of single-token decoding, whatever stands beside them.

Attention kernels give that by construction (`tk.step_attention`). Two things outside them do not: a
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

from ..ops import interpreting, row_invariant_linear
from ..ops.linear import lora_operator
from ..ops.linear.operands import Adapter, Projection
from ..ops.operands import Rows
from ..ops.step_attention import cpu_exact
from ..ops.step_attention import operator as step_operator
from ..patterns import Pattern

__all__ = ["exact_rows"]


class exact_rows(TorchFunctionMode):  # a context manager, used as a function
    """Context in which the causal rows of a step are exact; see the module.

    Args:
        pattern: of the forward pass inside. Operands `[batch, pattern.q_len, features]` are split at its causal rows.
            All rows of any other operand are exact; so they are without a pattern.

    Raises:
        ValueError: the pattern has a tree mask: the keys of a token tree's row do not lie as in single-token decoding.
    """

    def __init__(self, pattern: Pattern | None = None) -> None:
        super().__init__()
        if pattern is not None and pattern.tree_mask is not None:
            raise ValueError(f"pattern: expected one without tree mask for exact rows, got {pattern.name}")
        self.q_len = -1 if pattern is None else pattern.q_len
        self.exact = 0 if pattern is None else pattern.causal_len

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if lora_operator.is_called_by(func):
            return lora_operator.with_bundles(self._gated_lora, args, kwargs)
        if step_operator.is_called_by(func) and not interpreting():
            return step_operator.with_bundles(self._step_attention, args, kwargs)
        return func(*args, **kwargs)

    def _gated_lora(self, projection: Projection, adapter: Adapter, row_invariant: bool) -> Any:
        return lora_operator(projection, adapter, row_invariant=True)

    def _step_attention(self, rows: Rows, *others: Any) -> Any:
        if rows.q.device.type != "cpu":
            return step_operator(rows, *others)
        return cpu_exact.step_attention(rows, *others, causal_rows=self.exact)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.q_len or self.exact == self.q_len:
            return row_invariant_linear(x, weight, bias)
        exact = row_invariant_linear(x[:, : self.exact], weight, bias)
        return torch.cat([exact, F.linear(x[:, self.exact :], weight, bias)], dim=1)
