"""Checks of `step_attention`: parity with its eager twin, and the bits that do not depend on a launch.

Their cases are data: `step_cases.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import eager, ops, patterns
from ..ops import paging
from ..ops.operands import Cached, Keys
from ..ops.paging import plain
from .caches import CacheKind, make_cache
from .harness import (
    Guarded,
    ParityError,
    ParityResult,
    bits,
    budget,
    check_case,
    check_equal,
    generator_of,
    guarded,
    naming,
    poisoned_allocations,
    result_of,
)
from .step_cases import StepCase

__all__ = ["StepOperands", "check_launch_bits", "check_row_bits", "check_step_attention", "step_operands"]

_NAMES = ("q", "k", "v", "k_cache", "v_cache", "lengths")
_OPTIONS = ("sinks", "block_table", "k_scale", "v_scale")


@dataclass(frozen=True)
class StepOperands:
    """The operands of one step, each between guard bands; sinks, the table and scales may be None.

    Cache slots past the length hold NaN, and those of a cache with pages or scales random bits.
    """

    q: Guarded
    k: Guarded
    v: Guarded
    k_cache: Guarded
    v_cache: Guarded
    lengths: Guarded
    sinks: Guarded | None = None
    block_table: Guarded | None = None
    k_scale: Guarded | None = None
    v_scale: Guarded | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the operator's arguments, but for `options`."""
        return tuple(memory.tensor for name, memory in vars(self).items() if name not in _OPTIONS)

    @property
    def options(self) -> dict[str, Any]:
        """Sinks, the block table and scales, as the operator takes them."""
        return {name: None if (memory := getattr(self, name)) is None else memory.tensor for name in _OPTIONS}

    @property
    def cache_options(self) -> dict[str, Any]:
        """The block table and scales."""
        return {name: value for name, value in self.options.items() if name != "sinks"}

    def check_untouched(self) -> None:
        """Raise `ParityError` if an operand, or the memory around it, was written to."""
        for name, memory in vars(self).items():
            if memory is not None:
                memory.check(name)


def step_operands(case: StepCase, device: torch.device | str = "cpu") -> StepOperands:
    """Fresh random operands of a case."""
    check_case(case, StepCase, device)
    draw, batch = generator_of(case), len(case.lengths)

    head_dim_v = case.head_dim if case.head_dim_v is None else case.head_dim_v

    def normal(heads: int, rows: int, head_dim: int = case.head_dim) -> Tensor:
        shape = batch, heads, rows, head_dim
        return torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu").to(case.dtype)

    def cache(head_dim: int = case.head_dim) -> Tensor:
        values = normal(case.num_kv_heads, case.cache_len, head_dim)
        for sequence, length in enumerate(case.lengths):
            values[sequence, :, length:] = torch.nan
        return values

    # Query heads differ even where the layout shares one kv head.
    q_layout = "bnhd" if case.layout == "shared_heads" else case.layout

    def place(values: Tensor, layout: str) -> Guarded:
        return guarded(values.to(device), layout)

    q = place(normal(case.num_heads, case.pattern.q_len), q_layout)
    k = place(normal(case.num_kv_heads, case.pattern.kv_len), case.layout)
    v = place(normal(case.num_kv_heads, case.pattern.kv_len, head_dim_v), case.layout)
    lengths = guarded(torch.tensor(case.lengths, dtype=case.lengths_dtype, device=device))
    if case.cache is None:
        caches = {"k_cache": place(cache(), case.cache_layout), "v_cache": place(cache(head_dim_v), case.cache_layout)}
    else:
        caches = _caches(case, case.cache, (cache(), cache()), lengths.tensor, draw, device)
    return StepOperands(
        q=q,
        k=k,
        v=v,
        lengths=lengths,
        **caches,
        sinks=guarded(torch.randn(case.num_heads, generator=draw, device="cpu").to(device, case.dtype))
        if case.sinks
        else None,
    )


def _caches(
    case: StepCase,
    kind: CacheKind,
    values: tuple[Tensor, Tensor],
    lengths: Tensor,
    draw: torch.Generator,
    device: torch.device | str,
) -> dict[str, Guarded]:
    """Caches of a kind that hold `values [batch, kv_heads, cache_len, head_dim]` below `lengths`, and what they need.

    There are pages for the context and the causal rows after it, no more.
    """
    needed = [(0, length + case.pattern.causal_len) for length in case.lengths]
    shape = (case.num_kv_heads, case.cache_len, case.head_dim)
    made = make_cache(kind, lengths, needed, shape, case.dtype, draw, device)
    position = torch.arange(case.cache_len, device=device)
    places = paging.locate(made.cached, torch.where(position < lengths[:, None], position, -1))
    found = {}
    for name, value in zip("kv", values, strict=True):
        cache, scale = getattr(made.cached, f"{name}_cache"), getattr(made.cached, f"{name}_scale")
        stored = value.to(device).transpose(1, 2)[places.exists]  # [keys, kv_heads, head_dim]
        page, slot = places.page[places.exists], places.slot[places.exists]
        if scale is not None:
            of_keys = None if scale.ndim == 3 else scale.expand(len(lengths), case.num_kv_heads)
            of_keys = None if of_keys is None else of_keys[places.exists.nonzero()[:, 0]]
            stored, of_keys = paging.quantise(stored, of_keys, cache.dtype)
            if scale.ndim == 3:
                scale[page, :, slot] = of_keys
            found[f"{name}_scale"] = guarded(scale)
        bits(cache)[page, :, slot] = bits(stored)
    for name, memory in zip("kv", made.memories, strict=False):
        found[f"{name}_cache"] = Guarded(memory.tensor, memory.buffer, memory.buffer.clone())
    if made.cached.block_table is not None:
        found["block_table"] = guarded(made.cached.block_table)
    return found


def _step(
    case: StepCase, operands: Iterable[Tensor], backend: ops.Backend | None = None, **changes: Any
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of the operator under poisoned allocations; sinks are among the `changes`."""
    q, k, v, k_cache, v_cache, lengths = operands
    options: dict[str, Any] = {"scale": case.scale, "softcap": case.softcap, "max_context": case.max_context} | changes
    options["pattern"] = case.windowed(options.get("pattern", case.pattern))
    with poisoned_allocations():
        out, lse = ops.step_attention(q, k, v, k_cache, v_cache, lengths, **options, return_lse=True, backend=backend)
        return out, lse


def check_step_attention(
    case: StepCase, device: torch.device | str = "cpu", backend: ops.Backend | None = None
) -> ParityResult:
    """`step_attention` against its eager twin in float64, by the budget rule; out, its worst row, and lse.

    Also: every output finite where it should be; rows without a key exactly 0; nothing read past a sequence's length
    (NaN lies there); nothing written but the outputs. With pages or scales, the bits are those of a contiguous cache of
    what the keys are worth.

    Raises:
        ParityError: any of it fails.
    """
    check_case(case, StepCase, device)
    operands = step_operands(case, device)
    with naming("step_attention", case, device):
        out, lse = _step(case, operands.tensors, backend, **operands.options)
        operands.check_untouched()
        pattern, sinks = case.windowed(case.pattern), operands.options["sinks"]

        def twin(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            q, k, v, k_cache, v_cache, lengths = (x.to(dtype) if x.dtype == case.dtype else x for x in operands.tensors)
            return eager.step_attention(
                *(q, k, v, k_cache, v_cache, lengths, pattern, case.scale),
                softcap=case.softcap,
                sinks=None if sinks is None else sinks.to(dtype),
                return_lse=True,
                **operands.cache_options,
            )

        (reference, reference_lse), (plain, plain_lse) = twin(torch.float64), twin(case.dtype)
        if out.dtype != case.dtype:
            raise ParityError(f"out: expected dtype {case.dtype}, got {out.dtype}")
        measures = (
            budget(out, reference, plain),
            budget(out, reference, plain, "worst row of out", by_row=True),
            budget(lse, reference_lse, plain_lse, "lse"),
        )
        empty = (reference == 0.0).all(-1)
        check_equal(out[empty], torch.zeros_like(out[empty]), "rows of out that see no key")
        if case.cache is not None:
            alike, alike_lse = _step(case, _plain(case, operands), backend, sinks=sinks, max_context=None)
            check_equal(out, alike, "out, against a contiguous cache")
            check_equal(lse, alike_lse, "lse, against a contiguous cache")
    return result_of("step_attention", case, device, measures)


def _plain(case: StepCase, operands: StepOperands) -> tuple[Tensor, ...]:
    """The operands that a contiguous cache of the dtype of q would have: `plain` of the reference."""
    q, k, v, k_cache, v_cache, lengths = operands.tensors
    kept_len = 0 if operands.k_scale is None else case.windowed(case.pattern).kept_len
    cached = Cached(k_cache, v_cache, lengths, case.cache_len, **operands.cache_options, kept_len=kept_len)
    keys, cached = plain(Keys(k, v), cached)
    return q, *keys, cached.k_cache, cached.v_cache, lengths


def check_row_bits(
    case: StepCase, device: torch.device | str = "cpu", backend: ops.Backend | None = "triton"
) -> ParityResult:
    """Causal row m of a step at length P has the very bits of single-token decoding at length P + m, lse too.

    The drafts before it are committed as the decoder commits them, by `append_kv`. This is a promise of the kernels:
    the CPU path does not make it, so "triton" is asked for by name.

    Raises:
        ParityError: a bit differs, in out or lse, for any m below `pattern.causal_len`.
    """
    check_case(case, StepCase, device)
    causal_len = case.pattern.causal_len
    if case.max_len is None:
        case = replace(case, max_len=max(case.lengths) + causal_len + 1)
    operands = step_operands(case, device)
    q, k, v, k_cache, v_cache, lengths = operands.tensors
    with naming("row bits", case, device):
        out, lse = _step(case, operands.tensors, backend, **operands.options)
        new, options = (k[:, :, :causal_len], v[:, :, :causal_len]), operands.cache_options
        ops.append_kv(k_cache, v_cache, *new, lengths, **options, backend=backend)
        decode = patterns.causal(1)
        for m in range(causal_len):
            row = [x[:, :, m : m + 1] for x in (q, k, v)]
            at = (*row, k_cache, v_cache, lengths + m)
            alone, alone_lse = _step(case, at, backend, pattern=decode, **operands.options)
            check_equal(out[:, :, m : m + 1], alone, f"row {m} of out")
            check_equal(lse[:, :, m : m + 1], alone_lse, f"row {m} of lse")
    return result_of("row_bits", case, device)


def check_launch_bits(
    case: StepCase, device: torch.device | str = "cpu", backend: ops.Backend | None = "triton"
) -> ParityResult:
    """What else is in a launch does not change the bits of a row, be it a draft, a prompt or a mask row.

    Varied: the other sequences of the batch, the other heads, `max_context`, the width of `lengths`, the strides of
    every operand. A promise of the kernels, as in `check_row_bits`.

    Raises:
        ParityError: a bit differs.
    """
    check_case(case, StepCase, device)
    memory = step_operands(case, device)
    operands, sinks, paged = memory.tensors, memory.options["sinks"], memory.cache_options.items()
    group = case.num_heads // case.num_kv_heads

    def compare(what: str, at: tuple[slice, ...], tensors: Iterable[Tensor], **changes: Any) -> None:
        changed, changed_lse = _step(case, tensors, backend, **(memory.options | changes))
        check_equal(changed, out[at], f"out {what}")
        check_equal(changed_lse, lse[at], f"lse {what}")

    with naming("launch bits", case, device):
        out, lse = _step(case, operands, backend, **memory.options)
        for b in range(len(case.lengths)):
            one = slice(b, b + 1)
            # Pages are everybody's; what there is one of a sequence is taken apart.
            whose = {"k_cache", "v_cache", "k_scale", "v_scale"} if memory.block_table is not None else set()
            part = [x if name in whose else x[one] for name, x in zip(_NAMES, operands, strict=True)]
            own = {
                name: x if x is None or not x.ndim or (name in whose and x.ndim == 3) else x[one] for name, x in paged
            }
            compare(f"of sequence {b} alone", (one,), part, **own)
        for h in range(case.num_heads):
            head, kv_head = slice(h, h + 1), slice(h // group, h // group + 1)
            part = [operands[0][:, head], *(x[:, kv_head] for x in operands[1:5]), operands[5]]
            own = {name: x[:, kv_head] for name, x in paged if x is not None and name != "block_table" and x.ndim}
            own |= {} if sinks is None else {"sinks": sinks[head]}
            compare(f"of head {h} alone", (slice(None), head), part, **own)
        compare("with max_context", (), operands, max_context=max(case.lengths))
        compare("with int64 lengths", (), [*operands[:5], operands[5].long()])
        for layout in ("bhnd", "gaps", "bhdn"):
            moved = [guarded(x, layout).tensor if x.dtype == case.dtype else x for x in operands[:5]]
            compare(f"in layout {layout}", (), [*moved, operands[5]])
    return result_of("launch_bits", case, device)
