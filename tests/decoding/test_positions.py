"""Models with learned positions: rows look past the last one, and what is decoded is right up to it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.toys import Learned
from tidar_kernels import Decoder, patterns
from tidar_kernels.decoding.strategies import BlockDiffusion, SelfSpeculation, Strategy, isd, tidar, tree

POSITIONS = 32
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
STRATEGIES: dict[str, Strategy] = {
    "tidar 1": tidar(1),
    "tidar 4": tidar(4),
    "tidar 8": tidar(8),
    "levels": tidar(8, levels=[1, 3]),
    "isd": isd(4),
    "flare": isd(4, bidirectional=True, shifted=False),
    "self-speculation": SelfSpeculation(8),
    "tree": tree(6),
}


@cache
def expected(first: int) -> list[int]:
    """Greedy tokens up to the last position, the whole sequence computed anew for each: nobody looks ahead."""
    model, tokens = Learned(POSITIONS, clamps=False), PROMPT[first:]
    while len(tokens) < POSITIONS:
        tokens = [
            *tokens,
            int(model.logits(model(torch.tensor([tokens]), patterns.causal(len(tokens))))[0, -1].argmax()),
        ]
    return tokens[len(PROMPT) - first :]


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_the_room_there_is(name: str) -> None:
    """20 + 12 of 32 positions, beside a request that ends earlier and one that goes to the last position too."""
    prompts = [PROMPT, PROMPT[12:], PROMPT[1:]]
    result = Decoder(Learned(POSITIONS), strategy=STRATEGIES[name]).generate(prompts, 12)
    assert result.tokens == [expected(0), expected(12)[:12], expected(1)[:12]]
    longest = Decoder(Learned(POSITIONS), strategy=STRATEGIES[name]).generate([PROMPT[12:]], 24)
    assert longest.tokens == [expected(12)]
    assert result.cache.lengths.tolist() == [32, 20, 31]


@pytest.mark.parametrize("exact", [True, False])
def test_cached_keys_are_those_of_autoregression(exact: bool) -> None:
    found = Decoder(Learned(POSITIONS), strategy=tidar(4), exact=exact).generate([PROMPT], 12)
    plain = Decoder(Learned(POSITIONS), mode="autoregressive", exact=exact).generate([PROMPT], 12)
    for mine, other in ((found.cache.k, plain.cache.k), (found.cache.v, plain.cache.v)):
        torch.testing.assert_close(mine[..., :POSITIONS, :], other[..., :POSITIONS, :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*STRATEGIES, "block diffusion"])
def test_rows_do_look_further(name: str) -> None:
    """Without the clamp they read positions that are not there: the tests above would see it."""
    strategy = STRATEGIES.get(name) or BlockDiffusion(5)
    Decoder(Learned(POSITIONS), strategy=strategy).generate([PROMPT], 12)
    if name != "tidar 1":
        with pytest.raises(IndexError):
            Decoder(Learned(POSITIONS, clamps=False), strategy=strategy).generate([PROMPT], 12)


def test_more_than_there_is_room_for_is_refused() -> None:
    decoder = Decoder(Learned(POSITIONS), 4, batch_size=2, max_len=64)
    message = r"^max_new_tokens: expected <= 12 after a prompt of 20, for the model has 32 positions, got 13$"
    calls: list[Any] = [decoder.generate, decoder.stream, decoder.session.check]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call([PROMPT], 13)
    with pytest.raises(ValueError, match=message):
        decoder.add(PROMPT, 13)
    assert decoder.session.free_slots == 2
    with pytest.raises(ValueError, match=r"^max_new_tokens: expected <= -8 after a prompt of 40"):
        decoder.add([*PROMPT, *PROMPT], 1)
