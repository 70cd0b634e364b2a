"""Operators that write into the cache: `append_kv`, `compact_kv`, `rotary_append`. None of them commits anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...patterns.arguments import check_int
from .. import checks
from ..declaration import Backend, Operator, check_backend
from ..operands import Cached, Keys
from . import cpu, reference
from .operands import Turned, Written

__all__ = ["append_kv", "compact_kv", "rotary_append"]


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cu_rows: Tensor | None = None,
    keep: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Write new keys and values after the committed ones, in place; commits nothing.

    Token j of sequence b lands in slot `lengths[b] + j`, bit for bit, or in a float8 cache as `x / scale`, rounded to
    nearest, ties to even, and saturated. Every other slot keeps its bits. On CUDA, where `lengths` is not read by the
    host, slots outside `[0, max_len)` are dropped by the kernel, and so are those whose entry of the table names no
    page; `KVCache` raises first. No gradient flows through a cache.

    Args:
        k_cache, v_cache: `[batch, kv_heads, max_len, head_dim]`, any float dtype, any strides; written in place. With a
            block table `[num_pages, kv_heads, page_size, head_dim]`, any strides: K and V may be halves of one tensor.
        k, v: `[batch, kv_heads, n, head_dim]`, same dtype and device; v and v_cache may have a head_dim of their own.
            They share no memory with other slots of the caches: what is written first could be read again.
        lengths: int32 or int64 `[batch]`, on the same device.
        block_table: int32 `[batch, max_pages]`: slot n of sequence b is slot `n % page_size` of page
            `block_table[b, n // page_size]`. Entries that no new token needs are not read.
        k_scale, v_scale: float32, for caches of float8_e4m3fn or float8_e5m2 and for no others: value = stored * scale.
            Broadcastable to `[batch, kv_heads]`, and read; or by slot, `[num_pages, kv_heads, page_size]`, and written:
            that of a token and head makes its largest value the largest of the dtype.
        cu_rows: int32 `[batch + 1]`, for ragged rows: k, v are `[rows, kv_heads, head_dim]`, and those of sequence b
            are `[cu_rows[b], cu_rows[b + 1])`. Rows past the last entry are nobody's.
        keep: int32 `[batch]`, the leading rows of each sequence to write; default all.
        backend: None picks by device; "triton" or "eager" by name.

    Raises:
        TypeError: a non-tensor, or mixed dtypes. ValueError: shapes, devices or lengths do not fit, or an operand asks
            for a gradient (`backend="eager"` has one); on the CPU also `lengths[b] + n > max_len`, and an entry that is
            needed and names no page. Nothing is written then.

    Twin: `tidar_kernels.eager.append_kv`. Kernel: `triton.py` beside this file.
    """
    if cu_rows is not None:
        k, v = _ragged(cu_rows, k=k, v=v)
    checks.operands(4, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    checks.written(k_cache=k_cache, v_cache=v_cache)
    batch = _batch(k_cache, k, lengths, block_table, cu_rows)
    (_, num_kv_heads, _, head_dim), head_dim_v, (of_rows, _, num_new, _) = k_cache.shape, v_cache.shape[3], k.shape
    capacity = checks.caches(
        k_cache, v_cache, batch, num_kv_heads, head_dim, block_table, k_scale, v_scale, head_dim_v=head_dim_v
    )
    of_rows = batch if cu_rows is None else of_rows
    checks.shape("k", k, (of_rows, num_kv_heads, num_new, head_dim))
    checks.shape("v", v, (of_rows, num_kv_heads, num_new, head_dim_v))
    written = Written(cu_rows, keep)
    cached = Cached(k_cache, v_cache, lengths, 0, block_table, k_scale, v_scale)
    cached, written = _checked_target(cached, written, num_new, num_new, capacity)
    check_backend(backend, k_cache.device)
    if backend == "eager":
        reference.append_kv(k_cache, v_cache, k, v, cached.lengths, block_table, k_scale, v_scale, *written)
        return
    _check_no_gradients(k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    operator = scaling_append_operator if _by_slot(k_scale) else append_operator
    operator(cached, Keys(k, v), written)


def compact_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    path: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Move an accepted path of a token tree together, in place: slot `lengths[b] + i` gets that of node `path[b, i]`.

    A step over a tree (`tidar_kernels.patterns.tree`) writes the K/V of node j into slot `lengths[b] + j`. After the
    move those of the path are the first ones there, bit for bit, so that they are committed by length. Every other slot
    keeps its bits. On CUDA, where the host reads neither `lengths` nor `path`, slots outside `[0, max_len)`, and those
    whose entry of the table names no page, are left out.

    Args:
        k_cache, v_cache: `[batch, kv_heads, max_len, head_dim]`, any float dtype, any strides; written in place. With a
            block table `[num_pages, kv_heads, page_size, head_dim]`.
        lengths: int32 or int64 `[batch]`, on the same device.
        path: int32 or int64 `[batch, n]`, n <= 1024, on the same device: nodes in ascending order, then -1.
        block_table: int32 `[batch, max_pages]`, as in `append_kv`.
        k_scale, v_scale: of float8 caches, as in `append_kv`; by slot they move with their slots.
        backend: None picks by device; "triton" or "eager" by name.

    Raises:
        TypeError: a non-tensor, or a dtype. ValueError: shapes, devices or lengths do not fit, or a cache asks for a
            gradient (`backend="eager"` has one); on the CPU also a path that does not ascend, or leaves the cache, and
            an entry that is needed and names no page. Nothing is written then.

    Twin: `tidar_kernels.eager.compact_kv`. Kernel: `triton.py` beside this file.
    """
    checks.operands(4, k_cache=k_cache, v_cache=v_cache)
    checks.written(k_cache=k_cache, v_cache=v_cache)
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    batch = _batch(k_cache, k_cache, lengths, block_table, block_table)
    capacity = checks.caches(
        k_cache, v_cache, batch, num_kv_heads, head_dim, block_table, k_scale, v_scale, head_dim_v=v_cache.shape[3]
    )
    what = "max_len" if block_table is None else "max_pages * page_size"
    lengths = checks.lengths(lengths, batch, k_cache.device, capacity, what)
    checks.path(path, lengths, k_cache.device, capacity)
    if block_table is not None and checks.readable(path):
        nodes = path.amax(1) + 1 if path.shape[1] else torch.zeros_like(lengths)
        checks.entries(block_table, k_cache, lengths, lengths + nodes)
    check_backend(backend, k_cache.device)
    if backend == "eager":
        reference.compact_kv(k_cache, v_cache, lengths, path, block_table, k_scale, v_scale)
        return
    _check_no_gradients(k_cache=k_cache, v_cache=v_cache)
    cached = Cached(k_cache, v_cache, lengths, 0, block_table, k_scale, v_scale)
    operator = scaling_compact_operator if _by_slot(k_scale) else compact_operator
    operator(cached, path=path)


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    keep: int | Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cu_rows: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k, and write the first `keep` rows' k and v after the committed ones; commits nothing.

    What a layer of a decode step does before its attention, in one launch. v goes into the cache as by `append_kv`; k
    as the rotated k that is returned would. It has no gradient: a backward pass through it is a RuntimeError;
    `backend="eager"` has one.

    Args:
        q: `[batch, heads, rows, head_dim]`, any float dtype, any strides, as for all operands.
        k, v: `[batch, kv_heads, rows, head_dim]`, as in `append_kv`; v and v_cache may have a head_dim of their own.
        rotary: `(cos, sin)` from `RotaryEmbedding`: `[batch, rows, 1, head_dim]`, or without the batch.
        k_cache, v_cache: `[batch, kv_heads, max_len, head_dim]`; written in place. With a block table
            `[num_pages, kv_heads, page_size, head_dim]`.
        lengths: int32 or int64 `[batch]`, on the same device.
        keep: rows to write, 0 .. rows; or those of each sequence, int32 `[batch]` on the same device.
        block_table, k_scale, v_scale: as in `append_kv`.
        cu_rows: int32 `[batch + 1]`, for ragged rows: q is `[rows, heads, head_dim]`, k and v likewise, cos and sin
            `[rows, 1, head_dim]`, and those of sequence b are `[cu_rows[b], cu_rows[b + 1])`.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        `(rotated q, rotated k)`, in the shape and layout of q and k.

    Raises:
        TypeError: a non-tensor, or mixed dtypes. ValueError: shapes, devices, `keep` or lengths do not fit, or a cache
            asks for a gradient; on the CPU also `lengths[b] + keep > max_len`, and an entry that is needed and names no
            page. Nothing is written then.

    Twin: `tidar_kernels.eager.rotary_append`. Kernel: `triton.py` beside this file.
    """
    if cu_rows is not None:
        q, k, v = _ragged(cu_rows, q=q, k=k, v=v)
    cos, sin = (x if x.ndim == 4 else x.unsqueeze(0) for x in checks.rotary(rotary))
    checks.operands(4, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, cos=cos, sin=sin)
    checks.written(k_cache=k_cache, v_cache=v_cache)
    of_rows, num_kv_heads, rows, head_dim = q.shape[0], k.shape[1], q.shape[2], q.shape[3]
    if head_dim % 2:
        raise ValueError(f"q: expected an even head_dim for rotary positions, got {head_dim}")
    checks.heads(q, num_kv_heads)
    checks.shape("k", k, (of_rows, num_kv_heads, rows, head_dim))
    checks.shape("v", v, (of_rows, num_kv_heads, rows, v_cache.shape[3]))
    checks.shape("cos", cos, (1 if cos.shape[0] == 1 else of_rows, rows, 1, head_dim))
    checks.shape("sin", sin, (1 if sin.shape[0] == 1 else of_rows, rows, 1, head_dim))
    batch = of_rows if cu_rows is None else _batch(k_cache, k, lengths, block_table, cu_rows)
    capacity = checks.caches(
        k_cache, v_cache, batch, num_kv_heads, head_dim, block_table, k_scale, v_scale, head_dim_v=v_cache.shape[3]
    )
    most = rows if isinstance(keep, Tensor) else keep
    if type(most) is not int:
        check_int("keep", most, 0)
    if not 0 <= most <= rows:
        raise ValueError(f"keep: expected 0 <= keep <= {rows} rows, got {keep}")
    written = Written(cu_rows, keep if isinstance(keep, Tensor) else None)
    cached = Cached(k_cache, v_cache, lengths, 0, block_table, k_scale, v_scale)
    cached, written = _checked_target(cached, written, rows, most, capacity)
    check_backend(backend, q.device)
    cos, sin = cos.squeeze(2), sin.squeeze(2)
    if backend == "eager":
        turned = reference.rotary_append(
            q, k, v, cos, sin, k_cache, v_cache, cached.lengths, most, block_table, k_scale, v_scale, *written
        )
    else:
        _check_no_gradients(k_cache=k_cache, v_cache=v_cache)
        operator = scaling_rotary_operator if _by_slot(k_scale) else rotary_operator
        bundles = Turned(q, cos, sin), Keys(k, v), cached, written
        if not torch.is_grad_enabled():
            turned = operator(*bundles, keep=most)
        else:
            with torch.no_grad():  # or the CPU path would make the cache part of the graph
                turned = operator(*bundles, keep=most)
            if q.requires_grad or k.requires_grad:
                turned = _WithoutGradient.apply(*turned, q, k)
    return turned if cu_rows is None else (turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1))


def _ragged(cu_rows: Any, **values: Tensor) -> list[Tensor]:
    """Ragged rows `[rows, heads, d]` as the operators take them, beside a table of where those of a sequence begin."""
    checks.tensor("cu_rows", cu_rows, 1)
    return checks.ragged(**values)


def _batch(k_cache: Tensor, k: Tensor, lengths: Any, block_table: Any, ragged: Any) -> int:
    """The number of sequences that the operands are held to: that of the cache, of k, or of the lengths."""
    if block_table is None:
        return k_cache.shape[0]
    if ragged is None:
        return k.shape[0]
    checks.tensor("lengths", lengths, 1)
    return len(lengths)


def _checked_target(cached: Cached, written: Written, rows: int, keep: int, capacity: int) -> tuple[Cached, Written]:
    """Both, if the lengths leave room for the first `keep` of the rows and the entries that these need name pages; with
    tensors of one dimension as the kernels read them."""
    k_cache, lengths, block_table = cached.k_cache, cached.lengths, cached.block_table
    batch = k_cache.shape[0] if block_table is None else len(block_table)
    what = "max_len" if block_table is None else "max_pages * page_size"
    if written.cu_rows is None and written.kept is None:
        lengths = checks.lengths(lengths, batch, k_cache.device, capacity - keep, f"{what} - {keep} new tokens")
        new: Tensor | int = keep
    else:
        if written.cu_rows is not None:
            checks.cu_rows(written.cu_rows, batch, rows, k_cache.device)
        if written.kept is not None:
            checks.kept(written.kept, batch, k_cache.device)
        checks.tensor("lengths", lengths, 1)
        counts: tuple[int, ...] | None = None
        new = 0
        if checks.readable(lengths):
            new = torch.full((batch,), rows, device="cpu") if written.cu_rows is None else written.cu_rows.diff()
            new = new.clamp(max=keep) if written.kept is None else torch.minimum(new, written.kept).clamp(max=keep)
            counts = tuple(new.tolist())
        lengths = checks.lengths(lengths, batch, k_cache.device, capacity, what, counts)
        written = Written(*(None if x is None else x.contiguous() for x in written))
    if block_table is not None and checks.readable(block_table):
        checks.entries(block_table, k_cache, lengths, lengths + new)
    return cached if lengths is cached.lengths else cached._replace(lengths=lengths), written


def _check_no_gradients(**operands: Tensor) -> None:
    """Raise if what is written would need a gradient: `torch.library` takes none of an operator that writes."""
    if torch.is_grad_enabled():
        for name, value in operands.items():
            if value.requires_grad:
                raise ValueError(
                    f"{name}: expected no gradient through a write into a cache, got a tensor that requires one; call "
                    'it under torch.no_grad(), or with backend="eager"'
                )


def _by_slot(k_scale: Tensor | None) -> bool:
    """Whether there are scales by slot, which are written too. The others are only read, and may be expanded."""
    return k_scale is not None and k_scale.ndim == 3


class _WithoutGradient(torch.autograd.Function):
    """Results of `rotary_append` under autograd: `torch.library` takes no gradient of an operator that writes."""

    @staticmethod
    def forward(ctx: Any, turned_q: Tensor, turned_k: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return turned_q.view_as(turned_q), turned_k.view_as(turned_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "rotary_append: expected no backward pass through a write into a cache, got one; "
            'apply_rotary is differentiable, and so is backend="eager"'
        )


def _kernels() -> Any:
    from . import triton

    return triton


def _append_cpu(cached: Cached, keys: Keys, written: Written) -> None:
    if cpu.fits(cached, written, keys.k.shape[2]):
        cpu.append_kv(cached, keys)
        return
    k_cache, v_cache, lengths, _, block_table, k_scale, v_scale, _ = cached
    reference.append_kv(k_cache, v_cache, *keys, lengths, block_table, k_scale, v_scale, *written)


def _rotary_cpu(turned: Turned, keys: Keys, cached: Cached, written: Written, keep: int) -> tuple[Tensor, Tensor]:
    if cpu.fits(cached, written, keep):
        return cpu.rotary_append(turned, keys, cached, keep)
    (q, cos, sin), (k_cache, v_cache, lengths, _, block_table, k_scale, v_scale, _) = turned, cached
    return reference.rotary_append(
        q, *keys, cos, sin, k_cache, v_cache, lengths, keep, block_table, k_scale, v_scale, *written
    )


def _nothing(*bundles: Any, **others: Any) -> None:
    return None


def _rotary_fake(turned: Turned, keys: Keys, cached: Cached, written: Written, keep: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(turned.q), torch.empty_like(keys.k)


def _pair(schema: str, *bundles: Any, **faces: Any) -> tuple[Operator, Operator]:
    """An operator, and the one that writes the scales too: what an operator writes is part of its schema."""
    name, arguments = schema.split("(", 1)
    scaling = arguments.replace("Tensor? k_scale=None", "Tensor(c!)? k_scale=None")
    scaling = scaling.replace("Tensor? v_scale=None", "Tensor(d!)? v_scale=None")
    return Operator(schema, *bundles, **faces), Operator(f"{name}_scaling({scaling}", *bundles, **faces)


append_operator, scaling_append_operator = _pair(
    "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, "
    "Tensor? block_table=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    "Tensor? cu_rows=None, Tensor? kept=None) -> ()",
    Cached,
    Keys,
    Written,
    cpu=_append_cpu,
    kernel=lambda: _kernels().append_kv,
    fake=_nothing,
)
compact_operator, scaling_compact_operator = _pair(
    "compact_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor path, "
    "Tensor? block_table=None, Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    Cached,
    reference=reference.compact_kv,
    kernel=lambda: _kernels().compact_kv,
    fake=_nothing,
)
rotary_operator, scaling_rotary_operator = _pair(
    "rotary_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor lengths, int keep, Tensor? block_table=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    "Tensor? cu_rows=None, Tensor? kept=None) -> (Tensor, Tensor)",
    Turned,
    Keys,
    Cached,
    Written,
    cpu=_rotary_cpu,
    kernel=lambda: _kernels().rotary_append,
    fake=_rotary_fake,
)
