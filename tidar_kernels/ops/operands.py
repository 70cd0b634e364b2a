"""The bundles in which the operands of attention travel: made where arguments are checked, taken apart where used."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Cached", "Keys", "Results", "Rows", "Scores", "results_of"]


class Rows(NamedTuple):
    """The query rows and what of the in-flight keys and of the context each sees (`tidar_kernels.Pattern`).

    Of a ragged batch (`tidar_kernels.patterns.batch`) q has a batch of 1 and the rows of all requests one after
    another, `lead .. tree_mask` are the rows of its patterns one after another (`PatternTable`), and keys in flight lie
    as q does. The rows of request b, which are its keys too, are `[cu_rows[b], cu_rows[b + 1])`: the first ones of
    pattern `kinds[b]`, whose rows begin at `offsets[kinds[b]]`.

    Attributes:
        q: `[batch, heads, q_len, head_dim]`.
        lead, own: int32 `[q_len, 2]`.
        reach: int32 `[q_len]`, or None: all of the context.
        tree_mask: int32 `[q_len, ceil(kv_len / 32)]`, further visible keys (`Pattern.tree_mask`), or None.
        cu_rows, kinds, offsets: int32 `[batch + 1]`, `[batch]` and `[patterns + 1]` of a ragged batch, else None.
        max_rows: of a ragged batch the most rows that a request can have.
        into: where a step's results go, in the shape of its results (`results_of`), any strides; None: new memory.
    """

    q: Tensor
    lead: Tensor
    own: Tensor
    reach: Tensor | None = None
    tree_mask: Tensor | None = None
    cu_rows: Tensor | None = None
    kinds: Tensor | None = None
    offsets: Tensor | None = None
    max_rows: int = 0
    into: Tensor | None = None


class Keys(NamedTuple):
    """Keys and values in flight, `[batch, kv_heads, kv_len, head_dim]`; values of a step may be `[.., head_dim_v]`."""

    k: Tensor
    v: Tensor


class Cached(NamedTuple):
    """Keys and values in the cache (`paging.py` says where a key lies and what its value is).

    Attributes:
        k_cache, v_cache: `[batch, kv_heads, max_len, head_dim]`, or pages `[num_pages, kv_heads, page_size, head_dim]`.
        lengths: int32 or int64 `[batch]`, tokens of context of each sequence.
        max_context: an upper bound of `lengths` that the host knows; an operator that has no use for it leaves it 0.
        block_table: int32 `[batch, max_pages]`, the pages of each sequence in order; None: the cache has no pages.
        k_scale, v_scale: float32, of a float8 cache, else None: value = stored * scale. Broadcastable to
            `[batch, kv_heads]`, or by slot, in the shape of the cache without head_dim.
        kept_len: of the keys in flight the first ones, which enter the cache: beside a float8 cache they are seen with
            the values that it will hold. An operator that has no use for it leaves it 0.
    """

    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    max_context: int = 0
    block_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    kept_len: int = 0

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for: `max_len`, or `max_pages * page_size`."""
        slots = self.k_cache.shape[2]
        return slots if self.block_table is None else slots * self.block_table.shape[1]


class Scores(NamedTuple):
    """What becomes of `q.k` before the softmax.

    Attributes:
        scale: factor of the scores.
        softcap: cap of the logits, `softcap * tanh(scale * q.k / softcap)`, or None.
        sinks: `[heads]`, one more logit in the softmax of every row of a head, or None.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


class Results(NamedTuple):
    """What attention gave, and the gradients that come back.

    Attributes:
        out: `[batch, heads, q_len, head_dim]`.
        lse: `[batch, heads, q_len]`, natural log, float32 at least.
        grad_out: as out.
        grad_lse: as lse; None if lse was not used.
    """

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None = None


def results_of(rows: Rows, head_dim_v: int) -> Tensor:
    """Room for what rows of a step give, `[batch, heads, q_len, head_dim_v]`; of a ragged batch in the order of q's."""
    if rows.into is not None:
        return rows.into
    batch, num_heads, q_len, _ = rows.q.shape
    if rows.cu_rows is None:
        return rows.q.new_empty(batch, num_heads, q_len, head_dim_v)
    return rows.q.new_empty(batch, q_len, num_heads, head_dim_v).transpose(1, 2)
