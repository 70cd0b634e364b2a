"""Caches as engines lay them out: pages with K and V apart or interleaved in one tensor, tables, float8 with scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import checks, paging
from ..ops.operands import Cached
from ..patterns.arguments import check_device, check_dtype, check_instance, check_ints, check_sequence
from .harness import GUARD, Guarded, bits, canary, check_equal, guarded

__all__ = ["PAGED_LAYOUTS", "CacheKind", "GuardedCache", "make_cache"]

# Of caches with pages, `(strides of K and of V [pages, kv_heads, page_size, head_dim], where V starts)`, in elements.
PAGED_LAYOUTS: dict[str, Callable[[int, int, int, int], tuple[tuple[int, ...], int]]] = {
    "hnd": lambda p, h, s, d: ((h * s * d, s * d, d, 1), p * h * s * d),  # FlashInfer HND, a tensor each
    "nhd": lambda p, h, s, d: ((s * h * d, d, h * d, 1), p * h * s * d),  # FlashAttention, FlashInfer NHD, SGLang
    "pair_nhd": lambda p, h, s, d: ((2 * s * h * d, d, h * d, 1), s * h * d),  # FlashInfer [pages, 2, page, heads, d]
    "packed_hnd": lambda p, h, s, d: ((2 * h * s * d, 2 * s * d, 2 * d, 1), d),  # vLLM [pages, heads, page, 2 * d]
    "packed_nhd": lambda p, h, s, d: ((2 * s * h * d, 2 * d, 2 * h * d, 1), d),  # vLLM, the other physical order
    "tokens": lambda p, h, s, d: ((2 * s * h * d, d, 2 * h * d, 1), h * d),  # transformers [tokens, 2, heads, d]
}


@dataclass(frozen=True)
class CacheKind:
    """What a cache is made of; the default is contiguous and holds what was computed.

    Args:
        page_size: slots of a page; 0 for a cache without pages.
        layout: `PAGED_LAYOUTS` of pages, else `LAYOUTS`.
        dtype: float8_e4m3fn or float8_e5m2; None for that of the operands.
        scale: of a float8 cache: by "tensor", "head" (and sequence) or "slot".
        bad_entries: every third entry that is needed names no page: nothing may be written for it.
    """

    page_size: int = 0
    layout: str = "bhnd"
    dtype: torch.dtype | None = None
    scale: str = "tensor"
    bad_entries: bool = False


class GuardedCache:
    """A cache of random bits inside guarded memory, and a second copy of that memory for what is expected of it.

    Attributes:
        cached: the operands, with `lengths` None until they are known.
        options: block_table, k_scale and v_scale, where there are any, as the public functions take them.
    """

    def __init__(self, cached: Cached, memories: Sequence[Guarded]) -> None:
        self.cached = cached
        self.memories = memories
        named = {name: getattr(cached, name) for name in ("block_table", "k_scale", "v_scale")}
        self.options: dict[str, Any] = {name: x for name, x in named.items() if x is not None}
        self._expected = {memory.buffer.data_ptr(): memory.before.clone() for memory in memories}

    def expected(self, name: str) -> Tensor:
        """k_cache, v_cache, k_scale or v_scale in the copy: what is expected is written here."""
        tensor: Tensor = getattr(self.cached, name)
        (memory,) = (memory for memory in self.memories if memory.tensor is tensor)
        copy = self._expected[memory.buffer.data_ptr()]
        return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def check(self) -> None:
        """Raise unless all of the memory, guard bands and gaps included, has the bits that are expected of it.

        Raises:
            ParityError: any bit differs.
        """
        for memory in self.memories:
            expected = self._expected[memory.buffer.data_ptr()]
            check_equal(bits(memory.buffer), bits(expected), "memory of the cache")

    def place(self, b: int, n: int) -> tuple[int, int] | None:
        """`(page, slot)` of key n of sequence b, or None: worked out from the definition, one key at a time."""
        table, (pages, _, slots, _) = self.cached.block_table, self.cached.k_cache.shape
        if not 0 <= n < self.cached.capacity:
            return None
        if table is None:
            return b, n
        page = int(table[b, n // slots])
        return (page, n % slots) if 0 <= page < pages else None

    def write(self, b: int, n: int, k: Tensor, v: Tensor) -> None:
        """Expect k, v `[kv_heads, head_dim]` as key n of sequence b, in the way that the cache holds them."""
        place = self.place(b, n)
        if place is None:
            return
        page, slot = place
        for name, value in (("k", k), ("v", v)):
            cache, scale = self.expected(f"{name}_cache"), getattr(self.cached, f"{name}_scale")
            if scale is None:
                bits(cache)[page, :, slot] = bits(value)
                continue
            given = None if scale.ndim == 3 else scale.expand(len(self.cached.lengths), len(value))[b]
            stored, found = paging.quantise(value, given, cache.dtype)
            bits(cache)[page, :, slot] = bits(stored)
            if scale.ndim == 3:
                self.expected(f"{name}_scale")[page, :, slot] = found


def make_cache(
    kind: CacheKind,
    lengths: Tensor,
    needed: Sequence[tuple[int, int]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    draw: torch.Generator,
    device: torch.device | str,
) -> GuardedCache:
    """A cache of random bits.

    Args:
        lengths: `[batch]`, on the device.
        needed: for each sequence the slots `[first, end)` whose entries the operator may read; the others are garbage.
        shape: `(kv_heads, max_len, head_dim)`; with pages the capacity is max_len, rounded up to pages.
        dtype: of the operands.

    Raises:
        TypeError, ValueError: an argument is of another type, or there is not one entry of `needed` a sequence.
    """
    check_instance("kind", kind, CacheKind)
    check_instance("lengths", lengths, Tensor)
    pairs = check_sequence("needed", needed, "pairs of ints")
    needed = [tuple(check_ints("needed", pair, -(2**64), 2**64)) for pair in pairs]  # type: ignore[misc]
    if any(len(pair) != 2 for pair in needed):
        raise ValueError(f"needed: expected pairs of ints, got {needed}")
    checks.shape("lengths", lengths, (len(needed),))
    if len(check_ints("shape", shape, 1)) != 3:
        raise ValueError(f"shape: expected (kv_heads, max_len, head_dim), got {shape}")
    if check_dtype("dtype", dtype) is None:
        raise TypeError("dtype: expected a float dtype that computes, got None")
    check_instance("draw", draw, torch.Generator)
    device = check_device("device", device)
    batch, (heads, max_len, dim) = len(needed), shape
    stored = kind.dtype or dtype

    def noise(*size: int) -> Tensor:
        last = size[-1] * stored.itemsize
        raw = torch.randint(256, (*size[:-1], last), generator=draw, dtype=torch.uint8, device="cpu")
        return raw.view(stored).to(device)

    table, memories = None, []
    if kind.page_size:
        columns = -(-max_len // kind.page_size)
        pages = batch * columns + 2
        table = _table(kind, needed, columns, pages, draw).to(device)
        strides, of_v = PAGED_LAYOUTS[kind.layout](pages, heads, kind.page_size, dim)
        first = (pages, heads, kind.page_size)
        buffer = torch.full((2 * pages * heads * kind.page_size * dim + 2 * GUARD,), 0, dtype=stored, device=device)
        bits(buffer).fill_(canary(bits(buffer).dtype))
        tensors = [buffer.as_strided((*first, dim), strides, GUARD + offset) for offset in (0, of_v)]
        for tensor in tensors:
            bits(tensor).copy_(bits(noise(*first, dim)))
        memories = [Guarded(tensor, buffer, buffer.clone()) for tensor in tensors]
    else:
        first = (batch, heads, max_len)
        memories = [_guarded_bits(noise(*first, dim), kind.layout) for _ in "kv"]
    scales: list[Guarded] = []
    if kind.dtype is not None:
        size = {"tensor": (), "head": (batch, heads), "slot": first}[kind.scale]
        scales = [guarded((torch.rand(size, generator=draw, device="cpu") + 0.5).to(device)) for _ in "kv"]
    k_scale, v_scale = (memory.tensor for memory in scales) if scales else (None, None)
    cached = Cached(memories[0].tensor, memories[1].tensor, lengths, 0, table, k_scale, v_scale)
    return GuardedCache(cached, [*memories, *scales])


def _guarded_bits(values: Tensor, layout: str) -> Guarded:
    """`guarded` of a dtype that cannot be filled with a canary, too."""
    if values.dtype.itemsize > 1:
        return guarded(values, layout)
    memory = guarded(values.view(torch.uint8), layout)
    return Guarded(*(x.view(values.dtype) for x in memory.__dict__.values()))


def _table(
    kind: CacheKind, needed: Sequence[tuple[int, int]], columns: int, pages: int, draw: torch.Generator
) -> Tensor:
    """Pages in random order, of which one is left over at each end; garbage where no slot is needed."""
    garbage = [-1, 2**31 - 1, -(2**31), pages, 0, pages - 1]
    order = torch.randperm(pages - 2, generator=draw, device="cpu") + 1
    table = order.view(len(needed), columns).to(torch.int32)
    count = 0
    for b, (first, end) in enumerate(needed):
        for column in range(columns):
            used = first < end and column * kind.page_size < end and (column + 1) * kind.page_size > first
            bad = used and kind.bad_entries and column % 3 == 1
            if bad or not used:
                table[b, column] = garbage[count % (4 if bad else len(garbage))]
                count += 1
    return table
