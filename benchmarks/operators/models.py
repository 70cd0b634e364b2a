"""Known models, whose shapes workloads have.

Heads are `(query heads, key/value heads, head dim)`. Qwen3-8B and Llama-3-8B have the same ones, so attention is
measured once for both; their vocabularies differ, which `verify` sees.
"""

from __future__ import annotations

HEADS = {"Qwen2.5-1.5B": (12, 2, 128), "Qwen3-8B": (32, 8, 128), "Llama-3-8B": (32, 8, 128), "Qwen3-32B": (64, 8, 128)}
SAME_HEADS = {"Llama-3-8B": "Qwen3-8B"}
VOCABULARIES = {
    "shipped": 258, "Llama-2-7B": 32000, "Llama-3-8B": 128256, "Qwen2.5-1.5B": 151936, "Gemma-3-4B": 262208
}  # fmt: skip


def attention_of(model: str) -> tuple[str, int, int, int]:
    """The name of a model, its query and key/value heads, and their width: how workloads of attention begin."""
    return model, *HEADS[model]


def cache_of(model: str) -> tuple[str, int, int]:
    """The name of a model, its key/value heads, and their width: how workloads of a cache begin."""
    return model, *HEADS[model][1:]
