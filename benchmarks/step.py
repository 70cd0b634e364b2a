"""Step attention: workloads, their floors, the peers, and one row of figures a case.

Floors come from the pattern's live pairs: a (row, key) pair costs 4 * head_dim FLOPs a head, and the K/V of the context
is read once. Peers compute the same mask: SDPA with the dense mask over context and in-flight keys together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import tidar_kernels as tk
from tidar_kernels.testing import relative_error

from . import timing


@dataclass(frozen=True)
class Workload:
    """One case: attention heads of a known model, a block length (0: single-token decoding), a context length."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_len: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.model}-B{self.block_size}-P{self.context_len}"


HEADS = {"Qwen2.5-1.5B": (12, 2, 128), "Qwen3-8B": (32, 8, 128)}


def workloads(models: tuple[str, ...], block_sizes: tuple[int, ...], contexts: tuple[int, ...]) -> list[Workload]:
    return [Workload(m, *HEADS[m], b, p) for m in models for b in block_sizes for p in contexts]


@dataclass
class Operands:
    """Random operands of a workload, and the calls that are compared on them."""

    case: Workload
    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        case = self.case
        at: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self.pattern = tk.patterns.causal(1) if case.block_size == 0 else tk.patterns.tidar_step(case.block_size)
        rows, max_len = self.pattern.q_len, case.context_len + max(case.block_size, 1)
        kv = (case.batch, case.num_kv_heads)
        self.q = torch.randn(case.batch, case.num_heads, rows, case.head_dim, **at)
        self.k, self.v = (torch.randn(*kv, rows, case.head_dim, **at) for _ in range(2))
        self.k_cache, self.v_cache = (torch.randn(*kv, max_len, case.head_dim, **at) for _ in range(2))
        self.lengths = torch.full((case.batch,), case.context_len, dtype=torch.int32, device=self.device)

    def ours(self) -> torch.Tensor:
        return tk.step_attention(self.q, self.k, self.v, self.k_cache, self.v_cache, self.lengths, self.pattern)

    def dense_sdpa(self) -> torch.Tensor:
        """The usual way: keys concatenated, the mask of the whole row."""
        if not hasattr(self, "mask"):
            self.mask = self.pattern.dense(self.case.context_len).to(self.device)
        n = self.case.context_len
        keys = torch.cat([self.k_cache[:, :, :n], self.k], dim=2)
        values = torch.cat([self.v_cache[:, :, :n], self.v], dim=2)
        return F.scaled_dot_product_attention(self.q, keys, values, attn_mask=self.mask, enable_gqa=True)

    def check(self) -> float:
        """Relative error of ours against the float64 twin on the first sequence.

        Raises:
            RuntimeError: it exceeds the budget of twice eager PyTorch's own error; a red check reports no speed.
        """
        first = [x[:1] for x in (self.q, self.k, self.v, self.k_cache, self.v_cache)]
        twin: Callable[..., torch.Tensor] = tk.eager.step_attention
        exact = twin(*(x.double() for x in first), self.lengths[:1], self.pattern)
        plain = twin(*first, self.lengths[:1], self.pattern)
        error, budget = relative_error(self.ours()[:1], exact), 2 * relative_error(plain, exact) + 1e-5
        if not error <= budget:
            raise RuntimeError(f"{self.case}: expected a relative error <= {budget:.3g} before timing, got {error:.3g}")
        return error


def floors(case: Workload, element_size: int) -> dict[str, float]:
    """FLOPs and bytes that no implementation of the case can avoid."""
    pattern = tk.patterns.causal(1) if case.block_size == 0 else tk.patterns.tidar_step(case.block_size)
    rows = pattern.q_len
    pairs = rows * case.context_len + int(pattern.dense().sum())
    per_token = case.head_dim * element_size * case.batch
    return {
        "rows": rows,
        "flops": 4.0 * pairs * case.head_dim * case.num_heads * case.batch,
        "bytes": per_token * (2.0 * case.num_kv_heads * (case.context_len + rows) + 2.0 * case.num_heads * rows),
    }


def row(case: Workload, name: str, measured: dict[str, float], dtype: torch.dtype, error: float) -> dict[str, Any]:
    """One line of a results file."""
    floor = floors(case, dtype.itemsize)
    seconds = measured["p50_us"] / 1e6
    return {
        "operator": "step_attention",
        "implementation": name,
        "dtype": str(dtype).removeprefix("torch."),
        **vars(case),
        **floor,
        **measured,
        "tflops": round(floor["flops"] / seconds / 1e12, 3),
        "gbytes_per_s": round(floor["bytes"] / seconds / 1e9, 2),
        "relative_error": error,
    }


def run_cuda(case: Workload, dtype: torch.dtype = torch.bfloat16, peers: bool = True) -> list[dict[str, Any]]:
    """Check, then time on CUDA: the kernel, and SDPA with the dense mask."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(16, int(2 * l2 / floors(case, dtype.itemsize)["bytes"]) + 1))
    operands = [Operands(case, "cuda", dtype) for _ in range(copies)]
    error = operands[0].check()
    rows = [row(case, "tidar_kernels", timing.time_cuda([o.ours for o in operands]), dtype, error)]
    if peers:
        measured = timing.time_cuda([o.dense_sdpa for o in operands])
        rows.append(row(case, "sdpa_dense_mask", measured, dtype, 0.0))
    return rows
