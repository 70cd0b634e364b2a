"""Attention over vLLM's paged cache against the dense mask of the same rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tidar_kernels import patterns
from tidar_kernels.integrations.vllm.attention import Rows, append, attend
from tidar_kernels.ops.operands import Scores

PAGE, HEADS, KV_HEADS, DIM = 4, 4, 2, 16


def rows_of(pattern: patterns.Pattern, count: int) -> Rows:
    """The first `count` rows of a pattern: what is left of a step that was cut."""
    return Rows(pattern.lead[:count, 1], pattern.own[:count])


def batch_of(requests: list[tuple[int, patterns.Pattern, int]]) -> tuple[Rows, Tensor, Tensor]:
    rows = [rows_of(pattern, count) for _, pattern, count in requests]
    counts = torch.tensor([count for _, _, count in requests])
    lengths = torch.tensor([context for context, _, _ in requests]) + counts
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Rows(*(torch.cat(part) for part in zip(*rows, strict=True))), lengths.int(), starts.int()


@pytest.mark.parametrize("layout", ["pages first", "heads first"])
def test_every_row_sees_its_intervals(layout: str) -> None:
    requests = [
        (13, patterns.tidar_step(4), 20),
        (0, patterns.causal(9), 9),
        (7, patterns.causal(3), 3),
        (16, patterns.tidar_step(4), 14),  # cut within a block
        (5, patterns.tidar_step(4), 2),  # cut within the drafts
        (9, patterns.isd_step(3, bidirectional=True), 5),
    ]
    rows, lengths, starts = batch_of(requests)
    tokens, pages = int(starts[-1]), 40
    q, k, v = (torch.randn(tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    shape = (pages, KV_HEADS, PAGE, 2 * DIM)
    cache = torch.full(shape, torch.nan)
    if layout == "heads first":
        cache = torch.full((KV_HEADS, pages, PAGE, 2 * DIM), torch.nan).transpose(0, 1)
    table = torch.randperm(pages).int()[: 6 * 6].view(6, 6)
    contexts = [
        (torch.randn(context, KV_HEADS, DIM), torch.randn(context, KV_HEADS, DIM)) for context, _, _ in requests
    ]
    for request, (context_k, context_v) in enumerate(contexts):
        places = torch.arange(len(context_k))
        append(cache, context_k, context_v, table[request, places // PAGE].long() * PAGE + places % PAGE)
    out = torch.full((tokens, HEADS * DIM), torch.nan)
    halves = cache.chunk(2, dim=-1)
    attend(q, k, v, halves, table, lengths, starts, rows, Scores(DIM**-0.5), out, max_query_len=20)

    for request, (context, pattern, count) in enumerate(requests):
        here = slice(int(starts[request]), int(starts[request + 1]))
        keys, values = (torch.cat([c, x[here]]).double() for c, x in zip(contexts[request], (k, v), strict=True))
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[here].double(), keys) * DIM**-0.5
        visible = pattern.dense(context)[:count, : context + count]
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
        torch.testing.assert_close(out[here].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_token_without_a_slot_is_not_stored() -> None:
    cache = torch.zeros(3, KV_HEADS, PAGE, 2 * DIM)
    key, value = torch.randn(3, KV_HEADS, DIM), torch.randn(3, KV_HEADS, DIM)
    append(cache, key, value, torch.tensor([5, -1, 11, 0]))  # padded, as the runner's slots are
    expected = torch.zeros_like(cache)
    for token, (page, slot) in {0: (1, 1), 2: (2, 3)}.items():
        expected[page, :, slot] = torch.cat([key[token], value[token]], dim=-1)
    torch.testing.assert_close(cache, expected, rtol=0, atol=0)
