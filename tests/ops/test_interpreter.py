"""Triton's interpreter as it is mended: bfloat16 and float8 against PyTorch, with kernels of no operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import tidar_kernels.ops._triton.launch  # noqa: F401  # mends the interpreter
from tidar_kernels.testing import bits

pytestmark = pytest.mark.interpret
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    y = tl.trans(tl.load(b + i * N + j)) if TRANSPOSED else tl.load(b + i * N + j)
    acc = tl.full([N, N], 1.0, tl.float32)
    tl.store(out + i * N + j, tl.dot(tl.load(a + i * N + j), y, acc, input_precision="ieee"))


@triton.jit
def cast_kernel(x, out, N: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def binary_kernel(x, y, out, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "div":
        c = a / b
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "fma":
        c = tl.fma(a, b, a)
    elif OP == "clamp":
        c = tl.clamp(a, -tl.abs(b), tl.abs(b))
    elif OP == "where":
        c = tl.where(a < b, a, -1.5)
    elif OP == "constant":
        c = 0.1 * a + 3.0
    elif OP == "full":
        c = tl.full([N], 0.3, a.dtype) + 0.0 * a
    elif OP == "abs":
        c = tl.abs(a)
    else:
        c = -a
    tl.store(out + i, c)


@triton.jit
def plus(a, b):
    return a + b


@triton.jit
def reduce_kernel(x, out, N: tl.constexpr):
    tl.store(out, tl.reduce(tl.load(x + tl.arange(0, N)), 0, plus))
    tl.store(out + 1 + tl.arange(0, N), tl.associative_scan(tl.load(x + tl.arange(0, N)), 0, plus))


@triton.jit
def atomic_kernel(x):
    tl.atomic_add(x, tl.full([], 1.0, tl.bfloat16))


def every_number(dtype: torch.dtype) -> Tensor:
    """All values of a type of 16 bits, NaN and infinities too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def around(dtype: torch.dtype) -> Tensor:
    """float32 `[2^16]`: numbers of a narrow type, halfway between two of them, a little to each side, and far out."""
    codes = torch.arange(2 ** (8 * dtype.itemsize) // 2, dtype=torch.int16 if dtype.itemsize == 2 else torch.int8)
    exact = codes.view(dtype).float()
    exact = exact[exact.isfinite()]
    middle = ((exact[1:].double() + exact[:-1].double()) / 2).float()
    found = torch.cat([exact, middle, middle.nextafter(exact[1:]), middle.nextafter(exact[:-1])])
    found = torch.cat([found, torch.tensor([torch.inf, torch.nan, 0.0, 3e38, 1e-40, 449.0, 464.0, 465.0, 6e4, 7e4])])
    found = torch.cat([found, -found])
    return torch.cat([found, torch.randn(2**18 - len(found))])


def run(kernel: Any, *tensors: Tensor, **options: Any) -> None:
    kernel[(1,)](*tensors, **options)


def check_same(got: Tensor, expected: Tensor) -> None:
    """The same bits, but for which NaN."""
    assert torch.equal(got.isnan(), expected.isnan())
    differs = (bits(got) != bits(expected)) & ~expected.isnan()
    assert not bool(differs.any()), (got[differs][:5], expected[differs][:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FLOAT8], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_exact_and_summed_in_float32(dtype: torch.dtype, transposed: bool) -> None:
    a, b = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    out = torch.full((32, 32), torch.nan)
    run(dot_kernel, a, b, out, N=32, TRANSPOSED=transposed)
    expected = a.double() @ (b.t() if transposed else b).double() + 1.0
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, *FLOAT8], ids=str)
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = around(dtype)
    out = torch.empty(len(x), dtype=dtype)
    run(cast_kernel, x, out, N=len(x), ROUNDING=None)
    limits = torch.finfo(dtype)
    expected = x.to(dtype) if dtype == torch.bfloat16 else x.clamp(limits.min, limits.max).to(dtype)
    assert bool(expected[:10].eq(x[:10].to(dtype)).all())
    check_same(out.float(), expected.float())
    back = torch.empty(len(x))
    run(cast_kernel, out, back, N=len(x), ROUNDING=None)
    check_same(back, expected.float())


def test_what_is_too_large_for_float8_becomes_its_largest_number() -> None:
    x = torch.tensor([448.0, 464.0, 1e9, torch.inf, -torch.inf, torch.nan, 60000.0, -7e4])
    found = {}
    for dtype in FLOAT8:
        out = torch.empty(8, dtype=dtype)
        run(cast_kernel, x, out, N=8, ROUNDING=None)
        found[dtype] = out.float()
    nan = torch.nan
    assert found[FLOAT8[0]].nan_to_num(9.0).tolist() == [448.0, 448.0, 448.0, 448.0, -448.0, 9.0, 448.0, -448.0]
    check_same(found[FLOAT8[1]], torch.tensor([448.0, 448.0, 57344.0, 57344.0, -57344.0, nan, 57344.0, -57344.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2], ids=str)
def test_casts_round_to_zero_where_asked(dtype: torch.dtype) -> None:
    x = torch.randn(2**12)
    out = torch.empty(len(x), dtype=dtype)
    run(cast_kernel, x, out, N=len(x), ROUNDING="rtz")
    nearest = x.to(dtype).float()
    assert bool((out.float().abs() <= x.abs()).all())
    assert bool((out.float() == nearest)[nearest.abs() <= x.abs()].all())
    assert bool((out.float() != nearest)[nearest.abs() > x.abs()].all())


@pytest.mark.parametrize("other", [torch.int32, torch.float16, torch.float64, torch.float8_e5m2], ids=str)
def test_casts_from_and_to_other_types(other: torch.dtype) -> None:
    x = torch.randn(256).mul(100).to(other)
    narrow, back = torch.empty(256, dtype=torch.bfloat16), torch.empty(256, dtype=other)
    run(cast_kernel, x, narrow, N=256, ROUNDING=None)
    check_same(narrow, x.float().to(torch.bfloat16))
    run(cast_kernel, narrow, back, N=256, ROUNDING=None)
    check_same(back.double(), narrow.to(other).double())


EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "maximum": torch.fmax,
    "fma": lambda a, b: a * b + a,
    "clamp": lambda a, b: a.clamp(-b.abs(), b.abs()),
    "where": lambda a, b: torch.where(a < b, a, -1.5),
    "constant": lambda a, b: (torch.tensor(0.1).bfloat16() * a.bfloat16()).double() + 3.0,
    "full": lambda a, b: torch.full_like(a, 0.3),
    "abs": lambda a, b: a.abs(),
    "negative": lambda a, b: -a,
}


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("operation", EXACT)
def test_bfloat16_operations_are_rounded_once(operation: str) -> None:
    x = torch.randn(2**12).mul(8).bfloat16()
    y = torch.randn(2**12).bfloat16()
    y[:3] = torch.tensor([torch.inf, torch.nan, 1e-30])
    out = torch.empty(2**12, dtype=torch.bfloat16)
    run(binary_kernel, x, y, out, N=2**12, OP=operation)
    kept = slice(3, None) if operation in ("clamp", "full", "constant") else slice(None)
    check_same(out[kept], EXACT[operation](x.double(), y.double()).bfloat16()[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_larger_of_a_number_and_nan_is_the_number(dtype: torch.dtype) -> None:
    x, y = torch.tensor([1.0, torch.nan], dtype=dtype), torch.tensor([torch.nan, 2.0], dtype=dtype)
    out = torch.empty(2, dtype=dtype)
    run(binary_kernel, x, y, out, N=2, OP="maximum")
    assert out.tolist() == [1.0, 2.0]


def test_reductions_and_scans_of_bfloat16_round_every_sum() -> None:
    x = torch.full((64,), 1.0, dtype=torch.bfloat16)
    x[0] = 256.0
    out = torch.empty(65, dtype=torch.bfloat16)
    run(reduce_kernel, x, out, N=64)
    assert out.tolist() == [256.0] * 65  # 257 lies between 256 and 258: the even one of the two


def test_an_atomic_sum_of_bfloat16_is_refused() -> None:
    with pytest.raises(Exception, match=r"tl\.atomic_add: expected a type that the interpreter adds, got bf16"):
        run(atomic_kernel, torch.zeros(1, dtype=torch.bfloat16))


def test_mending_twice_changes_nothing() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    from tidar_kernels.ops._triton.interpreter import mend

    before = dict(vars(InterpreterBuilder))
    mend()
    assert dict(vars(InterpreterBuilder)) == before
