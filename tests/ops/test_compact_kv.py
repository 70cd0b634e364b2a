"""Compaction: every slot, moved and not, bit for bit; and nothing outside the cache, whatever lengths and paths say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.paths import DEVICES, HERE, on_every_path
from tidar_kernels import KVCache, ops, testing


@pytest.mark.parametrize(("device", "case"), on_every_path("compact_kv"))
def test_every_slot(device: str, case: testing.CompactCase) -> None:
    testing.check_compact_kv(case, device)


@pytest.mark.parametrize("case", [case for case in testing.COMPACT_CASES if case.fits], ids=lambda case: case.id)
def test_the_twin_too(case: testing.CompactCase) -> None:
    testing.check_compact_kv(case, "cpu", backend="eager")


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(
    ("lengths", "path", "message"),
    [
        ([0, 3], [[0, 2, 1], [0, 1, 2]], r"^path: expected ascending nodes, then -1, got \[0, 2, 1\] in sequence 0$"),
        ([0, 3], [[0, 1, 2], [1, 1, -1]], r"^path: .* got \[1, 1, -1\] in sequence 1$"),
        ([0, 3], [[0, 1, 2], [0, -1, 2]], r"^path: .* got \[0, -1, 2\] in sequence 1$"),
        ([0, 3], [[-2, 0, 2], [0, -1, -1]], r"^path: .* got \[-2, 0, 2\] in sequence 0$"),
        ([0, 3], [[0, 1, 2], [0, 6, 17]], r"^path: expected nodes below max_len - length = 17, got 17 in sequence 1$"),
        ([0, 21], [[0, 1, 2], [-1, -1, -1]], r"^lengths: expected 0 <= length <= max_len = 20, got 21 in sequence 1$"),
        ([0, 3], [[0, 1, 2]], r"^path: expected shape \[2, n <= 1024\], got \[1, 3\]$"),
        ([0, 3], [list(range(1025))] * 2, r"^path: expected shape \[2, n <= 1024\], got \[2, 1025\]$"),
    ],
)
def test_bad_paths_raise_before_anything_is_written(
    device: str, backend: Any, lengths: list[int], path: list[list[int]], message: str
) -> None:
    k_cache, v_cache = torch.randn(2, 2, 2, 20, 16).unbind(0)
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(ValueError, match=message):
        ops.compact_kv(k_cache, v_cache, torch.tensor(lengths), torch.tensor(path), backend=backend)
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


def test_bad_types() -> None:
    k_cache, v_cache = torch.zeros(2, 1, 1, 8, 4).unbind(0)
    lengths, path = torch.tensor([0]), torch.tensor([[0]])
    with pytest.raises(TypeError, match=r"^path: expected dtype int32 or int64, got torch.float32$"):
        ops.compact_kv(k_cache, v_cache, lengths, path.float())
    with pytest.raises(ValueError, match=r"^path: expected 2 dimensions, got shape \[1\]$"):
        ops.compact_kv(k_cache, v_cache, lengths, path[0])
    with pytest.raises(TypeError, match=r"^v_cache: expected dtype torch.float32 like the other operands, got "):
        ops.compact_kv(k_cache, v_cache.double(), lengths, path)


def test_fake_tensors_and_mutation() -> None:
    """As `torch.compile` and CUDA graphs need it: the schema says what is written, and nothing else is."""
    k_cache, v_cache = torch.randn(2, 2, 1, 8, 4).unbind(0)
    arguments = (k_cache, v_cache, torch.tensor([0, 2]), torch.tensor([[0, 2], [1, 4]]))
    torch.library.opcheck(torch.ops.tidar_kernels.compact_kv.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_of_several_layers(device: str) -> None:
    """All layers move, committed slots and lengths stay; of one sequence's view, that sequence alone."""
    cache = KVCache(num_layers=3, batch_size=2, num_kv_heads=2, head_dim=16, max_len=12, device=device)
    cache.k.normal_()
    cache.v.normal_()
    cache.lengths += torch.tensor([2, 5], dtype=torch.int32, device=device)
    cache.length_bounds[:] = [2, 5]
    before = cache.k.clone(), cache.v.clone()
    cache.compact(torch.tensor([[0, 2, 5], [1, 3, -1]], device=device))
    cache.sequence(1).compact(torch.tensor([[0, 1, 6]], device=device))
    for found, expected in zip((cache.k, cache.v), before, strict=True):
        old = expected.clone()
        for to, of in ((3, 4), (4, 7)):
            expected[:, 0, :, to] = old[:, 0, :, of]
        for to, of in ((5, 6), (6, 8), (7, 11)):
            expected[:, 1, :, to] = old[:, 1, :, of]
        assert torch.equal(found, expected)
    assert cache.lengths.tolist() == cache.length_bounds.tolist() == [2, 5]


def test_a_cache_without_room() -> None:
    cache = KVCache(num_layers=2, batch_size=1, num_kv_heads=1, head_dim=4, max_len=6)
    cache.k.normal_()
    cache.commit(4)
    before = cache.k.clone()
    with pytest.raises(ValueError, match=r"^max_len: expected room for 3 more tokens in sequence 0, got 4 of 6"):
        cache.compact(torch.tensor([[0, 1, -1]]))
    with pytest.raises(ValueError, match=r"^path: expected nodes below max_len - length = 2, got 2 in sequence 0$"):
        cache.compact(torch.tensor([[0, 2]]))
    assert torch.equal(cache.k, before)


@pytest.mark.parametrize("path", ["cpu", pytest.param("interpreter", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("by_slot", [False, True])
def test_opcheck_with_pages(path: str, by_slot: bool) -> None:
    k_cache, v_cache = torch.randn(2, 5, 2, 4, 8)
    given = {"k_cache": k_cache, "v_cache": v_cache, "lengths": torch.tensor([1, 2])}
    given |= {"path": torch.tensor([[0, 2, 3], [1, -1, -1]])}
    given |= {"block_table": torch.tensor([[4, 0], [2, 1]], dtype=torch.int32)}
    if by_slot:  # the scales of an operator below its checks may be those of any dtype
        given |= {name: torch.rand(5, 2, 4) for name in ("k_scale", "v_scale")}
    op = torch.ops.tidar_kernels.compact_kv_scaling if by_slot else torch.ops.tidar_kernels.compact_kv
    torch.library.opcheck(op.default, (), given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_table": torch.zeros(2, 2)}, TypeError, r"^block_table: expected dtype int32"),
        ({"block_table": torch.zeros(2, 1).int()}, ValueError, r"^path: expected nodes below max_len - length = 3"),
        (
            {"block_table": torch.tensor([[4, 5], [2, 9]]).int()},
            ValueError,
            r"^block_table: .* got 5 in entry 1 of seq",
        ),
        ({"k_scale": torch.ones(())}, TypeError, r"^k_cache: expected dtype float8_e4m3fn or float8_e5m2 with k_scale"),
        (
            {"lengths": torch.tensor([1, 9])},
            ValueError,
            r"^lengths: .* max_pages \* page_size = 8, got 9 in sequence 1$",
        ),
    ],
)
def test_bad_pages_move_nothing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    k_cache, v_cache = torch.ones(2, 5, 2, 4, 8)
    given = {"lengths": torch.tensor([1, 2]), "path": torch.tensor([[0, 2, 3], [1, -1, -1]])}
    given |= {"block_table": torch.tensor([[4, 0], [2, 9]], dtype=torch.int32)} | changes
    with pytest.raises(error, match=message):
        ops.compact_kv(k_cache, v_cache, **given)
    assert bool((k_cache == 1).all())
