"""`rotary_append`: all rows of a step rotated, its drafts appended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import tidar_kernels as tk
from tidar_kernels.nn.rotary import RotaryEmbedding, apply_rotary
from tidar_kernels.ops import rotary_append

from ..core.operands import OURS, Implementation, Operands, Prepared
from .models import attention_of


@dataclass(frozen=True)
class Rotation:
    """The rows of a step of `block_size` drafts after `context_len` committed tokens."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_len: int
    batch: int = 1


def _rotary_ours(o: RotaryAppend) -> Prepared:
    return Prepared(lambda: rotary_append(o.q, o.k, o.v, o.rotary, o.k_cache, o.v_cache, o.lengths, o.keep))


def _rotary_unfused(o: RotaryAppend) -> Prepared:
    """The rotation in PyTorch, then the append."""

    def run() -> tuple[Tensor, Tensor]:
        q, k = (apply_rotary(x.transpose(1, 2), o.rotary).transpose(1, 2) for x in (o.q, o.k))
        tk.append_kv(o.k_cache, o.v_cache, k[:, :, : o.keep], o.v[:, :, : o.keep], o.lengths)
        return q, k

    return Prepared(run)


class RotaryAppend(Operands):
    operator = "rotary_append"
    workload = Rotation
    implementations: ClassVar = {
        OURS: Implementation("tidar_kernels", _rotary_ours),
        "unfused": Implementation("rotation in PyTorch, then append_kv", _rotary_unfused),
    }
    cpu = tuple(Rotation(*attention_of("Qwen2.5-1.5B"), block, 1000) for block in (4, 8, 16))
    cuda = (
        *(
            Rotation(*attention_of("Qwen3-8B"), block, 4096, batch)
            for block, batch in ((4, 1), (8, 1), (16, 1), (16, 32))
        ),
        Rotation(*attention_of("Qwen3-32B"), 16, 4096, 32),
    )
    tiny = (Rotation("tiny", 4, 2, 16, 4, 40),)
    case: Rotation

    def make(self) -> None:
        case, pattern = self.case, tk.patterns.tidar_step(self.case.block_size)
        self.keep = case.block_size
        self.q = self.random(case.batch, case.num_heads, pattern.q_len, case.head_dim)
        self.k, self.v = (self.random(case.batch, case.num_kv_heads, pattern.q_len, case.head_dim) for _ in "kv")
        shape = (case.batch, case.num_kv_heads, case.context_len + self.keep, case.head_dim)
        self.k_cache, self.v_cache = self.random(*shape), self.random(*shape)
        self.lengths = torch.full((case.batch,), case.context_len, dtype=torch.int32, device=self.device)
        positions = (pattern.positions + case.context_len).expand(case.batch, -1).to(self.device)
        self.rotary = RotaryEmbedding(case.head_dim).to(self.device)(positions, self.dtype)

    def check(self, name: str, prepared: Prepared) -> float:
        q, k = prepared.run()
        plain = [apply_rotary(x.transpose(1, 2), self.rotary).transpose(1, 2) for x in (self.q, self.k)]
        wide = [x.double() for x in self.rotary]
        exact = [apply_rotary(x.double().transpose(1, 2), (wide[0], wide[1])).transpose(1, 2) for x in (self.q, self.k)]
        error = max(self.within(name, *three) for three in zip((q, k), exact, plain, strict=True))
        kept = (self.k_cache[:, :, -self.keep :], k), (self.v_cache[:, :, -self.keep :], self.v)
        if not all(torch.equal(cache, new[:, :, : self.keep]) for cache, new in kept):
            raise self.wrong(name, "the appended bits of k and v, got others")
        return error

    def floor(self, name: str = OURS) -> dict[str, float]:
        """q and k read and written, cos and sin read, the drafts' v read and their k and v written."""
        drafts = self.k[:, :, : self.keep].numel()
        elements = 2 * self.q.numel() + 2 * self.k.numel() + 3 * drafts + 2 * self.rotary[0].numel()
        return {"rows": self.q.shape[2], "bytes": float(elements * self.dtype.itemsize), "flops": 0.0}
