"""Argument checks shared by the public operators: every error names the argument, what was expected and what came."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..patterns import Pattern, PatternBatch
from ..patterns.arguments import FLOAT_DTYPES

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)  # of quantised caches
_CACHES = ("k_cache", "v_cache")


def strided(name: str, value: Any) -> None:
    """`value` is a tensor, and an ordinary, strided one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {'a nested one' if value.is_nested else value.layout}")


def written(**values: Tensor) -> None:
    """Every tensor can be written in place, each element of it into memory of its own."""
    for name, value in values.items():
        if not value.is_contiguous() and _shares_places(value):
            raise ValueError(
                f"{name}: expected elements with a place each, got shape {list(value.shape)} with strides "
                f"{list(value.stride())}"
            )
        if torch.compiler.is_compiling():
            continue
        if value.is_neg():
            raise ValueError(f"{name}: expected a tensor that can be written, got a view with the negative bit")
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name}: expected an ordinary tensor outside of inference mode, got one made in it")


def _shares_places(value: Tensor) -> bool:
    """Whether elements may lie in one place: the step of a dimension is shorter than what all smaller steps span.

    Interleaved dimensions whose elements miss each other (steps 2 and 3) count as sharing; nobody lays out a cache so.
    """
    dimensions = list(zip(value.stride(), value.shape, strict=True))
    if torch.compiler.is_compiling():  # symbols cannot be sorted
        return any(step == 0 and size > 1 for step, size in dimensions)
    span = 1
    for step, size in sorted(dimensions):
        if size > 1:
            if step < span:
                return True
            span += step * (size - 1)
    return False


def tensor(name: str, value: Any, rank: int) -> None:
    """`value` is a strided tensor of this rank."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout is not torch.strided:
        strided(name, value)
    if value.ndim != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {list(value.shape)}")


def last_dim(name: str, value: Any, size: int) -> None:
    """`value` is a float tensor `[.., size]`."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout is not torch.strided:
        strided(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a float dtype, got {value.dtype}")
    if value.ndim < 1 or value.shape[-1] != size:
        raise ValueError(f"{name}: expected shape [.., {size}], got {list(value.shape)}")


def shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    """`value` has exactly this shape."""
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(value.shape)}")


def same_kind(reference: Tensor, **others: Tensor) -> None:
    """Every tensor has the float dtype and the device of `reference` (which is called q or k_cache in errors).

    The dtype of a float8 cache is left to `caches`.
    """
    _same_kind(reference, others)


def _same_kind(reference: Tensor, others: dict[str, Tensor]) -> None:
    dtype, device = reference.dtype, reference.device
    if dtype in FLOAT8_DTYPES and reference is others.get("k_cache"):
        dtype = next((value.dtype for name, value in others.items() if name not in _CACHES), torch.float32)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, float16, bfloat16 or float64, got {dtype}")
    for name, value in others.items():
        if value.dtype is not dtype and not (name in _CACHES and value.dtype in FLOAT8_DTYPES):
            raise TypeError(f"{name}: expected dtype {dtype} like the other operands, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name}: expected device {device} like the other operands, got {value.device}")


def ragged(**values: Tensor) -> list[Tensor]:
    """Ragged rows `[rows, heads, d]` as the operators take them, `[1, heads, rows, d]`: views."""
    for name, value in values.items():
        tensor(name, value, 3)
    return [value.transpose(0, 1).unsqueeze(0) for value in values.values()]


def operands(rank: int, **values: Any) -> None:
    """Every value is a tensor of this rank, and all are of one kind: the float dtype and device of the first."""
    strided = torch.strided
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.layout is not strided or value.ndim != rank or value.is_nested:
            tensor(name, value, rank)
    _same_kind(next(iter(values.values())), values)


def heads(q: Tensor, num_kv_heads: int) -> None:
    """Query heads are a multiple of key/value heads; there is at least one, and it has a dimension."""
    num_heads, head_dim = q.shape[1], q.shape[-1]
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"q: expected a multiple of {num_kv_heads} kv_heads in dimension 1, got {num_heads} heads")
    if head_dim < 1:
        raise ValueError(f"q: expected a head_dim of at least 1, got shape {list(q.shape)}")


def rotary(value: Any) -> tuple[Tensor, Tensor]:
    """`value` is a pair of tensors, `(cos, sin)`."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        got = [type(x).__name__ for x in value] if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"rotary: expected a pair of tensors (cos, sin), got {got}")
    return value[0], value[1]


def scale(value: float | None, head_dim: int) -> float:
    """The softmax scale, 1/sqrt(head_dim) by default."""
    return 1.0 / math.sqrt(head_dim) if value is None else _positive("scale", value, "a float")


def softcap(value: float | None) -> float | None:
    """The cap of the logits: None, or positive."""
    return None if value is None else _positive("softcap", value, "a float or None")


def _positive(name: str, value: Any, expected: str) -> float:
    """`value` as a float, if it is positive, and finite in float32 together with what kernels multiply it by."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"{name}: expected a number in [1e-30, 1e30], got {value}")
    return float(value)


def sinks(value: Any, q: Tensor) -> Tensor | None:
    """`value` is None, or a float tensor `[heads]` on the device of q, of whatever float dtype."""
    if value is None:
        return None
    tensor("sinks", value, 1)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"sinks: expected dtype float32, float16, bfloat16 or float64, got {value.dtype}")
    shape("sinks", value, (q.shape[1],))
    if value.device != q.device:
        raise ValueError(f"sinks: expected device {q.device} like the other operands, got {value.device}")
    return value


def attention_operands(
    q: Tensor, k: Tensor, v: Tensor, pattern: Any, num_keys: int | None = None, *, head_dim_v: int | None = None
) -> None:
    """q, k and v, 4-D tensors of one kind, fit each other and the pattern.

    Args:
        num_keys: where k and v have not all the pattern's keys. head_dim_v: of v; default that of k.
    """
    batch, num_heads, q_len, head_dim = q.shape
    of_keys = k.shape
    num_kv_heads = of_keys[1]
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads or head_dim < 1:
        heads(q, num_kv_heads)
    if of_keys[0] != batch or of_keys[3] != head_dim:
        shape("k", k, (batch, num_kv_heads, of_keys[2], head_dim))
    of_values = of_keys if head_dim_v is None else (*of_keys[:3], head_dim_v)
    if v.shape != of_values:
        shape("v", v, tuple(of_values))
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern: expected a tidar_kernels.Pattern, got {type(pattern).__name__}")
    if q_len != pattern.q_len:
        raise ValueError(f"q: expected {pattern.q_len} rows for {pattern.name}, got {q_len}")
    expected = pattern.kv_len if num_keys is None else num_keys
    if of_keys[2] != expected:
        raise ValueError(f"k: expected {expected} in-flight keys for {pattern.name}, got {of_keys[2]}")


def requests(q: Tensor, k: Tensor, v: Tensor, batch: PatternBatch) -> None:
    """q, k and v, 3-D tensors, fit each other and the ragged batch; on the CPU its rows fit its patterns too."""
    heads(q, k.shape[1])
    shape("k", k, (len(q), k.shape[1], q.shape[2]))
    shape("v", v, (*k.shape[:2], v.shape[2]))
    if len(q) != batch.num_rows:
        raise ValueError(f"q: expected {batch.num_rows} rows for the batch of {len(batch)} requests, got {len(q)}")
    if batch.device != q.device:
        raise ValueError(f"pattern: expected device {q.device} like the other operands, got {batch.device}")
    if not readable(batch.cu_rows):
        return
    ends, kinds, known = batch.cu_rows.tolist(), batch.kinds.tolist(), len(batch.patterns)
    if ends[0] != 0 or ends[-1] > len(q) or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"cu_rows: expected to ascend from 0 to at most the number of rows = {len(q)}, got {ends}")
    for request, (kind, first, end) in enumerate(zip(kinds, ends, ends[1:], strict=False)):
        if first < end and not 0 <= kind < known:
            raise ValueError(f"kinds: expected a pattern 0 <= kind < {known}, got {kind} in request {request}")
        if first < end and end - first > batch.patterns[kind].q_len:
            raise ValueError(
                f"cu_rows: expected at most the {batch.patterns[kind].q_len} rows of {batch.patterns[kind].name} in "
                f"request {request}, got {end - first}"
            )


def caches(
    k_cache: Tensor,
    v_cache: Tensor,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    block_table: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    *,
    head_dim_v: int | None = None,
) -> int:
    """Both caches are `[batch, num_kv_heads, max_len, head_dim]`, or pages with a table, and float8 ones have scales.

    Args:
        head_dim_v: of v_cache; default `head_dim`.

    Returns:
        The capacity: `max_len`, or `max_pages * page_size`.
    """
    first, slots = batch, k_cache.shape[2]
    capacity = slots
    if block_table is not None:
        _block_table(block_table, k_cache, batch)
        first, capacity = k_cache.shape[0], slots * block_table.shape[1]
    expected = (first, num_kv_heads, slots, head_dim)
    if k_cache.shape != expected:
        shape("k_cache", k_cache, expected)
    if head_dim_v is not None:
        expected = (first, num_kv_heads, slots, head_dim_v)
    if v_cache.shape != expected:
        shape("v_cache", v_cache, expected)
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"v_cache: expected dtype {k_cache.dtype} like k_cache, got {v_cache.dtype}")
    if k_cache.dtype in FLOAT8_DTYPES or k_scale is not None or v_scale is not None:
        if k_cache.dtype not in FLOAT8_DTYPES:
            name = "k_scale" if k_scale is not None else "v_scale"
            raise TypeError(f"k_cache: expected dtype float8_e4m3fn or float8_e5m2 with {name}, got {k_cache.dtype}")
        _scale("k_scale", k_scale, k_cache, batch)
        _scale("v_scale", v_scale, v_cache, batch)
        if (k_scale.ndim == 3) != (v_scale.ndim == 3):
            raise ValueError(
                f"v_scale: expected a scale by slot exactly if k_scale is one, got shapes {list(k_scale.shape)} "
                f"and {list(v_scale.shape)}"
            )
    return capacity


def into(value: Any, expected: tuple[int, ...], *operands: Tensor) -> None:
    """`value`, which results are written to, is of this shape and of the kind of the first operand; no gradient."""
    like = operands[0]
    tensor("out", value, len(expected))
    shape("out", value, expected)
    if value.dtype != like.dtype:
        raise TypeError(f"out: expected dtype {like.dtype} like q, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"out: expected device {like.device} like the other operands, got {value.device}")
    written(out=value)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (value, *operands)):
        raise ValueError("out: expected no gradient through a write, got a tensor that requires one")


def _block_table(value: Any, k_cache: Tensor, batch: int) -> None:
    """`value` is an int32 tensor `[batch, max_pages]` on the device of pages that have slots."""
    tensor("block_table", value, 2)
    if value.dtype != torch.int32:
        raise TypeError(f"block_table: expected dtype int32, got {value.dtype}")
    if len(value) != batch:
        shape("block_table", value, (batch, value.shape[1]))
    if value.device != k_cache.device:
        raise ValueError(f"block_table: expected device {k_cache.device} like the other operands, got {value.device}")
    if k_cache.shape[0] < 1 or k_cache.shape[2] < 1:
        raise ValueError(
            f"k_cache: expected at least one page (dimension 0) and a page size of at least 1 (dimension 2), got shape "
            f"{list(k_cache.shape)}"
        )


def _scale(name: str, value: Any, cache: Tensor, batch: int) -> None:
    """`value` is the scale of a float8 cache: float32, there, broadcastable to `[batch, kv_heads]` or by slot."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor with a {name[0]}_cache of {cache.dtype}, got {type(value).__name__}"
        )
    if value.dtype != torch.float32:
        raise TypeError(f"{name}: expected dtype float32, got {value.dtype}")
    if value.device != cache.device:
        raise ValueError(f"{name}: expected device {cache.device} like the other operands, got {value.device}")
    by_request = (batch, cache.shape[1])
    by_slot = tuple(cache.shape[:3])
    broadcasts = value.ndim <= 2 and all(
        size in (1, full) for size, full in zip(reversed(value.shape), reversed(by_request), strict=False)
    )
    if not broadcasts and tuple(value.shape) != by_slot:
        raise ValueError(
            f"{name}: expected a shape broadcastable to {list(by_request)}, or {list(by_slot)}, got {list(value.shape)}"
        )


def entries(block_table: Tensor | None, k_cache: Tensor, first: Tensor, end: Tensor) -> None:
    """On the CPU, where reading is free: the table's entries for slots `[first[b], end[b])` name pages of the cache.

    What the other entries hold is nobody's business: they are not looked at.
    """
    if block_table is None or not readable(block_table):
        return
    num_pages, page_size = k_cache.shape[0], k_cache.shape[2]
    start = torch.arange(block_table.shape[1], device="cpu") * page_size
    needed = (start < end[:, None]) & (start + page_size > first[:, None]) & (first < end)[:, None]
    wrong = (needed & ((block_table < 0) | (block_table >= num_pages))).nonzero()
    if len(wrong):
        sequence, entry = wrong[0].tolist()
        raise ValueError(
            f"block_table: expected pages 0 <= page < {num_pages} where slots are used, got "
            f"{int(block_table[sequence, entry])} in entry {entry} of sequence {sequence}"
        )


def lengths(
    value: Any, batch: int, device: torch.device, limit: int, what: str, new: tuple[int, ...] | None = None
) -> Tensor:
    """`value` is an integer tensor `[batch]`; on the CPU, where reading it is free, in `[0, limit]` too.

    `new`: tokens that each sequence needs room for besides.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.ndim != 1:
        tensor("lengths", value, 1)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths: expected dtype int32 or int64, got {value.dtype}")
    if value.shape[0] != batch:
        shape("lengths", value, (batch,))
    if value.device != device:
        raise ValueError(f"lengths: expected device {device} like the other operands, got {value.device}")
    if readable(value):
        for sequence, length in enumerate(value.tolist()):
            room = limit - (new[sequence] if new else 0)
            if not 0 <= length <= room:
                what = f"{what} - {new[sequence]} new tokens" if new else what
                raise ValueError(
                    f"lengths: expected 0 <= length <= {what} = {room}, got {length} in sequence {sequence}"
                )
    return value if value.is_contiguous() else value.contiguous()


def cu_rows(value: Any, batch: int, rows: int, device: torch.device) -> None:
    """`value` is an int32 tensor `[batch + 1]`; on the CPU it ascends from 0 to the number of rows too."""
    tensor("cu_rows", value, 1)
    if value.dtype != torch.int32:
        raise TypeError(f"cu_rows: expected dtype int32, got {value.dtype}")
    shape("cu_rows", value, (batch + 1,))
    if value.device != device:
        raise ValueError(f"cu_rows: expected device {device} like the other operands, got {value.device}")
    if readable(value):
        ends = value.tolist()
        if ends[0] != 0 or ends[-1] != rows or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"cu_rows: expected to ascend from 0 to the number of rows = {rows}, got {ends}")


def kept(value: Any, batch: int, device: torch.device) -> None:
    """`value` is an int32 tensor `[batch]`; on the CPU not negative too."""
    tensor("keep", value, 1)
    if value.dtype != torch.int32:
        raise TypeError(f"keep: expected an int, or dtype int32, got {value.dtype}")
    shape("keep", value, (batch,))
    if value.device != device:
        raise ValueError(f"keep: expected device {device} like the other operands, got {value.device}")
    if readable(value) and bool((value < 0).any()):
        raise ValueError(f"keep: expected >= 0 rows, got {value.tolist()}")


def readable(value: Tensor) -> bool:
    """Whether the host reads the values of a tensor without waiting for anything, and outside of a graph."""
    return (
        value.device.type == "cpu"
        and type(value) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def path(value: Any, lengths: Tensor, device: torch.device, max_len: int) -> None:
    """`value` is an integer tensor `[batch, n]`; on the CPU also cached nodes in ascending order, then -1."""
    tensor("path", value, 2)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"path: expected dtype int32 or int64, got {value.dtype}")
    nodes_max = 1024  # what a program of the kernel holds
    if len(value) != len(lengths) or value.shape[1] > nodes_max:
        raise ValueError(f"path: expected shape [{len(lengths)}, n <= {nodes_max}], got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"path: expected device {device} like the other operands, got {value.device}")
    if readable(value):
        for sequence, (nodes, length) in enumerate(zip(value.tolist(), lengths.tolist(), strict=True)):
            count = nodes.index(-1) if -1 in nodes else len(nodes)
            ascending = [-1, *nodes[:count]]
            if any(a >= b for a, b in itertools.pairwise(ascending)) or any(node != -1 for node in nodes[count:]):
                raise ValueError(f"path: expected ascending nodes, then -1, got {nodes} in sequence {sequence}")
            if count and length + nodes[count - 1] >= max_len:
                raise ValueError(
                    f"path: expected nodes below max_len - length = {max_len - length}, got {nodes[count - 1]} "
                    f"in sequence {sequence}"
                )
