"""A batch that is decoded step by step: requests join and leave between steps, each with its own sampling.

One step (TiDAR, arXiv 2511.08923, decode step), for all slots of the batch at once:

    rows      [d_0 .. d_{B-1} | block 1 | ... | block B]          one forward pass, `patterns.tidar_step`
    verify    lm_head on the B draft rows, `sampling.verify`      a accepted drafts and the token behind them
    commit    lengths += a; the K/V of d[0:a] is in place already, everything else is forgotten
    next      [that token] + a token of rows 1..B-1 of block a    lm_head on these alone

Autoregressive decoding is that step with one draft and no block: rows `[d_0]`, `patterns.causal(1)`.

Everything that a step needs stays on the device in buffers that never move. The host reads one small tensor a step:
what was accepted. On CUDA the whole step is captured once as a graph and replayed at every length.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from . import patterns
from .cache import KVCache
from .noise import Stream
from .sampling import Rule, SamplingParams, SamplingTensors, sample, sampling_tensors, verify

__all__ = ["DecoderModel", "Event", "FinishReason", "Request", "Session", "Step"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class DecoderModel(Protocol):
    """What decoding needs of a model; `tidar_kernels.models.Transformer` is one.

    `config` has `vocab_size`, `num_layers`, `num_kv_heads` and `head_dim`. Calling the model with int64 tokens
    `[batch, pattern.q_len]` gives hidden states `[batch, q_len, hidden]` and writes the K/V of the pattern's causal
    rows behind the cache's committed tokens; `logits` is the lm_head.
    """

    @property
    def config(self) -> Any: ...

    def __call__(self, tokens: Tensor, pattern: patterns.Pattern, cache: KVCache | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Step:
    """How a session decodes: the same for all of its requests.

    Args:
        block_size: B; 0 for plain autoregression, one token a step.
        mask_token_id: the token of mask rows.
        rule: how drafts are judged, see `tidar_kernels.sampling`.
        beta: trust in the autoregressive logits, in [0, 1]; below 1 the block's own row 0 has a say in its slot 0.
        prefill_chunk: prompt tokens per forward pass of a prefill.
    """

    block_size: int
    mask_token_id: int = 0
    rule: Rule = "coupled"
    beta: float = 1.0
    prefill_chunk: int = 512

    @property
    def drafts(self) -> int:
        """Draft rows of a step."""
        return max(1, self.block_size)

    @property
    def pattern(self) -> patterns.Pattern:
        return patterns.tidar_step(self.block_size) if self.block_size else patterns.causal(1)


@dataclass
class Request:
    """One sequence, from its prompt to its last token.

    Attributes:
        tokens: the new tokens so far; a stop token, or the token that completed a stop string, is the last.
        accepted: tokens accepted by each of its steps.
        finish_reason: None while it runs; "stop" (a stop token or string), "length", "cancelled" or "error".
        error: what went wrong, if something did.
    """

    id: int
    prompt: list[int]
    max_new_tokens: int
    params: SamplingParams
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None
    on_tokens: Callable[[int, list[int]], None] | None = None
    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    def take(self, tokens: list[int]) -> list[int]:
        """Append accepted tokens, as many as the request's own limits let through; sets `finish_reason`."""
        taken = []
        for token in tokens:
            taken.append(token)
            self.tokens.append(token)
            if token in self.stop_tokens or self._ends_with_stop_string():
                self.finish_reason = "stop"
            elif len(self.tokens) == self.max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        self.accepted.append(len(taken))
        return taken

    def _ends_with_stop_string(self) -> bool:
        """Whether the last token completed one, wherever token boundaries lie: looked for in the decoded end."""
        if not self.stop_strings or self.decode is None:
            return False
        # Tokens that decode to nothing make the window too short in theory; sixteen of them are allowed for.
        window = max(len(stop.encode()) for stop in self.stop_strings) + 16
        text = self.decode(self.tokens[-window:])
        return any(stop in text for stop in self.stop_strings)


@dataclass(frozen=True)
class Event:
    """What a step brought one request: its new tokens, maybe none, and why it ended, if it did."""

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None = None


class Session:
    """A batch of `batch_size` slots over one cache; see the module.

    Args:
        model: its parameters' dtype and device are those of the cache.
        step: how it decodes.
        batch_size: slots; every step computes all of them, taken or not.
        max_len: cache slots per sequence: prompt, new tokens and B drafts must fit.
        cuda_graph: capture the step as one CUDA graph; default where there is a GPU.

    Attributes:
        requests: the requests that run, by id.
        forwards, prefill_forwards: forward passes so far.
        seconds, prefill_seconds: wall time of the steps, and of the prefills.
    """

    def __init__(
        self, model: DecoderModel, step: Step, batch_size: int, max_len: int, *, cuda_graph: bool | None = None
    ) -> None:
        weight, config = next(iter(model.parameters())), model.config
        self.model, self.step_config, self.pattern = model, step, step.pattern
        self.device, self.vocab_size = weight.device, config.vocab_size
        self.cache = KVCache(
            num_layers=config.num_layers,
            batch_size=batch_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_len=max_len,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.requests: dict[int, Request] = {}
        self.forwards = self.prefill_forwards = 0
        self.seconds = self.prefill_seconds = 0.0
        self._slots: list[Request | None] = [None] * batch_size
        self._lengths = [0] * batch_size  # committed in each slot, as the host knows after a step
        self._next_id = 0
        self._tokens = torch.full((batch_size, self.pattern.q_len), step.mask_token_id, device=self.device)
        self._drafts = self._tokens[:, : step.drafts]
        self._drafts.zero_()
        self._active = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self._knobs, self._seeds = sampling_tensors([SamplingParams()] * batch_size, self.device)
        self._seen: Tensor | None = None  # made by the first request with a repetition penalty
        self._draft_logits: Tensor | None = None
        self._block_rows = torch.arange(1, step.drafts, device=self.device)
        self._report = torch.zeros(batch_size, step.drafts + 3, dtype=torch.int64, device=self.device)
        self._graph: Any = None
        self._use_graph = self.device.type == "cuda" if cuda_graph is None else cuda_graph

    @property
    def free_slots(self) -> int:
        """How many requests could join now."""
        return self._slots.count(None)

    def check(self, prompt: Sequence[int], max_new_tokens: int, stop_tokens: Sequence[int] = ()) -> None:
        """Raise TypeError or ValueError for a request that could not run; `add` asks it before anything is written."""
        patterns.check_int("max_new_tokens", max_new_tokens, 1)
        for token in stop_tokens:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(f"stop_tokens: expected token ids in [0, {self.vocab_size}), got {token!r}")
        if not prompt:
            raise ValueError("prompt: expected at least one token, got none")
        for token in prompt:
            if not isinstance(token, int) or isinstance(token, bool):
                raise TypeError(f"prompt: expected ints, got {type(token).__name__}")
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"prompt: expected tokens in [0, {self.vocab_size}), got {token}")
        # A step appends B drafts behind every sequence, also behind one that has ended while others go on.
        needed = len(prompt) + max_new_tokens + self.step_config.drafts
        if needed > self.cache.max_len:
            raise ValueError(
                f"max_len: expected >= {needed} (prompt {len(prompt)} + max_new_tokens {max_new_tokens} + "
                f"{self.step_config.drafts} drafts), got {self.cache.max_len}"
            )

    def add(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 256,
        params: SamplingParams | None = None,
        *,
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> int:
        """Let a request join: its prompt is computed now, its tokens come with the next steps. Returns its id.

        Args:
            prompt: token ids.
            max_new_tokens: >= 1.
            params: default greedy.
            stop_tokens: ids that end the request; the stop token is kept as its last.
            stop_strings: texts that end it, wherever token boundaries lie; the token that completes one is its last.
            decode: token ids to text, for `stop_strings`.
            on_tokens: called with the id and its new tokens after every step that brings some.

        Raises:
            TypeError, ValueError: an argument does not fit, or no slot is free; nothing is written then.
        """
        self.check(prompt, max_new_tokens, stop_tokens)
        if isinstance(stop_strings, str) or not all(isinstance(stop, str) and stop for stop in stop_strings):
            raise ValueError(f"stop_strings: expected non-empty strings, got {stop_strings!r}")
        if stop_strings and decode is None:
            raise ValueError("decode: expected a function from token ids to text beside stop_strings, got None")
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params: expected a SamplingParams, got {type(params).__name__}")
        if not self.free_slots:
            raise ValueError(f"prompt: expected a free slot, got {len(self._slots)} requests running")
        slot = self._slots.index(None)
        request = Request(
            self._next_id, list(prompt), max_new_tokens, params, frozenset(stop_tokens), tuple(stop_strings), decode,
            on_tokens,
        )  # fmt: skip
        started = time.perf_counter()
        with torch.inference_mode():
            self._join(slot, request)
        self.prefill_seconds += time.perf_counter() - started
        self._next_id += 1
        self._slots[slot] = self.requests[request.id] = request
        self._lengths[slot] = len(prompt)
        return request.id

    def remove(self, request_id: int) -> Request:
        """Cancel a request: its slot is free at once, its tokens so far are in what is returned.

        Raises:
            KeyError: no such request is running.
        """
        if request_id not in self.requests:
            raise KeyError(f"request_id: expected one of {sorted(self.requests)}, got {request_id}")
        request = self.requests[request_id]
        request.finish_reason = "cancelled"
        self._leave(self._slots.index(request))
        return request

    def step(self) -> list[Event]:
        """One forward pass for every running request; what it brought, in the order of the slots."""
        if not self.requests:
            return []
        started = time.perf_counter()
        with torch.inference_mode():
            report = self._run()
        self.forwards += 1
        received = [
            (request, self._receive(slot, request, *report[slot]))
            for slot, request in enumerate(self._slots)
            if request is not None
        ]
        self.cache.lengths_known(self._lengths)
        self.seconds += time.perf_counter() - started
        for request, event in received:  # last: what a callback raises leaves the session whole
            if event.tokens and request.on_tokens is not None:
                request.on_tokens(event.id, event.tokens)
        return [event for _, event in received]

    async def steps(self) -> AsyncIterator[list[Event]]:
        """Steps until no request runs, each on a worker thread; requests may be added and removed between them."""
        while self.requests:
            yield await asyncio.to_thread(self.step)

    def _receive(self, slot: int, request: Request, accepted: int, following: int, bad: int, *drafts: int) -> Event:
        """Give a request what its slot accepted; let it leave if that ended it."""
        tokens: list[int] = []
        if request.error is None:
            tokens = request.take(list(drafts[:accepted]))
            if bad >= 0 and request.finish_reason is None:
                position = len(request.prompt) + len(request.tokens)
                request.error = f"expected finite logits, got NaN, inf or nothing above -inf for position {position}"
        self._lengths[slot] = len(request.prompt) + len(request.tokens)
        if request.error is not None:
            request.finish_reason = "error"
        if request.finish_reason is not None:
            self._leave(slot)
        return Event(request.id, tokens, request.finish_reason)

    def _join(self, slot: int, request: Request) -> None:
        """Commit the prompt into `slot` and make its first draft, which comes with the last chunk's forward pass."""
        step, cache, prompt = self.step_config, self.cache.sequence(slot), request.prompt
        cache.reset()
        knobs, seeds = sampling_tensors([request.params], self.device)
        self._knobs[slot], self._seeds[slot] = knobs[0], seeds[0]
        if self._seen is None and request.params.repetition_penalty != 1.0:
            self._seen = torch.zeros(len(self._slots), self.vocab_size, dtype=torch.bool, device=self.device)
            self._graph = None
        if self._seen is not None:
            self._seen[slot] = False
            self._seen[slot, torch.tensor(prompt, device=self.device)] = True
        seen = None if self._seen is None else self._seen[slot : slot + 1]

        last = (len(prompt) - 1) // step.prefill_chunk * step.prefill_chunk
        for start in range(0, last, step.prefill_chunk):
            chunk = torch.tensor([prompt[start : start + step.prefill_chunk]], device=self.device)
            self.model(chunk, patterns.causal(chunk.shape[1]), cache)
            cache.commit(chunk.shape[1])
            self.prefill_forwards += 1
        n = len(prompt) - last
        masks = [step.mask_token_id] * step.block_size
        pattern = patterns.tidar_prefill(n, step.block_size) if masks else patterns.causal(n)
        hidden = self.model(torch.tensor([prompt[last:] + masks], device=self.device), pattern, cache)
        cache.commit(n)
        self.prefill_forwards += 1
        # Slot 0 is the prompt's own next token, slots 1.. are mask rows 1..: mask row 0 would only guess slot 0.
        logits = self.model.logits(hidden[:, [n - 1, *range(n + 1, n + step.drafts)]])
        here, state = torch.tensor([len(prompt)], device=self.device), SamplingTensors(knobs, seeds)
        first = sample(logits[:, :1], here, state, seen=seen)
        self._drafts[slot, :1] = first[0].clamp(min=0)
        if step.drafts > 1:
            self._drafts[slot, 1:] = self._draft(logits[:, 1:], here + 1, state, seen)[0]
            if step.rule == "rejection":
                if self._draft_logits is None:
                    shape = (len(self._slots), step.drafts, logits.shape[-1])
                    self._draft_logits = torch.zeros(shape, dtype=logits.dtype, device=self.device)
                self._draft_logits[slot, 1:] = logits[0, 1:]
        if int(first) < 0:
            request.error = "expected finite logits, got NaN, inf or nothing above -inf behind the prompt"
        else:
            self._active[slot] = 1

    def _leave(self, slot: int) -> None:
        """Free a slot. Its K/V and length stay, as committed, until the next request joins there."""
        request = self._slots[slot]
        if request is not None:
            self._slots[slot], self._active[slot] = None, 0
            self.cache.lengths[slot] = self._lengths[slot]
            del self.requests[request.id]

    def _draft(self, logits: Tensor, positions: Tensor, state: SamplingTensors, seen: Tensor | None) -> Tensor:
        """Draft tokens from mask rows, by the rule that will judge them."""
        if self.step_config.rule == "point_mass":
            return logits.argmax(-1)
        stream = Stream.TOKEN if self.step_config.rule == "coupled" else Stream.DRAFT
        # Bad logits give -1: as a token, anything does, for the row's verdict does not depend on it.
        return sample(logits, positions, state, seen=seen, stream=stream).clamp(min=0)

    def _device_step(self) -> None:
        """The step on the device: from the buffers, into the buffers, nothing read."""
        step, count, drafts = self.step_config, self.step_config.drafts, self._drafts
        state = SamplingTensors(self._knobs, self._seeds)
        hidden = self.model(self._tokens, self.pattern, self.cache)
        found = verify(
            self.model.logits(hidden[:, :count]),
            drafts,
            self.cache.lengths + 1,
            state,
            rule=step.rule if count > 1 else "coupled",
            draft_logits=self._draft_logits if count > 1 else None,
            mix=self.model.logits(hidden[:, count::count]) if step.beta < 1.0 else None,
            beta=step.beta,
            seen=self._seen,
            check=False,
        )
        self._report.copy_(torch.cat([torch.stack(found, dim=1), drafts], dim=1))
        kept = found.accepted * self._active
        if self._seen is not None:
            taken = torch.arange(count, device=self.device) < kept[:, None]
            self._seen.scatter_(1, torch.where(taken, drafts, drafts[:, :1]), True)
        self.cache.commit(kept, at_most=count)
        if count > 1:
            # Block g, the one conditioned on g accepted drafts, starts at row g * B.
            rows = found.accepted[:, None] * count + self._block_rows
            logits = self.model.logits(hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1])))
            drafts[:, 1:] = self._draft(logits, self.cache.lengths + 1, state, self._seen)
            if self._draft_logits is not None:
                self._draft_logits[:, 1:] = logits
        drafts[:, 0] = found.next_tokens.clamp(min=0)

    def _run(self) -> list[list[int]]:
        """One step; returns `[accepted, next token, bad row, drafts ..]` of every slot: the one read of the device."""
        if not self._use_graph:
            self._device_step()
            report: list[list[int]] = self._report.tolist()
            return report
        if self._graph is None:
            self._capture()
        self.cache.check_room(self.step_config.drafts)
        self._graph.replay()
        self.cache.length_bounds += self.step_config.drafts
        self._host_report.copy_(self._report, non_blocking=True)
        self._reported.record()
        self._reported.synchronize()
        report = self._host_report.tolist()
        return report

    def _capture(self) -> None:
        """Record the step as a CUDA graph. Warm-up runs with every slot inactive, and leaves the buffers as found."""
        buffers = [x for x in (self._tokens, self._active, self._seen, self._draft_logits) if x is not None]
        saved, bounds = [x.clone() for x in buffers], self.cache.length_bounds.copy()
        self._active.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._device_step()
                self.cache.length_bounds[:] = bounds
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._device_step()
        self.cache.length_bounds[:] = bounds
        for buffer, content in zip(buffers, saved, strict=True):
            buffer.copy_(content)
        self._host_report = torch.empty(self._report.shape, dtype=torch.int64, pin_memory=True)
        self._reported = torch.cuda.Event()
