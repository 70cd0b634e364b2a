"""Where kernels round to bfloat16: weights P before they multiply values, and the gradients of scores.

Operands are chosen so that a result is exactly 0 if a factor was rounded to nearest, and is not if it was rounded to
zero or not at all: two products that differ in bits that bfloat16 does not have cancel.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tidar_kernels as tk
from tests.paths import KERNELS
from tidar_kernels import Pattern

HEAD_DIM = 16
# exp(-2^-10) = 1 - 0.00098 lies above the middle of 1 and the bfloat16 below it, 1 - 2^-8.
NEARLY = 2.0**-10


def rows(*values: dict[int, float], device: str) -> Tensor:
    """bfloat16 `[1, 1, rows, HEAD_DIM]`: of each row the entries that are not 0."""
    found = torch.zeros(1, 1, len(values), HEAD_DIM, dtype=torch.bfloat16)
    for row, entries in enumerate(values):
        for column, value in entries.items():
            found[0, 0, row, column] = value
            assert float(found[0, 0, row, column]) == value
    return found.to(device)


def everyone_sees(q_len: int, kv_len: int) -> Pattern:
    """Rows that see all keys in flight."""
    lead = torch.tensor([[0, kv_len]] * q_len, dtype=torch.int32)
    return Pattern(lead, torch.zeros_like(lead), torch.arange(q_len, dtype=torch.int32), kv_len)


@pytest.mark.parametrize("device", KERNELS)
def test_weights_are_rounded_before_they_multiply_values(device: str) -> None:
    """Weights 1 and exp(-2^-10) of values 64 and -64."""
    q, k = rows({0: 1.0}, device=device), rows({}, {0: -NEARLY}, device=device)
    v = rows({0: 64.0, 1: 1.0}, {0: -64.0, 1: 1.0}, device=device)
    out = tk.attention(q, k, v, everyone_sees(1, 2), scale=1.0, backend="triton")
    assert out[0, 0, 0, :2].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize(("before", "context"), [(0, 0), (0, 1), (0, 2), (14, 16), (15, 16), (16, 16)])
def test_a_step_rounds_weights_in_whole_tiles_where_the_context_ends_and_in_flight(
    before: int, context: int, device: str
) -> None:
    """The same, after `before` keys that weigh nothing; the first `context` keys are in the cache."""
    q = rows({0: 1.0, 1: 1.0}, device=device)
    k = rows(*[{1: -(2.0**15)}] * before, {}, {0: -NEARLY}, device=device)
    v = rows(*[{0: 8.0}] * before, {0: 64.0, 1: 1.0}, {0: -64.0, 1: 1.0}, device=device)
    caches = (x[:, :, :context].clone() for x in (k, v))
    lengths = torch.tensor([context], dtype=torch.int32, device=device)
    pattern = everyone_sees(1, k.shape[2] - context)
    in_flight = (x[:, :, context:] for x in (k, v))
    out = tk.step_attention(q, *in_flight, *caches, lengths, pattern, scale=1.0, backend="triton")
    assert out[0, 0, 0, :2].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("device", KERNELS)
def test_weights_are_rounded_before_they_multiply_gradients(device: str) -> None:
    """dv = P^T dO: rows whose weights of a key are 0.50024 and 0.49976, with gradients 64 and -64."""
    q, k = rows({0: 1.0}, {0: -1.0}, device=device), rows({}, {0: -NEARLY}, device=device)
    v = rows({1: 1.0}, {1: 2.0}, device=device).requires_grad_()
    out = tk.attention(q.requires_grad_(), k.requires_grad_(), v, everyone_sees(2, 2), scale=1.0, backend="triton")
    (dv,) = torch.autograd.grad(out, v, rows({0: 64.0}, {0: -64.0}, device=device))
    assert dv[0, 0, :, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("device", KERNELS)
def test_gradients_of_scores_are_rounded_before_they_multiply_queries(device: str) -> None:
    """dk = dS^T q: rows whose dS of key 0 is 1/4 and 1/4 + 2^-12, with queries 64 and -64 and every weight 1/2."""
    q, k = rows({0: 64.0}, {0: -64.0}, device=device), rows({}, {}, device=device).requires_grad_()
    v = rows({0: 1.0, 1: 2.0**-8}, {}, device=device).requires_grad_()
    out = tk.attention(q.requires_grad_(), k, v, everyone_sees(2, 2), scale=1.0, backend="triton")
    (dk,) = torch.autograd.grad(out, k, rows({0: 1.0}, {0: 1.0, 1: 0.25}, device=device))
    assert dk[0, 0, :, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("device", KERNELS)
def test_gradients_of_scores_are_rounded_before_they_multiply_keys(device: str) -> None:
    """dq = dS k: four keys of weight 1/4 whose dS are 1/4, 1/4 + 2^-12 and twice their negative mean."""
    q = rows({0: 1.0}, device=device).requires_grad_()
    k = rows({1: 64.0}, {1: -64.0}, {}, {}, device=device).requires_grad_()
    v = rows({0: 1.0}, {0: 1.0, 1: 2.0**-8}, *[{0: -1.0, 1: -(2.0**-9)}] * 2, device=device).requires_grad_()
    out = tk.attention(q, k, v, everyone_sees(1, 4), scale=1.0, backend="triton")
    (dq,) = torch.autograd.grad(out, q, rows({0: 1.0, 1: 0.25}, device=device))
    assert dq[0, 0, 0, 1].item() == 0.0
