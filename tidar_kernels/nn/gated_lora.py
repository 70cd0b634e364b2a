"""A frozen projection with LoRA on some rows (R-ISD, arXiv 2604.11035), and the gate that says on which.

    with lora_gate(gate):                                # [batch, rows] or [rows]: which rows the adapter applies to
        hidden = model(tokens, pattern)

The gate is said, never guessed from token ids: a model with adapters does not run without one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import gated_lora, row_invariant_linear
from ..ops.linear import add_lora
from ..patterns.arguments import FLOAT_DTYPES, check_dtype, check_int, check_number

__all__ = ["GatedLoRA", "check_base", "has_gated_lora", "kind_of", "lora_gate"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LINEAR_FORWARD = nn.Linear.forward


class _Gate(threading.local):
    """The open gate of a thread. Not a context variable: `torch.compile` cannot read those."""

    value: Tensor | bool | None = None


_gate = _Gate()


@contextmanager
def lora_gate(gate: Tensor | bool) -> Iterator[None]:
    """Inside, every `GatedLoRA` that this thread runs applies its adapter to the rows of this gate.

    Activations that are recomputed in the backward pass need it there too: for `torch.utils.checkpoint`,
    `context_fn=lambda: (nullcontext(), lora_gate(gate))`.

    Args:
        gate: bool or float, broadcast over the leading dimensions of every projection's input, `[batch, rows]` or
            `[rows]`; a float scales the adapter's term. True is all rows, False the base model.

    Raises:
        TypeError: neither a tensor nor a bool.
    """
    if not isinstance(gate, (Tensor, bool)):
        raise TypeError(f"gate: expected a torch.Tensor or a bool, got {type(gate).__name__}")
    outer, _gate.value = _gate.value, gate
    try:
        yield
    finally:
        _gate.value = outer


def kind_of(module: object) -> str:
    """A module's class in words; with its package where the name alone would mislead."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ == "Linear" else kind.__name__


def _is_plain(linear: nn.Linear) -> bool:
    """Whether calling the module is `x W^T + bias` of a plain weight and nothing else: then kernels may compute it.

    Not so for subclasses, parametrised, hooked and patched modules, and for weights of tensor subclasses (quantised,
    sharded). Asked at every call, for hooks come and go.
    """
    return (
        type(linear) is nn.Linear
        and type(linear).forward is _LINEAR_FORWARD
        and "forward" not in vars(linear)
        and not any(getattr(linear, hooks) for hooks in _HOOKS)
        and type(linear.weight) in (nn.Parameter, Tensor)
        and linear.weight.layout is torch.strided
    )


def check_base(name: str, linear: Any, row_invariant: bool = False) -> None:
    """Raise unless `GatedLoRA` can wrap the module; `name` is what errors call it.

    Raises:
        TypeError: not an `nn.Linear`, or one whose weight is not there or not usable.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name}: expected an nn.Linear, got {kind_of(linear)}")
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(f"{name}: expected a module that is called, got that of nn.MultiheadAttention, which is not")
    weight = linear.weight
    if nn.parameter.is_lazy(weight):
        raise TypeError(f"{name}: expected a weight of known shape, got {kind_of(linear)} before its first call")
    if hasattr(weight, "device_mesh"):
        raise TypeError(f"{name}: expected a whole weight, got a DTensor; add adapters before the model is sharded")
    if weight.device.type == "meta" and hasattr(linear, "_hf_hook"):
        raise TypeError(f"{name}: expected a weight in memory, got one that accelerate offloads")
    if not _is_plain(linear):
        if row_invariant:
            raise TypeError(f"{name}: expected a plain nn.Linear for row_invariant, got {_what_else(linear)}")
    elif tuple(weight.shape) != (linear.out_features, linear.in_features) or not weight.is_floating_point():
        raise TypeError(
            f"{name}: expected a float weight of shape {[linear.out_features, linear.in_features]}, "
            f"got {weight.dtype} of shape {list(weight.shape)}"
        )


def _what_else(linear: nn.Linear) -> str:
    """What a module is more than a plain `nn.Linear`, for an error."""
    if type(linear) is not nn.Linear:
        return kind_of(linear)
    weight = type(linear.weight)
    return "one with hooks or a forward of its own" if weight is nn.Parameter else f"a weight of {weight.__name__}"


class GatedLoRA(nn.Module):
    """`base(x) + s * ((m * (x A^T)) B^T)` around an `nn.Linear`, which is frozen; m is the gate of `lora_gate`.

    A starts as in LoRA (uniform), B at 0, so that a new adapter changes nothing. Rows with gate 0 have the bits of the
    base. Where that is `x W^T + bias` and nothing else, one fused operator computes both terms; a module that is more
    (a subclass, quantised, parametrised, hooked) runs as it is, and the adapter's term is added in plain PyTorch.

    Args:
        linear: the projection, an `nn.Linear` or a subclass; kept as `base`.
        rank: of the adapter, >= 1.
        alpha: s = alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        dtype: of A and B; default that of the weight, float32 if that is quantised. They are cast to the dtype of x
            where they are used.
        row_invariant: the base is `row_invariant_linear`, as it is for exact rows (`tidar_kernels.decoding.exact`).

    Raises:
        TypeError: not an `nn.Linear`; a weight that is lazy, offloaded, sharded or packed without a forward of its own;
            with `row_invariant`, a base that is more than `x W^T + bias`; an argument of another type.
        ValueError: rank < 1, or alpha is not finite.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        *,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
        row_invariant: bool = False,
    ) -> None:
        super().__init__()
        check_base("linear", linear, row_invariant)
        check_adapter(rank, alpha, dtype)
        weight = linear.weight
        if dtype is None:
            dtype = weight.dtype if weight.dtype in FLOAT_DTYPES else torch.float32
        self.rank, self.alpha, self.use_rslora, self.row_invariant = rank, alpha, use_rslora, row_invariant
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.base = linear.requires_grad_(False)
        self.train(linear.training)

    @property
    def scale(self) -> float:
        """s, the factor of the adapter's term."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, where models look for it."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features] -> [..., out_features]`.

        Raises:
            RuntimeError: no `lora_gate` is open, or a `row_invariant` base has become more than `x W^T + bias`.
        """
        gate = _gate.value
        if gate is None:
            raise RuntimeError("lora_gate: expected an open lora_gate(gate) around a model with GatedLoRA, got none")
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        plain = _is_plain(self.base)
        if self.row_invariant and not plain:
            raise RuntimeError(f"base: expected a plain nn.Linear for row_invariant, got {_what_else(self.base)}")
        if gate is False:
            return row_invariant_linear(x, self.weight, self.bias) if self.row_invariant else self.base(x)
        rows = x.new_ones(()) if gate is True else gate
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        if plain:
            return gated_lora(x, self.weight, a, b, rows, self.scale, self.bias, row_invariant=self.row_invariant)
        return add_lora(self.base(x), x, a, b, rows, self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, use_rslora={self.use_rslora}"


def check_adapter(rank: Any, alpha: Any, dtype: Any) -> None:
    """Raise unless an adapter can have this rank, alpha and dtype."""
    check_int("rank", rank, 1, 2**31)
    check_number("alpha", alpha)
    check_dtype("dtype", dtype)


def has_gated_lora(model: object) -> bool:
    """Whether any projection of the model is wrapped: it then runs inside `lora_gate` only.

    Args:
        model: a module, or what has one as its attribute `model`.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    return isinstance(module, nn.Module) and any(isinstance(inner, GatedLoRA) for inner in module.modules())
