"""The reference decoder: prefill, step, stream, generate; TiDAR and plain autoregression are the same loop.

One step of `mode="tidar"` (TiDAR, arXiv 2511.08923, decode step):

    rows      [d_0 .. d_{B-1} | block 1 | ... | block B]          one forward pass, `patterns.tidar_step`
    picks     argmax of the lm_head on the B draft rows
    accept    longest run of drafts that equal the picks before them: a in 1..B
    commit    lengths += a; the K/V of d[0:a] is in place already, everything else is forgotten
    next      [picks[a-1]] + argmax of the lm_head on rows 1..B-1 of block a

`mode="autoregressive"` is that step with one draft and no block: rows `[d_0]`, `patterns.causal(1)`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from . import patterns
from .cache import KVCache
from .patterns import Pattern
from .sampling import accept_greedy

__all__ = ["Decoder", "DecoderModel", "GenerationResult", "TokenStream"]

Mode = Literal["tidar", "autoregressive"]


class DecoderModel(Protocol):
    """What `Decoder` needs of a model; `tidar_kernels.models.Transformer` is one.

    `config` has `vocab_size`, `num_layers`, `num_kv_heads` and `head_dim`. Calling the model with int64 tokens
    `[batch, pattern.q_len]` gives hidden states `[batch, q_len, hidden]` and writes the K/V of the pattern's causal
    rows behind the cache's committed tokens; `logits` is the lm_head.
    """

    @property
    def config(self) -> Any: ...

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Any]: ...


@dataclass
class GenerationResult:
    """What a generation produced, and what it took.

    Attributes:
        tokens: the new tokens of each sequence; a stop token, if one ended it, is the last.
        forwards: decode forward passes of the batch; prefill is counted apart.
        prefill_forwards: forward passes of prefill.
        accepted: for each sequence, tokens accepted by each of its steps.
        seconds: wall time of decoding, prefill excluded; `prefill_seconds` is the rest.
        cache: the K/V of prompts and new tokens, committed.
    """

    tokens: list[list[int]]
    accepted: list[list[int]]
    cache: KVCache
    forwards: int = 0
    prefill_forwards: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per sequence and decode forward pass (the papers' T/NFE); 0 before the first step."""
        steps = sum(len(a) for a in self.accepted)
        return sum(len(t) for t in self.tokens) / steps if steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences per second of decoding."""
        return sum(len(t) for t in self.tokens) / self.seconds if self.seconds else 0.0


class TokenStream(Iterator[tuple[int, list[int]]]):
    """Iterator of `(sequence index, its new tokens)`, one item a sequence and step; `result` grows as it goes."""

    def __init__(self, result: GenerationResult, steps: Iterator[tuple[int, list[int]]]) -> None:
        self.result = result
        self._steps = steps

    def __next__(self) -> tuple[int, list[int]]:
        return next(self._steps)


@dataclass
class _Run:
    """A generation under way."""

    prompts: list[list[int]]
    max_new_tokens: int
    stop_tokens: frozenset[int]
    result: GenerationResult
    drafts: Tensor
    active: Tensor
    open: list[bool] = field(default_factory=list)


class Decoder:
    """Greedy decoding of a `DecoderModel`, several tokens a forward pass.

    With `mode="tidar"` the output equals that of `mode="autoregressive"` token for token, for every block size: drafts
    only decide how many forward passes it takes.

    Args:
        model: the model; its parameters' dtype and device are those of the cache.
        block_size: B, tokens drafted a step, >= 1; default what the model was trained with. Unused autoregressively.
        mask_token_id: the token of mask rows; default the model's own. Unused autoregressively.
        mode: "tidar" or "autoregressive".
        max_len: cache slots per sequence; default as many as each generation needs.
        prefill_chunk: prompt tokens per prefill forward pass, >= 1.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model has no default for it.
    """

    def __init__(
        self,
        model: DecoderModel,
        block_size: int | None = None,
        mask_token_id: int | None = None,
        *,
        mode: Mode = "tidar",
        max_len: int | None = None,
        prefill_chunk: int = 512,
    ) -> None:
        if mode not in ("tidar", "autoregressive"):
            raise ValueError(f'mode: expected "tidar" or "autoregressive", got {mode!r}')
        self.model, self.mode, self.max_len = model, mode, max_len
        self.prefill_chunk = patterns.check_int("prefill_chunk", prefill_chunk, 1)
        if max_len is not None:
            patterns.check_int("max_len", max_len, 1)
        if mode == "autoregressive":
            self.block_size, self.mask_token_id, self.pattern = 1, 0, patterns.causal(1)
            return
        block_size = getattr(model.config, "block_size", None) if block_size is None else block_size
        mask_token_id = getattr(model.config, "mask_token_id", None) if mask_token_id is None else mask_token_id
        self.block_size = patterns.check_int("block_size", block_size, 1)
        self.mask_token_id = patterns.check_int("mask_token_id", mask_token_id, 0)
        if self.mask_token_id >= model.config.vocab_size:
            raise ValueError(f"mask_token_id: expected < vocab_size = {model.config.vocab_size}, got {mask_token_id}")
        self.pattern = patterns.tidar_step(self.block_size)

    def generate(
        self,
        input_ids: Tensor | Sequence[Any],
        max_new_tokens: int = 256,
        *,
        stop_tokens: Sequence[int] = (),
    ) -> GenerationResult:
        """Decode every prompt of a batch to the end.

        Args:
            input_ids: int tensor `[batch, n]` or `[n]`, or a list of prompts (lists of ints) of any lengths >= 1.
            max_new_tokens: new tokens per sequence, >= 1.
            stop_tokens: token ids that end a sequence; the stop token is kept as its last.

        Raises:
            TypeError, ValueError: an empty prompt, a token outside the vocabulary, a prompt that does not fit `max_len`
                together with `max_new_tokens`; before anything runs.
        """
        run = self._start(input_ids, max_new_tokens, stop_tokens)
        for _ in self._steps(run):
            pass
        return run.result

    def stream(
        self,
        input_ids: Tensor | Sequence[Any],
        max_new_tokens: int = 256,
        *,
        stop_tokens: Sequence[int] = (),
    ) -> TokenStream:
        """Like `generate`, but an iterator of `(sequence index, its new tokens)`, yielded after every step.

        Arguments are checked here and now; the model runs as the iterator is consumed. Its `result` is up to date
        whenever an item is yielded, and counts no time that the consumer took.
        """
        run = self._start(input_ids, max_new_tokens, stop_tokens)
        return TokenStream(run.result, self._steps(run))

    def _start(self, input_ids: Any, max_new_tokens: int, stop_tokens: Sequence[int]) -> _Run:
        """Check every argument, and only then allocate."""
        vocab_size = self.model.config.vocab_size
        prompts = _as_prompts(input_ids, vocab_size)
        patterns.check_int("max_new_tokens", max_new_tokens, 1)
        for token in stop_tokens:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ValueError(f"stop_tokens: expected token ids in [0, {vocab_size}), got {token!r}")
        # A step appends B drafts behind every sequence, also behind one that has ended while others go on.
        needed = max(map(len, prompts)) + max_new_tokens + self.block_size
        if self.max_len is not None and needed > self.max_len:
            raise ValueError(
                f"max_len: expected >= {needed} (longest prompt {max(map(len, prompts))} + max_new_tokens "
                f"{max_new_tokens} + block_size {self.block_size}), got {self.max_len}"
            )
        weight = next(iter(self.model.parameters()))
        config = self.model.config
        cache = KVCache(
            num_layers=config.num_layers,
            batch_size=len(prompts),
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_len=self.max_len or needed,
            dtype=weight.dtype,
            device=weight.device,
        )
        return _Run(
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            stop_tokens=frozenset(stop_tokens),
            result=GenerationResult([[] for _ in prompts], [[] for _ in prompts], cache),
            drafts=torch.empty(len(prompts), self.block_size, dtype=torch.int64, device=weight.device),
            active=torch.ones(len(prompts), dtype=torch.int64, device=weight.device),
            open=[True] * len(prompts),
        )

    def _steps(self, run: _Run) -> Iterator[tuple[int, list[int]]]:
        started = time.perf_counter()
        with torch.inference_mode():
            for index, prompt in enumerate(run.prompts):
                run.drafts[index] = self._prefill(run, prompt, run.result.cache.sequence(index))
        run.result.prefill_seconds = time.perf_counter() - started
        while any(run.open):
            started = time.perf_counter()
            with torch.inference_mode():
                verified, accepted = self._step(run)
                # The one read of the device in a step: what it accepted.
                counts, tokens = accepted.tolist(), verified.tolist()
            new = [self._take(run, i, tokens[i][: counts[i]]) for i in range(len(tokens))]
            lengths = [len(prompt) + len(out) for prompt, out in zip(run.prompts, run.result.tokens, strict=True)]
            run.result.cache.lengths_known(lengths)
            run.result.seconds += time.perf_counter() - started
            yield from ((i, got) for i, got in enumerate(new) if got)

    def _prefill(self, run: _Run, prompt: list[int], cache: KVCache) -> Tensor:
        """Commit the prompt and make the first draft, `[B]`; the draft comes with the last chunk's forward pass."""
        device = cache.lengths.device
        last = (len(prompt) - 1) // self.prefill_chunk * self.prefill_chunk
        for start in range(0, last, self.prefill_chunk):
            chunk = torch.tensor([prompt[start : start + self.prefill_chunk]], device=device)
            self.model(chunk, patterns.causal(chunk.shape[1]), cache)
            cache.commit(chunk.shape[1])
            run.result.prefill_forwards += 1
        n = len(prompt) - last
        masks = [] if self.mode == "autoregressive" else [self.mask_token_id] * self.block_size
        pattern = patterns.tidar_prefill(n, self.block_size) if masks else patterns.causal(n)
        hidden = self.model(torch.tensor([prompt[last:] + masks], device=device), pattern, cache)
        cache.commit(n)
        run.result.prefill_forwards += 1
        # Slot 0 is the prompt's own next token, slots 1.. are mask rows 1..: mask row 0 would only guess slot 0.
        rows = [n - 1, *range(n + 1, n + self.block_size)]
        return self.model.logits(hidden[0, rows]).argmax(dim=-1)

    def _step(self, run: _Run) -> tuple[Tensor, Tensor]:
        """One forward pass: `(verified drafts [batch, B], accepted counts [batch])`, both still on the device."""
        block, drafts, cache = self.block_size, run.drafts, run.result.cache
        masks = drafts.new_full((drafts.shape[0], self.pattern.q_len - block), self.mask_token_id)
        hidden = self.model(torch.cat([drafts, masks], dim=1), self.pattern, cache)
        picks = self.model.logits(hidden[:, :block]).argmax(dim=-1)
        accepted = accept_greedy(drafts, picks)
        cache.commit(accepted * run.active, at_most=block)
        run.drafts = picks.gather(1, accepted[:, None] - 1)
        if block > 1:
            # Block g, the one conditioned on g accepted drafts, starts at row g * B.
            rows = accepted[:, None] * block + torch.arange(1, block, device=drafts.device)
            chosen = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
            run.drafts = torch.cat([run.drafts, self.model.logits(chosen).argmax(dim=-1)], dim=1)
        run.result.forwards += 1
        return drafts, accepted

    def _take(self, run: _Run, index: int, tokens: list[int]) -> list[int]:
        """Append accepted tokens to a sequence's output; close it at a stop token or at `max_new_tokens`."""
        if not run.open[index]:
            return []
        out, cache = run.result.tokens[index], run.result.cache
        tokens = tokens[: run.max_new_tokens - len(out)]
        stop = next((i for i, token in enumerate(tokens) if token in run.stop_tokens), None)
        if stop is not None:
            tokens = tokens[: stop + 1]
        out.extend(tokens)
        run.result.accepted[index].append(len(tokens))
        if stop is not None or len(out) == run.max_new_tokens:
            run.open[index] = False
            run.active[index] = 0
            cache.lengths[index] = len(run.prompts[index]) + len(out)
        return tokens


def _as_prompts(input_ids: Any, vocab_size: int) -> list[list[int]]:
    """Prompts as lists of ints, each token checked against the vocabulary."""
    values = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    if values and isinstance(values[0], int):
        values = [values]
    if not values:
        raise ValueError("input_ids: expected at least one prompt, got none")
    prompts = []
    for index, prompt in enumerate(values):
        prompt = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        if not prompt:
            raise ValueError(f"input_ids: expected at least one token in every prompt, got none in prompt {index}")
        for token in prompt:
            if not isinstance(token, int) or isinstance(token, bool):
                raise TypeError(f"input_ids: expected ints, got {type(token).__name__} in prompt {index}")
            if not 0 <= token < vocab_size:
                raise ValueError(f"input_ids: expected tokens in [0, {vocab_size}), got {token} in prompt {index}")
        prompts.append(prompt)
    return prompts
