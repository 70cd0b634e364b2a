"""Training attention on the CPU against its eager twin in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tidar_kernels import eager, ops, patterns
from tidar_kernels.patterns import Pattern

PATTERNS = {
    "training": patterns.tidar_training(96, 8),
    "ragged training": patterns.tidar_training(101, 16),
    "long blocks": patterns.tidar_training(70, 100),
    "step": patterns.tidar_step(8),
    "prefill": patterns.tidar_prefill(77, 4),
    "causal": patterns.causal(130),
}


def forward_backward(attend, inputs: list[Tensor], grad: Tensor, pattern: Pattern, dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in inputs)
    out = attend(q, k, v, pattern, 0.3)
    out.backward(grad.to(dtype))
    return [out.detach(), *(x.grad for x in (q, k, v))]


def operands(pattern: Pattern, heads: int, kv_heads: int, head_dim: int) -> tuple[list[Tensor], Tensor]:
    """Inputs as a model has them, `[batch, rows, heads, d]` transposed, and a gradient."""
    shapes = ((pattern.q_len, heads), (pattern.kv_len, kv_heads), (pattern.kv_len, kv_heads))
    inputs = [torch.randn(2, rows, h, head_dim, dtype=torch.float64).transpose(1, 2) for rows, h in shapes]
    return inputs, torch.randn(2, heads, pattern.q_len, head_dim, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PATTERNS)
def test_parity_within_the_budget(name, dtype):
    """Output and gradients: error <= 2 x the error of the eager twin in the same dtype + 1e-5."""
    pattern = PATTERNS[name]
    for heads, kv_heads, head_dim in ((4, 2, 32), (3, 1, 16), (2, 2, 80)):
        inputs, grad = operands(pattern, heads, kv_heads, head_dim)
        exact = forward_backward(eager.attention, inputs, grad, pattern, torch.float64)
        plain = forward_backward(eager.attention, inputs, grad, pattern, dtype)
        tiled = forward_backward(ops.attention, inputs, grad, pattern, dtype)
        for what, e, p, t in zip(("out", "dq", "dk", "dv"), exact, plain, tiled, strict=True):
            assert t.dtype == dtype
            budget = 2 * (p.double() - e).norm() / e.norm() + 1e-5
            assert (t.double() - e).norm() / e.norm() <= budget, (what, heads, kv_heads, head_dim)


def test_rows_without_keys_give_zero_and_no_gradient():
    """Some rows of a tile empty, and a whole tile of them."""
    rows = 200
    lead = torch.zeros(rows, 2, dtype=torch.int32)
    lead[5:100, 1] = torch.arange(1, 96, dtype=torch.int32)
    own = torch.zeros(rows, 2, dtype=torch.int32)
    own[60:90] = torch.tensor([120, 140], dtype=torch.int32)
    pattern = Pattern(lead=lead, own=own, positions=torch.arange(rows, dtype=torch.int32), kv_len=150)
    inputs, grad = operands(pattern, 4, 2, 8)
    exact = forward_backward(eager.attention, inputs, grad, pattern, torch.float64)
    tiled = forward_backward(ops.attention, inputs, grad, pattern, torch.float64)
    for e, t in zip(exact, tiled, strict=True):
        torch.testing.assert_close(t, e, rtol=1e-10, atol=1e-12)
    assert not tiled[0][:, :, :5].any()
    assert not tiled[1][:, :, 100:].any()


def test_any_strides():
    pattern = patterns.tidar_training(20, 4)
    inputs, _ = operands(pattern, 4, 2, 8)
    strided = [torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0] for x in inputs]
    assert all(x.stride(-1) == 2 for x in strided)
    expected = ops.attention(*inputs, pattern, 0.3)
    assert torch.equal(ops.attention(*strided, pattern, 0.3), expected)


def test_autocast_computes_in_its_dtype():
    pattern = patterns.tidar_training(20, 4)
    inputs, _ = operands(pattern, 4, 2, 8)
    single = [x.float().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(*single, pattern, 0.3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.attention(*(x.detach().bfloat16() for x in single), pattern, 0.3))
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in single)
