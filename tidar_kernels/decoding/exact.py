"""Exact decoding: draft rows whose bits are those of single-token decoding, whatever stands beside them.

Attention kernels give that by construction (`tk.step_attention`). Three things outside them do not: a
matrix product picks its order of summation by how many rows it is given, the CPU's fused attention by how many
queries, and the CPU's exponentials are those of another routine for the elements that its vectors leave over. Inside
`exact_rows`, for a pattern's causal rows,

    torch.nn.functional.linear    runs as `tidar_kernels.row_invariant_linear`
    gated adapters                run on that as their base, mask rows too
    step attention on the CPU     runs row by row, each as the step of one token that it stands for
    activations on the CPU        run row by row (`_ELEMENTWISE`)

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


def _functions(*names: str) -> frozenset[Callable[..., Any]]:
    """The functions of these names in every form in which a model may call them."""
    found = (getattr(home, name, None) for home in (F, torch, Tensor) for name in names)
    return frozenset(function for function in found if function is not None)


# What is no exact operation of IEEE 754, so that two routines may differ in the last bit.
_ELEMENTWISE = _functions(
    "silu", "gelu", "mish", "elu", "celu", "selu", "softplus", "logsigmoid",
    "sigmoid", "tanh", "exp", "exp2", "expm1", "log", "log1p", "erf", "cos", "sin", "pow",
)  # fmt: skip


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
        if func in _ELEMENTWISE and not kwargs.get("inplace") and kwargs.get("out") is None:
            return self._by_row(func, *args, **kwargs)
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

    def _by_row(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x, others = (args[0], args[1:]) if args else (kwargs.get("input"), ())
        if not isinstance(x, Tensor) or x.device.type != "cpu" or x.ndim < 3 or x.shape[1] != self.q_len:
            return func(*args, **kwargs)
        rows = x[:, : self.exact].contiguous()
        if len(rows) * self.exact > 1:
            done = [func(row, *others, **kwargs) for row in rows.flatten(0, 1).unbind()]
            exact = torch.stack(done).view_as(rows) if done else rows
        else:
            exact = func(rows, *others, **kwargs)
        if self.exact == self.q_len:
            return exact
        return torch.cat([exact, func(x[:, self.exact :], *others, **kwargs)], dim=1)
