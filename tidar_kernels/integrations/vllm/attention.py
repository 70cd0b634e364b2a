"""Attention of a batch of requests over vLLM's paged cache, where a row sees intervals of the rows in flight.

A row sees its request's context, which the cache holds, and of the rows of its request that are in flight the
intervals `[0, lead)` and `own`: the rows of `tidar_kernels.patterns.Pattern`, ragged. In flight means computed in this
pass: their keys and values are read where they were computed, for those of mask rows are in no cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["Rows", "append", "attend"]


class Rows(NamedTuple):
    """What each row in flight sees of those of its request, counted from the request's first.

    Attributes:
        lead: int32 `[tokens]`, the end of the first interval, which begins at 0.
        own: int32 `[tokens, 2]`, begin and end of the second.
    """

    lead: Tensor
    own: Tensor


def append(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write keys and values `[tokens, kv_heads, head_dim]` into their slots; a token of slot -1 is not stored.

    Args:
        cache: `[pages, kv_heads, page_size, 2 * head_dim]`, any strides: a key, then a value.
        slots: int64 `[at least tokens]`, page * page_size + slot in the page.
    """
    slots = slots[: len(key)]
    kept = (slots >= 0).nonzero().squeeze(1)
    page_size, slots = cache.shape[2], slots[kept]
    cache[slots // page_size, :, slots % page_size] = torch.cat([key[kept], value[kept]], dim=-1).to(cache.dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    rows: Rows,
    scale: float,
    out: Tensor,
) -> None:
    """Attention of every row, request by request; for CPUs.

    Args:
        query: `[tokens, heads, head_dim]`. key, value: `[tokens, kv_heads, head_dim]`.
        cache: as in `append`. block_table: int32 `[requests, pages]`.
        seq_lens: int32 `[requests]`, with the rows in flight, as vLLM counts.
        query_start_loc: int32 `[requests + 1]`, where each request's rows begin.
        out: `[tokens, heads * head_dim]` or `[tokens, heads, head_dim]`, written in place.

    Raises:
        NotImplementedError: not on a CPU.
    """
    if query.device.type != "cpu":
        raise NotImplementedError(f"attend: expected tensors on a CPU, got {query.device.type}")
    head_dim, page_size = query.shape[2], cache.shape[2]
    starts = query_start_loc.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        here = slice(starts[request], starts[request + 1])
        count = here.stop - here.start
        context = length - count
        pages = block_table[request, : -(-context // page_size)].long()
        cached = cache[pages].transpose(1, 2).flatten(0, 1)[:context].to(key.dtype)
        keys = torch.cat([cached[..., :head_dim], key[here]])
        values = torch.cat([cached[..., head_dim:], value[here]])
        place = torch.arange(count, device=query.device)
        own = rows.own[here]
        seen = place < rows.lead[here, None]
        seen |= (own[:, :1] <= place) & (place < own[:, 1:])
        visible = torch.cat([seen.new_ones(count, context), seen], dim=1)
        result = scaled_dot_product_attention(
            query[here].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=visible,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        out[here] = result[0].transpose(0, 1).reshape(out[here].shape)
