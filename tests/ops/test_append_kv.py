"""Append: every slot, touched and untouched, bit for bit; and nothing outside the cache, whatever lengths say."""

from __future__ import annotations

import pytest
import torch

from tests.paths import DEVICES, HERE, on_every_path
from tidar_kernels import eager, ops, testing


@pytest.mark.parametrize(("device", "case"), on_every_path("append_kv"))
def test_every_slot(device: str, case: testing.AppendCase) -> None:
    testing.check_append_kv(case, device)


@pytest.mark.parametrize("case", [case for case in testing.APPEND_CASES if case.fits], ids=lambda case: case.id)
def test_the_twin_too(case: testing.AppendCase) -> None:
    """The harness takes its expectation from the definition, not from the twin; so the twin is checked as well."""
    testing.check_append_kv(case, "cpu", backend="eager")


# A GPU's lengths are not read by the host: there it is `KVCache` that knows the bounds.
@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(("lengths", "sequence"), [((33, 0), 0), ((0, -1), 1), ((32, 41), 1)])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_overflow_raises_before_anything_is_written(
    device: str, lengths: tuple[int, int], sequence: int, backend: ops.Backend | None
) -> None:
    k_cache, v_cache = torch.randn(2, 2, 2, 40, 16, device=device).unbind(0)
    before = k_cache.clone(), v_cache.clone()
    k, v = torch.randn(2, 2, 2, 8, 16, device=device).unbind(0)
    message = f"^lengths: expected 0 <= length <= .*32, got {lengths[sequence]} in sequence {sequence}$"
    with pytest.raises(ValueError, match=message):
        ops.append_kv(k_cache, v_cache, k, v, torch.tensor(lengths, device=device), backend=backend)
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


@pytest.mark.parametrize("device", DEVICES)
def test_rejected_slots_are_overwritten_by_the_next_append(device: str) -> None:
    """Two steps of 8 drafts of which 3 are accepted: after the accepted ones lie those of the second step."""
    k_cache, v_cache = torch.zeros(2, 1, 2, 24, 16, device=device).unbind(0)
    first, second = torch.randn(2, 2, 1, 2, 8, 16, device=device).unbind(0)
    lengths = torch.tensor([5], dtype=torch.int32, device=device)
    ops.append_kv(k_cache, v_cache, *first, lengths)
    ops.append_kv(k_cache, v_cache, *second, lengths + 3)
    for cache, old, new in zip((k_cache, v_cache), first, second, strict=True):
        expected = torch.zeros_like(cache)
        expected[:, :, 5:8], expected[:, :, 8:16] = old[:, :, :3], new
        assert torch.equal(cache, expected)


def test_twin_drops_what_lies_outside() -> None:
    k_cache, v_cache = torch.zeros(2, 1, 1, 4, 2).unbind(0)
    k, v = torch.ones(2, 1, 1, 3, 2).unbind(0)
    eager.append_kv(k_cache, v_cache, k, v, torch.tensor([2]))
    eager.append_kv(k_cache, v_cache, k, v, torch.tensor([-2]))
    assert k_cache[0, 0, :, 0].tolist() == [1.0, 0.0, 1.0, 1.0]
