"""transformers' continuous batching (`generate_batch`) under `attn_implementation="tidar"`.

It hands the rows of all requests one after another, and a cache in pages of its own (`PagedAttentionCache`), which
writes their keys and gives back those of every request, also one after another. Here that is a cache with pages of one
token: the block table of request b counts on from where its keys begin. Nothing is read by the host.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

from ... import ops
from ..causal import causal

__all__ = ["PagedAttentionCache", "accept", "attend"]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, cache: PagedAttentionCache, **options: Any
) -> Tensor:
    """Attention of one layer in a forward pass of continuous batching; writes the new keys and values into its cache.

    Args:
        query, key, value: `[1, heads, rows, head_dim]`, the rows of all requests; those past the last are padding.
        options: the layer's `scale`, `softcap`, `sinks` and `sliding_window`, and what transformers hands along:
            `cu_seq_lens_q`, `cu_seq_lens_k`, their maxima, and the places in its cache.

    Returns:
        `[1, rows, heads, head_dim]`.
    """
    numbers = {name: options.pop(name) for name in ("scale", "softcap", "sinks")}
    window = options.pop("sliding_window")
    keys, values = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=options)
    rows, first_row = query.shape[2], options["cu_seq_lens_q"]
    first_key, most_keys = options["cu_seq_lens_k"], options["max_length_k"]
    pattern = causal(options["max_length_q"])
    pattern = pattern if window is None else pattern.windowed(window)

    def counted(first: Tensor, most: int, end: int) -> Tensor:
        """`[requests, most]`: the numbers from `first` on; those past a request's own are never used."""
        return (first[:-1, None] + torch.arange(most, device=first.device)).clamp(max=end - 1)

    at = counted(first_row, pattern.q_len, rows)
    q, k, v = (x[0][:, at].transpose(0, 1) for x in (query, key, value))
    k_pages, v_pages = (x[0].transpose(0, 1).unsqueeze(2) for x in (keys, values))
    table = counted(first_key, most_keys, len(k_pages)).to(torch.int32)
    lengths = (first_key.diff() - first_row.diff()).to(torch.int32)
    out = ops.step_attention(q, k, v, k_pages, v_pages, lengths, pattern, **numbers, block_table=table)
    row = torch.arange(rows, device=query.device)
    request = torch.searchsorted(first_row[1:], row, right=True, out_int32=True).clamp(max=len(lengths) - 1)
    token = (row - first_row[request]).clamp(max=pattern.q_len - 1)
    return out.transpose(1, 2)[request, token].unsqueeze(0)


def accept(name: str) -> None:
    """Let continuous batching take models whose attention is `name`: transformers refuses what it does not know.

    Nothing is done for a transformers that has another way to refuse (before 5.2x): it still does.
    """
    switch: Any = getattr(ContinuousBatchingManager, "switch_to_cb_friendly_attn", None)
    if switch is None or getattr(switch, "accepts", None) == name:
        return

    @functools.wraps(switch)
    def switch_unless_known(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation != name:
            switch(self, model, *args, **kwargs)

    switch_unless_known.accepts = name  # type: ignore[attr-defined]
    ContinuousBatchingManager.switch_to_cb_friendly_attn = switch_unless_known  # type: ignore[method-assign]
