"""bfloat16 weights on a CPU, kept a second time in the layout in which it multiplies.

Where a CPU multiplies bfloat16 natively, oneDNN wants the weights in blocks of pairs, and makes these from the rows
that PyTorch keeps in every call: a product of few rows spends more on that than on reading and multiplying. Inside
`packed_linear` a weight is brought into that layout once, and `torch.nn.functional.linear` runs on it: the same
products in the same order, so the same bits. It takes the weights' memory once more.

It is a mode over calls of PyTorch, so the model's code stays as it is. Exact rows (`exact_rows`), which run another
product, are none of its business: they come first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["PackedWeights", "can_pack", "packed_linear"]


class _Packed(NamedTuple):
    """A weight in blocks, and which state of which parameter it is."""

    of: weakref.ref[nn.Parameter]
    rows: Tensor  # its memory then: held, so that no other weight comes to lie there
    version: int
    blocks: Tensor


class PackedWeights:
    """The weights that were packed so far, each when a product first asks for it. A copy begins empty.

    A weight that was written since, or replaced, is packed anew, as far as PyTorch tells: not what is written through
    `weight.data`.
    """

    def __init__(self) -> None:
        self._held: dict[int, _Packed] = {}

    def __reduce__(self) -> Any:
        return PackedWeights, ()

    def __call__(self, weight: nn.Parameter) -> Tensor:
        """The blocks of a weight as it is now."""
        held = self._held.get(id(weight))
        if (
            held is None
            or held.of() is not weight
            or held.rows.data_ptr() != weight.data_ptr()
            or held.version != weight._version
        ):
            rows = weight.detach()
            blocks = torch.ops.mkldnn._reorder_linear_weight(rows, 1)
            held = self._held[id(weight)] = _Packed(weakref.ref(weight), rows, weight._version, blocks)
        return held.blocks


class packed_linear(TorchFunctionMode):  # a context manager, used as a function
    """Context in which products with bfloat16 parameters on a CPU run on packed weights; see the module."""

    def __init__(self, weights: PackedWeights) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return self._linear(*args, **kwargs) if func is F.linear else func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or not isinstance(weight, nn.Parameter) or not _is_packable(input, weight):
            return F.linear(input, weight, bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._weights(weight), bias, "none", [], "")
        return found


def _is_packable(input: Tensor, weight: nn.Parameter) -> bool:
    """Whether it is a product that oneDNN would do in bfloat16, with a weight whose changes are noticed."""
    fits = weight.dtype == input.dtype == torch.bfloat16 and weight.ndim == 2
    on_cpu = weight.device.type == input.device.type == "cpu"
    return fits and on_cpu and weight.is_contiguous() and input.numel() > 0 and not weight.is_inference()


def can_pack() -> bool:
    """Whether this machine multiplies bfloat16 through oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
