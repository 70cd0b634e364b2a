"""Micro-benchmarks of the operators on the CPU, under pytest-benchmark: checked against the eager twin, then timed.

python -m pytest benchmarks --benchmark-json=FILE
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tidar_kernels as tk
from tidar_kernels import eager_linear, linear
from tidar_kernels.rotary import RotaryEmbedding, rotary_append

from . import training
from .step import Operands, Workload

STEPS = [Workload("Qwen2.5-1.5B", 12, 2, 128, block, context) for block in (0, 4, 8) for context in (512, 4096)]


@pytest.mark.parametrize("case", STEPS, ids=str)
@pytest.mark.parametrize("implementation", ["ours", "dense_sdpa"])
def test_step_attention(benchmark: Any, case: Workload, implementation: str) -> None:
    operands = Operands(case, "cpu", torch.float32)
    operands.check()
    benchmark.extra_info.update(vars(case))
    benchmark(getattr(operands, implementation))


@pytest.mark.parametrize("block_size", [4, 8, 16])
def test_append_kv(benchmark: Any, block_size: int) -> None:
    k_cache, v_cache = cache = torch.zeros(2, 4, 8, 4096, 128)
    k, v = new = torch.randn(2, 4, 8, block_size, 128)
    lengths = torch.tensor([0, 17, 1024, 4000], dtype=torch.int32)
    tk.append_kv(k_cache, v_cache, k, v, lengths)
    for b, length in enumerate(lengths.tolist()):
        if not torch.equal(cache[:, b, :, length : length + block_size], new[:, b]):
            pytest.fail("append_kv wrote something else; no speed is reported")
    benchmark(tk.append_kv, k_cache, v_cache, k, v, lengths)


@pytest.mark.parametrize("case", [training.Workload(512, 16, 4, 4, 64), training.Workload(512, 16, 8, 2, 64)], ids=str)
@pytest.mark.parametrize("direction", training.DIRECTIONS)
@pytest.mark.parametrize("implementation", ["tidar_kernels", "sdpa_dense_mask"])
def test_attention(benchmark: Any, case: training.Workload, direction: str, implementation: str) -> None:
    operands = training.Operands(case, "cpu", torch.float32)
    calls = training.IMPLEMENTATIONS[implementation](operands)
    call, _ = training.checked(operands, implementation, calls, direction)
    benchmark.extra_info.update(vars(case))
    benchmark(call)


@pytest.mark.parametrize("block_size", [4, 8])
def test_rotary_append(benchmark: Any, block_size: int) -> None:
    """One layer of Qwen2.5-1.5B before its attention."""
    pattern = tk.patterns.tidar_step(block_size)
    q, (k, v) = torch.randn(1, 12, pattern.q_len, 128), torch.randn(2, 1, 2, pattern.q_len, 128)
    k_cache, v_cache = torch.zeros(1, 2, 4096, 128), torch.zeros(1, 2, 4096, 128)
    lengths = torch.tensor([1000])
    rotary = RotaryEmbedding(128)(pattern.positions + 1000, torch.float32)
    _, turned = rotary_append(q, k, v, rotary, k_cache, v_cache, lengths, block_size)
    if not torch.equal(k_cache[:, :, 1000 : 1000 + block_size], turned[:, :, :block_size]):
        pytest.fail("rotary_append wrote something else; no speed is reported")
    benchmark(rotary_append, q, k, v, rotary, k_cache, v_cache, lengths, block_size)


@pytest.mark.parametrize("vocab_size", [258, 151_936])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_verify(benchmark: Any, vocab_size: int, temperature: float) -> None:
    """Eight drafts, greedy and sampled."""
    logits, params = torch.randn(1, 8, vocab_size) * 3, tk.SamplingParams(temperature, seed=1)
    picks = tk.sample(logits, torch.tensor([1]), params)
    drafts = torch.cat([picks[:, :1], picks[:, :-1]], dim=1)
    if tk.verify(logits, drafts, torch.tensor([1]), params).accepted.item() != 8:
        pytest.fail("verify accepts something else; no speed is reported")
    benchmark(tk.verify, logits, drafts, torch.tensor([1]), params)


@pytest.mark.parametrize("rows", [1, 20, 72])
@pytest.mark.parametrize("implementation", ["row_invariant_linear", "gated_lora", "library"])
def test_projection(benchmark: Any, rows: int, implementation: str) -> None:
    """One projection of Qwen2.5-1.5B, alone and with an adapter of rank 64 on the mask rows of a step."""
    x, weight = torch.randn(rows, 1536), torch.randn(1536, 1536)
    lora_a, lora_b = torch.randn(64, 1536) * 0.03, torch.randn(1536, 64)
    gate = torch.arange(rows) >= rows // 8
    calls = {
        "row_invariant_linear": lambda: linear.row_invariant_linear(x, weight),
        "gated_lora": lambda: linear.gated_lora(x, weight, lora_a, lora_b, gate),
        "library": lambda: torch.nn.functional.linear(x, weight),
    }
    call = calls[implementation]
    a, b = lora_a.double(), lora_b.double()
    chosen = gate if implementation == "gated_lora" else torch.tensor(False)
    expected = eager_linear.gated_lora(x.double(), weight.double(), a, b, chosen)
    if not torch.allclose(call().double(), expected, rtol=1e-3, atol=1e-2):
        pytest.fail(f"{implementation} computes something else; no speed is reported")
    benchmark(call)
