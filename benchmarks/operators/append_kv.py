"""`append_kv`: new tokens of one layer after the committed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import tidar_kernels as tk

from ..core.operands import OURS, Implementation, Operands, Prepared
from .models import cache_of

QWEN2, QWEN3 = cache_of("Qwen2.5-1.5B"), cache_of("Qwen3-8B")


@dataclass(frozen=True)
class Append:
    """`new_tokens` of one layer after `context_len` committed ones."""

    model: str
    num_kv_heads: int
    head_dim: int
    new_tokens: int
    context_len: int
    batch: int = 1


def _append_ours(o: AppendKV) -> Prepared:
    return Prepared(lambda: tk.append_kv(o.k_cache, o.v_cache, o.k, o.v, o.lengths))


def _append_copy(o: AppendKV) -> Prepared:
    """What moves as many bytes without looking where: the bandwidth to reach."""
    new, target = torch.stack([o.k, o.v]), torch.empty_like(torch.stack([o.k, o.v]))
    return Prepared(lambda: target.copy_(new))


def _append_index(o: AppendKV) -> Prepared:
    """The usual way: indexed assignment at every sequence's length."""
    batch, _, n, _ = o.k.shape
    sequence = torch.arange(batch, device=o.device)[:, None]
    slot = o.lengths.long()[:, None] + torch.arange(n, device=o.device)

    def run() -> None:
        for cache, new in ((o.k_cache, o.k), (o.v_cache, o.v)):
            cache.transpose(1, 2)[sequence, slot] = new.transpose(1, 2)

    return Prepared(run)


class AppendKV(Operands):
    operator = "append_kv"
    workload = Append
    implementations: ClassVar = {
        OURS: Implementation("tidar_kernels", _append_ours),
        "indexed": Implementation("indexed assignment", _append_index),
        "copy": Implementation("copy_ of as many bytes", _append_copy, ceiling=True),
    }
    cpu = (*(Append(*QWEN2, n, 1000, 1) for n in (4, 16)), Append(*QWEN3, 8, 1000, 4))
    # From one sequence's drafts to a prefill chunk of many: what a launch costs, and what bandwidth it reaches.
    cuda = (
        *(Append(*QWEN3, n, 4096, batch) for n, batch in ((8, 1), (16, 1), (16, 64), (512, 64))),
        Append(*QWEN2, 16, 4096, 64),
    )
    tiny = (Append("tiny", 2, 16, 4, 40, 2),)
    case: Append

    def make(self) -> None:
        case = self.case
        shape = (case.batch, case.num_kv_heads)
        self.k, self.v = (self.random(*shape, case.new_tokens, case.head_dim) for _ in "kv")
        max_len = case.context_len + case.new_tokens
        self.k_cache, self.v_cache = (self.random(*shape, max_len, case.head_dim) for _ in "kv")
        # Ragged, as in a batch of requests.
        lengths = torch.randint(max(1, case.context_len // 2), case.context_len + 1, (case.batch,))
        self.lengths = lengths.to(self.device, torch.int32)

    def check(self, name: str, prepared: Prepared) -> float:
        before = self.k_cache.clone(), self.v_cache.clone()
        tk.eager.append_kv(*before, self.k, self.v, self.lengths)
        prepared.run()
        if not (torch.equal(self.k_cache, before[0]) and torch.equal(self.v_cache, before[1])):
            raise self.wrong(name, "the bits of the twin, got others")
        return 0.0

    def floor(self, name: str = OURS) -> dict[str, float]:
        return {"rows": self.case.new_tokens, "bytes": 4.0 * self.k.nbytes, "flops": 0.0}  # K and V, read and written
