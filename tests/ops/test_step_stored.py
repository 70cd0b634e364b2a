"""What the kernel of a step reads of caches with pages or float8: no copy is made, and every byte is decoded right."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.paths import KERNELS
from tidar_kernels import ops, patterns, testing
from tidar_kernels.ops import paging
from tidar_kernels.testing.caches import CacheKind

KINDS = {
    "pages": CacheKind(3, "packed_nhd"),
    "pages of a tile": CacheKind(64, "hnd"),
    "float8": CacheKind(0, "bhnd", torch.float8_e4m3fn, "head"),
    "float8 pages": CacheKind(16, "packed_hnd", torch.float8_e5m2, "slot"),
}


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_gathered(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of the context is made, and the pages are not widened."""
    case = testing.StepCase("direct", patterns.tidar_step(2), (70, 5), 2, 1, 16, cache=KINDS[kind])
    memory = testing.step_operands(case, device)

    def run() -> torch.Tensor:
        found: torch.Tensor = ops.step_attention(
            *memory.tensors, case.pattern, backend="triton", **memory.cache_options
        )
        return found

    expected = run()
    for name in ("dense", "of_one_width"):
        monkeypatch.setattr(paging, name, None)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float8_number_is_decoded(device: str, dtype: torch.dtype) -> None:
    """A row that sees one key has its value: of every byte that is a number, subnormal ones included."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = torch.where(codes.float().isfinite(), codes.float(), 0.0).to(dtype).to(device)
    cache = codes.view(16, 1, 1, 16)
    q, none = torch.zeros(16, 1, 1, 16, device=device), torch.zeros(16, 1, 0, 16, device=device)
    keys, lengths = torch.zeros_like(cache.float()).to(dtype), torch.ones(16, dtype=torch.int32, device=device)
    pattern = patterns.Pattern(*(torch.zeros(1, 2, dtype=torch.int32) for _ in range(2)), torch.zeros(1).int(), 0)
    scales = {name: torch.tensor([[x]], device=device) for name, x in (("k_scale", 1.0), ("v_scale", 0.3))}
    found = ops.step_attention(q, none, none, keys, cache, lengths, pattern, backend="triton", **scales)
    assert torch.equal(found, paging.dequantise(cache, scales["v_scale"].expand(16, 1)[..., None]))


@pytest.mark.parametrize("device", KERNELS)
def test_pages_as_wide_as_a_tile_are_looked_up_once_a_tile(device: str) -> None:
    """A table read by tile and one read by key have the same bits, and the last page ends within a tile."""
    kernel = import_module("tidar_kernels.ops.step_attention.triton")
    assert kernel.step_config(None, torch.float32, 16).BLOCK_N == 16
    found = []
    case = testing.StepCase("tiles", patterns.tidar_step(3), (96, 31, 0), 2, 1, 16, max_len=99)
    q, k, v, *caches, lengths = testing.step_operands(case, device).tensors
    for page_size in (32, 11):
        columns = 99 // page_size + 1
        order = torch.randperm(3 * columns, dtype=torch.int32).view(3, columns).to(device)
        pages = torch.full((2, 3 * columns, 1, page_size, 16), torch.nan, device=device)
        for b, length in enumerate(case.lengths):
            for n in range(length):
                for to, cache in zip(pages, caches, strict=True):
                    to[order[b, n // page_size], :, n % page_size] = cache[b, :, n]
        found.append(ops.step_attention(q, k, v, *pages, lengths, case.pattern, block_table=order, backend="triton"))
    assert torch.equal(found[0], found[1])
