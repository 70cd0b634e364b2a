"""Triton's interpreter, mended: bfloat16 and float8 are computed as a GPU computes them.

Triton keeps tiles of these types as integers that hold their bits, and computes with the integers: it multiplies raw
16-bit words in `tl.dot`, adds them in `+`, cuts bits off in a cast where hardware rounds, and knows no constants of
bfloat16. With `mend` the interpreter does what hardware does:

- `tl.dot` multiplies and adds in float32, which holds every product exactly.
- Any other operation is computed in float32 and rounded once to the type of its operands. For +, -, * and / that is
  the correctly rounded result: float32 has more than twice the bits of bfloat16.
- Casts round to nearest even, or to zero where the kernel asks for it. What is too large becomes an infinity in
  bfloat16, and the largest number in float8 e4m3fn (448) and e5m2 (57344), infinities included: `cvt.rn.satfinite`, the
  only conversion that NVIDIA's chips have. PyTorch's own casts to float8 give NaN and infinity there.
- `tl.maximum` and `tl.minimum` of a number and NaN are the number unless NaN is to be propagated, in every float type.

The mending is for the process: kernels of other packages are computed this way too. The float8 types of older AMD chips
(fp8e4b8, fp8e5b16) and Triton's fp8e4b15 stay as they were.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

# Triton's name of a type that is kept as integers; PyTorch's type, and that of the integers.
_NARROW = {
    "bf16": (torch.bfloat16, torch.uint16),
    "fp8e4nv": (torch.float8_e4m3fn, torch.uint8),
    "fp8e5": (torch.float8_e5m2, torch.uint8),
}


def _is_narrow(handle: Any) -> bool:
    """True for values of these types; a comparison of them may keep their type, but its values are booleans."""
    return handle.dtype.scalar.name in _NARROW and handle.data.dtype != np.bool_


def _wide(handle: Any) -> Any:
    """The values of a tile as an array: float32 if its type is kept as integers, else as they are."""
    if not _is_narrow(handle):
        return handle.data
    return torch.from_numpy(np.array(handle.data)).view(_NARROW[handle.dtype.scalar.name][0]).float().numpy()


def _narrowed(values: Any, dtype: Any, to_zero: bool = False) -> Any:
    """The tile of type `dtype`, one of those kept as integers, that holds `values` rounded to it."""
    kept, integers = _NARROW[dtype.scalar.name]
    exact = torch.from_numpy(np.array(values)).to(torch.float32)
    if kept.itemsize == 1:
        exact = exact.clamp(torch.finfo(kept).min, torch.finfo(kept).max)
    rounded = exact.to(kept)
    codes = rounded.view(integers).numpy()
    if to_zero:  # the code of the next number nearer to zero is one less, whatever the sign
        codes = codes - (rounded.float().abs() > exact.abs()).numpy()
    return TensorHandle(codes.astype(interpreter._get_np_dtype(dtype.scalar)), dtype.scalar)


@functools.cache
def mend() -> None:
    """Replace the methods of Triton's interpreter that compute these types wrongly; does nothing a second time."""
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf"):
        setattr(InterpreterBuilder, name, _computed_wide(getattr(InterpreterBuilder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, _rounding(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _multiplying(InterpreterBuilder.create_dot)
    InterpreterBuilder.create_atomic_rmw = _refusing(InterpreterBuilder.create_atomic_rmw)
    InterpreterBuilder.get_bf16 = lambda self, value: _narrowed([value], tl.bfloat16)
    InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    ReduceOps.apply_impl = _one_by_one(ReduceOps.apply_impl, ReduceOps.generic_reduce)
    ScanOps.cumsum = _one_by_one(ScanOps.cumsum, ScanOps.generic_scan)
    ScanOps.cumprod = _one_by_one(ScanOps.cumprod, ScanOps.generic_scan)


def _computed_wide(original: Any) -> Any:
    """An operation on tiles of one type, computed in float32 and rounded; a comparison is not rounded."""

    def compute(self: Any, *operands: Any, **rest: Any) -> Any:
        first = operands[0]
        if not _is_narrow(first):
            return original(self, *operands, **rest)
        wide = [TensorHandle(_wide(x), tl.float32) if isinstance(x, TensorHandle) else x for x in operands]
        found = original(self, *wide, **rest)
        return TensorHandle(found.data, tl.int1) if found.data.dtype == np.bool_ else _narrowed(found.data, first.dtype)

    return compute


def _rounding(original: Any) -> Any:
    """A cast from or to these types."""

    def cast(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        others = src.dtype.scalar.is_fp8() and not _is_narrow(src)
        if dst_type.scalar.name in _NARROW and not others:
            return _narrowed(_wide(src), dst_type, ir.ROUNDING_MODE.RTZ in rounding)
        if _is_narrow(src) and not dst_type.scalar.is_fp8():
            return TensorHandle(_wide(src).astype(interpreter._get_np_dtype(dst_type.scalar)), dst_type.scalar)
        return original(self, src, dst_type, *rounding)

    return cast


def _multiplying(original: Any) -> Any:
    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(_wide(x), tl.float32) if _is_narrow(x) else x for x in (a, b))
        return original(self, a, b, *rest)

    return dot


def _refusing(original: Any) -> Any:
    def atomic(self: Any, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        if _is_narrow(value) and operation == ir.ATOMIC_OP.FADD:
            raise TypeError(f"tl.atomic_add: expected a type that the interpreter adds, got {value.dtype.scalar}")
        return original(self, operation, pointer, value, *rest)

    return atomic


def _one_by_one(original: Any, generic: Any) -> Any:
    """A reduction or scan: of these types value by value, as Triton does those that it has no NumPy function for."""

    def reduce(self: Any, operands: Any) -> Any:
        given = operands if isinstance(operands, tuple) else (operands,)
        return generic(self, given) if any(_is_narrow(x.handle) for x in given) else original(self, operands)

    return reduce
