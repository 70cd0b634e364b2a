"""Attention of a batch of requests over vLLM's paged cache, where a row sees intervals of the rows in flight.

A row sees its request's context, which the cache holds, and of the rows of its request that are in flight the
intervals `[0, lead)` and `own`: the rows of `tidar_kernels.patterns.Pattern`, ragged. In flight means computed in this
pass: their keys and values are read where they were computed, for those of mask rows are in no cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.operands import Cached, Keys, Scores
from ...ops.operands import Rows as QueryRows
from ...ops.step_attention import cpu
from ...ops.step_attention.api import operator

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
    cache: tuple[Tensor, Tensor],
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    rows: Rows,
    scores: Scores,
    out: Tensor,
    *,
    max_query_len: int,
) -> None:
    """Attention of every row of a ragged batch, by the kernel of `tidar_kernels.step_attention`.

    Each request is a pattern of its own in the kernel's tables: what its rows see is what `rows` says. Nothing of a
    GPU is read, and the launch depends on sizes alone, so a captured graph serves every batch of that size.

    Args:
        query: `[tokens, heads, head_dim]`. key, value: `[tokens, kv_heads, head_dim]`.
        cache: keys and values, each `[pages, kv_heads, page_size, head_dim]`, any strides.
        block_table: int32 `[requests, pages]`.
        seq_lens: int32 `[requests]`, with the rows in flight, as vLLM counts.
        query_start_loc: int32 `[requests + 1]`, where each request's rows begin.
        scores: scale, cap and sinks.
        out: `[tokens, heads * head_dim]` or `[tokens, heads, head_dim]`, written in place.
        max_query_len: an upper bound of the rows of a request.
    """
    requests, tokens = len(seq_lens), len(query)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    starts = query_start_loc[: requests + 1].to(torch.int32)
    lead = torch.stack([torch.zeros_like(rows.lead), rows.lead], dim=1)
    kinds = torch.arange(requests, dtype=torch.int32, device=query.device)
    lengths = (seq_lens[:requests] - starts.diff()).to(torch.int32)
    table = block_table[:requests]
    capacity = table.shape[1] * cache[0].shape[2]
    cached = Cached(*cache, lengths, capacity, table)
    # On a CPU the operator runs the kernel where Triton's interpreter is on, which vLLM's tests need for its own.
    compute = operator if query.is_cuda else cpu.step_attention
    ragged = QueryRows(q, lead, rows.own, cu_rows=starts, kinds=kinds, offsets=starts, max_rows=max_query_len)
    result, _ = compute(ragged, Keys(k, v), cached, scores)
    out.view(tokens, *query.shape[1:]).copy_(result[0].transpose(0, 1))
