"""What the compiler made of a kernel: registers, spills, shared memory, tensor-core instructions. Needs no GPU.

Triton compiles for any target; only launching needs a driver. A stand-in driver that names the target lets `Launch`
compile the very specialisation that it would run there, and Triton's own copies of `cuobjdump` and `nvdisasm` read the
binary. AMD's assembly says the same in its own words.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from tidar_kernels.ops import interpreting
from tidar_kernels.ops._triton.launch import Launch

from .assembly import AMDGCN, SASS, by_class, copies_ahead, hot_loop, instructions
from .occupancy import resident_warps

Work = TypeVar("Work")
Found = TypeVar("Found")


@dataclass(frozen=True)
class CompileReport:
    """Resources of one compiled kernel.

    Args:
        kernel: its name.
        chip: compute capability, 10 * major + minor; or AMD's name of the architecture, "gfx942".
        registers: per thread; on AMD vector registers, accumulation registers included.
        stack_bytes: local (AMD: scratch) memory per thread, spills included.
        local_accesses: instructions in the binary that load from or store to local memory.
        spill_bytes: stored and loaded per thread, as ptxas reports, without asking it where no local memory is used;
            on AMD the vector registers spilled to scratch memory.
        shared_bytes: per block.
        warps: resident on a multiprocessor at a time, at most.
        tensor_core: names of the tensor-core instructions in it: HMMA (cc 80 to 89 and 120), HGMMA (wgmma, cc 90),
            UTCHMMA (tcgen05, cc 100), MFMA (AMD); of PTX, whose instructions become these, unless the binary was read.
        loop: instructions by class of the loop that does the multiplying (`assembly.hot_loop`); empty unless the
            binary was read.
        copies_ahead: `assembly.copies_ahead` of that loop; None on AMD, and unless the binary was read.
    """

    kernel: str
    chip: int | str
    registers: int
    stack_bytes: int
    local_accesses: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    tensor_core: tuple[str, ...]
    loop: dict[str, int] = field(repr=False, compare=False)
    copies_ahead: int | None = field(compare=False)


class _Target:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, chip: int | str) -> None:
        self.chip = chip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.chip, 32) if isinstance(self.chip, int) else GPUTarget("hip", self.chip, 64)

    def get_current_device(self) -> str:
        """The key of Triton's cache of compiled kernels: one that no real device has."""
        return f"{self.chip} without a device"

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextmanager
def compiling_for(chip: int | str) -> Iterator[None]:
    """Within it `Launch.compile` compiles for `chip`, whatever the machine has."""
    from triton.runtime import driver

    # Not `set_active` and `reset_active`: where there is no GPU there is no driver to go back to.
    with mock.patch.object(driver, "_active", _Target(chip)):
        yield


def _run(tool: str, content: bytes, *arguments: str) -> str:
    """Standard output and error of one of Triton's NVIDIA tools on a file of this content."""
    from triton import knobs

    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        command = [getattr(knobs.nvidia, tool).path, *arguments, file.name]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{tool}: expected exit code 0, got {done.returncode}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def disassembled(cubin: bytes) -> str:
    """The SASS of an NVIDIA binary."""
    return _run("nvdisasm", cubin, "-c")


# Tensor-core instructions: in PTX, and in the binary.
_IN_PTX = ((r"\bmma\.sync\b", "HMMA"), (r"\bwgmma\.mma_async\b", "HGMMA"), (r"\btcgen05\.mma\b", "UTCHMMA"))


def compile_report(launch: Launch, chip: int | str, *, read_binary: bool = False) -> CompileReport:
    """Compile exactly what `launch.run()` would run on `chip`, and read the result.

    Disassembling takes a third of the time. It is done where local memory is used, or on demand: without local memory
    nothing loads from it or stores to it.

    Raises:
        RuntimeError: kernels are interpreted in this process, a kernel does not compile, or a tool fails.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET: expected unset for compiling, got 1")
    with compiling_for(chip):
        compiled = launch.compile()
    return read_report(compiled, chip, read_binary=read_binary)


def read_report(compiled: Any, chip: int | str, *, read_binary: bool = False) -> CompileReport:
    """What `compile_report` says of a kernel that was compiled already: of its `asm` and `metadata`."""
    found = _read_cubin(compiled, chip, read_binary) if isinstance(chip, int) else _read_amdgcn(compiled)
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    threads = re.search(r"^\.reqntid (\d+)", compiled.asm.get("ptx", ""), re.MULTILINE)  # with warps of other groups
    num_warps = int(threads[1]) // 32 if threads else compiled.metadata.num_warps
    warps = resident_warps(chip, found["registers"], shared, num_warps, columns)
    return CompileReport(compiled.metadata.name, chip, shared_bytes=shared, warps=warps, **found)


def _read_cubin(compiled: Any, chip: int, read_binary: bool) -> dict[str, Any]:
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    usage = _run("cuobjdump", cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, got {usage!r}")
    stack_bytes, spill_bytes, local_accesses = int(found[2]), 0, 0
    tensor_core = {name for pattern, name in _IN_PTX if re.search(pattern, ptx)}
    loop: list[str] = []
    if stack_bytes or read_binary:
        sass = disassembled(cubin)
        local_accesses = len(re.findall(r"\b(?:LDL|STL)\b", sass))
        tensor_core, loop = set(re.findall(r"\b([A-Z]+MMA)\b", sass)), hot_loop(sass, SASS)
    if stack_bytes:
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
        name = f"--gpu-name={target[1] if target else f'sm_{chip}'}"
        log = _run("ptxas_blackwell" if chip >= 100 else "ptxas", ptx.encode(), "-v", name, "-o", "/dev/null")
        spill_bytes = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return {
        "registers": int(found[1]),
        "stack_bytes": stack_bytes,
        "local_accesses": local_accesses,
        "spill_bytes": spill_bytes,
        "tensor_core": tuple(sorted(tensor_core)),
        "loop": by_class(loop, SASS),
        "copies_ahead": copies_ahead(loop),
    }


def _read_amdgcn(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        found = re.search(rf"{re.escape(name)}:?\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"asm['amdgcn']: expected {name}, got none")
        return int(found[1])

    lines, stack_bytes = instructions(text, AMDGCN), value(".private_segment_fixed_size")
    return {
        "registers": value(".amdhsa_next_free_vgpr"),
        "stack_bytes": stack_bytes,
        "local_accesses": sum(AMDGCN.classes["local"].match(line) is not None for line in lines),
        "spill_bytes": 4 * value(".vgpr_spill_count") if stack_bytes else 0,  # else to accumulation registers
        "tensor_core": ("MFMA",) if any(AMDGCN.classes["mma"].match(line) for line in lines) else (),
        "loop": by_class(hot_loop(text, AMDGCN), AMDGCN),
        "copies_ahead": None,
    }


def compile_all(compile_one: Callable[[Work], Found], work: Sequence[Work], jobs: int) -> Iterator[tuple[Work, Found]]:
    """`(one, compile_one(one))` as they get ready, in `jobs` processes."""
    if jobs == 1:
        yield from ((one, compile_one(one)) for one in work)
        return
    # Not forked: a compiler's threads would be missing in the child.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(compile_one, one): one for one in work}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
