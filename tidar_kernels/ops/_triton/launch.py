"""How a kernel is launched: operands with their strides, and a launch that can be run, or compiled without a GPU."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Triton reads the same variable when a kernel is decorated, that is when these modules are imported.
INTERPRET = os.environ.get("TRITON_INTERPRET", "") == "1"
IS_AMD = torch.version.hip is not None
MOST_PROGRAMS, MOST_PROGRAMS_ACROSS = 2**31 - 1, 65_535

if INTERPRET:  # every module with kernels imports this one: whoever has a kernel has the mended interpreter
    from .interpreter import mend

    mend()


class Strided(NamedTuple):
    """A tensor operand of a kernel: `x.ptr`, and `x.stride[i]` in elements. Stride 1 is specialised by Triton."""

    ptr: Any
    stride: Any


_made: Any = tuple.__new__  # of a named tuple: half the time of its constructor, and a step makes a dozen of them


def strided(tensor: Tensor) -> Strided:
    """`tensor` as a kernel operand; any strides, no copy."""
    return _made(Strided, (tensor, tensor.stride()))


class Launch(NamedTuple):
    """One kernel with its grid and arguments. `options` holds constexpr arguments, `num_warps` and `num_stages`.

    A grid may have 2^31 - 1 programs along its first axis and 65,535 along the others.

    A named tuple, because one is made for every launch: a frozen dataclass takes three times as long.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch on the current stream of the operands' device; nothing to do for an empty grid.

        Raises:
            ValueError: the grid is larger than a chip can launch.
        """
        kernel, grid, args, options = self
        if 0 in grid:
            return
        if max(grid) > MOST_PROGRAMS_ACROSS and (
            grid[0] > MOST_PROGRAMS or max(grid[1:], default=0) > MOST_PROGRAMS_ACROSS
        ):
            raise ValueError(
                f"{kernel.__name__}: expected a grid of at most {MOST_PROGRAMS} programs along its first axis and "
                f"{MOST_PROGRAMS_ACROSS} along the others, got {list(grid)}: too many rows, heads or sequences"
            )
        first = args[0]
        tensor = first.ptr if isinstance(first, Strided) else first
        if IS_AMD:
            options = _options(options, IS_AMD)
        # Triton launches on the current device, which on a machine of several GPUs need not be the operands'.
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                kernel.run(*args, grid=grid, warmup=False, **options)
        else:  # what `kernel[grid](..)` does, without the function that it makes for every launch
            kernel.run(*args, grid=grid, warmup=False, **options)

    def compile(self) -> triton.compiler.CompiledKernel:
        """Compile exactly the specialisation that `run` would use, for Triton's active target, without launching."""
        from triton.runtime import driver

        options = _options(self.options, driver.active.get_current_target().backend == "hip")
        return self.kernel.warmup(*self.args, grid=self.grid, **options)


def _options(options: dict[str, Any], is_amd: bool) -> dict[str, Any]:
    """`options` as the chip's compiler takes them: that of AMD knows no `maxnreg`."""
    return {name: value for name, value in options.items() if name != "maxnreg"} if is_amd else options


def sequence_slices(batch: int, num_heads: int) -> list[slice]:
    """A batch cut into as many sequences as one launch takes with batch x heads along its second axis, at least one."""
    most = max(1, MOST_PROGRAMS_ACROSS // num_heads)
    return [slice(first, min(first + most, batch)) for first in range(0, max(batch, 1), most)]


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up: on plain ints, ten times as fast as `triton.cdiv`, which must also serve kernels."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n >= 1`."""
    return 1 << (n - 1).bit_length()


def block_dim(head_dim: int) -> int:
    """Tile width that holds `head_dim`: the next power of two, at least the 16 that `tl.dot` needs."""
    return max(16, next_power_of_2(head_dim))
