"""One declaration an operator: from it follow registration, dispatch, fake tensors and gradients.

    attention = Operator(
        "attention(Tensor q, Tensor k, ..) -> (Tensor, Tensor)",   # what `torch.library` has
        Rows, Keys, Scores,                                        # how its operands travel
        cpu=cpu.attention, kernel=_kernel, fake=_fake, gradient=Gradient(_save, _backward),
    )
    out, lse = attention(Rows(q, lead, own), Keys(k, v), Scores(scale))

Implementations take the bundles. Operands are matched to fields by name, once, when the operator is declared: no
wrapper repeats the list, and none takes it apart by index.

    device of the operands      what runs
    CUDA                        the Triton kernels
    CPU, TRITON_INTERPRET=1     the same kernels, interpreted
    CPU                         `cpu`, or the reference where that serves

PyTorch's dispatcher takes two dozen operands apart and hands them back to Python, which costs more than all of the
checks. A call that it has nothing to do for goes to the implementation at once (`Operator.__call__`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.autograd.graph import increment_version

__all__ = ["Backend", "Gradient", "Operator", "check_backend", "interpreting", "no_gradient", "no_second_derivative"]

Backend = Literal["triton", "eager"]
NAMESPACE = "tidar_kernels"
library = torch.library.Library(NAMESPACE, "DEF")


@functools.cache
def interpreting() -> bool:
    """True if Triton kernels run interpreted on the CPU (`TRITON_INTERPRET=1`, read before they are imported)."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def check_backend(backend: str | None, device: torch.device) -> None:
    """Raise `ValueError` for an unknown backend, or for "triton" where no kernel runs: there is no silent fallback."""
    if backend is None:
        return
    if backend not in ("triton", "eager"):
        raise ValueError(f'backend: expected None, "triton" or "eager", got {backend!r}')
    if backend == "triton" and device.type != "cuda" and not interpreting():
        raise ValueError(
            f'backend: expected CUDA tensors (or TRITON_INTERPRET=1) for "triton", got tensors on {device}'
        )


class Gradient(NamedTuple):
    """The backward pass of an operator.

    Args:
        save: `save(ctx, output, *bundles, **others)` keeps what the backward pass needs.
        backward: `backward(ctx, needed, *grads)` returns gradients by the names of operands; `needed` are the names
            that ask for one, and others may be left out.
    """

    save: Callable[..., None]
    backward: Callable[..., dict[str, Tensor | None]]


def no_gradient(message: str) -> Gradient:
    """The gradient of an operator that has none: a backward pass through it is a RuntimeError with this message."""

    def save(ctx: Any, output: Any, *bundles: Any, **others: Any) -> None:
        return None

    def backward(ctx: Any, needed: frozenset[str], *grads: Tensor | None) -> dict[str, Tensor | None]:
        raise RuntimeError(message)

    return Gradient(save, backward)


def no_second_derivative(name: str) -> Gradient:
    """The gradient of an operator that is itself the backward pass of `name`."""
    return no_gradient(f"{name}: expected at most first derivatives, got a request for a second one")


_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_OTHERS = frozenset({type(None), bool, int, float, str})


def _is_plain(values: tuple[Any, ...]) -> bool:
    """Whether the dispatcher has nothing to do for a call with these operands, the first of which is a tensor.

    That is: no gradient to record, no mode, transform, trace or profiler that must see the call, no subclass of Tensor,
    and a device that an implementation is registered for.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or profiler._is_profiler_enabled
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    with_gradients = torch.is_grad_enabled()
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            if (with_gradients and value.requires_grad) or not (value.is_cuda or value.is_cpu):
                return False
        elif kind not in _OTHERS:
            return False
    return True


def _picker(positions: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """`values -> tuple(values[i] for i in positions)`, as fast as Python has it."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda values: tuple(values[i] for i in positions)


class Operator:
    """An operator of `torch.library` whose operands travel in bundles.

    Args:
        schema: name, arguments and results, as `torch.library` takes them.
        bundles: named tuples. An operand belongs to the bundle that has a field of its name. Fields that are no operand
            have defaults: they are dropped on the way in, and are the default on the way out. Operands that are no
            field go by keyword, to the operator and to its implementations.
        cpu: runs it on the CPU: `cpu(*bundles, **others)`.
        reference: serves on the CPU where there is no `cpu`: takes every operand by its name.
        kernel: returns the Triton launcher, `launcher(*bundles, **others)`. Called once, where kernels first run:
            importing Triton is left till then.
        fake: shapes and dtypes of the results, `fake(*bundles, **others)`.
        gradient: the backward pass, for an operator that has one.

    Raises:
        TypeError: two bundles have a field of one operand, or a field that is no operand has no default.
    """

    def __init__(
        self,
        schema: str,
        *bundles: type[tuple[Any, ...]],
        kernel: Callable[[], Callable[..., Any]],
        fake: Callable[..., Any],
        cpu: Callable[..., Any] | None = None,
        reference: Callable[..., Any] | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        self.name = schema[: schema.index("(")]
        library.define(schema)
        self._packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        self._overload = self._packet.default
        arguments = self._overload._schema.arguments
        self.operands = tuple(argument.name for argument in arguments)
        self._defaults = tuple(argument.default_value for argument in arguments)
        self._match(bundles)
        written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
        self._written = [self._order[i] for i in written]
        self.kernel, self.cpu, self.reference = functools.cache(kernel), cpu, reference
        if (cpu is None) == (reference is None):
            raise TypeError(f"{self.name}: expected a cpu path or a reference that serves as one")
        library.impl(self.name, self._run_cpu, "CPU")
        library.impl(self.name, self._run_kernel, "CUDA")
        qualified = f"{NAMESPACE}::{self.name}"
        torch.library.register_fake(qualified, lambda *args: self._with_bundles(fake, args), lib=library)
        if gradient is not None:
            self._save, self._backward = gradient
            torch.library.register_autograd(
                qualified, self._run_backward, setup_context=self._setup_context, lib=library
            )

    def _match(self, bundles: tuple[Any, ...]) -> None:
        """Match operands and fields by name: index tables for both directions."""
        packed: list[str] = []  # names in the order of the bundles' fields
        absent: list[Any] = []  # defaults of fields that are no operand, which follow the operands
        self._bundles = []
        for bundle in bundles:
            positions = []
            for name in bundle._fields:
                if name in packed and name in self.operands:
                    raise TypeError(f"{self.name}: expected {name} in one bundle, got it in {bundle.__name__} too")
                packed.append(name)
                if name in self.operands:
                    positions.append(self.operands.index(name))
                elif name in bundle._field_defaults:
                    positions.append(len(self.operands) + len(absent))
                    absent.append(bundle._field_defaults[name])
                else:
                    raise TypeError(f"{self.name}: expected a default for {bundle.__name__}.{name}, no operand of it")
            self._bundles.append((bundle, _picker(positions)))
        self._absent = tuple(absent)
        self._others = tuple(name for name in self.operands if name not in packed)
        self._pick_others = _picker([self.operands.index(name) for name in self._others])
        self._order = tuple((*packed, *self._others).index(name) for name in self.operands)
        self._arrange = _picker(list(self._order))

    def __call__(self, *bundles: tuple[Any, ...], **others: Any) -> Any:
        """Run the operator; its operands are checked by the public function."""
        values: tuple[Any, ...] = ()
        for bundle in bundles:
            values += bundle
        if others:
            values += tuple([others[name] for name in self._others])
        if forward_ad._current_level >= 0:
            self._check_no_tangents(values)
        if torch.compiler.is_compiling():  # Dynamo does not trace a picker
            return self._overload(*[values[i] for i in self._order])
        if not _is_plain(values):
            return self._overload(*self._arrange(values))
        if values[0].is_cuda or interpreting():
            found = self.kernel()(*bundles, **others)
        elif self.cpu is not None:
            found = self.cpu(*bundles, **others)
        else:
            found = self._run_reference(self._arrange(values))
        if self._written:
            increment_version([values[i] for i in self._written])
        return found

    def _check_no_tangents(self, values: tuple[Any, ...]) -> None:
        """PyTorch drops tangents at an operator that has no forward derivative, without a word."""
        for value in values:
            if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
                raise RuntimeError(
                    f"{self.name}: expected no forward-mode derivative through its kernels, got one; "
                    'backend="eager" has it'
                )

    def is_called_by(self, function: Any) -> bool:
        """Whether `function`, as a mode over calls of PyTorch sees it, is this operator."""
        return function is self._overload or function is self._packet

    def with_bundles(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`run(*bundles, **others)` for the arguments of a call of the operator, however they were given."""
        if kwargs:
            missing = self.operands[len(args) :]
            args += tuple(
                kwargs.get(name, default) for name, default in zip(missing, self._defaults[len(args) :], strict=True)
            )
        return self._with_bundles(run, args)

    def _with_bundles(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        # The dispatcher drops trailing arguments that are at their defaults.
        if len(args) < len(self._defaults):
            args += self._defaults[len(args) :]
        args += self._absent
        # What `bundle(*pick(args))` makes, in half the time.
        bundles = [tuple.__new__(bundle, pick(args)) for bundle, pick in self._bundles]
        if self._others:
            return run(*bundles, **dict(zip(self._others, self._pick_others(args), strict=True)))
        return run(*bundles)

    def _run_kernel(self, *args: Any) -> Any:
        return self._with_bundles(self.kernel(), args)

    def _run_cpu(self, *args: Any) -> Any:
        if interpreting():
            return self._run_kernel(*args)
        if self.cpu is not None:
            return self._with_bundles(self.cpu, args)
        return self._run_reference(args + self._defaults[len(args) :])

    def _run_reference(self, args: tuple[Any, ...]) -> Any:
        operands = dict(zip(self.operands, args, strict=True))
        return self.reference(**operands)  # type: ignore[misc]  # it is there where there is no `cpu`

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self._with_bundles(functools.partial(self._save, ctx, output), inputs)

    def _run_backward(self, ctx: Any, *grads: Tensor | None) -> Any:
        flags = ctx.needs_input_grad  # of the arguments that were given: trailing defaults have no flag
        needed = frozenset(name for name, flag in zip(self.operands, flags, strict=False) if flag)
        found = self._backward(ctx, needed, *grads)
        return tuple(found.get(name) if name in needed else None for name in self.operands[: len(flags)])
