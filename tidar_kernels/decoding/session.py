"""A batch that is decoded step by step: requests join and leave between steps, each with its own sampling.

One step, for all slots of the batch at once (TiDAR, arXiv 2511.08923, decode step; `tidar_kernels.strategies`):

    rows      [d_0 .. d_{B-1} | block 1 | ... | block B]          one forward pass over the strategy's pattern
    verify    lm_head on the B draft rows, `sampling.verify`      a accepted drafts and the token behind them
    commit    lengths += a; the K/V of d[0:a] is in place already, everything else is forgotten
    next      [that token] + a token of rows 1..B-1 of block a    lm_head on these alone

What the rows are and where the next drafts come from is the strategy's. Autoregressive decoding is one of them, with
one draft and no block. Commit, requests and limits are the session's.

Everything that a step needs stays on the device in buffers that never move. The host reads one small tensor a step:
what was accepted. On CUDA the whole step is captured once as a graph and replayed at every length.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .. import patterns
from ..cache import KVCache
from ..nn.adapters import has_gated_lora
from ..ops.verify import Rule, SamplingParams, sample, sampling_tensors
from .strategies import Batch, DecoderModel, Strategy
from .strategies.base import check_positions, check_ready

__all__ = ["DecoderModel", "Event", "FinishReason", "Request", "Session", "StepConfig"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class StepConfig:
    """How a session decodes: the same for all of its requests.

    Args:
        strategy: the rows of a step and where drafts come from, see `tidar_kernels.strategies`.
        mask_token_id: the token of mask rows.
        rule: how drafts are judged, see `tidar_kernels.ops.verify`.
        beta: trust in the autoregressive logits, in [0, 1]; below 1 the block's own row 0 has a say in its slot 0.
        prefill_chunk: prompt tokens per forward pass of a prefill.
        adapted: mask rows, and they alone, run the model's gated adapters (`tidar_kernels.lora`).
        exact: what is committed has the bits of autoregressive decoding, see `tidar_kernels.exact`.

    Raises:
        ValueError: the strategy cannot do that.
    """

    strategy: Strategy
    mask_token_id: int = 0
    rule: Rule = "coupled"
    beta: float = 1.0
    prefill_chunk: int = 512
    adapted: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        name, rules = self.strategy.name, self.strategy.rules
        if self.rule not in rules:
            raise ValueError(f'sampling: expected {" or ".join(rules)} for strategy "{name}", got {self.rule!r}')
        if self.exact and not self.strategy.can_be_exact:
            raise ValueError(f'exact: expected False for strategy "{name}", got True')

    @property
    def drafts(self) -> int:
        """The most tokens that a step commits."""
        return self.strategy.drafts

    @property
    def slots(self) -> int:
        """The most cache slots that a step writes: a draft each, those that are rejected too."""
        return self.strategy.slots


@dataclass
class Request:
    """One sequence, from its prompt to its last token.

    Attributes:
        tokens: the new tokens so far; a stop token, or the token that completed a stop string, is the last.
        accepted, passes: tokens accepted by each of its steps, and the forward passes that it took.
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
    passes: list[int] = field(default_factory=list)
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
        max_len: cache slots per sequence: prompt, new tokens and the drafts of a step must fit.
        cuda_graph: capture the step as one CUDA graph; default where there is a GPU.

    Attributes:
        requests: the requests that run, by id.
        forwards, prefill_forwards: forward passes so far.
        seconds, prefill_seconds: wall time of the steps, and of the prefills.
    """

    def __init__(
        self, model: DecoderModel, step: StepConfig, batch_size: int, max_len: int, *, cuda_graph: bool | None = None
    ) -> None:
        weight, config = next(iter(model.parameters())), model.config
        self.model, self.step_config = model, step
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
        self._adapters = has_gated_lora(model)
        self._is_checked = False  # whether this run's model is the one that the session was made for
        self._active = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        drafts = torch.full((batch_size, step.drafts), -1, device=self.device)
        drafts[:, 0] = 0
        self._batch = Batch(
            model=model,
            cache=self.cache,
            mask_token_id=step.mask_token_id,
            rule=step.rule,
            beta=step.beta,
            state=sampling_tensors([SamplingParams()] * batch_size, self.device),
            drafts=drafts,
            adapted=step.adapted,
            exact=step.exact,
        )
        self._report = torch.zeros(batch_size, step.drafts + 3, dtype=torch.int64, device=self.device)
        self._graph: Any = None
        on_gpu = self.device.type == "cuda"
        self._use_graph = step.strategy.graphable and (on_gpu if cuda_graph is None else cuda_graph)

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
        # A step appends its drafts behind every sequence, also behind one that has ended while others go on.
        needed = len(prompt) + max_new_tokens + self.step_config.slots
        if needed > self.cache.max_len:
            raise ValueError(
                f"max_len: expected >= {needed} (prompt {len(prompt)} + max_new_tokens {max_new_tokens} + "
                f"{self.step_config.slots} drafts), got {self.cache.max_len}"
            )
        check_positions(self.model, len(prompt), max_new_tokens)

    def check_model(self) -> None:
        """Raise if the model is no longer what the session was made for; asked once a run, see `DecoderModel`.

        Raises:
            TypeError, ValueError: its parameters have another dtype or device than the cache, its vocabulary has
                another size, gated adapters were added or taken away, or what `check_ready` of the model raises.
        """
        check_ready(self.model)
        weight = next(iter(self.model.parameters()))
        now = {
            "dtype": (self.cache.k.dtype, weight.dtype),
            "device": (self.cache.k.device, weight.device),
            "vocab_size": (self.vocab_size, self.model.config.vocab_size),
            "gated adapters": (self._adapters, has_gated_lora(self.model)),
        }
        for what, (expected, found) in now.items():
            if expected != found:
                raise ValueError(
                    f"model: expected {what} {expected} as when the decoder was made, got {found}; make a new one"
                )
        self._is_checked = True

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
        self.check_model()
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
        self._is_checked = False  # the model may change until the first step
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
        if not self._is_checked:
            self.check_model()
        started = time.perf_counter()
        before = self.forwards
        with torch.inference_mode():
            report = self._run()
        received = []
        for slot, request in enumerate(self._slots):
            if request is not None:
                request.passes.append(self.forwards - before)
                received.append((request, self._receive(slot, request, *report[slot])))
        self.cache.lengths_known(self._lengths)
        self.seconds += time.perf_counter() - started
        for request, event in received:  # last: what a callback raises leaves the session whole
            if event.tokens and request.on_tokens is not None:
                request.on_tokens(event.id, event.tokens)
        return [event for _, event in received]

    def replayed(self) -> Callable[[], object]:
        """The step on the device alone, for timing: what `step` runs, with nothing read and no request served."""
        if not self._use_graph:

            def run() -> None:
                bounds = self.cache.length_bounds.copy()
                self._device_step()
                self.cache.length_bounds[:] = bounds

            return run
        if self._graph is None:
            with torch.inference_mode():
                self._capture()
        replay: Callable[[], object] = self._graph.replay
        return replay

    async def steps(self) -> AsyncIterator[list[Event]]:
        """Steps until no request runs, each on a worker thread; requests may be added and removed between them."""
        self._is_checked = False
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
        step, prompt = self.step_config, request.prompt
        self._make_room_for(request.params)
        one = replace(self._batch.sequence(slot), exact=False)
        one.cache.reset()
        for held, value in zip(one.state, sampling_tensors([request.params], self.device), strict=True):
            held.copy_(value)
        if one.seen is not None:
            one.seen.fill_(False)
            one.seen[0, torch.tensor(prompt, device=self.device)] = True

        last = (len(prompt) - 1) // step.prefill_chunk * step.prefill_chunk
        for start in range(0, last, step.prefill_chunk):
            chunk = prompt[start : start + step.prefill_chunk]
            self._prefill(one, chunk, patterns.causal(len(chunk)))
        n = len(prompt) - last
        # Exact decoding starts cold: with masks behind it the prompt's bits would depend on how many there are.
        pattern, rows = (None if step.exact else step.strategy.first(n)) or (patterns.causal(n), [])
        hidden = self._prefill(one, prompt[last:], pattern)
        logits = self.model.logits(hidden[:, [n - 1, *rows]])
        here = torch.tensor([len(prompt)], device=self.device)
        first = sample(logits[:, :1], here, one.state, seen=one.seen)
        one.drafts.fill_(-1)
        one.drafts[:, :1] = first.clamp(min=0)
        if rows:
            one.drafts[:, 1:] = one.draft(logits[:, 1:], here + 1)
            if one.draft_logits is not None:
                one.draft_logits[:, 1:] = logits[:, 1:]
        if int(first) < 0:
            request.error = "expected finite logits, got NaN, inf or nothing above -inf behind the prompt"
        else:
            self._active[slot] = 1

    def _make_room_for(self, params: SamplingParams) -> None:
        """Buffers that only some requests need, made by the first of them; a captured step does not know them."""
        size = len(self._slots)
        if self._batch.seen is None and params.repetition_penalty != 1.0:
            self._batch.seen = torch.zeros(size, self.vocab_size, dtype=torch.bool, device=self.device)
            self._graph = None
        if self._batch.draft_logits is None and self.step_config.rule == "rejection" and self.step_config.drafts > 1:
            dtype = next(iter(self.model.parameters())).dtype
            shape = (size, self.step_config.drafts, self.vocab_size)
            self._batch.draft_logits = torch.zeros(shape, dtype=dtype, device=self.device)
            self._graph = None

    def _prefill(self, one: Batch, prompt: list[int], pattern: patterns.Pattern) -> Tensor:
        """One forward pass over prompt tokens and the mask rows behind them; commits the tokens."""
        masks = pattern.q_len - len(prompt)
        tokens = torch.tensor([prompt + [0] * masks], device=self.device)
        row = torch.arange(pattern.q_len, device=self.device)[None]
        hidden = one.forward(tokens, pattern, row >= len(prompt) if masks else False)
        one.cache.commit(len(prompt))
        self.prefill_forwards += 1
        return hidden

    def _leave(self, slot: int) -> None:
        """Free a slot. Its K/V and length stay, as committed, until the next request joins there."""
        request = self._slots[slot]
        if request is not None:
            self._slots[slot], self._active[slot] = None, 0
            self.cache.lengths[slot] = self._lengths[slot]
            del self.requests[request.id]

    def _device_step(self) -> int:
        """The step on the device, from the buffers into the buffers; returns how many forward passes it took."""
        batch = self._batch
        found, drafts, following, logits, forwards, path = self.step_config.strategy.step(batch)
        self._report.copy_(torch.cat([torch.stack(found, dim=1), drafts], dim=1))
        kept = found.accepted * self._active
        if batch.seen is not None:
            taken = torch.arange(drafts.shape[1], device=self.device) < kept[:, None]
            batch.seen.scatter_(1, torch.where(taken, drafts, drafts[:, :1]), True)
        if path is not None:
            self.cache.compact(path)
        self.cache.commit(kept, at_most=drafts.shape[1])
        batch.drafts[:, 0] = found.next_tokens.clamp(min=0)
        batch.drafts[:, 1:] = following
        if batch.draft_logits is not None and logits is not None:
            batch.draft_logits[:, 1:] = logits
        return forwards

    def _run(self) -> list[list[int]]:
        """One step; returns `[accepted, next token, bad row, drafts ..]` of every slot: the one read of the device."""
        if not self._use_graph:
            self.forwards += self._device_step()
            report: list[list[int]] = self._report.tolist()
            return report
        if self._graph is None:
            self._capture()
        self.cache.check_room(self.step_config.slots)
        self._graph.replay()
        self.forwards += self._forwards_captured
        self.cache.length_bounds += self.step_config.drafts
        self._host_report.copy_(self._report, non_blocking=True)
        self._reported.record()
        self._reported.synchronize()
        report = self._host_report.tolist()
        return report

    def _capture(self) -> None:
        """Record the step as a CUDA graph. Warm-up runs with every slot inactive, and leaves the buffers as found."""
        batch = self._batch
        buffers = [x for x in (batch.drafts, self._active, batch.seen, batch.draft_logits) if x is not None]
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
            self._forwards_captured = self._device_step()
        self.cache.length_bounds[:] = bounds
        for buffer, content in zip(buffers, saved, strict=True):
            buffer.copy_(content)
        self._host_report = torch.empty(self._report.shape, dtype=torch.int64, pin_memory=True, device="cpu")
        self._reported = torch.cuda.Event()


def __getattr__(name: str) -> Any:
    if name == "Step":
        warnings.warn(f"{__name__}.Step is StepConfig now; its old name goes in the next release", FutureWarning, 2)
        return StepConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
