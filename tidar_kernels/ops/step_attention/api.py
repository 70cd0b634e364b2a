"""Attention of one decode step: cached context, then the in-flight keys of a pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...patterns import Pattern, PatternBatch
from ...patterns.arguments import check_int
from .. import checks
from ..declaration import Backend, Operator, check_backend, no_gradient
from ..operands import Cached, Keys, Rows, Scores, results_of
from ..paging import as_kept_rows
from . import cpu, reference

__all__ = ["into_operator", "operator", "rows_of", "step_attention"]


def step_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    pattern: Pattern | PatternBatch,
    scale: float | None = None,
    *,
    max_context: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | Any:
    """Attention of one decode step: every row sees the cached context, then its pattern's in-flight keys.

    Row q of sequence b sees cache slots `[0, lengths[b])` and the in-flight keys in `lead[q]`, `own[q]` and
    `tree_mask[q]`
    (TiDAR, arXiv 2511.08923, decode step; `tidar_kernels.patterns`); of a windowed pattern, the last `reach[q]` of
    these slots, and slots that no row reaches cost nothing. The bits of a causal row do not depend on how it
    was launched: draft row m of a step at length P equals single-token decoding at length P + m. It has no gradient: a
    backward pass through it is a RuntimeError; `backend="eager"` has one.

    With a ragged batch (`tidar_kernels.patterns.batch`) q is `[rows, heads, head_dim]`, the rows of all requests one
    after another, k and v are `[rows, kv_heads, head_dim]`, and each request has the bits that it has alone. What the
    batch is made of is read on the device: a captured graph serves every mix of its patterns. Rows that are nobody's
    see no key.

    Args:
        q: `[batch, heads, q_len, head_dim]`, float32, float16 or bfloat16; any strides, as for all operands.
        k, v: `[batch, kv_heads, kv_len, head_dim]`, the in-flight keys and values; `kv_heads` divides `heads`. Values
            may have another width, `head_dim_v`.
        k_cache, v_cache: `[batch, kv_heads, max_len, head_dim]`, or with `block_table` pages
            `[num_pages, kv_heads, page_size, head_dim]`; slots at and past `lengths[b]` are never read. Values as v. Of
            the dtype of q, or with scales float8_e4m3fn or float8_e5m2.
        lengths: int32 or int64 `[batch]`, tokens of context in each sequence; stays on the device.
        pattern: `pattern.q_len` and `pattern.kv_len` match q and k; of a ragged batch, `pattern.num_rows`.
        scale: of the scores, positive; default `1 / sqrt(head_dim)`.
        max_context: an upper bound of `lengths` that the host happens to know; fewer programs are launched, the bits
            stay. Default `max_len`.
        softcap: cap of the logits, positive: they are `softcap * tanh(scale * q.k / softcap)` (Gemma 2). Default none.
        sinks: `[heads]`, any float dtype: one more logit in the softmax of every row of a head, without a value
            (GPT-OSS); lse has it too. Default none.
        return_lse: also return the log-sum-exp (natural log, float32) of every row, `[batch, heads, q_len]`.
        backend: None picks by device; "triton" or "eager" by name.
        block_table: int32 `[batch, max_pages]`: key n of sequence b lies in slot `n % page_size` of page
            `block_table[b, n // page_size]`, and `max_len` is `max_pages * page_size`. Where keys lie does not change a
            bit. What entries hold that no key below `lengths[b]` needs does not matter. Default: no pages.
        k_scale, v_scale: float32, positive, of a float8 cache: the value of a slot is `stored * scale`, rounded to the
            dtype of q. Broadcastable to `[batch, kv_heads]`, or one a slot, in the shape of the cache without head_dim.
            In-flight rows that may enter the cache (`pattern.kept_len`) are seen with the values that it will hold.
        out: where the results go, of the shape, dtype and device of what is returned, any strides; it shares no memory
            with the other operands. It is returned. Default: new memory.

    Returns:
        `[batch, heads, q_len, head_dim_v]` in the dtype of q; a row that sees no key is 0 with lse = -inf
        (its head's sink, with sinks). Of a ragged batch `[rows, heads, head_dim_v]`, and lse `[rows, heads]`.

    Raises:
        TypeError: a non-tensor, or mixed dtypes. ValueError: shapes, devices, lengths, backend, or on the CPU the
            entries of a table or the rows of a ragged batch do not fit; a head_dim above 512, which the kernels have no
            tiles for.

    Twin: `tidar_kernels.eager.step_attention`. Kernel: `triton_kernels.py` beside this file.
    """
    given = q, k, v
    if isinstance(pattern, PatternBatch):
        q, k, v = checks.ragged(q=q, k=k, v=v)
        checks.operands(4, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
        checks.requests(*given, pattern)
    else:
        checks.operands(4, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
        checks.attention_operands(q, k, v, pattern, head_dim_v=v.shape[3])
    batch, num_kv_heads, _, head_dim = k.shape
    if isinstance(pattern, PatternBatch):
        batch = len(pattern)
    max_len = checks.caches(
        *(k_cache, v_cache, batch, num_kv_heads, head_dim, block_table, k_scale, v_scale), head_dim_v=v.shape[3]
    )
    if max_context is None:
        max_context = max_len
    else:
        if type(max_context) is not int:
            check_int("max_context", max_context, 0)
        if not 0 <= max_context <= max_len:
            raise ValueError(f"max_context: expected 0 <= max_context <= max_len = {max_len}, got {max_context}")
    lengths = checks.lengths(lengths, batch, q.device, max_context, "max_context")
    if block_table is not None:
        checks.entries(block_table, k_cache, torch.zeros_like(lengths), lengths)
    scores = Scores(checks.scale(scale, head_dim), checks.softcap(softcap), checks.sinks(sinks, q))
    check_backend(backend, q.device)
    if out is not None:
        checks.into(
            out, (*given[0].shape[:-1], v.shape[3]), *given, k_cache, v_cache, *([] if sinks is None else [sinks])
        )
    if backend == "eager":
        return reference.step_attention(
            *(*given, k_cache, v_cache, lengths, pattern, scale),
            softcap=softcap,
            sinks=sinks,
            return_lse=return_lse,
            block_table=block_table,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
        )
    cached, keys = Cached(k_cache, v_cache, lengths, max_context, block_table, k_scale, v_scale), Keys(k, v)
    if k_scale is not None:
        if isinstance(pattern, PatternBatch):
            keys = _as_kept(keys, cached, pattern)
        else:
            cached = cached._replace(kept_len=pattern.kept_len)
    rows = rows_of(q, pattern)
    if out is None:
        out, lse = operator(rows, keys, cached, scores)
        if isinstance(pattern, PatternBatch):
            out = out[0].transpose(0, 1)
    else:
        into = out.transpose(0, 1).unsqueeze(0) if isinstance(pattern, PatternBatch) else out
        lse = into_operator(rows._replace(into=into), keys, cached, scores)
    if isinstance(pattern, PatternBatch):
        lse = lse[0].transpose(0, 1)
    return (out, lse) if return_lse else out


def rows_of(q: Tensor, pattern: Pattern | PatternBatch) -> Rows:
    """Query rows as the operator takes them: `[batch, heads, q_len, head_dim]`, of a ragged batch with a batch of 1."""
    if isinstance(pattern, Pattern):
        return Rows(q, *pattern.rows_on(q.device))
    table, most = pattern.table, max(one.q_len for one in pattern.patterns)
    return Rows(
        *(q, table.lead, table.own, table.reach, table.tree_mask),
        *(pattern.cu_rows.contiguous(), pattern.kinds.contiguous(), table.offsets),
        max_rows=min(most, pattern.num_rows),
    )


def _as_kept(keys: Keys, cached: Cached, batch: PatternBatch) -> Keys:
    """The keys in flight of a ragged batch as they are seen: those that enter a float8 cache as it will hold them."""
    if not len(batch):
        return keys
    request, token = batch.rows_of()
    somebodys = request < len(batch)
    request = torch.where(somebodys, request, 0)
    return as_kept_rows(keys, cached, request, somebodys & (token < batch.kept[request]))


def _cpu_into(rows: Rows, keys: Keys, cached: Cached, scores: Scores) -> Tensor:
    out, lse = cpu.step_attention(rows, keys, cached, scores)
    results_of(rows, keys.v.shape[3]).copy_(out)
    return lse


def _kernel_into() -> Callable[..., Tensor]:
    launch = _kernel()
    return lambda *bundles: launch(*bundles)[1]


def _kernel() -> Callable[..., Any]:
    from .triton import step_attention as launch

    return launch


def _fake(rows: Rows, keys: Keys, cached: Cached, scores: Scores) -> tuple[Tensor, Tensor]:
    q = rows.q
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return results_of(rows, keys.v.shape[3]), lse


_SCHEMA = (
    "step_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor lengths, "
    "Tensor lead, Tensor own, float scale, int max_context, "
    "Tensor? reach=None, float? softcap=None, Tensor? sinks=None, Tensor? tree_mask=None, "
    "Tensor? block_table=None, Tensor? k_scale=None, Tensor? v_scale=None, int kept_len=0, "
    "Tensor? cu_rows=None, Tensor? kinds=None, Tensor? offsets=None, int max_rows=0) -> (Tensor, Tensor)"
)
operator = Operator(
    _SCHEMA,
    Rows,
    Keys,
    Cached,
    Scores,
    cpu=cpu.step_attention,
    kernel=_kernel,
    fake=_fake,
    gradient=no_gradient(
        "step_attention: expected no backward pass through a step against a cache, got one; "
        'tk.attention is differentiable, and so is backend="eager"'
    ),
)
# Results that the caller has room for: what an operator writes is part of its schema.
into_operator = Operator(
    _SCHEMA.replace("(", "_into(Tensor(a!) into, ", 1).replace("-> (Tensor, Tensor)", "-> Tensor"),
    Rows,
    Keys,
    Cached,
    Scores,
    cpu=_cpu_into,
    kernel=_kernel_into,
    fake=lambda *bundles: _fake(*bundles)[1],
)
