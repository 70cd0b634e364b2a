"""`compact_kv`: the accepted path of a token tree moved together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import tidar_kernels as tk

from ..core.operands import OURS, Implementation, Operands, Prepared
from .models import cache_of


@dataclass(frozen=True)
class Compact:
    """Every other of `nodes` nodes of one layer, after `context_len` committed tokens."""

    model: str
    num_kv_heads: int
    head_dim: int
    nodes: int
    context_len: int
    batch: int = 1


def _ours(o: CompactKV) -> Prepared:
    return Prepared(lambda: tk.compact_kv(o.k_cache, o.v_cache, o.lengths, o.path))


def _index(o: CompactKV) -> Prepared:
    """The usual way: a gather and an indexed assignment."""
    sequence = torch.arange(o.case.batch, device=o.device)[:, None]
    first = o.lengths.long()[:, None]
    to, of = first + torch.arange(o.path.shape[1], device=o.device), first + o.path

    def run() -> None:
        for cache in (o.k_cache, o.v_cache):
            tokens = cache.transpose(1, 2)
            tokens[sequence, to] = tokens[sequence, of]

    return Prepared(run)


class CompactKV(Operands):
    operator = "compact_kv"
    workload = Compact
    implementations: ClassVar = {
        OURS: Implementation("tidar_kernels", _ours),
        "indexed": Implementation("indexed assignment", _index),
    }
    cpu = (Compact(*cache_of("Qwen3-8B"), 16, 1000, 4),)
    cuda = tuple(Compact(*cache_of("Qwen3-8B"), 16, 4096, batch) for batch in (1, 64))
    tiny = (Compact("tiny", 2, 16, 6, 40, 2),)
    case: Compact

    def make(self) -> None:
        case = self.case
        shape = (case.batch, case.num_kv_heads, case.context_len + case.nodes, case.head_dim)
        self.k_cache, self.v_cache = self.random(*shape), self.random(*shape)
        lengths = torch.randint(max(1, case.context_len // 2), case.context_len + 1, (case.batch,))
        self.lengths = lengths.to(self.device, torch.int32)
        self.path: Tensor = torch.arange(1, case.nodes, 2, device=self.device).repeat(case.batch, 1)

    def check(self, name: str, prepared: Prepared) -> float:
        before = self.k_cache.clone(), self.v_cache.clone()
        tk.eager.compact_kv(*before, self.lengths, self.path)
        prepared.run()
        if not (torch.equal(self.k_cache, before[0]) and torch.equal(self.v_cache, before[1])):
            raise self.wrong(name, "the bits of the twin, got others")
        return 0.0

    def floor(self, name: str = OURS) -> dict[str, float]:
        """All slots of the path change place: K and V, read and written."""
        values = self.path.numel() * self.case.num_kv_heads * self.case.head_dim
        return {"rows": self.path.shape[1], "bytes": 4.0 * values * self.dtype.itemsize, "flops": 0.0}
