"""A pass over vLLM's paged cache: keys and values are stored, and rows see intervals of the rows in flight.

A row sees its request's context, which the cache holds, and of the rows of its request that are in flight the
intervals `[0, lead)` and `own`: the rows of `tidar_kernels.patterns.Pattern`, ragged. In flight means computed in this
pass: their keys and values are read where they were computed, for those of mask rows are in no cache.

What a pass is made of is put into `Buffers` once, and read by every layer. The buffers keep their addresses and a
launch depends on sizes alone, so a captured graph serves every pass of its sizes. Nothing of the device is read by the
host, and nothing loops over requests, but for the CPU path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ops.kv import reference
from ...ops.kv.api import append_operator
from ...ops.kv.operands import Written
from ...ops.operands import Cached, Keys, Scores
from ...ops.operands import Rows as QueryRows
from ...ops.paging import as_kept_rows
from ...ops.step_attention import cpu
from ...ops.step_attention.api import into_operator

__all__ = ["KERNELS", "ON_CPU", "Batch", "Buffers", "Path", "Rows", "step"]


class Rows(NamedTuple):
    """What each row in flight sees of those of its request, counted from the request's first.

    Attributes:
        lead: int32 `[rows]`, the end of the first interval, which begins at 0.
        own: int32 `[rows, 2]`, begin and end of the second.
    """

    lead: Tensor
    own: Tensor


class Batch(NamedTuple):
    """What a pass is made of, on the device.

    Attributes:
        starts: int32 `[requests + 1]`, where each request's rows begin; rows from the last entry on are nobody's.
        lengths: int32 `[requests]`, tokens of context.
        kept: int32 `[requests]`, the leading rows of each request whose keys and values enter the cache.
        kinds: int32 `[requests]`, 0, 1, ..: in the kernel's tables each request is a pattern of its own.
        lead, own: int32 `[rows, 2]`, intervals over the request's rows in flight.
        request: int64 `[rows]`, whose each row is; of one that is nobody's, any.
        enters: bool `[rows]`, whether its keys and values enter the cache.
        block_table: int32 `[requests, pages]`.
        slot_mapping: int64 `[rows]`, vLLM's own form of where rows enter; -1 for those that do not.
        max_rows: an upper bound of the rows of a request.
        max_context: an upper bound of `lengths`.
    """

    starts: Tensor
    lengths: Tensor
    kept: Tensor
    kinds: Tensor
    lead: Tensor
    own: Tensor
    request: Tensor
    enters: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    max_rows: int
    max_context: int


class Buffers:
    """Room for what passes are made of, at fixed addresses.

    Args:
        max_requests, max_rows: of a pass, padding included.
        device: where vLLM's tensors are.
    """

    def __init__(self, max_requests: int, max_rows: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._lengths, self._kept = zeros(max_requests), zeros(max_requests)
        self._kinds = torch.arange(max_requests, dtype=torch.int32, device=device)
        self._row = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._lead, self._own = zeros(max_rows, 2), zeros(max_rows, 2)
        self._request, self._enters = zeros(max_rows, dtype=torch.int64), zeros(max_rows, dtype=torch.bool)

    def fill(
        self,
        starts: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        slot_mapping: Tensor,
        rows: Rows | None = None,
        *,
        num_rows: int,
        max_rows: int,
        max_seq_len: int,
    ) -> Batch:
        """Take over a pass, as vLLM's runner describes it, in place.

        Args:
            starts: int32 `[requests + 1]`; requests that are padding have no rows.
            seq_lens: int32 `[requests]`, tokens of each with the rows in flight, as vLLM counts.
            block_table: int32 `[requests, pages]`.
            slot_mapping: int64 `[num_rows or more]`; of a request's rows the first ones have slots, the others -1.
            rows: what the first rows see; None: each row all before it, and itself.
            num_rows: of the pass, padding included.
            max_rows, max_seq_len: upper bounds of the rows of a request, and of `seq_lens`.

        Returns:
            Views of the buffers and of the arguments.
        """
        requests = len(seq_lens)
        lead, own = self._lead[:num_rows], self._own[:num_rows]
        request, enters = self._request[:num_rows], self._enters[:num_rows]
        lengths, kept = self._lengths[:requests], self._kept[:requests]
        torch.sub(seq_lens, starts.diff(), out=lengths)
        torch.ge(slot_mapping[:num_rows], 0, out=enters)
        entered = pad(enters.cumsum(0), (1, 0))  # before each row
        kept.copy_(entered[starts.long()].diff())
        row = self._row[:num_rows]
        request.copy_(torch.searchsorted(starts[1:], row, right=True).clamp(max=requests - 1))
        if rows is None:
            lead[:, 1].copy_(row - starts[request] + 1)
            own.zero_()
        else:
            lead[: len(rows.lead), 1].copy_(rows.lead)
            own[: len(rows.own)].copy_(rows.own)
        return Batch(
            *(starts, lengths, kept, self._kinds[:requests], lead, own, request, enters),
            *(block_table[:requests], slot_mapping[:num_rows], max_rows, max_seq_len),
        )


class Path(NamedTuple):
    """What runs a pass: `append(cached, keys, written)`, and `attend(rows, keys, cached, scores)` into `rows.into`."""

    append: Callable[[Cached, Keys, Written], Any]
    attend: Callable[[QueryRows, Keys, Cached, Scores], Any]


def _append_on_cpu(cached: Cached, keys: Keys, written: Written) -> None:
    k_cache, v_cache, lengths, _, block_table, k_scale, v_scale, _ = cached
    reference.append_kv(k_cache, v_cache, *keys, lengths, block_table, k_scale, v_scale, *written)


KERNELS = Path(append_operator, into_operator)
# For CPUs alone. There the operators run the kernels if Triton interprets, which vLLM's tests need for its own kernels.
ON_CPU = Path(_append_on_cpu, cpu.step_attention)


def step(
    path: Path,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: tuple[Tensor, Tensor],
    batch: Batch,
    scores: Scores,
    out: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """One layer of a pass: what enters the cache is written, and every row attends.

    Of a float8 cache rows see the keys in flight that enter it with the values that it holds then, and those of mask
    rows as they were computed.

    Args:
        path: the kernels, or what stands in for them on a CPU.
        query: `[rows or more, heads, head_dim]`. key, value: `[rows or more, kv_heads, head_dim]`.
        cache: keys and values, each `[pages, kv_heads, page_size, head_dim]`, any strides.
        batch: of the pass.
        scores: scale, cap and sinks.
        out: `[rows or more, heads * head_dim]` or `[rows or more, heads, head_dim]`, written in place; it shares no
            memory with the other operands. Rows that are nobody's are 0.
        scales: of a float8 cache, float32, broadcastable to `[requests, kv_heads]`: value = stored * scale.
    """
    rows = len(batch.lead)
    q, k, v = (x[:rows].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    capacity = batch.block_table.shape[1] * cache[0].shape[2]
    cached = Cached(*cache, batch.lengths, min(batch.max_context, capacity), batch.block_table, *(scales or ()))
    keys = Keys(k, v)
    path.append(cached, keys, Written(batch.starts, batch.kept))
    if scales is not None:
        keys = as_kept_rows(keys, cached, batch.request, batch.enters)
    ragged = QueryRows(
        *(q, batch.lead, batch.own),
        cu_rows=batch.starts,
        kinds=batch.kinds,
        offsets=batch.starts,
        max_rows=batch.max_rows,
        into=out[:rows].view(rows, *query.shape[1:]).transpose(0, 1).unsqueeze(0),
    )
    path.attend(ragged, keys, cached, scores)
