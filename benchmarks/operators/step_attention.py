"""`step_attention`: one layer of one decode step, beside its peers (`step_peers`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

import tidar_kernels as tk
from tidar_kernels import Pattern, patterns

from ..core.operands import OURS, Expected, Operands, Prepared, live_pairs
from .models import attention_of
from .step_peers import STEP

BLOCK_SIZES = (0, 4, 8, 16)  # 0: single-token decoding


@dataclass(frozen=True)
class Step:
    """One layer of one step over `context_len` committed tokens."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_len: int
    batch: int = 1

    @property
    def pattern(self) -> Pattern:
        """The rows of the step."""
        return patterns.tidar_step(self.block_size) if self.block_size else patterns.causal(1)


def step(model: str, block_size: int, context_len: int, batch: int = 1) -> Step:
    """A step of a model by its name."""
    return Step(*attention_of(model), block_size, context_len, batch)


def ladder(model: str, *contexts: int, batch: int = 1) -> list[Step]:
    """Every block size, the longest first, at each context."""
    return [step(model, block, context, batch) for context in contexts for block in BLOCK_SIZES[::-1]]


class StepAttention(Operands):
    operator = "step_attention"
    workload = Step
    implementations = STEP
    cpu = (
        *(step("Qwen2.5-1.5B", block, context) for context in (512, 2048, 4096) for block in BLOCK_SIZES),
        *(step("Qwen3-8B", 8, context) for context in (512, 4096)),
    )
    # Keys and values of a layer: 4 KiB a token of Qwen3-8B. 16384 tokens are 64 MiB, eight sequences of 8192 256 MiB.
    cuda = (
        *ladder("Qwen3-8B", 8192, 32768),
        *ladder("Qwen3-8B", 8192, batch=8),
        *ladder("Qwen2.5-1.5B", 8192),
        *ladder("Qwen3-32B", 8192),
        *ladder("Qwen3-8B", 16384, 4096, 512),
        *ladder("Qwen2.5-1.5B", 32768, 512),
        *ladder("Qwen3-32B", 32768),
    )
    tiny: ClassVar[tuple[Step, ...]] = (Step("tiny", 4, 2, 16, 4, 40), Step("tiny", 4, 2, 16, 0, 40, 2))
    compiled = (
        *(step("Qwen3-8B", block, 8192) for block in (16, 8, 4)),
        step("Qwen3-8B", 16, 32768),
        step("Qwen3-32B", 16, 8192),
        step("Qwen3-8B", 0, 8192),
        *(step("Qwen2.5-1.5B", block, 4096) for block in (4, 8)),  # on the CPU
        tiny[0],
    )

    def make(self) -> None:
        case, self.pattern = self.case, self.case.pattern
        rows, max_len = self.pattern.q_len, case.context_len + max(case.block_size, 1)
        kv = (case.batch, case.num_kv_heads)
        self.q = self.random(case.batch, case.num_heads, rows, case.head_dim)
        self.k, self.v = (self.random(*kv, rows, case.head_dim) for _ in "kv")
        self.k_cache, self.v_cache = (self.random(*kv, max_len, case.head_dim) for _ in "kv")
        self.lengths = torch.full((case.batch,), case.context_len, dtype=torch.int32, device=self.device)

    def joined(self, *, context_first: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of context and in-flight rows in one buffer each."""
        pairs = (
            (cache[:, :, : self.case.context_len], new)
            for cache, new in ((self.k_cache, self.k), (self.v_cache, self.v))
        )
        keys, values = (torch.cat(pair if context_first else pair[::-1], dim=2) for pair in pairs)
        return keys, values

    def head_major(self, out: Tensor) -> Tensor:
        """`[batch * rows, heads, head_dim]` -> `[batch, heads, rows, head_dim]`."""
        return out.reshape(self.case.batch, -1, self.case.num_heads, self.case.head_dim).transpose(1, 2)

    @cached_property
    def _twin(self) -> Expected:
        first = [x[:1] for x in (self.q, self.k, self.v, self.k_cache, self.v_cache)]
        twin: Callable[..., Tensor] = tk.eager.step_attention
        exact = twin(*(x.double() for x in first), self.lengths[:1], self.pattern)
        return Expected(exact, twin(*first, self.lengths[:1], self.pattern))

    def expected(self, name: str) -> list[Expected]:
        return [self._twin]

    def results(self, prepared: Prepared) -> list[Tensor]:
        """Of the first sequence."""
        return [prepared.result(prepared.run())[:1]]

    def floor(self, name: str = OURS) -> dict[str, float]:
        case, rows = self.case, self.pattern.q_len
        pairs = rows * case.context_len + live_pairs(self.pattern)
        elements = 2 * case.num_kv_heads * (case.context_len + rows) + 2 * case.num_heads * rows
        return {
            "rows": rows,
            "bytes": float(elements * case.head_dim * case.batch * self.dtype.itemsize),
            "flops": 4.0 * pairs * case.head_dim * case.num_heads * case.batch,
        }
