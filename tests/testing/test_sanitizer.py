"""The sanitizer finds planted faults of kernels that belong to no operator, and nothing in the package's own."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.paths import REPOSITORY
from tidar_kernels import testing
from tidar_kernels.testing import SanitizerError, mark_unwritten, sanitize

interpreted = pytest.mark.interpret


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr, LOADED: tl.constexpr, STORED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < n + LOADED)  # the load
    tl.store(out + i, values, mask=i < n + STORED)  # the store


@triton.jit
def rows_kernel(x, out, stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(out + i * BLOCK + j, tl.load(x + i * stride + j, mask=j < COLUMNS, other=0))


@triton.jit
def load_sum(pair, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.load(pair.left + i) + tl.load(pair.right + i)  # in a function


@triton.jit
def sum_kernel(pair, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), load_sum(pair, BLOCK))


@triton.jit
def shift_kernel(x, BACK: tl.constexpr):
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + i - BACK, mask=i >= BACK, other=0.0) + 1.0)


@triton.jit
def same_kernel(out):
    tl.store(out + tl.arange(0, 4), tl.program_id(0))


@triton.jit
def words_kernel(x, out, FIRST: tl.constexpr):
    words = (x + FIRST + 4 * tl.arange(0, 4)).to(tl.pointer_type(tl.int32))
    tl.store(out + tl.arange(0, 4), tl.load(words))


@triton.jit
def table_kernel(table, x, out, ELEMENT: tl.constexpr):
    row = tl.load(table + tl.arange(0, 2)).to(tl.pointer_type(tl.float32))
    tl.store(out + tl.arange(0, 2), tl.load(row + ELEMENT))


@triton.jit
def last_one_sums_kernel(parts, counter, out, PROGRAMS: tl.constexpr, ORDER: tl.constexpr):
    """Every program writes its part; the last one to arrive adds them."""
    tl.store(parts + tl.program_id(0), 1.0)
    if tl.atomic_add(counter, 1, sem=ORDER) == PROGRAMS - 1:
        tl.store(out, tl.sum(tl.load(parts + tl.arange(0, PROGRAMS)), 0))
        tl.store(counter, 0)


@triton.jit
def swap_kernel(x, AT: tl.constexpr):
    tl.atomic_cas(x + AT, 0, 1)


@triton.jit
def descriptor_kernel(x, out, FIRST: tl.constexpr):
    i, j = tl.arange(0, 4)[:, None], tl.arange(0, 8)[None, :]
    tl.store(out + i * 8 + j, x.load([FIRST, 0]))


def line_of(function: Any, marker: str) -> str:
    """ "file:line" of a marked line in a kernel."""
    lines, first = inspect.getsourcelines(function.fn)
    (at,) = (i for i, line in enumerate(lines) if marker in line)
    return f"{__file__}:{first + at}"


def faults_of(launch: Callable[[], Any]) -> list[testing.Fault]:
    with pytest.raises(SanitizerError) as error, sanitize():
        launch()
    return error.value.faults


def fault_of(launch: Callable[[], Any]) -> testing.Fault:
    (fault,) = faults_of(launch)
    return fault


@interpreted
def test_what_is_sound_passes_with_the_same_result() -> None:
    x, wide = torch.randn(100), torch.randn(16, 40)
    with sanitize():
        out = torch.empty(100)
        copy_kernel[(4,)](x, out, 100, BLOCK=32, LOADED=0, STORED=0)
        rows = torch.empty(16, 16)
        rows_kernel[(1,)](wide[:, 3:19], rows, 40, COLUMNS=16, BLOCK=16)
        total = torch.empty(16)
        sum_kernel[(1,)](Pair(x, x[50:]), total, BLOCK=16)
        # The same memory twice in a launch, and an operand by keyword.
        copy_kernel[(1,)](total, out=total, n=16, BLOCK=16, LOADED=0, STORED=0)
        # Its own writes are no race, and what it wrote was written.
        copy_kernel[(4,)](out, out, 100, BLOCK=32, LOADED=0, STORED=0)
    assert torch.equal(out, x)
    assert torch.equal(rows, wide[:, 3:19])
    assert torch.equal(total, x[:16] + x[50:66])


@interpreted
def test_a_planted_overrun_is_found_where_it_is() -> None:
    x, out = torch.randn(100), torch.zeros(200)
    fault = fault_of(lambda: copy_kernel[(4,)](x, out, 100, BLOCK=32, LOADED=3, STORED=0))
    assert (fault.kind, fault.access, fault.kernel, fault.operand) == ("out of bounds", "load", "copy_kernel", "x")
    assert fault.where == line_of(copy_kernel, "# the load")
    assert (fault.index, fault.offset, fault.shape, fault.lanes) == (None, 100, (100,), 3)
    assert (fault.program, fault.other) == ((3, 0, 0), None)
    assert str(fault) == (
        "out of bounds: load of x 100 elements from its start, shape [100], by 3 lanes of program (3, 0, 0); "
        f"copy_kernel, {fault.where}"
    )


@interpreted
def test_a_store_out_of_bounds_does_not_reach_memory() -> None:
    x, memory = torch.randn(100), torch.zeros(200)
    fault = fault_of(lambda: copy_kernel[(4,)](x, memory[:90], 90, BLOCK=32, LOADED=0, STORED=10))
    assert (fault.access, fault.operand, fault.offset, fault.lanes) == ("store", "out", 90, 6)
    assert fault.where == line_of(copy_kernel, "# the store")
    assert torch.equal(memory[:90], x[:90])
    assert not bool(memory[90:].any())


@interpreted
def test_an_overrun_into_another_operand_is_one() -> None:
    memory, out = torch.randn(64), torch.zeros(32)
    with sanitize():
        sum_kernel[(1,)](Pair(memory[:32], memory[32:]), out, BLOCK=32)
    fault = fault_of(lambda: sum_kernel[(1,)](Pair(memory[:31], memory[31:]), out, BLOCK=32))
    assert (fault.operand, fault.offset, fault.lanes) == ("pair.left", 31, 1)
    assert fault.where == line_of(load_sum, "# in a function")


@interpreted
def test_a_view_is_its_elements() -> None:
    wide, out = torch.randn(16, 40), torch.zeros(16, 16)
    between = fault_of(lambda: rows_kernel[(1,)](wide[:, :12], out, 40, COLUMNS=13, BLOCK=16))
    assert (between.operand, between.offset, between.lanes, between.shape) == ("x", 12, 16, (16, 12))
    after = fault_of(lambda: rows_kernel[(1,)](wide[:15, :16], out, 40, COLUMNS=16, BLOCK=16))
    assert (after.offset, after.lanes) == (600, 16)
    before = fault_of(lambda: rows_kernel[(1,)](wide[1:, :16], out, -40, COLUMNS=16, BLOCK=16))
    assert (before.offset, before.lanes) == (-40, 240)


@interpreted
def test_a_misaligned_word_is_found() -> None:
    x, out = torch.zeros(20, dtype=torch.int8), torch.zeros(4, dtype=torch.int32)
    with sanitize():
        words_kernel[(1,)](x, out, FIRST=4)
    fault = fault_of(lambda: words_kernel[(1,)](x, out, FIRST=2))
    assert (fault.kind, fault.operand, fault.index, fault.lanes) == ("misaligned", "x", (2,), 4)


@interpreted
@pytest.mark.parametrize(
    ("back", "program", "other"),
    [(1, (1, 0, 0), (0, 0, 0)), (-1, (1, 0, 0), (0, 0, 0))],
    ids=["read_after", "write_after"],
)
def test_a_planted_race_is_found(back: int, program: tuple[int, ...], other: tuple[int, ...]) -> None:
    """Each program reads what its neighbour writes: the next one or the one before."""
    x = torch.zeros(9)
    fault = fault_of(lambda: shift_kernel[(8,)](x[: 8 + (back < 0)], BACK=back))
    assert (fault.kind, fault.kernel, fault.operand) == ("race", "shift_kernel", "x")
    assert (fault.access, fault.index) == (("load", (0,)) if back > 0 else ("store", (1,)))
    assert (fault.program, fault.other) == (program, other)


@interpreted
def test_programs_that_write_the_same_race() -> None:
    with sanitize():
        same_kernel[(1,)](torch.zeros(4, dtype=torch.int32))
    fault = fault_of(lambda: same_kernel[(2, 3)](torch.zeros(4, dtype=torch.int32)))
    assert (fault.kind, fault.access, fault.index, fault.lanes) == ("race", "store", (0,), 4)
    assert (fault.program, fault.other) == ((0, 1, 0), (0, 0, 0))


@interpreted
def test_who_acquires_what_was_released_does_not_race() -> None:
    parts, counter, out = torch.zeros(8), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with sanitize():
        last_one_sums_kernel[(8,)](parts, counter, out, PROGRAMS=8, ORDER="acq_rel")
    assert (out.item(), counter.item()) == (8.0, 0)
    fault = fault_of(lambda: last_one_sums_kernel[(8,)](parts, counter, out, PROGRAMS=8, ORDER="relaxed"))
    assert (fault.kind, fault.access, fault.operand, fault.lanes) == ("race", "load", "parts", 7)
    assert fault.program == (7, 0, 0)


@interpreted
def test_an_atomic_is_an_access_like_others() -> None:
    fault = fault_of(lambda: swap_kernel[(1,)](torch.zeros(4, dtype=torch.int32), AT=4))
    assert (fault.kind, fault.access, fault.offset) == ("out of bounds", "atomic", 4)
    fault = fault_of(lambda: swap_kernel[(1,)](torch.empty(4, dtype=torch.int32), AT=3))
    assert (fault.kind, fault.access, fault.index) == ("never written", "atomic", (3,))


@interpreted
def test_a_planted_read_of_memory_that_nothing_wrote_is_found() -> None:
    out = torch.zeros(64)

    def copy(x: Tensor, n: int) -> None:
        copy_kernel[(2,)](x, out, n, BLOCK=32, LOADED=0, STORED=0)

    fault = fault_of(lambda: copy(torch.empty(8, 8)[1:], 40))
    assert (fault.kind, fault.access, fault.operand, fault.index) == ("never written", "load", "x", (0, 0))
    assert fault.where == line_of(copy_kernel, "# the load")
    with sanitize():
        by_kernel = torch.empty(64)
        copy_kernel[(2,)](out, by_kernel, 40, BLOCK=32, LOADED=0, STORED=0)
        copy(by_kernel, 40)
        with pytest.raises(SanitizerError, match=r"^never written: load of x\[40\], shape \[64\], by 1 lanes"):
            copy(by_kernel, 41)
        by_torch = out.new_empty(64)
        by_torch[:41] = torch.rand(41) + 1.0
        copy(by_torch, 41)
        with pytest.raises(SanitizerError, match=r"^never written: load of x\[41\], shape \[64\], by 23 lanes"):
            copy(by_torch, 64)
        by_torch.zero_()


@interpreted
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_every_dtype_starts_unwritten(dtype: torch.dtype) -> None:
    out = torch.zeros(64, dtype=dtype)
    fault = fault_of(
        lambda: copy_kernel[(2,)](torch.empty_like(out), out, 64, BLOCK=32, LOADED=0, STORED=0),
    )
    assert (fault.kind, fault.index, fault.lanes) == ("never written", (0,), 32)
    with sanitize():
        x = torch.empty_like(out).copy_(out.zero_())
        copy_kernel[(2,)](x, out, 64, BLOCK=32, LOADED=0, STORED=0)


@interpreted
def test_any_tensor_can_be_marked() -> None:
    x, out = torch.full((64,), torch.nan), torch.zeros(64)
    with sanitize():
        copy_kernel[(2,)](x, out, 64, BLOCK=32, LOADED=0, STORED=0)
        mark_unwritten(x[10:20])
        mark_unwritten(x[15:30])
        with pytest.raises(SanitizerError, match=r"^never written: load of x\[10\], shape \[64\], by 20 lanes"):
            copy_kernel[(2,)](x, out, 64, BLOCK=32, LOADED=0, STORED=0)


@interpreted
def test_what_is_too_large_to_follow_is_said(tmp_path: Path) -> None:
    far = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**40, dtype=torch.uint8)
    x = torch.as_strided(far, (8,), (1,))
    with (
        sanitize(),
        pytest.raises(MemoryError, match=r"^sanitize: expected .*, got 1,[\d,]+ bytes in a launch of copy_k"),
    ):
        copy_kernel[(1,)](x, torch.zeros(8, dtype=torch.uint8), 8, BLOCK=8, LOADED=0, STORED=0)


@interpreted
def test_outside_of_it_nothing_is_unwritten(pytestconfig: pytest.Config) -> None:
    if pytestconfig.pluginmanager.hasplugin("tidar_kernels.testing.pytest_sanitizer"):
        pytest.skip("every test is within it")
    x, y, out = torch.empty(64), torch.zeros(64), torch.zeros(64)
    mark_unwritten(y)
    copy_kernel[(2,)](x, out, 64, BLOCK=32, LOADED=0, STORED=0)
    with sanitize():
        copy_kernel[(2,)](y, out, 64, BLOCK=32, LOADED=0, STORED=0)


@interpreted
def test_pointers_from_memory_may_point_into_any_operand() -> None:
    x, out = torch.randn(8), torch.zeros(8)
    table = torch.tensor([x.data_ptr(), out.data_ptr()])

    def launch(element: int) -> None:
        table_kernel[(1,)](table, x, out, ELEMENT=element)

    with sanitize():
        launch(7)
    assert out[0] == x[7]
    found = faults_of(lambda: launch(9))
    assert [(f.kind, f.offset) for f in found] == [("out of bounds", 9)] * 2


@interpreted
def test_descriptors_have_a_base() -> None:
    x, out = torch.randn(8, 8), torch.zeros(4, 8)
    descriptor = TensorDescriptor.from_tensor(x, [4, 8])
    with sanitize():
        descriptor_kernel[(1,)](descriptor, out, FIRST=6)
    assert torch.equal(out[:2], x[6:])
    lying = TensorDescriptor(x[:7], [8, 8], [8, 1], [4, 8])
    fault = fault_of(lambda: descriptor_kernel[(1,)](lying, out, FIRST=4))
    assert (fault.operand, fault.offset, fault.lanes) == ("x.base", 56, 8)


@interpreted
@pytest.mark.parametrize(
    ("suite", "case"),
    [
        pytest.param(suite, case, id=f"{suite.operator}-{case.id}")
        for suite in testing.SUITES
        for case in suite.cases_on("interpreter", quick=True)[:2]
        if suite.operator != "launch_bits"  # the launches of step_attention once more
    ],
)
def test_operators_are_clean(suite: testing.Suite, case: Any) -> None:
    with sanitize():
        suite.check(case, "cpu")


@interpreted
def test_outputs_of_the_parity_harness_are_unwritten() -> None:
    out = torch.zeros(64)
    with sanitize(), testing.poisoned_allocations():
        x = torch.empty(64)
        with pytest.raises(SanitizerError, match=r"^never written"):
            copy_kernel[(2,)](x, out, 64, BLOCK=32, LOADED=0, STORED=0)


PLANTED = """
import torch, triton, triton.language as tl

@triton.jit
def kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, 16), 1.0, mask=tl.arange(0, 16) < N)

def test_sound():
    kernel[(1,)](torch.zeros(9), N=9)

def test_overrun():
    kernel[(1,)](torch.zeros(9), N=10)
"""


def run_pytest(folder: Path, interpret: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_planted.py").write_text(PLANTED)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "tidar_kernels.testing.pytest_sanitizer",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
    )


@interpreted
def test_the_plug_in_fails_the_tests_with_faults(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "1")
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert "out of bounds: store of x 9 elements from its start, shape [9]" in done.stdout


def test_compiled_kernels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^TRITON_INTERPRET: expected 1 for the sanitizer, got unset$"), sanitize():
        pass
    done = run_pytest(tmp_path, "0")
    assert done.returncode == 4
    assert "TRITON_INTERPRET: expected 1 for the sanitizer" in done.stderr
