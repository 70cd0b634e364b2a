"""TiDARAttention against the formula written out, with and without a cache."""

from __future__ import annotations

import math

import pytest
import torch

import tidar_kernels as tk
from tidar_kernels.nn.attention import RMSNorm, RotaryEmbedding, apply_rotary


def rotate_by_complex_numbers(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions as complex products: component j of the first half pairs with j of the second."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions.double()[..., None] * frequency)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn.unsqueeze(-2)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_rotary_equals_complex_rotation() -> None:
    x, positions = torch.randn(2, 5, 3, 16), torch.tensor([[0, 1, 5, 3, 900], [7, 7, 0, 2, 1]])
    got = apply_rotary(x, RotaryEmbedding(16, 100.0)(positions, torch.float32))
    torch.testing.assert_close(got.double(), rotate_by_complex_numbers(x, positions, 100.0), rtol=1e-4, atol=1e-4)


def test_rotary_needs_an_even_head_dim() -> None:
    with pytest.raises(ValueError, match="head_dim: expected an even number for rotary positions, got 15"):
        RotaryEmbedding(15)


def test_rms_norm_formula() -> None:
    norm, x = RMSNorm(8, eps=1e-3), torch.randn(4, 8)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_is_the_formula(qk_norm: bool, bias: bool, kv_heads: int) -> None:
    layer = tk.TiDARAttention(20, 6, kv_heads, 8, qk_norm=qk_norm, bias=bias).double()
    pattern = tk.patterns.tidar_training(6, 4)
    x = torch.randn(2, 12, 20, dtype=torch.float64)
    rotary = RotaryEmbedding(8)(pattern.positions, torch.float64)
    heads = {}
    for name, count in (("q", 6), ("k", kv_heads), ("v", kv_heads)):
        y = getattr(layer, f"{name}_proj")(x).view(2, 12, count, 8)
        if qk_norm and name != "v":
            y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        if name != "v":
            y = apply_rotary(y, rotary)
        heads[name] = y.repeat_interleave(6 // count, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", heads["q"], heads["k"]) / math.sqrt(8)
    weights = scores.masked_fill(~pattern.dense(), -math.inf).softmax(-1)
    expected = layer.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, heads["v"]).reshape(2, 12, 48))
    torch.testing.assert_close(layer(x, pattern, rotary=rotary), expected)


def test_a_cache_changes_where_keys_are_not_what_comes_out() -> None:
    layer, cache = tk.TiDARAttention(32, 4, 2, layer_idx=1), None
    x = torch.randn(2, 10, 32)
    with torch.no_grad():
        whole = layer(x, tk.patterns.causal(10))
        cache = tk.KVCache(num_layers=2, batch_size=2, num_kv_heads=2, head_dim=8, max_len=12)
        pieces = []
        for start, stop in ((0, 4), (4, 5), (5, 10)):
            pieces.append(layer(x[:, start:stop], tk.patterns.causal(stop - start), cache=cache))
            cache.commit(stop - start)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert not cache.k[0].any()
    assert cache.k[1, :, :, :10].any()


def test_only_causal_rows_reach_the_cache() -> None:
    layer = tk.TiDARAttention(32, 4, 2)
    cache = tk.KVCache(num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8, max_len=30)
    cache.k.fill_(7.0)
    with torch.no_grad():
        layer(torch.randn(1, 20, 32), tk.patterns.tidar_step(4), cache=cache)
    assert not (cache.k[:, :, :, :4] == 7.0).any()
    assert (cache.k[:, :, :, 4:] == 7.0).all()


def test_kv_heads_must_divide_heads() -> None:
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads = 4, got 3"):
        tk.TiDARAttention(32, 4, 3)


def test_state_dict_names_are_those_of_llama_and_qwen() -> None:
    names = set(tk.TiDARAttention(32, 4, 2, qk_norm=True, bias=True).state_dict())
    projections = {f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")}
    assert names == projections | {"o_proj.weight", "q_norm.weight", "k_norm.weight"}


@pytest.mark.parametrize("rotated", [False, True])
def test_a_backward_pass_through_a_cache_is_an_error(rotated: bool) -> None:
    layer, pattern = tk.TiDARAttention(32, 4, 2), tk.patterns.causal(4)
    cache = tk.KVCache(num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8, max_len=8)
    rotary = RotaryEmbedding(8)(pattern.positions[None], torch.float32) if rotated else None
    out = layer(torch.randn(1, 4, 32), pattern, rotary=rotary, cache=cache)
    with pytest.raises(RuntimeError, match=r"^step_attention: expected no backward pass"):
        out.sum().backward()


def test_layers_are_made_on_the_default_device() -> None:
    with torch.device("meta"):
        layer, rotary = tk.TiDARAttention(32, 4, 2, qk_norm=True, bias=True), RotaryEmbedding(8)
        adapter = tk.GatedLoRA(torch.nn.Linear(8, 4), 2, 4.0)
    tensors = [*layer.state_dict().values(), *adapter.state_dict().values(), rotary.inv_freq]
    assert {t.device.type for t in tensors} == {"meta"}
