"""Training attention, forward and backward, beside its peers.

Every implementation computes `tidar_training(S, B)` on the same operands and is compared with the float64 twin before
it is timed. The yardsticks are two causal calls of attention on S rows, with K/V heads repeated beforehand. FLOPs count
live pairs: 4 * head_dim a pair and query head forward, 10 * head_dim backward; the backward pass is timed alone, on a
retained graph.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tidar_kernels as tk

from ..core.operands import OURS, Expected, Implementation, Operands, Prepared, live_pairs
from . import flex
from .step_peers import CUDA, STEP

DIRECTIONS = ("forward", "backward")
CHECKED_ROWS = 64
MAX_DENSE_MASK = 2**28  # bytes; longer sequences have no dense peer


@dataclass(frozen=True)
class Training:
    """`tidar_training(seq_len, block_size)`, 2 * seq_len rows, in one direction, and the attention heads over it."""

    direction: str
    seq_len: int
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int = 1

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {self.direction}")

    @property
    def pattern(self) -> tk.Pattern:
        return tk.patterns.tidar_training(self.seq_len, self.block_size)

    def __str__(self) -> str:
        heads = f"h{self.num_heads}_{self.num_kv_heads}-d{self.head_dim}"
        return f"S{self.seq_len}-B{self.block_size}-{heads}-b{self.batch} {self.direction}"


def both(*sizes: int) -> tuple[Training, ...]:
    """A case in both directions: `seq_len, block_size, num_heads, num_kv_heads, head_dim, batch`."""
    return tuple(Training(direction, *sizes) for direction in DIRECTIONS)


def gpu_cases() -> tuple[Training, ...]:
    """TiDAR training at B = 16, 2048 columns of heads, 16384 clean tokens a call, shorter sequences in larger batches.

    One kind of heads over all lengths, then the others, the middle length first: the time may end before the table.
    """
    kinds, middle, others = [(128, 4), (64, 1), (128, 1), (64, 4)], 8192, (2048, 4096, 16384, 32768)
    order = [(seq_len, *kinds[0]) for seq_len in (middle, *others)]
    order += [(middle, *kind) for kind in kinds[1:]]
    order += [(seq_len, *kind) for kind in kinds[1:] for seq_len in others]
    return tuple(
        case
        for seq_len, head_dim, group in order
        for case in both(seq_len, 16, 2048 // head_dim, 2048 // head_dim // group, head_dim, max(1, 16384 // seq_len))
    )


class Calls(NamedTuple):
    """An implementation and its operands: `compute(*leaves)` gives its outputs."""

    compute: Callable[..., tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]

    def forward(self, direction: str) -> tuple[Tensor, ...]:
        """The outputs: before a backward pass with their graph, else of operands that need no gradient."""
        leaves = self.leaves if direction == "backward" else (x.detach() for x in self.leaves)
        return self.compute(*leaves)

    def timed(self, direction: str) -> Callable[[], Any]:
        """The call to time: forward without a graph, or backward alone, after a first call that makes the graph."""
        if direction == "forward":
            return partial(self.forward, direction)

        @functools.cache
        def graph() -> tuple[tuple[Tensor, ...], list[Tensor]]:
            outputs = self.forward(direction)
            return outputs, [torch.randn_like(out) for out in outputs]

        def backward() -> tuple[Tensor, ...]:
            outputs, gradients = graph()
            return torch.autograd.grad(outputs, self.leaves, gradients, retain_graph=True)

        return backward


def _flex_attention(o: Attention) -> Calls:
    attend, mask = flex.plan(replace(o.case, direction="forward"), o.device)  # one for both directions
    return Calls(lambda q, k, v: (attend(q, k, v, block_mask=mask, enable_gqa=True),), o.leaves)


def _dense_sdpa(o: Attention) -> Calls:
    """The usual way: the mask of the doubled sequence, and K/V repeated for every query head."""
    case = o.case
    if (2 * case.seq_len) ** 2 > MAX_DENSE_MASK:
        raise MemoryError(f"the dense mask is left out beyond {MAX_DENSE_MASK >> 20} MiB")
    mask, group = o.pattern.dense().to(o.device), case.num_heads // case.num_kv_heads

    def compute(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        k, v = (x if group == 1 else x.repeat_interleave(group, dim=1) for x in (k, v))
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask),)

    return Calls(compute, o.leaves)


def _causal(o: Attention, backend: SDPBackend | None = None) -> Calls:
    """Two causal calls on S rows, with as many K/V heads as query heads; their own operands, so nothing to check."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    leaves = tuple(o.leaf(o.case.num_heads, o.case.seq_len) for _ in range(6))
    return Calls(lambda *x: (attend(*x[:3]), attend(*x[3:])), leaves)


def _flash_attention(o: Attention, module: str) -> Calls:
    """Two causal calls of an installed FlashAttention, whose tensors are `[batch, rows, heads, head_dim]`."""
    flash = importlib.import_module(module).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, ...] = flash(q, k, v, causal=True)
        return out if isinstance(out, Tensor) else out[0]  # some versions return the log-sum-exp too

    leaves = tuple(o.leaf(o.case.seq_len, o.case.num_heads) for _ in range(6))
    return Calls(lambda *x: (attend(*x[:3]), attend(*x[3:])), leaves)


class Attention(Operands):
    operator = "attention"
    workload = Training
    implementations: ClassVar = {
        OURS: Implementation(OURS, lambda o: Calls(lambda q, k, v: (tk.attention(q, k, v, o.pattern),), o.leaves)),
        "flex_attention": replace(STEP["flex_attention"], prepare=_flex_attention),
        "sdpa_dense_mask": replace(STEP["sdpa_dense_mask"], prepare=_dense_sdpa),
        "causal_sdpa": Implementation("2 causal SDPA calls: the floor", _causal, ceiling=True, devices=("cpu",)),
        "causal_flash": Implementation(
            "causal flash", partial(_causal, backend=SDPBackend.FLASH_ATTENTION), ceiling=True, devices=CUDA
        ),
        "causal_cudnn": Implementation(
            "causal cuDNN", partial(_causal, backend=SDPBackend.CUDNN_ATTENTION), ceiling=True, devices=CUDA
        ),
        **{
            name: replace(STEP[name], prepare=partial(_flash_attention, module=STEP[name].module))
            for name in ("flash_attention_2", "flash_attention_3")
        },
    }
    cpu = tuple(case for heads in ((4, 4), (8, 2)) for case in both(2048, 16, *heads, 64))
    cuda = gpu_cases()
    tiny = both(40, 8, 4, 2, 16)
    sets = 1  # larger than any cache
    inference, graph = False, False
    yardstick = "causal_sdpa"

    def make(self) -> None:
        case, s = self.case, self.case.seq_len
        self.pattern = case.pattern
        self.q = self.leaf(case.num_heads, 2 * s)
        self.k, self.v = (self.leaf(case.num_kv_heads, 2 * s) for _ in "kv")
        # Random rows, and the first and last of each half. The rest of the gradient of out is 0, so that these rows
        # alone make up dK and dV, and the twin needs their scores only.
        rows = torch.cat([torch.randperm(2 * s)[: CHECKED_ROWS - 4], torch.tensor([0, s - 1, s, 2 * s - 1])]).unique()
        self.grad_out = torch.zeros_like(self.q)
        self.rows = rows.to(self.device)
        self.grad_out[:, :, self.rows] = torch.randn_like(self.q[:, :, self.rows])
        lead, own, positions = self.pattern.lead[rows], self.pattern.own[rows], self.pattern.positions[rows]
        self.checked = tk.Pattern(lead, own, positions, self.pattern.kv_len)

    def leaf(self, heads: int, rows: int) -> Tensor:
        """A leaf `[batch, heads, rows, head_dim]`."""
        return self.random(self.case.batch, heads, rows, self.case.head_dim).requires_grad_()

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @cached_property
    def _twin(self) -> list[Expected]:
        """What the eager twin gives for the checked rows."""

        def twin(dtype: torch.dtype) -> tuple[Tensor, ...]:
            leaves = self.q[:, :, self.rows], self.k, self.v
            q, k, v = (x.detach().to(dtype).requires_grad_() for x in leaves)
            out = tk.eager.attention(q, k, v, self.checked)
            if self.case.direction == "forward":
                return (out.detach(),)
            return torch.autograd.grad(out, (q, k, v), self.grad_out[:, :, self.rows].to(dtype))

        return [Expected(*both) for both in zip(twin(torch.float64), twin(self.dtype), strict=True)]

    def expected(self, name: str) -> list[Expected]:
        return self._twin

    def prepare(self, name: str) -> Prepared:
        return self.prepared(self.implementations[name].prepare(self))

    def prepared(self, calls: Calls) -> Prepared:
        """What is timed has dense gradients; the results come of another call, whose gradients are of few rows."""
        return Prepared(calls.timed(self.case.direction), lambda _: calls)

    def results(self, prepared: Prepared) -> tuple[Tensor, ...]:
        """The checked rows, or the gradients that come of them."""
        calls: Calls = prepared.result(None)
        (out,) = calls.forward(self.case.direction)
        if self.case.direction == "forward":
            return (out[:, :, self.rows],)
        dq, dk, dv = torch.autograd.grad(out, calls.leaves, self.grad_out)
        if bool(dq.index_fill(2, self.rows, 0.0).any()):
            raise self.wrong("backward", "gradients in the rows that have one, got others")
        return dq[:, :, self.rows], dk, dv

    def floor(self, name: str = OURS) -> dict[str, float]:
        """Live pairs computed once; a yardstick has fewer pairs, and as many K/V heads as query heads."""
        case, s, backward = self.case, self.case.seq_len, self.case.direction == "backward"
        causal = self.implementations[name].ceiling
        pairs = s * (s + 1) if causal else live_pairs(self.pattern)
        # q, k, v and out, and their gradients.
        heads = 2 * (case.num_heads + (case.num_heads if causal else case.num_kv_heads)) * (1 + backward)
        return {
            "rows": 2 * s,
            "bytes": float(2 * s * heads * case.head_dim * case.batch * self.dtype.itemsize),
            "flops": (10.0 if backward else 4.0) * pairs * case.head_dim * case.num_heads * case.batch,
        }
