"""Toy models: random transformers, chains of order 1, whose law is known, and how far an empirical law is from it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from tidar_kernels import KVCache, Pattern, attention, eager, step_attention
from tidar_kernels.decoding.strategies import Batch, Strategy
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.ops.verify import SamplingParams, sample, sampling_tensors

CONFIG = TransformerConfig(
    vocab_size=30, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16,
    mask_token_id=29,
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 29, 5, 3, 5, 8, 9]]  # a prompt may hold the mask token


def sharp_model(config: TransformerConfig = CONFIG, seed: int = 4, by: float = 8.0) -> Transformer:
    """A random model whose logits are far apart: greedy tokens differ from row to row, and rounding decides none."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(by)
    return model


def chain_law(table: Tensor, first: int, length: int, params: SamplingParams) -> Tensor:
    """Probability of every continuation of an order-1 chain, `[vocab] * length`, from its logits `[vocab, vocab]`."""
    knobs, _ = sampling_tensors([params], "cpu")
    p = eager.shaped_scores(table[None].double(), knobs.double())[0].softmax(-1)
    law = p[first]
    for _ in range(length - 1):
        law = law[..., None] * p
    return law


def distance(tokens: Tensor, law: Tensor) -> tuple[float, float]:
    """Total variation between an empirical law and `law`, and what sampling alone makes of it: mean + 3 standard
    deviations, by drawing as many samples of `law` itself."""
    flat = law.flatten()
    index = tokens[:, 0]
    for i in range(1, tokens.shape[1]):
        index = index * law.shape[0] + tokens[:, i]

    def tv(counts: Tensor) -> float:
        return 0.5 * (counts.double() / len(tokens) - flat).abs().sum().item()

    generator = torch.Generator().manual_seed(0)
    noise_tv = torch.tensor(
        [
            tv(torch.multinomial(flat, len(tokens), True, generator=generator).bincount(minlength=len(flat)))
            for _ in range(12)
        ]
    )
    return tv(index.bincount(minlength=len(flat))), (noise_tv.mean() + 3 * noise_tv.std()).item()


class Learned:
    """The least `DecoderModel` with attention: one layer, learned positions, sharp logits; small and quick.

    Positions are clamped to the last one, as `DecoderModel` asks of a model that has `config.max_positions`; with
    `clamps=False` rows that look further raise an IndexError.
    """

    def __init__(self, max_positions: int, vocab_size: int = 24, seed: int = 0, clamps: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.config = SimpleNamespace(
            vocab_size=vocab_size, num_layers=1, num_kv_heads=1, head_dim=16, max_positions=max_positions,
            mask_token_id=vocab_size - 1,
        )  # fmt: skip
        self.embedding, self.positions = randn(vocab_size, 32), randn(max_positions, 32) * 1.5
        self.qkv, self.out, self.head = randn(64, 32) * 0.3, randn(32, 32) * 0.5, randn(vocab_size, 32) * 3.0
        self.last = max_positions - 1 if clamps else 2**31 - 1

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache | None = None) -> Tensor:
        positions = pattern.positions if cache is None else cache.lengths[:, None] + pattern.positions
        x = torch.nn.functional.embedding(tokens, self.embedding)
        x = x + torch.nn.functional.embedding(positions.clamp(max=self.last), self.positions)
        batch, rows = tokens.shape
        qkv = torch.nn.functional.linear(x, self.qkv).view(batch, rows, 4, 16).transpose(1, 2)
        q, k, v = qkv[:, :2], qkv[:, 2:3], qkv[:, 3:]
        if cache is None:
            mixed = attention(q, k, v, pattern)
        else:
            cache.append(0, k[:, :, : pattern.kept_len], v[:, :, : pattern.kept_len])
            mixed = step_attention(q, k, v, *cache.layer(0), cache.context_lengths, pattern)
        return torch.nn.functional.linear(mixed.transpose(1, 2).reshape(batch, rows, 32), self.out, None) + x

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.head)

    def parameters(self) -> Iterator[Tensor]:
        yield self.embedding


class Chain:
    """A `DecoderModel` of tables: a token's row predicts by `table[token]`, a mask row by `drafts[token, offset - 1]`
    of the last token that the pattern lets it see, `offset` positions back. No row predicts the mask token, the last.
    """

    def __init__(self, table: Tensor, drafts: Tensor) -> None:
        vocab = table.shape[0]
        self.config = SimpleNamespace(vocab_size=vocab + 1, num_layers=1, num_kv_heads=1, head_dim=1)
        by_offset = torch.cat([table[:, None], drafts], dim=1)
        self.tables = torch.nn.functional.pad(by_offset, (0, 1), value=-torch.inf).flatten(0, 1)
        self.offsets, self.mask = by_offset.shape[1], vocab

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache | None = None) -> Tensor:
        position = pattern.positions
        visible = pattern.dense() & (position <= position[:, None]) & (tokens != self.mask)[:, None]
        last = torch.where(visible, position, -1).argmax(-1)
        seen = tokens.gather(1, last)
        return (seen * self.offsets + position - position[last])[..., None]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.tables[hidden[..., 0]]


def decode_chain(
    model: Chain, strategy: Strategy, params: list[SamplingParams], length: int, rule: str = "coupled"
) -> tuple[Tensor, int]:
    """`(the first `length` tokens of every request after token 0, forward passes)`; all requests run to the end."""
    size = len(params)
    cache = KVCache(num_layers=1, batch_size=size, num_kv_heads=1, head_dim=1, max_len=1)
    state = sampling_tensors(params, "cpu")
    drafts = torch.full((size, strategy.drafts), -1)
    drafts[:, 0] = sample(model.tables[torch.zeros(size, 1, dtype=torch.int64)], cache.lengths, state)[:, 0]
    batch = Batch(model, cache, model.mask, rule, 1.0, state, drafts)
    if rule == "rejection" and strategy.drafts > 1:
        batch.draft_logits = torch.zeros(size, strategy.drafts, model.config.vocab_size)
    out, forwards = torch.full((size, length + strategy.drafts), -1), 0
    while int(cache.lengths.min()) < length:
        found, judged, following, logits, passes, _ = strategy.step(batch)
        open_ = cache.lengths < length
        for i in range(strategy.drafts):
            take = open_ & (i < found.accepted)
            out[take, cache.lengths[take] + i] = judged[take, i]
        cache.lengths += torch.where(open_, found.accepted, 0)
        drafts[open_] = torch.cat([found.next_tokens[:, None], following], dim=1)[open_]
        if batch.draft_logits is not None and logits is not None:
            batch.draft_logits[open_, 1:] = logits[open_]
        forwards += passes
    return out[:, :length], forwards


def certain(vocab: int, offsets: int) -> tuple[Chain, list[int]]:
    """A chain that knows its next token for sure, and guesses those after it right; and its tokens after token 0."""
    table = torch.full((vocab, vocab), -40.0)
    for token in range(vocab):
        table[token, (token * 5 + 1) % vocab] = 0.0
    rows, ahead = [], table.argmax(-1)
    for _ in range(offsets):
        rows.append(torch.nn.functional.one_hot(ahead, vocab) * 40.0)
        ahead = table[ahead].argmax(-1)
    chain = [0]
    for _ in range(60):
        chain.append(int(table[chain[-1]].argmax()))
    return Chain(table, torch.stack(rows, dim=1)), chain[1:]


def toy(vocab: int, offsets: int) -> Chain:
    """A chain, and drafts that are like it but wrong: accepted often, not always."""
    generator = torch.Generator().manual_seed(vocab)
    table = torch.randn(vocab, vocab, generator=generator) * 1.5
    return Chain(table, table[:, None] + torch.randn(vocab, offsets, vocab, generator=generator))
