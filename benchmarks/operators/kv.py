"""Caches of one layer: `append_kv`, `compact_kv`, `rotary_append`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

import tidar_kernels as tk
from tidar_kernels.nn.rotary import RotaryEmbedding, apply_rotary
from tidar_kernels.ops import rotary_append

from ..core.operands import OURS, Expected, Implementation, Operands, Prepared, workload
from .models import attention_of, cache_of

QWEN2, QWEN3 = cache_of("Qwen2.5-1.5B"), cache_of("Qwen3-8B")
CACHE: dict[str, Any] = {"model": str, "num_kv_heads": int, "head_dim": int}
CONTEXT: dict[str, Any] = {"context_len": int, "batch": 1}
Append = workload("Append", **CACHE, new_tokens=int, **CONTEXT)
Compact = workload("Compact", **CACHE, nodes=int, **CONTEXT)
Rotation = workload("Rotation", model=str, num_heads=int, num_kv_heads=int, head_dim=int, block_size=int, **CONTEXT)


class Caches(Operands):
    """Caches of ragged sequences, as in a batch of requests, whose bits after a call are compared."""

    def make_caches(self, new: int) -> None:
        """Room for `new` tokens after each context."""
        case = self.case
        shape = case.batch, case.num_kv_heads, case.context_len + new, case.head_dim
        self.k_cache, self.v_cache = self.random(*shape), self.random(*shape)
        lengths = torch.randint(max(1, case.context_len // 2), case.context_len + 1, (case.batch,))
        self.lengths = lengths.to(self.device, torch.int32)

    def twin(self, k_cache: Tensor, v_cache: Tensor) -> None:
        """The eager operator."""
        raise NotImplementedError

    def expected(self, name: str) -> list[Expected]:
        caches = self.k_cache.clone(), self.v_cache.clone()
        self.twin(*caches)
        return [Expected(cache) for cache in caches]

    def results(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        prepared.run()
        return self.k_cache, self.v_cache

    def moved(self, tokens: int) -> dict[str, float]:
        """The floor of `tokens` tokens a sequence, whose K and V are read and written."""
        values = tokens * self.case.batch * self.case.num_kv_heads * self.case.head_dim
        return {"rows": tokens, "bytes": 4.0 * values * self.dtype.itemsize, "flops": 0.0}


def _append_copy(o: AppendKV) -> Callable[[], Any]:
    """What moves as many bytes without looking where: the bandwidth to reach."""
    new = torch.stack([o.k, o.v])
    target = torch.empty_like(new)
    return lambda: target.copy_(new)


def _append_indexed(o: AppendKV) -> Callable[[], Any]:
    """The usual way: indexed assignment at every sequence's length."""
    sequence = torch.arange(o.case.batch, device=o.device)[:, None]
    slot = o.lengths.long()[:, None] + torch.arange(o.case.new_tokens, device=o.device)

    def run() -> None:
        for cache, new in ((o.k_cache, o.k), (o.v_cache, o.v)):
            cache.transpose(1, 2)[sequence, slot] = new.transpose(1, 2)

    return run


class AppendKV(Caches):
    """`new_tokens` of one layer after `context_len` committed ones."""

    operator = "append_kv"
    workload = Append
    implementations: ClassVar = {
        OURS: Implementation(OURS, lambda o: lambda: tk.append_kv(o.k_cache, o.v_cache, o.k, o.v, o.lengths)),
        "indexed": Implementation("indexed assignment", _append_indexed),
        "copy": Implementation("copy_ of as many bytes", _append_copy, ceiling=True),
    }
    cpu = (*(Append(*QWEN2, n, 1000, 1) for n in (4, 16)), Append(*QWEN3, 8, 1000, 4))
    # From one sequence's drafts to a prefill chunk of many: what a launch costs, and what bandwidth it reaches.
    cuda = (
        *(Append(*QWEN3, n, 4096, batch) for n, batch in ((8, 1), (16, 1), (16, 64), (512, 64))),
        Append(*QWEN2, 16, 4096, 64),
    )
    tiny = (Append("tiny", 2, 16, 4, 40, 2),)

    def make(self) -> None:
        case = self.case
        self.make_caches(case.new_tokens)
        self.k, self.v = (self.random(case.batch, case.num_kv_heads, case.new_tokens, case.head_dim) for _ in "kv")

    def twin(self, k_cache: Tensor, v_cache: Tensor) -> None:
        tk.eager.append_kv(k_cache, v_cache, self.k, self.v, self.lengths)

    def floor(self, name: str = OURS) -> dict[str, float]:
        return self.moved(self.case.new_tokens)


def _compact_indexed(o: CompactKV) -> Callable[[], Any]:
    """The usual way: a gather and an indexed assignment."""
    sequence = torch.arange(o.case.batch, device=o.device)[:, None]
    first = o.lengths.long()[:, None]
    to, of = first + torch.arange(o.path.shape[1], device=o.device), first + o.path

    def run() -> None:
        for cache in (o.k_cache, o.v_cache):
            tokens = cache.transpose(1, 2)
            tokens[sequence, to] = tokens[sequence, of]

    return run


class CompactKV(Caches):
    """The accepted path of a token tree, every other of `nodes` nodes after the context, is moved together."""

    operator = "compact_kv"
    workload = Compact
    implementations: ClassVar = {
        OURS: Implementation(OURS, lambda o: lambda: tk.compact_kv(o.k_cache, o.v_cache, o.lengths, o.path)),
        "indexed": Implementation("indexed assignment", _compact_indexed),
    }
    cpu = (Compact(*QWEN3, 16, 1000, 4),)
    cuda = tuple(Compact(*QWEN3, 16, 4096, batch) for batch in (1, 64))
    tiny = (Compact("tiny", 2, 16, 6, 40, 2),)

    def make(self) -> None:
        self.make_caches(self.case.nodes)
        self.path: Tensor = torch.arange(1, self.case.nodes, 2, device=self.device).repeat(self.case.batch, 1)

    def twin(self, k_cache: Tensor, v_cache: Tensor) -> None:
        tk.eager.compact_kv(k_cache, v_cache, self.lengths, self.path)

    def floor(self, name: str = OURS) -> dict[str, float]:
        return self.moved(self.path.shape[1])  # all slots of the path change place


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The rotation in PyTorch."""
    return apply_rotary(x.transpose(1, 2), rotary).transpose(1, 2)


def _rotary_unfused(o: RotaryAppend) -> Callable[[], Any]:
    def run() -> tuple[Tensor, Tensor]:
        q, k = _rotated(o.q, o.rotary), _rotated(o.k, o.rotary)
        tk.append_kv(o.k_cache, o.v_cache, k[:, :, : o.keep], o.v[:, :, : o.keep], o.lengths)
        return q, k

    return run


class RotaryAppend(Operands):
    """All rows of a step of `block_size` drafts after the context are rotated, its drafts appended."""

    operator = "rotary_append"
    workload = Rotation
    implementations: ClassVar = {
        OURS: Implementation(
            OURS, lambda o: lambda: rotary_append(o.q, o.k, o.v, o.rotary, o.k_cache, o.v_cache, o.lengths, o.keep)
        ),
        "unfused": Implementation("rotation in PyTorch, then append_kv", _rotary_unfused),
    }
    cpu = tuple(Rotation(*attention_of("Qwen2.5-1.5B"), block, 1000) for block in (4, 8, 16))
    cuda = (
        *(Rotation(*attention_of("Qwen3-8B"), *sizes) for sizes in ((4, 4096), (8, 4096), (16, 4096), (16, 4096, 32))),
        Rotation(*attention_of("Qwen3-32B"), 16, 4096, 32),
    )
    tiny = (Rotation("tiny", 4, 2, 16, 4, 40),)

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

    def expected(self, name: str) -> list[Expected]:
        cos, sin = (x.double() for x in self.rotary)
        return [Expected(_rotated(x.double(), (cos, sin)), _rotated(x, self.rotary)) for x in (self.q, self.k)]

    def check(self, name: str, prepared: Prepared) -> float:
        """The rotation, and that the cache has its very bits."""
        error, (_, k) = super().check(name, prepared), prepared.run()
        kept = (self.k_cache[:, :, -self.keep :], k), (self.v_cache[:, :, -self.keep :], self.v)
        if not all(torch.equal(cache, new[:, :, : self.keep]) for cache, new in kept):
            raise self.wrong(name, "the appended bits of k and v, got others")
        return error

    def floor(self, name: str = OURS) -> dict[str, float]:
        """q and k read and written, cos and sin read, the drafts' v read and their k and v written."""
        drafts = self.k[:, :, : self.keep].numel()
        elements = 2 * self.q.numel() + 2 * self.k.numel() + 3 * drafts + 2 * self.rotary[0].numel()
        return {"rows": self.q.shape[2], "bytes": float(elements * self.dtype.itemsize), "flops": 0.0}
