"""The rules of a parity test: the error budget, poisoned memory, and guard bands. Nothing here knows an operator."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from ..ops import checks
from ..patterns.arguments import check_device, check_instance, check_number
from .sanitizer import mark_unwritten

__all__ = [
    "LAYOUTS",
    "Case",
    "Guarded",
    "Measure",
    "ParityError",
    "ParityResult",
    "bits",
    "budget",
    "check_case",
    "check_equal",
    "generator_of",
    "guarded",
    "naming",
    "poisoned_allocations",
    "relative_error",
    "result_of",
]

# Elements of canary before and after every guarded tensor: a multiple of 16 bytes in every dtype, so that alignment,
# which Triton specialises on, is that of an ordinary allocation.
GUARD = 1024


class ParityError(AssertionError):
    """A kernel computes something else than its eager twin. The message names the case, expected and got."""


@dataclass(frozen=True)
class Measure:
    """One quantity of one check: its relative error, that of eager PyTorch in the same dtype, and what was allowed."""

    name: str
    error: float
    eager_error: float
    budget: float


@dataclass(frozen=True)
class ParityResult:
    """What one check of one case found. `failure` is empty, or the message of the `ParityError`."""

    operator: str
    case: str
    device: str
    dtype: str
    measures: tuple[Measure, ...] = ()
    failure: str = ""

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return not self.failure

    def failed(self, error: ParityError) -> ParityResult:
        """The same result with a failure."""
        return replace(self, failure=str(error))


class Case(Protocol):
    """What every check needs of its case, which is a frozen dataclass of its own."""

    @property
    def name(self) -> str: ...

    @property
    def id(self) -> str:
        """Name and dtype, for messages."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands."""


def check_case(case: Any, of: type, device: Any) -> None:
    """Raise a TypeError or ValueError unless these are a case of this class and a device."""
    check_instance("case", case, of)
    check_device("device", device)


def _check_values(**values: Any) -> None:
    """Raise a TypeError unless all are tensors of real numbers that can be read."""
    for name, value in values.items():
        if check_instance(name, value, Tensor).is_complex() or value.is_meta:
            raise TypeError(f"{name}: expected a tensor of real numbers, got {value.dtype} on {value.device}")


@contextmanager
def naming(operator: str, case: Case, device: torch.device | str) -> Iterator[None]:
    """Put the operator, the case and the device before the message of a `ParityError`."""
    try:
        yield
    except ParityError as error:
        raise ParityError(f"{operator}, case {case.id} on {device}: {error}") from error


def result_of(operator: str, case: Case, device: torch.device | str, measures: Iterable[Measure] = ()) -> ParityResult:
    """The result of a check that found nothing wrong."""
    return ParityResult(operator, case.id, str(device), str(case.dtype).removeprefix("torch."), tuple(measures))


def generator_of(case: Case) -> torch.Generator:
    """A case draws the same numbers on every device and in any order; two cases draw different ones."""
    return torch.Generator().manual_seed(zlib.crc32(case.id.encode()))


def relative_error(value: Tensor, reference: Tensor, *, by_row: bool = False) -> float:
    """`|value - reference| / |reference|` in the Euclidean norm, in float64, over what is finite in `reference`.

    With `by_row` the norms are taken along the last dimension and the largest quotient is returned. Where the
    reference is 0 the error is absolute.

    Raises:
        TypeError, ValueError: these are no tensors of one shape.
    """
    _check_values(value=value, reference=reference)
    checks.shape("value", value, tuple(reference.shape))
    finite = reference.isfinite()
    expected = torch.where(finite, reference.double(), 0.0)
    difference = torch.where(finite, value.double(), 0.0) - expected
    if not by_row:
        expected, difference = expected.flatten(), difference.flatten()
    size = expected.norm(dim=-1)
    quotient = difference.norm(dim=-1) / torch.where(size > 0.0, size, 1.0)
    return float(quotient.max()) if quotient.numel() else 0.0


def budget(
    out: Tensor,
    reference: Tensor,
    eager: Tensor,
    name: str = "out",
    *,
    by_row: bool = False,
    at_least: float = 0.0,
) -> Measure:
    """The budget rule: an error of at most twice that of eager PyTorch in the same dtype, plus 1e-5, by norm.

    A norm over everything forgives one wrong row among thousands, so `by_row` compares the worst row with the worst
    row of eager PyTorch.

    Args:
        out: what the kernel computed.
        reference: what the eager twin computes from the same inputs in float64.
        eager: what the eager twin computes in the dtype of `out`.
        name: of the quantity, for messages.
        by_row: take the norms along the last dimension, and the largest.
        at_least: of the error of eager PyTorch, where it is that of a few numbers and may be small by luck.

    Raises:
        ParityError: the error is over budget; or shapes differ, or `out` is not finite where `reference` is, or not
            the same infinity where `reference` is infinite.
        TypeError, ValueError: an argument is of another type, or `eager` of another shape.
    """
    _check_values(out=out, reference=reference, eager=eager)
    checks.shape("eager", eager, tuple(reference.shape))
    check_number("at_least", at_least, 0.0)
    if out.shape != reference.shape:
        raise ParityError(f"{name}: expected shape {list(reference.shape)}, got {list(out.shape)}")
    finite = reference.isfinite()
    wrong = torch.where(finite, ~out.isfinite(), out.double() != reference.double())
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise ParityError(
            f"{name}: expected {float(reference[tuple(at)]):.6g} at {at}, got {float(out[tuple(at)])} "
            f"({int(wrong.sum())} of {wrong.numel()} entries are wrong in this way)"
        )
    error = relative_error(out, reference, by_row=by_row)
    eager_error = max(relative_error(eager, reference, by_row=by_row), at_least)
    measure = Measure(name, error, eager_error, 2.0 * eager_error + 1e-5)
    if not error <= measure.budget:
        raise ParityError(
            f"{name}: expected a relative error of at most {measure.budget:.3g} "
            f"(2 x {eager_error:.3g} of eager {str(eager.dtype).removeprefix('torch.')} + 1e-05), got {error:.3g}"
        )
    return measure


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers of the same size: NaNs compare, and 0.0 differs from -0.0.

    Raises:
        TypeError: it is no tensor of real numbers.
    """
    if check_instance("tensor", tensor, Tensor).is_complex():
        raise TypeError(f"tensor: expected one of real numbers, got {tensor.dtype}")
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def check_equal(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise unless `torch.equal`: no rounding is forgiven, and NaN never equals NaN.

    Raises:
        ParityError: naming `what`, the first place where they differ, and how many values differ.
        TypeError: these are no tensors.
    """
    _check_values(got=got, expected=expected)
    if got.shape != expected.shape:
        raise ParityError(f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}")
    if torch.equal(got, expected):
        return
    differs = got != expected
    at = differs.nonzero()[0].tolist()
    raise ParityError(
        f"{what}: expected the same bits, got {float(got[tuple(at)])!r} for {float(expected[tuple(at)])!r} at {at} "
        f"({int(differs.sum())} of {differs.numel()} values differ)"
    )


def canary(dtype: torch.dtype) -> float | int:
    """What unused memory is filled with: NaN, or the largest integer."""
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


@dataclass(frozen=True)
class Guarded:
    """A tensor that is a view into the middle of a larger buffer. `before` is a copy of all of the buffer."""

    tensor: Tensor
    buffer: Tensor
    before: Tensor

    def check(self, name: str, *, written: bool = False) -> None:
        """Raise if the buffer changed: around the tensor, between its elements or, unless `written`, in the tensor.

        Raises:
            ParityError: naming `name` and the first changed element of the buffer.
        """
        differs = bits(self.buffer) != bits(self.before)
        if written:
            differs.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()).fill_(False)
        changed = differs.nonzero()
        if changed.numel():
            where = int(changed[0]) - self.tensor.storage_offset()
            raise ParityError(
                f"{name}: expected no write here, got {changed.numel()} changed elements, "
                f"the first {where} elements from the start of a tensor of shape {list(self.tensor.shape)}"
            )


def _gaps(b: int, h: int, n: int, d: int) -> tuple[int, ...]:
    row, head = d + 1, (n + 3) * (d + 1)
    return h * head, head, row, 1


# Strides of a `[batch, heads, rows, head_dim]` operand by layout, in elements.
LAYOUTS: dict[str, Callable[[int, int, int, int], tuple[int, ...]]] = {
    "bhnd": lambda b, h, n, d: (h * n * d, n * d, d, 1),  # contiguous
    "bnhd": lambda b, h, n, d: (n * h * d, d, h * d, 1),  # a projection's output, transposed: the usual one
    "gaps": _gaps,  # slices of a larger tensor; also unaligned
    "bhdn": lambda b, h, n, d: (h * d * n, d * n, 1, n),  # stride 1 is not along head_dim
    "shared_heads": lambda b, h, n, d: (n * d, 0, d, 1),  # one kv head expanded to all
}


def guarded(values: Tensor, layout: str = "bhnd") -> Guarded:
    """`values` with these strides (`LAYOUTS`; ranks other than 4 are contiguous) inside a buffer of canaries.

    In the layout `shared_heads` all heads hold the values of head 0.

    Raises:
        TypeError: `values` is no tensor of real numbers. ValueError: `layout` is not in `LAYOUTS`.
    """
    _check_values(values=values)
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    shape = tuple(values.shape)
    if layout == "shared_heads":
        values = values[:, :1].expand(shape)
    strides = LAYOUTS[layout](*shape) if values.ndim == 4 else torch.empty(shape, device="meta").stride()
    first = GUARD + (layout == "gaps")  # an odd offset: not even aligned to two elements
    buffer = _canaries(_extent(shape, strides) + first + GUARD, values)
    tensor = buffer.as_strided(shape, strides, first)
    if layout == "shared_heads":
        tensor[:, :1].copy_(values[:, :1])
    else:
        tensor.copy_(values)
    return Guarded(tensor, buffer, buffer.clone())


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided tensor."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1 if all(shape) else 0


def _canaries(numel: int, like: Tensor) -> Tensor:
    return torch.full((numel,), canary(like.dtype), dtype=like.dtype, device=like.device)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, uninitialised memory is NaN (or the largest integer), and Python's allocations have guard bands.

    So an output that a kernel forgets to write is NaN, and a write just outside an output is found on leaving. All of
    PyTorch's `empty` family is filled, in C++ too, by its deterministic mode; `torch.empty`, `torch.empty_like` and
    `torch.empty_strided`, when called from Python, also return views into the middle of guarded buffers.

    Raises:
        ParityError: on leaving, if a guard band was written to.
    """
    made: list[Guarded] = []

    def guarding(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_guarded(*args: Any, **kwargs: Any) -> Tensor:
            plain = allocate(*args, **kwargs)
            shape, strides = tuple(plain.shape), plain.stride()
            buffer = _canaries(_extent(shape, strides) + 2 * GUARD, plain)
            tensor = buffer.as_strided(shape, strides, GUARD)
            made.append(Guarded(tensor, buffer, buffer.clone()))
            mark_unwritten(tensor)
            return tensor

        return allocate_guarded

    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    patches: dict[str, Any] = {
        name: guarding(getattr(torch, name)) for name in ("empty", "empty_like", "empty_strided")
    }
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with mock.patch.multiple(torch, **patches):
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    for memory in made:
        memory.check("guard band of an output", written=True)
