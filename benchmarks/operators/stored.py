"""Step attention by how rows and cache are kept: pages, float8, more slots than tokens, ragged rows, each beside plain.

A cache of many more slots than tokens is what a captured graph has: it knows no lengths, so it launches programs for
the whole capacity, and those past the context end at once. What they cost is the row against that of the plain cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tidar_kernels as tk
from tidar_kernels import KVCache

from ..core.operands import OURS, Expected, Implementation, Prepared
from .models import attention_of
from .step_attention import Step, StepAttention

FLOAT8 = "float8_e4m3fn"
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class StoredStep(Step):
    """A step, and its cache: tokens of a page (0: contiguous), dtype ("": that of q), slots (0: as many as needed).

    `ragged`: rows of all sequences one after another, and what the batch is made of on the device.
    """

    page_size: int = 0
    cache_dtype: str = ""
    capacity: int = 0
    ragged: bool = False

    @property
    def plain(self) -> StoredStep:
        """The same step, not ragged, over a contiguous cache of the dtype of q without a slot to spare."""
        return replace(self, page_size=0, cache_dtype="", capacity=0, ragged=False)


def kept(model: str, block_size: int, context_len: int, batch: int = 1) -> list[StoredStep]:
    """A step over a plain cache first, then over pages, float8, and both; ragged, and ragged over pages."""
    make = partial(StoredStep, *attention_of(model), block_size, context_len, batch)
    stored = [make(), make(page_size=16), make(cache_dtype=FLOAT8), make(page_size=16, cache_dtype=FLOAT8)]
    return [*stored, make(ragged=True), make(page_size=16, ragged=True)]


def sweep(model: str, block_size: int, context_len: int, *capacities: int) -> list[StoredStep]:
    """A step over a plain cache, then over larger and larger ones that are as full."""
    make = partial(StoredStep, *attention_of(model), block_size, context_len, 1)
    return [make(), *(make(capacity=capacity) for capacity in capacities)]


class StoredAttention(StepAttention):
    operator = "step_stored"
    workload = StoredStep
    cuda = (
        *sweep("Qwen3-8B", 16, 512, 4096, 32768, 131072),
        *sweep("Qwen3-8B", 4, 512, 4096, 32768),
        *kept("Qwen3-8B", 8, 8192),
        *kept("Qwen3-8B", 8, 8192, batch=8),
        *kept("Qwen3-8B", 0, 32768),
    )
    cpu = ()
    tiny = (
        StoredStep("tiny", 4, 2, 16, 4, 40),
        StoredStep("tiny", 4, 2, 16, 4, 40, page_size=16),
        StoredStep("tiny", 4, 2, 16, 4, 40, cache_dtype=FLOAT8),
        StoredStep("tiny", 4, 2, 16, 4, 40, capacity=256),
        StoredStep("tiny", 4, 2, 16, 4, 40, batch=2, ragged=True),
    )
    compiled = ()

    def make(self) -> None:
        super().make()
        case = self.case
        stored = getattr(torch, case.cache_dtype) if case.cache_dtype else self.dtype
        self.cache = KVCache(
            num_layers=1,
            batch_size=case.batch,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            max_len=max(case.capacity, self.k_cache.shape[2]),
            dtype=stored,
            device=self.device,
            page_size=case.page_size or None,
        )
        self.cache.append(0, self.k_cache[:, :, : case.context_len], self.v_cache[:, :, : case.context_len])
        self.cache.commit(case.context_len)
        self.cache.check_room(max(case.block_size, 1))
        if case.page_size:
            self._shuffle()

    def _shuffle(self) -> None:
        """Pages lie in any order, as they do after a while."""
        table = self.cache.block_table
        order = torch.randperm(self.cache.k.shape[1], device=self.device)
        for x in (self.cache.k, self.cache.v, self.cache.k_scale, self.cache.v_scale):
            if x is not None:
                stored = x.view(torch.uint8) if x.dtype in FLOAT8_DTYPES else x
                stored[:, order] = stored.clone()
        if table is not None:
            table.copy_(order[table.long()])

    def _twin_in(self, dtype: torch.dtype) -> Tensor:
        """Of the first sequence."""
        layer, options = self.cache.layer(0), self.cache.options(0)
        one = slice(0, 1)
        if self.cache.page_size is None:
            held = one, slice(None), slice(0, self.case.context_len)
            layer = layer[0][held], layer[1][held]
            options = {name: x[held] for name, x in options.items()}
        else:  # pages are everybody's
            options |= {"block_table": options["block_table"][one]}
        if self.cache.k.dtype == self.dtype:
            layer = layer[0].to(dtype), layer[1].to(dtype)
        new = (x[one].to(dtype) for x in (self.q, self.k, self.v))
        twin: Callable[..., Tensor] = tk.eager.step_attention
        return twin(*new, *layer, self.cache.lengths[one], self.pattern, **options)

    def expected(self, name: str) -> list[Expected]:
        return [Expected(self._twin_in(torch.float64), self._twin_in(self.dtype))]

    def floor(self, name: str = OURS) -> dict[str, float]:
        found, case = super().floor(name), self.case
        width = self.cache.k.dtype.itemsize
        context = 2 * case.num_kv_heads * case.context_len * case.batch
        found["bytes"] -= context * case.head_dim * (self.dtype.itemsize - width)
        found["bytes"] += context * 4 if self.cache.k_scale is not None else 0
        return found

    @classmethod
    def before(cls, case: StoredStep) -> Sequence[StoredStep]:
        return () if case == case.plain else (case.plain,)

    def further(self, line: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`of_plain`: its time over that of the plain cache."""
        plain = vars(self.case.plain)
        for row in rows:
            alike = row["operator"] == self.operator and all(row.get(name) == x for name, x in plain.items())
            if alike and "p50_us" in row and self.case != self.case.plain:
                return {"of_plain": round(line["p50_us"] / row["p50_us"], 3)}
        return {}


def _call(operands: StoredAttention) -> Any:
    layer, options = operands.cache.layer(0), operands.cache.options(0)
    o, lengths = operands, operands.cache.lengths
    if o.case.ragged:
        batch = tk.patterns.batch([o.pattern] * o.case.batch).to(o.device)
        q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (o.q, o.k, o.v))
        return Prepared(
            lambda: tk.step_attention(q, k, v, *layer, lengths, batch, **options),
            lambda found: found.unflatten(0, (o.case.batch, -1)).transpose(1, 2),
        )
    return lambda: tk.step_attention(o.q, o.k, o.v, *layer, lengths, o.pattern, **options)


StoredAttention.implementations = {OURS: Implementation(OURS, _call)}
