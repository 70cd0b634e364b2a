"""The decoder: TiDAR output equals autoregressive output, and the cache holds what the causal rows wrote."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tidar_kernels as tk
from tests.toys import sharp_model
from tidar_kernels import Decoder
from tidar_kernels.models import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=40,
    hidden_size=48,
    intermediate_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
    mask_token_id=39,
    block_size=4,
)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [3, 3], [12] * 20]
BLOCK_SIZES = (1, 2, 3, 4, 8, 16)


class Copier(torch.nn.Module):
    """A model of known behaviour: after token t comes t + 1; mask rows guess right except every `wrong`-th position.

    Hidden states are one-hot logits, so that acceptance is exactly predictable.
    """

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.config = CONFIG
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.wrong = wrong
        self.logits_rows: list[int] = []

    def forward(self, tokens, pattern, cache=None):
        keep = pattern.causal_len
        for layer in range(CONFIG.num_layers):
            rows = tokens[:, None, :keep, None].float().expand(-1, CONFIG.num_kv_heads, -1, CONFIG.head_dim)
            cache.append(layer, rows + layer, -rows)
        position = cache.lengths[:, None] + pattern.positions
        first = tokens[:, :1] - cache.lengths[:, None]  # the whole sequence is first + position
        guess = first + position + (0 if not self.wrong else (position % self.wrong == 0).long())
        target = torch.where(tokens == CONFIG.mask_token_id, guess, tokens + 1) % (CONFIG.vocab_size - 1)
        return torch.nn.functional.one_hot(target, CONFIG.vocab_size).float()

    def logits(self, hidden):
        self.logits_rows.append(hidden.shape[-2])
        return hidden


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharp_model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def expected(model: Transformer) -> list[list[int]]:
    """Greedy output by recomputing the whole sequence for every token: no cache, no step, eager attention."""
    out = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(40):
            hidden = model(torch.tensor([tokens]), tk.patterns.causal(len(tokens)))
            tokens.append(int(model.logits(hidden[0, -1]).argmax()))
        out.append(tokens[len(prompt) :])
    return out


def test_the_test_model_is_not_trivial(expected: list[list[int]]) -> None:
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert max(len(set(tokens)) for tokens in expected) > 4


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_tidar_equals_autoregressive_ragged_batch(model, expected, block_size: int) -> None:
    result = Decoder(model, block_size).generate(PROMPTS, 40)
    assert result.tokens == expected
    assert [sum(counts) for counts in result.accepted] == [40] * len(PROMPTS)
    assert all(1 <= count <= block_size for counts in result.accepted for count in counts)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_tidar_equals_autoregressive_alone(model, expected, block_size: int) -> None:
    for index in (0, 4):
        assert Decoder(model, block_size).generate(PROMPTS[index], 40).tokens == [expected[index]]


def test_autoregressive_mode(model, expected) -> None:
    result = Decoder(model, mode="autoregressive").generate(PROMPTS, 40)
    assert result.tokens == expected
    assert result.forwards == 40
    assert result.tokens_per_forward == 1.0


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("mode", ["tidar", "autoregressive"])
def test_prefill_chunks_do_not_change_the_output(model, expected, mode, chunk: int) -> None:
    result = Decoder(model, 4, mode=mode, prefill_chunk=chunk).generate(PROMPTS, 12)
    assert result.tokens == [tokens[:12] for tokens in expected]
    assert result.prefill_forwards == sum(-(-len(prompt) // chunk) for prompt in PROMPTS)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_perfect_drafts_are_all_accepted(block_size: int) -> None:
    result = Decoder(Copier(), block_size).generate([[3, 4, 5]], 10 * block_size)
    assert result.accepted == [[block_size] * 10]
    assert result.tokens_per_forward == block_size
    assert result.tokens[0][:3] == [6, 7, 8]


def test_a_wrong_draft_ends_the_run_and_is_replaced() -> None:
    result = Decoder(Copier(wrong=5), 8).generate([[3]], 30)
    assert result.tokens[0] == [(4 + i) % 39 for i in range(30)]
    # The token at a position divisible by 5 is guessed wrong: no run of accepted drafts crosses one.
    position = 1
    for count in result.accepted[0][:-1]:
        assert not any(p % 5 == 0 for p in range(position + 1, position + count))
        position += count


def test_lm_head_runs_on_the_drafts_and_one_block() -> None:
    model = Copier()
    Decoder(model, 8).generate([[3]], 16)
    assert model.logits_rows == [8, *[8, 7] * 2]  # first draft; then per step B draft rows and B - 1 of a block


@pytest.mark.parametrize(("mode", "block_size"), [("tidar", 1), ("tidar", 4), ("tidar", 8), ("autoregressive", None)])
def test_cache_holds_what_the_causal_rows_wrote(model, mode, block_size) -> None:
    written: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    class Recorder(tk.KVCache):
        def rotary_append(self, layer, q, k, v, rotary, keep):
            q, k = super().rotary_append(layer, q, k, v, rotary, keep)
            for b, length in enumerate(self.lengths.tolist()):
                for j in range(keep):
                    written[self.index + b, layer, length + j] = (k[b, :, j].clone(), v[b, :, j].clone())
            return q, k

        index = 0

        def sequence(self, index):
            view = super().sequence(index)
            view.__class__ = Recorder
            view.index = index
            return view

    stream = Decoder(model, block_size, mode=mode).stream(PROMPTS, 24)
    stream.result.cache.__class__ = Recorder
    for _ in stream:
        pass
    cache, masks_seen = stream.result.cache, 0
    lengths = [len(prompt) + 24 for prompt in PROMPTS]
    assert cache.lengths.tolist() == lengths
    for b, (prompt, tokens) in enumerate(zip(PROMPTS, stream.result.tokens, strict=True)):
        fresh = tk.KVCache(num_layers=2, batch_size=1, num_kv_heads=2, head_dim=16, max_len=lengths[b])
        with torch.inference_mode():
            model(torch.tensor([prompt + tokens]), tk.patterns.causal(lengths[b]), fresh)
        for layer in range(2):
            for slot in range(lengths[b]):
                k, v = written[b, layer, slot]
                assert torch.equal(cache.k[layer, b, :, slot], k)
                assert torch.equal(cache.v[layer, b, :, slot], v)
            # A mask row's K/V in a committed slot would differ from this by far more than rounding.
            torch.testing.assert_close(cache.k[layer, b, :, : lengths[b]], fresh.k[layer, 0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(cache.v[layer, b, :, : lengths[b]], fresh.v[layer, 0], rtol=1e-4, atol=1e-4)
            masks_seen += 1
    assert masks_seen == 2 * len(PROMPTS)


def test_stop_token_ends_its_sequence_alone(model, expected) -> None:
    stop = expected[0][7]
    ends = [(tokens.index(stop) + 1 if stop in tokens else 40) for tokens in expected]
    for block_size in (2, 8):
        result = Decoder(model, block_size).generate(PROMPTS, 40, stop_tokens=[stop])
        assert result.tokens == [tokens[:end] for tokens, end in zip(expected, ends, strict=True)]
        assert result.cache.lengths.tolist() == [len(p) + end for p, end in zip(PROMPTS, ends, strict=True)]
    assert len(set(ends)) > 1


def test_stream_yields_every_token_in_order(model, expected) -> None:
    got: list[list[int]] = [[] for _ in PROMPTS]
    events = 0
    for index, tokens in Decoder(model, 4).stream(PROMPTS, 40):
        assert tokens
        got[index].extend(tokens)
        events += 1
    assert got == expected
    assert events > 40


def test_input_forms(model, expected) -> None:
    decoder = Decoder(model, 4)
    for prompts in (
        torch.tensor([1, 2, 3]),
        torch.tensor([[1, 2, 3]]),
        [1, 2, 3],
        [[1, 2, 3]],
        [torch.tensor([1, 2, 3])],
    ):
        assert decoder.generate(prompts, 5).tokens == [expected[0][:5]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": []}, ValueError, "input_ids: expected at least one prompt"),
        ({"input_ids": [[1], []]}, ValueError, "input_ids: expected at least one token.* prompt 1"),
        ({"input_ids": [[1, 40]]}, ValueError, r"input_ids: expected tokens in \[0, 40\), got 40"),
        ({"input_ids": [[-1]]}, ValueError, r"input_ids: expected tokens in \[0, 40\), got -1"),
        ({"input_ids": [["a"]]}, TypeError, "input_ids: expected ints, got str"),
        ({"input_ids": [[1.5]]}, TypeError, "input_ids: expected ints, got float"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected >= 1, got 0"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens: expected an int, got float"),
        ({"stop_tokens": [40]}, ValueError, r"stop_tokens: expected token ids in \[0, 40\), got 40"),
        ({"stop_tokens": ["x"]}, ValueError, "stop_tokens: expected token ids"),
        ({"input_ids": [[1] * 60]}, ValueError, r"max_len: expected >= 74 \(longest prompt 60 .*got 64"),
    ],
)
def test_bad_generation_arguments(model, arguments, error, message: str) -> None:
    decoder = Decoder(model, 4, max_len=64)
    for call in (decoder.generate, decoder.stream):
        with pytest.raises(error, match=message):
            call(**{"input_ids": [[1, 2]], "max_new_tokens": 10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size: expected >= 1, got 0"),
        ({"block_size": "8"}, TypeError, "block_size: expected an int, got str"),
        ({"mask_token_id": 40}, ValueError, "mask_token_id: expected < vocab_size = 40, got 40"),
        ({"mode": "fast"}, ValueError, 'mode: expected "tidar" or "autoregressive", got \'fast\''),
        ({"max_len": 0}, ValueError, "max_len: expected >= 1, got 0"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk: expected >= 1, got 0"),
    ],
)
def test_bad_decoder_arguments(model, arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Decoder(model, **arguments)


def test_defaults_come_from_the_model(model) -> None:
    decoder = Decoder(model)
    assert (decoder.block_size, decoder.mask_token_id) == (4, 39)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_decodes_and_has_no_requests(copied: Callable[[Any], Any]) -> None:
    decoder = Decoder(sharp_model(), 4, batch_size=1, max_len=64)
    expected = decoder.generate([PROMPTS[0]], 9).tokens
    decoder.add(PROMPTS[0], 9)
    decoder.step()
    other = copied(decoder)
    assert other.generate([PROMPTS[0]], 9).tokens == expected
    assert not other.session.requests
    assert len(decoder.session.requests) == 1
    with pytest.raises(TypeError, match=r"^session: expected to be used where it was made, got copy or pickle"):
        copied(decoder.session)
    with pytest.raises(TypeError, match=r"^stream: expected to be used where it was made, got copy or pickle"):
        copied(decoder.stream([PROMPTS[0]], 9))
