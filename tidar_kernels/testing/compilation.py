"""What the compiler made of a kernel: registers, spills, shared memory, tensor-core instructions. Needs no GPU.

Triton compiles for any target; only launching needs a driver. A stand-in driver that names the target lets `Launch`
compile the very specialisation that it would run there, and Triton's own copies of `cuobjdump` and `nvdisasm` read the
binary.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from .. import ops
from .cases import AppendCase, StepCase
from .harness import LAYOUTS

if TYPE_CHECKING:
    from ..kernels.launch import Launch

__all__ = ["SHARED_LIMITS", "CompileReport", "compile_append_kv", "compile_report", "compile_step_attention"]

# Shared memory that one block can have, in bytes, by compute capability (CUDA programming guide).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class CompileReport:
    """Resources of one compiled kernel.

    Args:
        kernel: its name.
        cc: compute capability, 10 * major + minor.
        registers: per thread.
        stack_bytes: local memory per thread, spills included.
        local_accesses: instructions in the binary that load from or store to local memory.
        spill_bytes: stored and loaded per thread, as ptxas reports; 0 without asking it where no local memory is used.
        shared_bytes: per block.
        tensor_core: names of the tensor-core instructions in it: HMMA (cc 80), HGMMA (wgmma, cc 90), UTCHMMA (tcgen05,
            cc 100); of PTX, whose instructions become these, unless the binary was read.
        options: the launch's constexpr arguments, warps and stages.
    """

    kernel: str
    cc: int
    registers: int
    stack_bytes: int
    local_accesses: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: tuple[str, ...]
    options: dict[str, Any] = field(repr=False)


class _Target:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, cc: int) -> None:
        self.cc = cc

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.cc, 32)

    def get_current_device(self) -> str:
        """The key of Triton's cache of compiled kernels: one that no real device has."""
        return f"cc {self.cc} without a device"

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextmanager
def _compiling_for(cc: int) -> Iterator[None]:
    from triton.runtime import driver

    # Not `set_active` and `reset_active`: where there is no GPU there is no driver to go back to.
    with mock.patch.object(driver, "_active", _Target(cc)):
        yield


def _run(tool: str, *arguments: str) -> str:
    """Standard output and error of one of Triton's NVIDIA tools."""
    from triton import knobs

    done = subprocess.run(
        [getattr(knobs.nvidia, tool).path, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError(f"{tool}: expected exit code 0, got {done.returncode}: {done.stderr.strip()}")
    return done.stdout + done.stderr


# Tensor-core instructions: in PTX, and in the binary.
_IN_PTX = ((r"\bmma\.sync\b", "HMMA"), (r"\bwgmma\.mma_async\b", "HGMMA"), (r"\btcgen05\.mma\b", "UTCHMMA"))


def compile_report(launch: Launch, cc: int, *, read_binary: bool = False) -> CompileReport:
    """Compile exactly what `launch.run()` would run on compute capability `cc`, and read the result.

    Disassembling takes a third of the time. It is done where local memory is used, or on demand: without local memory
    nothing loads from it or stores to it.

    Raises:
        RuntimeError: kernels are interpreted in this process, or a tool fails.
    """
    if ops.interpreting():
        raise RuntimeError("TRITON_INTERPRET: expected unset for compiling, got 1")
    with _compiling_for(cc):
        compiled = launch.compile()
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump: expected REG and STACK, got {usage!r}")
        stack_bytes, spill_bytes, local_accesses = int(found[2]), 0, 0
        tensor_core = {name for pattern, name in _IN_PTX if re.search(pattern, compiled.asm["ptx"])}
        if stack_bytes or read_binary:
            sass = _run("nvdisasm", "-c", str(cubin))
            local_accesses = len(re.findall(r"\b(?:LDL|STL)\b", sass))
            tensor_core = set(re.findall(r"\b([A-Z]+MMA)\b", sass))
        if stack_bytes:
            ptx.write_text(compiled.asm["ptx"])
            target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
            ptxas = "ptxas_blackwell" if cc >= 100 else "ptxas"
            log = _run(ptxas, "-v", f"--gpu-name={target[1] if target else f'sm_{cc}'}", str(ptx), "-o", "/dev/null")
            spill_bytes = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return CompileReport(
        kernel=compiled.metadata.name,
        cc=cc,
        registers=int(found[1]),
        stack_bytes=stack_bytes,
        local_accesses=local_accesses,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        tensor_core=tuple(sorted(tensor_core)),
        options=launch.options,
    )


def _shape_only(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """A tensor without memory: compiling reads dtype and strides alone."""
    return torch.empty_strided(shape, LAYOUTS[layout](*shape), dtype=dtype, device="meta")


def compile_step_attention(case: StepCase, cc: int, *, read_binary: bool = False) -> list[CompileReport]:
    """The kernels of one step on compute capability `cc`: attention and, where there are splits, their merge."""
    from ..kernels.configs import nearest_chip
    from ..kernels.step_attention import plan_step_attention

    batch, pattern = len(case.lengths), case.windowed(case.pattern)

    def operand(heads: int, rows: int, layout: str) -> Tensor:
        return _shape_only((batch, heads, rows, case.head_dim), layout, case.dtype)

    q = operand(case.num_heads, pattern.q_len, case.layout)
    k = operand(case.num_kv_heads, pattern.kv_len, case.layout)
    cache = operand(case.num_kv_heads, case.cache_len, case.cache_layout)
    lengths = torch.empty(batch, dtype=case.lengths_dtype, device="meta")
    lead, own, _ = pattern.on("meta")
    max_context = case.cache_len if case.max_context is None else case.max_context
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    sinks = torch.empty(case.num_heads, dtype=case.dtype, device="meta") if case.sinks else None
    operands = (q, k, k, cache, cache, lengths, lead, own, scale, max_context, pattern.reach_on("meta"))
    launches, _, _ = plan_step_attention(*operands, case.softcap, sinks, nearest_chip(cc))
    return [compile_report(launch, cc, read_binary=read_binary) for launch in launches]


def compile_append_kv(case: AppendCase, cc: int) -> list[CompileReport]:
    """The kernel of one append on compute capability `cc`."""
    from ..kernels.append_kv import plan_append_kv

    batch, heads = len(case.lengths), case.num_kv_heads
    cache = _shape_only((batch, heads, case.max_len, case.head_dim), case.cache_layout, case.dtype)
    new = _shape_only((batch, heads, case.num_new, case.head_dim), case.layout, case.dtype)
    lengths = torch.empty(batch, dtype=case.lengths_dtype, device="meta")
    return [compile_report(plan_append_kv(cache, cache, new, new, lengths), cc)]
