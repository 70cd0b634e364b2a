"""What a chip has for a kernel's blocks, and how many of their warps it can hold at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChipLimits:
    """Resources of one multiprocessor (AMD: compute unit).

    Args:
        block_shared: bytes of shared memory (LDS) that one block can have.
        shared: bytes that its blocks have together.
        reserved: bytes that the system takes of every block's.
        warps: resident warps (AMD: waves) at most.
        blocks: resident blocks at most.
        registers: 32-bit registers a thread can have at most.
    """

    block_shared: int
    shared: int
    reserved: int
    warps: int
    blocks: int
    registers: int = 255


# CUDA programming guide, technical specifications by compute capability. AMD: the CDNA 3 and CDNA 4 instruction set
# guides; four SIMDs of eight waves, and 512 vector registers a lane, of which a kernel has an even share.
LIMITS: dict[int | str, ChipLimits] = {
    80: ChipLimits(163 * 1024, 164 * 1024, 1024, 64, 32),
    86: ChipLimits(99 * 1024, 100 * 1024, 1024, 48, 16),
    89: ChipLimits(99 * 1024, 100 * 1024, 1024, 48, 24),
    90: ChipLimits(227 * 1024, 228 * 1024, 1024, 64, 32),
    100: ChipLimits(227 * 1024, 228 * 1024, 1024, 64, 32),
    120: ChipLimits(99 * 1024, 100 * 1024, 1024, 48, 24),
    "gfx942": ChipLimits(64 * 1024, 64 * 1024, 0, 32, 32, 512),
    "gfx950": ChipLimits(160 * 1024, 160 * 1024, 0, 32, 32, 512),
}
_NVIDIA_REGISTERS = 65536  # of a multiprocessor, handed out to warps in units of 256
_TENSOR_COLUMNS = 512  # of tensor memory, cc 100
_AMD_REGISTERS = 512  # of a lane, handed out to waves in units of 8
_AMD_SIMDS = 4


def resident_warps(chip: int | str, registers: int, shared: int, num_warps: int, tensor_columns: int = 0) -> int:
    """Warps of a kernel that fit a multiprocessor at a time; 0 if not even one block does.

    Args:
        chip: a key of `LIMITS`.
        registers: of a thread; AMD: vector registers of a lane, accumulation registers included.
        shared: bytes of shared memory a block.
        num_warps: of a block.
        tensor_columns: of tensor memory a block, on cc 100.
    """
    limits = LIMITS[chip]
    if shared > limits.block_shared or registers > limits.registers:
        return 0
    blocks = min(limits.blocks, limits.warps // num_warps, limits.shared // max(1, shared + limits.reserved))
    if tensor_columns:
        blocks = min(blocks, _TENSOR_COLUMNS // tensor_columns)
    if isinstance(chip, int):
        by_registers = _NVIDIA_REGISTERS // (max(1, -(-registers * 32 // 256)) * 256)
    else:
        by_registers = _AMD_SIMDS * (_AMD_REGISTERS // max(8, -(-registers // 8) * 8))
    return min(blocks, by_registers // num_warps) * num_warps
