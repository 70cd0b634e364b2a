"""The checks: one function a property, each takes a case and a device, raises `ParityError`, returns a `ParityResult`.

Here those of `step_attention` and `append_kv`. `suites.SUITES` ties the checks to their case tables; a further operator
is a case dataclass, a check and a row there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import eager, ops, patterns
from .cases import AppendCase, StepCase
from .harness import (
    Guarded,
    ParityError,
    ParityResult,
    bits,
    budget,
    check_equal,
    generator_of,
    guarded,
    naming,
    poisoned_allocations,
    result_of,
)

__all__ = [
    "StepOperands",
    "check_append_kv",
    "check_launch_bits",
    "check_row_bits",
    "check_step_attention",
    "step_operands",
]


@dataclass(frozen=True)
class StepOperands:
    """The operands of one step, each between guard bands; cache slots past the length hold NaN; sinks may be None."""

    q: Guarded
    k: Guarded
    v: Guarded
    k_cache: Guarded
    v_cache: Guarded
    lengths: Guarded
    sinks: Guarded | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the operator's arguments, but sinks, which go by name."""
        return tuple(memory.tensor for name, memory in vars(self).items() if name != "sinks")

    @property
    def options(self) -> dict[str, Tensor | None]:
        """Sinks, as the operator takes them."""
        return {"sinks": None if self.sinks is None else self.sinks.tensor}

    def check_untouched(self) -> None:
        """Raise `ParityError` if an operand, or the memory around it, was written to."""
        for name, memory in vars(self).items():
            if memory is not None:
                memory.check(name)


def step_operands(case: StepCase, device: torch.device | str = "cpu") -> StepOperands:
    """Fresh random operands of a case."""
    draw, batch = generator_of(case), len(case.lengths)

    def normal(heads: int, rows: int) -> Tensor:
        shape = batch, heads, rows, case.head_dim
        return torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu").to(case.dtype)

    def cache() -> Tensor:
        values = normal(case.num_kv_heads, case.cache_len)
        for sequence, length in enumerate(case.lengths):
            values[sequence, :, length:] = torch.nan
        return values

    # Query heads differ even where the layout shares one kv head.
    q_layout = "bnhd" if case.layout == "shared_heads" else case.layout

    def place(values: Tensor, layout: str) -> Guarded:
        return guarded(values.to(device), layout)

    return StepOperands(
        q=place(normal(case.num_heads, case.pattern.q_len), q_layout),
        k=place(normal(case.num_kv_heads, case.pattern.kv_len), case.layout),
        v=place(normal(case.num_kv_heads, case.pattern.kv_len), case.layout),
        k_cache=place(cache(), case.cache_layout),
        v_cache=place(cache(), case.cache_layout),
        lengths=guarded(torch.tensor(case.lengths, dtype=case.lengths_dtype, device=device)),
        sinks=guarded(torch.randn(case.num_heads, generator=draw, device="cpu").to(device, case.dtype))
        if case.sinks
        else None,
    )


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
    (NaN lies there); nothing written but the outputs.

    Raises:
        ParityError: any of it fails.
    """
    operands = step_operands(case, device)
    with naming("step_attention", case, device):
        out, lse = _step(case, operands.tensors, backend, **operands.options)
        operands.check_untouched()
        pattern, sinks = case.windowed(case.pattern), operands.options["sinks"]

        def twin(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            q, k, v, k_cache, v_cache, lengths = (x.to(dtype) if x.is_floating_point() else x for x in operands.tensors)
            return eager.step_attention(
                *(q, k, v, k_cache, v_cache, lengths, pattern, case.scale),
                softcap=case.softcap,
                sinks=None if sinks is None else sinks.to(dtype),
                return_lse=True,
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
    return result_of("step_attention", case, device, measures)


def check_row_bits(
    case: StepCase, device: torch.device | str = "cpu", backend: ops.Backend | None = "triton"
) -> ParityResult:
    """Causal row m of a step at length P has the very bits of single-token decoding at length P + m, lse too.

    The drafts before it are committed as the decoder commits them, by `append_kv`. This is a promise of the kernels:
    the CPU path does not make it, so "triton" is asked for by name.

    Raises:
        ParityError: a bit differs, in out or lse, for any m below `pattern.causal_len`.
    """
    causal_len = case.pattern.causal_len
    if case.max_len is None:
        case = replace(case, max_len=max(case.lengths) + causal_len + 1)
    operands = step_operands(case, device)
    q, k, v, k_cache, v_cache, lengths = operands.tensors
    with naming("row bits", case, device):
        out, lse = _step(case, operands.tensors, backend, **operands.options)
        ops.append_kv(k_cache, v_cache, k[:, :, :causal_len], v[:, :, :causal_len], lengths, backend=backend)
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
    memory = step_operands(case, device)
    operands, sinks = memory.tensors, memory.options["sinks"]
    group = case.num_heads // case.num_kv_heads

    def compare(what: str, at: tuple[slice, ...], tensors: Iterable[Tensor], **changes: Any) -> None:
        changed, changed_lse = _step(case, tensors, backend, **({"sinks": sinks} | changes))
        check_equal(changed, out[at], f"out {what}")
        check_equal(changed_lse, lse[at], f"lse {what}")

    with naming("launch bits", case, device):
        out, lse = _step(case, operands, backend, sinks=sinks)
        for b in range(len(case.lengths)):
            one = slice(b, b + 1)
            compare(f"of sequence {b} alone", (one,), [x[one] for x in operands])
        for h in range(case.num_heads):
            head, kv_head = slice(h, h + 1), slice(h // group, h // group + 1)
            part = [operands[0][:, head], *(x[:, kv_head] for x in operands[1:5]), operands[5]]
            own = None if sinks is None else sinks[head]
            compare(f"of head {h} alone", (slice(None), head), part, sinks=own)
        compare("with max_context", (), operands, max_context=max(case.lengths))
        compare("with int64 lengths", (), [*operands[:5], operands[5].long()])
        for layout in ("bhnd", "gaps", "bhdn"):
            moved = [guarded(x, layout).tensor for x in operands[:5]]
            compare(f"in layout {layout}", (), [*moved, operands[5]])
    return result_of("launch_bits", case, device)


def check_append_kv(
    case: AppendCase, device: torch.device | str = "cpu", backend: ops.Backend | None = None
) -> ParityResult:
    """`append_kv` writes exactly the slots `lengths[b] + j` inside `[0, max_len)`, bit for bit, and nothing else.

    Values are random bit patterns, NaN payloads included. All of the memory is compared: written and unwritten slots,
    what lies between strided slots, and guard bands. A case that does not fit runs below the operator's checks, which
    would have raised.

    Raises:
        ParityError: any bit differs.
        ValueError: a case that does not fit, with a backend by name: only the default has checks to go below.
    """
    if backend is not None and not case.fits:
        raise ValueError(f"backend: expected None for a case that does not fit, got {backend!r}")
    draw, batch = generator_of(case), len(case.lengths)

    def noise(rows: int) -> Tensor:
        shape = (batch, case.num_kv_heads, rows, case.head_dim * case.dtype.itemsize)
        return torch.randint(256, shape, generator=draw, dtype=torch.uint8, device="cpu").view(case.dtype).to(device)

    caches = [guarded(noise(case.max_len), case.cache_layout) for _ in "kv"]
    new = [guarded(noise(case.num_new), case.layout) for _ in "kv"]
    lengths = guarded(torch.tensor(case.lengths, dtype=case.lengths_dtype, device=device))
    expected = [_appended(case, cache, fresh.tensor) for cache, fresh in zip(caches, new, strict=True)]
    operands = [memory.tensor for memory in (*caches, *new, lengths)]
    with naming("append_kv", case, device):
        if case.fits:
            ops.append_kv(*operands, backend=backend)
        else:
            torch.ops.tidar_kernels.append_kv(*operands)
        for name, cache, memory in zip(("k_cache", "v_cache"), caches, expected, strict=True):
            check_equal(bits(cache.buffer), memory, f"memory of {name}")
        for name, untouched in zip(("k", "v", "lengths"), (*new, lengths), strict=True):
            untouched.check(name)
    return result_of("append_kv", case, device)


def _appended(case: AppendCase, cache: Guarded, new: Tensor) -> Tensor:
    """The bits of a cache's whole buffer after the append, slot by slot from the operator's definition."""
    memory = bits(cache.buffer).clone()
    slots = memory.as_strided(cache.tensor.shape, cache.tensor.stride(), cache.tensor.storage_offset())
    for b, length in enumerate(case.lengths):
        for j in range(case.num_new):
            if 0 <= length + j < case.max_len:
                slots[b, :, length + j] = bits(new)[b, :, j]
    return memory
