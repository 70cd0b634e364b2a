"""Peers that are not installed here: their adapters, against stand-ins that do what the libraries document."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import operands as core
from benchmarks.operators import step_peers as peers
from benchmarks.operators.step_attention import Step, StepAttention


@pytest.fixture
def operands() -> StepAttention:
    return StepAttention(Step("tiny", 4, 2, 16, 4, 40, 2), "cpu", torch.float32)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one sequence, `[rows, heads, head_dim]`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


class Wrapper:
    """FlashInfer's paged prefill: pages `[page, K or V, token, head, dim]`, masks flat, one sequence after another."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")

    def plan(self, *plan: Any, custom_mask: Tensor, q_data_type: Any, kv_data_type: Any) -> None:
        self.rows, self.pages, self.indices, self.last, _, self.heads, self.dim, self.page = plan
        self.mask = custom_mask

    def run(self, q: Tensor, cache: Tensor) -> Tensor:
        outs, at = [], 0
        for b in range(len(self.rows) - 1):
            mine = q[self.rows[b] : self.rows[b + 1]]
            pages = cache[self.indices[self.pages[b] : self.pages[b + 1]].long()]
            length = (len(pages) - 1) * self.page + int(self.last[b])
            k, v = (pages[:, i].reshape(-1, self.heads, self.dim)[:length] for i in (0, 1))
            mask = self.mask[at : at + len(mine) * length].view(len(mine), length)
            outs.append(attend(mine, k, v, mask))
            at += len(mine) * length
        assert at == len(self.mask)
        return torch.cat(outs)


def extend_attention_fwd(
    q_extend: Tensor, k_extend: Tensor, v_extend: Tensor, o_extend: Tensor, k_buffer: Tensor, v_buffer: Tensor,
    qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, custom_mask: Tensor, is_causal: bool,
    mask_indptr: Tensor, max_len_extend: int, sm_scale: float | None = None,
) -> None:  # fmt: skip
    """SGLang's extend kernel: cached keys by index, then the new ones; a mask row is as long as both."""
    assert not is_causal
    for b in range(len(qo_indptr) - 1):
        rows, indices = slice(qo_indptr[b], qo_indptr[b + 1]), kv_indices[kv_indptr[b] : kv_indptr[b + 1]]
        assert rows.stop - rows.start <= max_len_extend
        k, v = (torch.cat([old[indices], new[rows]]) for old, new in ((k_buffer, k_extend), (v_buffer, v_extend)))
        mask = custom_mask[mask_indptr[b] : mask_indptr[b + 1]].view(-1, len(k))
        o_extend[rows] = attend(q_extend[rows], k, v, mask)


@pytest.mark.parametrize("name", ["flashinfer", "sglang_extend"])
@pytest.mark.parametrize("where", peers.SGLANG)
def test_adapters(name: str, where: str, operands: StepAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = where.split(".")
    for module in ("flashinfer", *(".".join(parts[: n + 1]) for n in range(len(parts)))):
        stand_in = ModuleType(module)
        stand_in.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
        stand_in.extend_attention_fwd = extend_attention_fwd  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module, stand_in)
    peer = peers.STEP[name]
    assert operands.check(name, peer.prepare(operands)) < 1e-6
    assert peer.absent("cpu") == "runs on cuda"


def test_what_is_not_there_is_listed_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    find = core.importlib.util.find_spec
    monkeypatch.setattr(core.importlib.util, "find_spec", lambda name: None if name == "flash_attn" else find(name))
    listed = {row["implementation"]: row for row in core.listing(StepAttention, "cuda")}
    assert listed["flash_attention_2"]["absent"] == "no module flash_attn"
    assert listed["flash_attention_2"]["install"].startswith("pip install flash-attn")
    assert listed["flex_attention"]["absent"] is None
    assert listed["flex_attention"]["version"]
    assert "tidar_kernels" not in listed
