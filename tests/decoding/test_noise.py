"""Drafts have the noise of the position they are for: a position off, and nothing but the acceptance would tell."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tidar_kernels import Decoder, KVCache, Pattern
from tidar_kernels.decoding.strategies import SelfSpeculation, Strategy, isd, tidar, tree

VOCAB = 50


class Independent:
    """A `DecoderModel` of independent tokens: every row, draft or mask, has the same logits."""

    def __init__(self, logits: Tensor) -> None:
        self.row = logits
        self.config = SimpleNamespace(
            vocab_size=len(logits), num_layers=1, num_kv_heads=1, head_dim=1, mask_token_id=len(logits) - 1
        )

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache | None = None) -> Tensor:
        return torch.zeros(*tokens.shape, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.row.expand(*hidden.shape[:-1], -1)

    def parameters(self) -> Iterator[Tensor]:
        yield self.row


def model() -> Any:
    return Independent(torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("strategy", "cold"),
    [
        (tidar(4), False),
        (tidar(1), False),
        (tidar(6, levels=[1, 3, 6]), False),
        (isd(4, shifted=False), True),
        (isd(4, bidirectional=True, shifted=False), True),
        (SelfSpeculation(5), False),
        (tree(4), False),
    ],
    ids=lambda x: f"{x.name} {x.drafts}" if isinstance(x, Strategy) else None,
)
def test_where_drafts_have_the_models_law_all_stay(strategy: Strategy, cold: bool) -> None:
    """Coupled: an argmax of the same scores with the same noise. From the prefill's drafts on, in every step."""
    result = Decoder(model(), strategy=strategy).generate([[1, 2, 3], [4]], 1 + 6 * strategy.drafts, temperature=1.0)
    plain = Decoder(model(), mode="autoregressive").generate([[1, 2, 3], [4]], 1 + 6 * strategy.drafts, temperature=1.0)
    assert result.tokens == plain.tokens
    assert len({token for tokens in result.tokens for token in tokens}) > 3
    for accepted in result.accepted:
        assert accepted[0] == 1 or not cold
        assert set(accepted[cold:-1]) == {strategy.drafts}


@pytest.mark.parametrize("mode", ["tidar", "autoregressive"])
def test_a_prompt_whose_next_token_is_0(mode: Any) -> None:
    """It is a token like any other, and no sign of bad logits, nor is it as a draft."""
    logits = torch.full((VOCAB,), -5.0)
    logits[0] = 5.0
    result = Decoder(Independent(logits), 4, mode=mode).generate([[1, 2, 3], [0]], 9)
    assert result.tokens == [[0] * 9] * 2
    assert result.finish_reasons == ["length"] * 2
    assert result.errors == [None] * 2
