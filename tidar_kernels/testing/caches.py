"""What the checks of operators that write into caches share: random bits, the call, all of the memory after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from .harness import Case, Guarded, ParityResult, bits, check_equal, generator_of, naming, result_of

__all__ = ["CacheCase", "check_caches", "random_bits", "slots_of"]


class CacheCase(Case, Protocol):
    """A call that writes into `[batch, num_kv_heads, max_len, head_dim]` caches."""

    @property
    def lengths(self) -> tuple[int, ...]: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def fits(self) -> bool:
        """All slots lie in the cache. A case that does not fit runs below the checks, which would have raised."""


def random_bits(case: CacheCase, device: torch.device | str, *tokens: int) -> list[Tensor]:
    """For each number of tokens `[batch, num_kv_heads, n, head_dim]` of random bit patterns, NaN payloads included."""
    draw, width = generator_of(case), case.head_dim * case.dtype.itemsize
    shapes = [(len(case.lengths), case.num_kv_heads, n, width) for n in tokens]
    noise = (torch.randint(256, shape, generator=draw, dtype=torch.uint8, device="cpu") for shape in shapes)
    return [x.view(case.dtype).to(device) for x in noise]


def slots_of(cache: Guarded, memory: Tensor) -> Tensor:
    """The slots of a cache in a copy of the bits of its whole buffer."""
    return memory.as_strided(cache.tensor.shape, cache.tensor.stride(), cache.tensor.storage_offset())


def check_caches(
    operator: str,
    case: CacheCase,
    device: torch.device | str,
    backend: ops.Backend | None,
    caches: Sequence[Guarded],
    expected: Sequence[Tensor],
    operands: dict[str, Guarded],
) -> ParityResult:
    """Call an operator on both caches and its other operands, in order: it writes what is expected and nothing else.

    All of the memory is compared: written and unwritten slots, what lies between strided slots, and guard bands.

    Raises:
        ParityError: any bit differs.
        ValueError: a case that does not fit, with a backend by name: only the default has checks to go below.
    """
    if backend is not None and not case.fits:
        raise ValueError(f"backend: expected None for a case that does not fit, got {backend!r}")
    values = [memory.tensor for memory in (*caches, *operands.values())]
    with naming(operator, case, device):
        if case.fits:
            getattr(ops, operator)(*values, backend=backend)
        else:
            getattr(torch.ops.tidar_kernels, operator)(*values)
        for name, cache, memory in zip(("k_cache", "v_cache"), caches, expected, strict=True):
            check_equal(bits(cache.buffer), memory, f"memory of {name}")
        for name, untouched in operands.items():
            untouched.check(name)
    return result_of(operator, case, device)
