"""Plain PyTorch twins of every operator: the oracle. No Triton, any float dtype including float64, autograd throughout.

Each is the `reference.py` of its operator's folder under `tidar_kernels.ops`, with the operator's checks of types and
shapes. What the host would have to read (lengths, paths, tables) is not checked: slots outside a cache are dropped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .ops import checks
from .ops.attention import api as attention_api
from .ops.attention import reference as attention_reference
from .ops.kv import reference as kv_reference
from .ops.linear import api as linear_api
from .ops.linear import reference as linear_reference
from .ops.step_attention import api as step_api
from .ops.step_attention import reference as step_reference
from .ops.verify import api as verify_api
from .ops.verify import reference as verify_reference
from .ops.verify.params import Knob, SamplingTensors
from .patterns.arguments import FLOAT_DTYPES, check_int

__all__ = [
    "append_kv",
    "attention",
    "compact_kv",
    "gated_lora",
    "rotary_append",
    "row_invariant_linear",
    "sample",
    "shaped_scores",
    "step_attention",
    "verify",
]

_INDICES = (torch.int32, torch.int64)
# Dimensions and dtypes of what is beside the operands that share one float dtype.
_OTHERS: dict[str, tuple[int, tuple[torch.dtype, ...]]] = {
    "lengths": (1, _INDICES),
    "path": (2, _INDICES),
    "cu_rows": (1, (torch.int32,)),
    "kept": (1, (torch.int32,)),
    "positions": (1, _INDICES),
    "seeds": (1, (torch.int64,)),
    "drafts": (2, (torch.int64,)),
    "knobs": (2, FLOAT_DTYPES),
    "history": (3, (torch.bool,)),
}
_OPTIONAL = frozenset({"cu_rows", "kept", "history"})


def _others(device: torch.device, sizes: tuple[int | None, ...] = (), **values: Any) -> None:
    """Values of `_OTHERS`, or None, are tensors of these kinds on the device; their first sizes are these."""
    for name, value in values.items():
        if value is None and name in _OPTIONAL:
            continue
        rank, dtypes = _OTHERS[name]
        checks.tensor(name, value, rank)
        if value.dtype not in dtypes:
            raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name}: expected device {device} like the other operands, got {value.device}")
        expected = [size if wanted is None else wanted for wanted, size in zip(sizes, value.shape, strict=False)]
        checks.shape(name, value, (*expected, *value.shape[len(expected) :]))


def _attention(q: Any, k: Any, v: Any, pattern: Any, scale: Any, softcap: Any, sinks: Any, return_lse: Any) -> None:
    attention_api.checked(q, k, v, pattern, scale, softcap, sinks, "eager")


def _append_kv(
    k_cache: Any, v_cache: Any, k: Any, v: Any, lengths: Any, block_table: Any, k_scale: Any, v_scale: Any,
    cu_rows: Any, kept: Any,
) -> None:  # fmt: skip
    checks.operands(4, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    checks.written(k_cache=k_cache, v_cache=v_cache)
    _others(k_cache.device, lengths=lengths)
    batch = len(lengths)
    _others(k_cache.device, (batch + 1,), cu_rows=cu_rows)
    _others(k_cache.device, (batch,), kept=kept)
    sizes = batch, k_cache.shape[1], k_cache.shape[3]
    checks.caches(k_cache, v_cache, *sizes, block_table, k_scale, v_scale, head_dim_v=v_cache.shape[3])
    of_rows = batch if cu_rows is None else 1
    checks.shape("k", k, (of_rows, k_cache.shape[1], k.shape[2], k_cache.shape[3]))
    checks.shape("v", v, (of_rows, k_cache.shape[1], k.shape[2], v_cache.shape[3]))


def _compact_kv(
    k_cache: Any, v_cache: Any, lengths: Any, path: Any, block_table: Any, k_scale: Any, v_scale: Any
) -> None:
    checks.operands(4, k_cache=k_cache, v_cache=v_cache)
    checks.written(k_cache=k_cache, v_cache=v_cache)
    _others(k_cache.device, lengths=lengths)
    _others(k_cache.device, (len(lengths),), path=path)
    sizes = len(lengths), k_cache.shape[1], k_cache.shape[3]
    checks.caches(k_cache, v_cache, *sizes, block_table, k_scale, v_scale, head_dim_v=v_cache.shape[3])


def _rotary_append(q: Any, k: Any, v: Any, cos: Any, sin: Any, keep: Any, **written: Any) -> None:
    checks.operands(4, q=q, k=k, v=v)
    checks.heads(q, k.shape[1])
    checks.shape("k", k, (len(q), k.shape[1], q.shape[2], q.shape[3]))
    for name, value in (("cos", cos), ("sin", sin)):
        checks.tensor(name, value, 3)
        checks.same_kind(q, **{name: value})
        checks.shape(name, value, (1 if len(value) == 1 else len(q), q.shape[2], q.shape[3]))
    check_int("keep", keep, 0)
    _append_kv(k=k, v=v, **written)


def _row_invariant_linear(x: Any, weight: Any, bias: Any) -> None:
    linear_api.check_linear(x, weight, bias)


def _gated_lora(x: Any, weight: Any, lora_a: Any, lora_b: Any, gate: Any, scale: Any, bias: Any) -> None:
    linear_api.check_linear(x, weight, bias)
    linear_api.check_lora(x, lora_a, lora_b, scale, weight.shape[0])
    linear_api.rows_of_gate(gate, x)


def _shaped_scores(logits: Any, knobs: Any, history: Any) -> None:
    checks.operands(3, logits=logits)
    _others(logits.device, (len(logits), len(Knob)), knobs=knobs)
    _others(logits.device, tuple(logits.shape), history=history)


def _sample(logits: Any, positions: Any, knobs: Any, seeds: Any, seen: Any, stream: Any, **others: Any) -> None:
    checks.operands(3, logits=logits)
    _others(logits.device, (len(logits), len(Knob)), knobs=knobs)
    _others(logits.device, (len(logits),), positions=positions, seeds=seeds)
    verify_api.check_rows(logits, positions, SamplingTensors(knobs, seeds), seen, others)
    check_int("stream", stream, 0, 2**31)


def _verify(drafts: Any, rule: Any, beta: Any, **sampled: Any) -> None:
    _sample(**sampled, stream=0)
    verify_api.check_drafts(drafts, sampled["logits"], rule, sampled["draft_logits"], beta, sampled["mix"])


def _twin(function: Callable[..., Any], check: Callable[..., None]) -> Any:
    """A twin that checks its arguments, all of them by name, before it computes."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def twin(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        check(**given.arguments)
        return function(*args, **kwargs)

    return twin


def _of_public(function: Callable[..., Any], public: Callable[..., Any]) -> Any:
    """A twin whose checks are those of the public function, which has it as a backend.

    Not for functions that cast under autocast, where an oracle in float64 has to stay one, nor for those that refuse
    slots outside of a cache, which the kernels drop.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def twin(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        return public(*given.args, **given.kwargs, backend="eager")

    return twin


attention = _twin(attention_reference.attention, _attention)
step_attention = _of_public(step_reference.step_attention, step_api.step_attention)
append_kv = _twin(kv_reference.append_kv, _append_kv)
compact_kv = _twin(kv_reference.compact_kv, _compact_kv)
rotary_append = _twin(kv_reference.rotary_append, _rotary_append)
row_invariant_linear = _twin(linear_reference.row_invariant_linear, _row_invariant_linear)
gated_lora = _twin(linear_reference.gated_lora, _gated_lora)
shaped_scores = _twin(verify_reference.shaped_scores, _shaped_scores)
sample = _twin(verify_reference.sample, _sample)
verify = _twin(verify_reference.verify, _verify)
