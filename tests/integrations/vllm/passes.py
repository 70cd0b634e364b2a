"""Passes of an engine, made up: requests of all kinds, their cache in any of vLLM's layouts, what must come out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar_kernels import patterns
from tidar_kernels.integrations.vllm.attention import Batch, Buffers, Path, Rows, step
from tidar_kernels.ops.operands import Scores
from tidar_kernels.ops.paging import dequantise, quantise

PAGE, PAGES, COLUMNS, HEADS, KV_HEADS, DIM = 4, 96, 10, 4, 2, 16
MOST_REQUESTS, MOST_ROWS = 9, 80
LAYERS = 2
# The orders in memory that vLLM has for [layer, page, head, slot, key and value] (`KVCacheLayout`).
LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (0.37, 2.5)


@dataclass(frozen=True)
class Request:
    """`chunk` causal rows, and the first `rows` of a pattern after them, behind a context."""

    context: int
    pattern: patterns.Pattern
    rows: int
    chunk: int = 0

    @property
    def count(self) -> int:
        return self.chunk + self.rows

    @property
    def kept(self) -> int:
        return self.chunk + min(self.rows, self.pattern.kept_len)

    def sees(self) -> Rows:
        pattern, rows = self.pattern, self.rows
        lead = torch.cat([torch.arange(1, self.chunk + 1), self.chunk + pattern.lead[:rows, 1]])
        own = torch.cat([torch.zeros(self.chunk, 2), self.chunk + pattern.own[:rows]])
        return Rows(lead.int(), own.int())

    def visible(self) -> Tensor:
        """bool `[count, context + count]`."""
        before = self.context + self.chunk
        causal = torch.ones(self.chunk, before + self.rows, dtype=torch.bool).tril(self.context)
        return torch.cat([causal, self.pattern.dense(before)[: self.rows, : before + self.rows]])


MIX = (
    Request(13, patterns.tidar_step(4), 20),
    Request(0, patterns.causal(9), 9),
    Request(7, patterns.causal(3), 3),
    Request(11, patterns.tidar_step(4), 0),  # idle
    Request(16, patterns.tidar_step(4), 14),  # cut within a block
    Request(5, patterns.tidar_step(4), 2),  # cut within the drafts
    Request(9, patterns.isd_step(3, bidirectional=True), 5),
    Request(3, patterns.tidar_step(2), 6, chunk=5),  # the end of a prompt, and a step at once
)


def cache_in(layout: str, dtype: torch.dtype) -> Tensor:
    """A layer's `[pages, kv_heads, page_size, 2 * head_dim]` of a cache in this order of memory, full of NaN."""
    order = LAYOUTS[layout]
    shape = (LAYERS, PAGES, KV_HEADS, PAGE, 2 * DIM)
    whole = torch.full([shape[axis] for axis in order], torch.nan).to(dtype)
    return whole.permute([order.index(axis) for axis in range(5)])[1]


class Pass:
    """A pass of some requests, padded to `MOST_ROWS` rows and `MOST_REQUESTS` requests, as vLLM's runner has it."""

    def __init__(self, requests: tuple[Request, ...], layout: str, dtype: torch.dtype = torch.float32) -> None:
        self.requests, self.dtype = requests, dtype
        counts = torch.tensor([request.count for request in requests] + [0] * (MOST_REQUESTS - len(requests)))
        contexts = torch.tensor([request.context for request in requests])
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        self.seq_lens = torch.zeros(MOST_REQUESTS, dtype=torch.int32)
        self.seq_lens[: len(requests)] = contexts + counts[: len(requests)]
        self.q, self.k, self.v = (torch.randn(MOST_ROWS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.contexts = [torch.randn(2, request.context, KV_HEADS, DIM) for request in requests]
        self.scales = tuple(map(torch.tensor, SCALES)) if dtype in FLOAT8 else None
        self.table = torch.randperm(PAGES)[: MOST_REQUESTS * COLUMNS - 6].int()
        self.table = torch.cat([self.table, torch.full((6,), 10**6)]).view(MOST_REQUESTS, COLUMNS).int()
        self.slots = torch.full((MOST_ROWS,), -1)
        self.cache, self.expected_cache = cache_in(layout, dtype), cache_in(layout, dtype)
        for index, request in enumerate(requests):
            self.write(self.cache, index, 0, self.contexts[index])
            self.write(self.expected_cache, index, 0, self.contexts[index])
            first = int(self.starts[index])
            kept = slice(first, first + request.kept)
            self.write(self.expected_cache, index, request.context, torch.stack([self.k[kept], self.v[kept]]))
            self.slots[kept] = self.slot(index, torch.arange(request.context, request.context + request.kept))

    def slot(self, index: int, at: Tensor) -> Tensor:
        return self.table[index, at // PAGE].long() * PAGE + at % PAGE

    def held(self, values: Tensor) -> Tensor:
        """Keys and values `[2, rows, kv_heads, d]` as they come back from the cache."""
        if self.scales is None:
            return values
        pairs = zip(values, self.scales, strict=True)
        return torch.stack([dequantise(*quantise(x, s.expand(x.shape[:2]), self.dtype)) for x, s in pairs])

    def write(self, cache: Tensor, index: int, first: int, values: Tensor) -> None:
        slot = self.slot(index, torch.arange(first, first + values.shape[1]))
        if self.scales is not None:
            pairs = zip(values, self.scales, strict=True)
            values = torch.stack([quantise(x, s.expand(x.shape[:2]), self.dtype)[0] for x, s in pairs])
        cache[slot // PAGE, :, slot % PAGE] = torch.cat([*values], dim=-1)

    def rows(self) -> Rows:
        return Rows(*map(torch.cat, zip(*(request.sees() for request in self.requests), strict=True)))

    def fill(self, buffers: Buffers, rows: Rows | None) -> Batch:
        return buffers.fill(
            *(self.starts, self.seq_lens, self.table, self.slots, rows),
            num_rows=MOST_ROWS,
            max_rows=max(request.count for request in self.requests),
            max_seq_len=COLUMNS * PAGE,
        )

    def run(self, path: Path, batch: Batch) -> Tensor:
        out = torch.full((MOST_ROWS, HEADS * DIM), torch.nan)
        halves = self.cache[..., :DIM], self.cache[..., DIM:]
        step(path, self.q, self.k, self.v, halves, batch, Scores(DIM**-0.5), out, self.scales)
        return out

    def expected(self) -> Tensor:
        out = torch.zeros(MOST_ROWS, HEADS * DIM, dtype=torch.float64)
        for index, request in enumerate(self.requests):
            here = slice(int(self.starts[index]), int(self.starts[index + 1]))
            new = torch.stack([self.k[here], self.v[here]])
            new = torch.cat([self.held(new[:, : request.kept]), new[:, request.kept :]], dim=1)
            keys, values = torch.cat([self.held(self.contexts[index]), new], dim=1).double()
            keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", self.q[here].double(), keys) * DIM**-0.5
            weights = scores.masked_fill(~request.visible(), -torch.inf).softmax(-1)
            out[here] = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
        return out

    def check(self, out: Tensor) -> None:
        torch.testing.assert_close(out.double(), self.expected(), rtol=1e-5, atol=1e-5)
        got, wanted = (x.contiguous().view(torch.uint8) for x in (self.cache, self.expected_cache))
        assert torch.equal(got, wanted)  # and not a bit of another slot
