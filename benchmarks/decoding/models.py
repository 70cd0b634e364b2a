"""Models at the shapes of known ones, random weights: latency does not depend on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidar_kernels import KVCache
from tidar_kernels.decoding.packed import PackedWeights, can_pack
from tidar_kernels.models import Transformer, TransformerConfig, load_shipped
from tidar_kernels.patterns import Pattern

from ..core.operands import live_pairs

SHIPPED = "shipped"


@dataclass(frozen=True)
class Shape:
    """A model's shape, and the tokens a forward pass that TiDAR (arXiv 2511.08923) publishes for it, by block size."""

    config: TransformerConfig
    published: dict[int, float]


SHAPES = {
    "Qwen2.5-1.5B": Shape(TransformerConfig(151936, 1536, 8960, 28, 12, 2, 128), {8: 5.69, 16: 7.35}),
    "Qwen3-8B": Shape(TransformerConfig(151936, 4096, 12288, 36, 32, 8, 128), {16: 8.36}),
    "SmolLM2-135M": Shape(TransformerConfig(49152, 576, 1536, 30, 9, 3, 64), {}),
    "tiny": Shape(TransformerConfig(300, 64, 96, 2, 4, 2, 16), {4: 3.0}),
}
LARGE = ("Qwen2.5-1.5B", "Qwen3-8B")
SMALL = "SmolLM2-135M"  # whose weights are larger than the caches of a CPU
_held: dict[tuple[str, str, torch.dtype], Transformer] = {}


def model_of(name: str, device: str, dtype: torch.dtype) -> Transformer:
    """The shipped model, or one of random weights in a known shape; the last one is held, and no other.

    Raises:
        ValueError: no such model.
    """
    if name != SHIPPED and name not in SHAPES:
        raise ValueError(f"model: expected one of {', '.join([SHIPPED, *SHAPES])}, got {name}")
    key = name, device, dtype
    if key not in _held:
        _held.clear()  # before the next one takes its place in memory
        with torch.inference_mode(False):
            _held[key] = load_shipped()[0].to(device, dtype) if name == SHIPPED else _random(name, device, dtype)
    return _held[key]


def _random(name: str, device: str, dtype: torch.dtype) -> Transformer:
    """Made where it is used."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Transformer(SHAPES[name].config).requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)


def packing(device: str, dtype: torch.dtype) -> PackedWeights | None:
    """What keeps bfloat16 weights as a CPU multiplies them, as `Decoder(packed=True)` does; None elsewhere."""
    return PackedWeights() if device == "cpu" and dtype == torch.bfloat16 and can_pack() else None


def fill(cache: KVCache, context_len: int) -> None:
    """Random keys and values, and `context_len` tokens of them in every sequence."""
    cache.k.normal_()
    cache.v.normal_()
    cache.lengths.fill_(context_len)
    cache.lengths_known([context_len])


def floor_of(
    config: TransformerConfig, pattern: Pattern, context: int, dtype: torch.dtype, *, batch: int = 1, logits_rows: int
) -> dict[str, float]:
    """Bytes and FLOPs that no forward pass over `pattern` can avoid: weights and K/V read once, and every product.

    `logits_rows` is how many rows of the whole batch the lm_head runs on.
    """
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    layers = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    pairs = batch * (pattern.q_len * context + live_pairs(pattern))
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (context + pattern.q_len) * batch
    flops = 2.0 * layers * pattern.q_len * batch + 2.0 * head * logits_rows
    flops += 4.0 * pairs * config.head_dim * config.num_heads * config.num_layers
    return {"rows": pattern.q_len * batch, "bytes": float((layers + head + kv) * dtype.itemsize), "flops": flops}
