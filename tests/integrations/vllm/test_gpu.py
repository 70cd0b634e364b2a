"""On a GPU: every token of an engine with drafts is one without, on the same attention; `make gpu` runs this alone.

In float32, where no near-tie was ever seen to fall the other way because a product had more rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from tidar_kernels.integrations.vllm import engine_options

from . import engines
from .engines import Ask, answers, cases, tokens

pytestmark = pytest.mark.cuda

ON_GPU = {"gpu_memory_utilization": 0.2, "max_num_batched_tokens": 512}


def asked() -> list[Ask]:
    found = cases()
    return found["greedy"] + found["sampled"] + found["long"] + found["ragged"][:8]


def without_drafts(checkpoint: Path, **more: Any) -> list[Any]:
    with engines.running(**engines.plain(checkpoint), attention_backend="CUSTOM", **ON_GPU | more) as llm:
        return tokens(answers(llm, asked()))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Any]:
    return without_drafts(checkpoint)


@pytest.mark.parametrize(
    ("strategy", "graphs", "at_least"), [("tidar", True, 2.0), ("isd", False, 1.5)], ids=["tidar, graphs", "isd"]
)
def test_every_token_is_autoregressive(
    checkpoint: Path,
    expected: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    strategy: Any,
    graphs: bool,
    at_least: float,
) -> None:
    options = engine_options(checkpoint, strategy, max_num_seqs=4, **ON_GPU)
    options |= {"enforce_eager": not graphs, "attention_backend": "CUSTOM"}
    with engines.recorded(monkeypatch, cache=False) as record, engines.running(**options) as llm:
        if graphs and torch.cuda.is_available():
            assert llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        assert tokens(answers(llm, asked())) == expected
    assert record.tokens_per_step > at_least


def test_a_float8_cache(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = without_drafts(checkpoint, kv_cache_dtype="fp8")
    options = engine_options(checkpoint, max_num_seqs=4, kv_cache_dtype="fp8", **ON_GPU)
    with engines.recorded(monkeypatch, cache=False) as record, engines.running(**options) as llm:
        assert tokens(answers(llm, asked())) == expected
    assert record.tokens_per_step > 2.0
