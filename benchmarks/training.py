"""Training attention: workloads, the peers, the floor, one row of figures a case and direction.

    python -m benchmarks.training --out DIR [--budget SECONDS]

Every implementation computes `tidar_training(S, B)` on the same operands and is compared with the float64 twin before
it is timed. The floor is two causal calls of PyTorch's own attention on S rows, with K/V heads repeated beforehand.
FLOPs count live pairs: 4 * head_dim a pair and query head forward, 10 * head_dim backward; the backward pass is timed
alone, on a retained graph.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

import tidar_kernels as tk
from tidar_kernels.testing import relative_error

from . import memory, plots, rates, record, row, timing
from .cases import PEER_SLACK
from .implementations import OURS, Implementation, WrongResultError, listing
from .peers import STEP, compiled_flex_attention
from .row import OUT_OF_TIME, reason

Result = TypeVar("Result")
DIRECTIONS = ("forward", "backward")
CHECKED_ROWS = 64
MAX_DENSE_MASK = 2**28  # bytes; longer sequences have no dense peer


@dataclass(frozen=True)
class Workload:
    """One case: `tidar_training(seq_len, block_size)`, 2 * seq_len rows, and the attention heads over it."""

    seq_len: int
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int = 1

    def __str__(self) -> str:
        heads = f"h{self.num_heads}_{self.num_kv_heads}-d{self.head_dim}"
        return f"S{self.seq_len}-B{self.block_size}-{heads}-b{self.batch}"


CPU_HEADS = ((4, 4), (8, 2))
CPU_DTYPES = (torch.float32, torch.bfloat16)


class Calls(NamedTuple):
    """An implementation and its operands: `compute(*leaves)` gives its outputs."""

    compute: Callable[..., tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]

    def forward(self, direction: str) -> tuple[Tensor, ...]:
        """The outputs: before a backward pass with their graph, else of operands that need no gradient."""
        leaves = self.leaves if direction == "backward" else (x.detach() for x in self.leaves)
        return self.compute(*leaves)

    def timed(self, direction: str) -> Callable[[], Any]:
        """The call to time: forward without a graph, or backward alone."""
        if direction == "forward":
            return partial(self.forward, direction)
        outputs = self.forward(direction)
        gradients = [torch.randn_like(out) for out in outputs]
        return lambda: torch.autograd.grad(outputs, self.leaves, gradients, retain_graph=True)


class Operands:
    """Random operands of a workload, and what the rows that are checked must come to."""

    def __init__(self, case: Workload, device: str, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.pattern = tk.patterns.tidar_training(case.seq_len, case.block_size)
        self.q = self.random(case.num_heads, 2 * case.seq_len)
        self.k, self.v = (self.random(case.num_kv_heads, 2 * case.seq_len) for _ in "kv")
        self._expected: dict[torch.dtype, dict[str, tuple[Tensor, ...]]] = {}

        # Random rows, and the first and last of each half. The rest of the gradient of out is 0, so that these rows
        # alone make up dK and dV, and the twin needs their scores only.
        s = case.seq_len
        rows = torch.cat([torch.randperm(2 * s)[: CHECKED_ROWS - 4], torch.tensor([0, s - 1, s, 2 * s - 1])]).unique()
        self.grad_out = torch.zeros_like(self.q)
        self.rows = rows.to(device)
        self.grad_out[:, :, self.rows] = torch.randn_like(self.q[:, :, self.rows])
        lead, own, positions = self.pattern.lead[rows], self.pattern.own[rows], self.pattern.positions[rows]
        self.checked = tk.Pattern(lead, own, positions, self.pattern.kv_len)

    def random(self, heads: int, rows: int) -> Tensor:
        """A leaf `[batch, heads, rows, head_dim]`."""
        shape = (self.case.batch, heads, rows, self.case.head_dim)
        return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=True)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def expected(self, dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
        """What the eager twin gives for the checked rows in `dtype`: of each direction, its results."""
        if dtype not in self._expected:
            leaves = self.q[:, :, self.rows], self.k, self.v
            q, k, v = (x.detach().to(dtype).requires_grad_() for x in leaves)
            out = tk.eager.attention(q, k, v, self.checked)
            gradients = torch.autograd.grad(out, (q, k, v), self.grad_out[:, :, self.rows].to(dtype))
            self._expected[dtype] = {"forward": (out.detach(),), "backward": gradients}
        return self._expected[dtype]

    def check(self, calls: Calls, direction: str, slack: float = 1.0) -> float:
        """Largest relative error of the checked rows of `calls`, or of the gradients that come of them.

        Raises:
            WrongResultError: it exceeds `slack` times the budget: twice eager PyTorch's own error and 1e-5.
        """
        (out,) = calls.forward(direction)
        if direction == "forward":
            found: tuple[Tensor, ...] = (out[:, :, self.rows],)
        else:
            dq, dk, dv = torch.autograd.grad(out, calls.leaves, self.grad_out)
            found = (dq[:, :, self.rows], dk, dv)
            if bool(dq.index_fill(2, self.rows, 0.0).any()):
                raise WrongResultError(f"{self.case}: expected gradients in the rows that have one, got others")
        errors = []
        exact, plain = self.expected(torch.float64)[direction], self.expected(self.dtype)[direction]
        for value, reference, eager in zip(found, exact, plain, strict=True):
            error, budget = relative_error(value, reference), slack * (2 * relative_error(eager, reference) + 1e-5)
            if not error <= budget:
                raise WrongResultError(
                    f"{self.case}: expected a relative error <= {budget:.3g} {direction}, got {error:.3g}"
                )
            errors.append(error)
        return max(errors)


def _ours(operands: Operands) -> Calls:
    return Calls(lambda q, k, v: (tk.attention(q, k, v, operands.pattern),), operands.leaves)


def _flex_attention(operands: Operands) -> Calls:
    # Looked up by row: on the CPU this predicate took two thirds of the time of one that divides by the block length.
    lead, own, _ = operands.pattern.on(operands.device)
    lead_end, own_start, own_end = lead[:, 1].contiguous(), *(x.contiguous() for x in own.unbind(1))

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key < lead_end[row]) | ((key >= own_start[row]) & (key < own_end[row]))

    length = operands.pattern.q_len
    block_mask = create_block_mask(visible, None, None, length, length, device=operands.device)
    attend = compiled_flex_attention()
    return Calls(lambda q, k, v: (attend(q, k, v, block_mask=block_mask, enable_gqa=True),), operands.leaves)


def _dense_sdpa(operands: Operands) -> Calls:
    """The usual way: the mask of the doubled sequence, and K/V repeated for every query head."""
    case = operands.case
    if (2 * case.seq_len) ** 2 > MAX_DENSE_MASK:
        raise MemoryError(f"the dense mask is left out beyond {MAX_DENSE_MASK >> 20} MiB")
    mask = operands.pattern.dense().to(operands.device)
    group = case.num_heads // case.num_kv_heads

    def compute(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        k, v = (x if group == 1 else x.repeat_interleave(group, dim=1) for x in (k, v))
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask),)

    return Calls(compute, operands.leaves)


def _floor(operands: Operands, backend: SDPBackend | None = None) -> Calls:
    """Two causal calls on S rows, with as many K/V heads as query heads; their own operands, so nothing to check."""
    case = operands.case
    leaves = tuple(operands.random(case.num_heads, case.seq_len) for _ in range(6))

    def compute(*x: Tensor) -> tuple[Tensor, ...]:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            first = F.scaled_dot_product_attention(x[0], x[1], x[2], is_causal=True)
            return first, F.scaled_dot_product_attention(x[3], x[4], x[5], is_causal=True)

    return Calls(compute, leaves)


def _flash_attention(operands: Operands, module: str) -> Calls:
    """Two causal calls of an installed FlashAttention, whose tensors are `[batch, rows, heads, head_dim]`."""
    attend = importlib.import_module(module).flash_attn_func
    case = operands.case
    shape = case.batch, case.seq_len, case.num_heads, case.head_dim
    leaves = tuple(torch.randn(shape, device=operands.device, dtype=operands.dtype) for _ in range(6))
    leaves = tuple(x.requires_grad_() for x in leaves)

    def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
        return out if isinstance(out, Tensor) else out[0]  # some versions return the log-sum-exp too

    return Calls(
        lambda *x: (first(attend(x[0], x[1], x[2], causal=True)), first(attend(x[3], x[4], x[5], causal=True))), leaves
    )


FLOORS: dict[str, Callable[[Operands], Calls]] = {
    "causal_sdpa": _floor,
    "causal_flash": partial(_floor, backend=SDPBackend.FLASH_ATTENTION),
    "causal_cudnn": partial(_floor, backend=SDPBackend.CUDNN_ATTENTION),
    "flash_attention_2": partial(_flash_attention, module="flash_attn"),
    "flash_attention_3": partial(_flash_attention, module="flash_attn_interface"),
}
IMPLEMENTATIONS: dict[str, Callable[[Operands], Calls]] = {
    OURS: _ours,
    "flex_attention": _flex_attention,
    "sdpa_dense_mask": _dense_sdpa,
    **FLOORS,
}
ON_CPU = (OURS, "flex_attention", "sdpa_dense_mask", "causal_sdpa")
ON_CUDA = tuple(name for name in IMPLEMENTATIONS if name != "causal_sdpa")


def peers(device: str) -> dict[str, Implementation]:
    """What `ON_CPU` or `ON_CUDA` needs to be there, FlashAttention's with how to install it."""
    names = ON_CPU if device == "cpu" else ON_CUDA
    return {
        name: STEP[name] if name in STEP else Implementation(plots.LABELS[name], _unplanned, ceiling=True)
        for name in names
    }


def _unplanned(operands: Any) -> Any:
    raise NotImplementedError("benchmarks.training plans its own calls")


def checked(operands: Operands, name: str, calls: Calls, direction: str) -> tuple[Callable[[], Any], float]:
    """The call of an implementation to time, and its relative error; a floor is PyTorch's own and has none."""
    if name in FLOORS:
        return calls.timed(direction), 0.0
    error = operands.check(calls, direction, 1.0 if name == OURS else PEER_SLACK)
    return calls.timed(direction), error


def attempt(action: Callable[[], Result]) -> Result | str:
    """What `action` returns, or the reason why it failed: compilers, backends and memory fail in their own ways."""
    try:
        return action()
    except Exception as error:
        return reason(error)


def least(operands: Operands, name: str, direction: str) -> dict[str, float]:
    """Rows, bytes and FLOPs: every operand read and every result written once, live pairs computed once."""
    case, s = operands.case, operands.case.seq_len
    intervals = operands.pattern.lead[:, 1] - operands.pattern.lead[:, 0]
    intervals += operands.pattern.own[:, 1] - operands.pattern.own[:, 0]
    pairs = s * (s + 1) if name in FLOORS else int(intervals.sum())
    kv_heads = case.num_heads if name in FLOORS else case.num_kv_heads
    per_row = 2 * (case.num_heads + kv_heads)  # q, k, v, out
    per_row += per_row if direction == "backward" else 0  # and their gradients
    return {
        "rows": 2 * s,
        "bytes": float(2 * s * per_row * case.head_dim * case.batch * operands.dtype.itemsize),
        "flops": (4.0 if direction == "forward" else 10.0) * pairs * case.head_dim * case.num_heads * case.batch,
    }


def line_of(
    operands: Operands, name: str, direction: str, found: dict[str, Any], known: rates.Rates | None = None
) -> dict[str, Any]:
    """One line of a results file: what was measured and what follows from it, or why there is nothing."""
    fields = {"direction": direction, **vars(operands.case)}
    line = row.head("attention", name, operands.device, operands.dtype, fields)
    floor = least(operands, name, direction)
    line |= {**floor, **found}
    if "p50_us" in found:
        line |= row.figures(found, floor)
        line |= known.against(line) if known else {}
    return line


def run_cpu(
    case: Workload,
    dtype: torch.dtype,
    names: Sequence[str] = ON_CPU,
    budget_s: float = 6.0,
    known: rates.Rates | None = None,
    directions: Sequence[str] = DIRECTIONS,
) -> list[dict[str, Any]]:
    """Check, then time on the CPU, the implementations taking turns; forward, then backward.

    What is wrong, or fails, ours too, has a row with the reason and no figures.
    """
    operands = Operands(case, "cpu", dtype)
    rows = []
    prepared = {name: attempt(partial(IMPLEMENTATIONS[name], operands)) for name in names}
    for direction in directions:
        ready: dict[str, Callable[[], Any]] = {}
        errors: dict[str, float] = {}
        missing: dict[str, str] = {}
        for name, calls in prepared.items():
            if isinstance(calls, str):
                missing[name] = calls
                continue
            found = attempt(partial(checked, operands, name, calls, direction))
            if isinstance(found, str):
                missing[name] = found
            else:
                ready[name], errors[name] = found
        measured = timing.time_in_turn(ready, budget_s)
        floor = next((measured[name]["p50_us"] for name in FLOORS if name in measured), None)
        for name in names:
            if name in missing:
                figures: dict[str, Any] = {"not_available": missing[name]}
            else:
                figures = {**measured[name], "relative_error": float(f"{errors[name]:.3g}")}
                if floor is not None:
                    figures["against_floor"] = round(measured[name]["p50_us"] / floor, 3)
            rows.append(line_of(operands, name, direction, figures, known))
    return rows


def run_on_device(
    case: Workload,
    dtype: torch.dtype = torch.bfloat16,
    names: Sequence[str] = ON_CUDA,
    device: str = "cuda",
    timer: Callable[[Callable[[], Any]], dict[str, float]] = timing.time_stream,
    deadline: float = math.inf,
    *,
    rows: record.Rows | None = None,
    known: rates.Rates | None = None,
    directions: Sequence[str] = DIRECTIONS,
) -> list[dict[str, Any]]:
    """Check, then time, one implementation after the other; whatever fails is recorded with the reason.

    Operands are much larger than L2, so that each call finds them cold. Past `deadline`, in seconds of
    `time.perf_counter`, no further implementation is started. An absent one has no rows. What `rows` has already is
    left alone, the others are entered there and returned.

    Raises:
        DeviceLostError: a failure took the device with it.
    """
    rows = row.Held() if rows is None else rows
    operands = Operands(case, device, dtype)
    offered = peers("cuda")
    done = []
    for name in names:
        if name in offered and offered[name].absent(device):
            continue
        calls: Calls | None = None
        for direction in directions:
            line = line_of(operands, name, direction, {})
            if rows.has(line["command"]):
                continue
            rows.begin(line)
            found: dict[str, Any]
            try:
                if time.perf_counter() > deadline:
                    raise TimeoutError(OUT_OF_TIME)
                calls = calls or IMPLEMENTATIONS[name](operands)
                call, error = checked(operands, name, calls, direction)
                found = {**timer(call), "relative_error": float(f"{error:.3g}"), **record.clocks(device)}
                del call
            except Exception as failure:
                found = {"not_available": reason(failure)}
            done.append(line_of(operands, name, direction, found, known))
            rows.put(done[-1])
            if row.failed(done[-1]):
                row.check_device(device)
        del calls
        if device == "cuda":
            torch.cuda.empty_cache()
    return done


def one(
    implementation: str, device: str, dtype: torch.dtype, fields: Sequence[str], known: rates.Rates
) -> list[dict[str, Any]]:
    """The row of a command line: `direction=` and the fields of a workload."""
    directions = [word.partition("=")[2] for word in fields if word.startswith("direction=")]
    names = ON_CPU if device == "cpu" else ON_CUDA
    if len(directions) != 1 or directions[0] not in DIRECTIONS or implementation not in names:
        raise ValueError(f"attention: expected one of {', '.join(names)} and direction=forward or backward")
    case = row.parse(Workload, [word for word in fields if not word.startswith("direction=")])
    if device == "cpu":
        wanted = list(dict.fromkeys((implementation, "causal_sdpa")))  # the floor beside it
        rows = run_cpu(case, dtype, wanted, known=known, directions=directions)
    else:
        rows = run_on_device(case, dtype, (implementation,), known=known, directions=directions)
    return [line for line in rows if line["implementation"] == implementation]


def describe(line: dict[str, Any]) -> str:
    """A row of figures for the terminal."""
    text = f"{line['implementation']:16} S={line['seq_len']:<6} {line['dtype']:9}"
    text += f" heads {line['num_heads']}/{line['num_kv_heads']} d={line['head_dim']:<3} {line['direction']:8}"
    if "not_available" in line:
        return f"{text} not available: {line['not_available']}"
    ratio = f" {line['against_floor']:6.2f} x the floor" if "against_floor" in line else ""
    return f"{text} {line['p50_us'] / 1e3:9.2f} ms {line['tflops']:8.3f} TFLOP/s{ratio}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing a case and direction")
    options = parser.parse_args(arguments)
    rows = rates.measure("cpu", CPU_DTYPES)
    known = rates.of(rows)
    rows += listing("attention", peers("cpu"), "cpu")
    for dtype in CPU_DTYPES:
        for heads in CPU_HEADS:
            case = Workload(options.seq_len, options.block_size, *heads, 64)
            rows += run_cpu(case, dtype, budget_s=options.budget, known=known)
            for line in rows[-len(DIRECTIONS) * len(ON_CPU) :]:
                print(describe(line), flush=True)
    for line in memory.rows():
        print(memory.describe(line), flush=True)
        rows.append(line)
    record.add(options.out, "training", "cpu", rows)
    return int(any(line.get("implementation") == OURS and row.failed(line) for line in rows))


if __name__ == "__main__":
    sys.exit(main())
