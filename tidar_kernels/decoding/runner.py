"""The device's half of a session: the buffers of its slots, the prefill of a prompt, the step, its CUDA graph.

Everything that a step needs stays on the device in buffers that never move. The host reads one small tensor a step:
what was accepted. On CUDA the whole step is captured once as a graph and replayed at every length; of a strategy that
chooses among several (`strategies.adaptive`), once for each that was chosen.

A slot that nobody has is computed with the others, but its context is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import patterns
from ..cache import KVCache
from ..ops.verify import Rule, SamplingParams, sample, sampling_tensors
from .packed import PackedWeights, packed_linear
from .strategies import Batch, DecoderModel, Strategy
from .strategies.base import check_interface
from .strategies.dflash import check_drafter

__all__ = ["SlotResult", "StepConfig", "StepRunner"]


@dataclass(frozen=True)
class StepConfig:
    """How a session decodes: the same for all of its requests.

    Args:
        strategy: the rows of a step and where drafts come from, see `tidar_kernels.strategies`.
        mask_token_id: the token of mask rows.
        rule: how drafts are judged, see `tidar_kernels.ops.verify`.
        beta: trust in the autoregressive logits, in [0, 1]; below 1 the block's own row 0 has a say in its slot 0.
        prefill_chunk: prompt tokens per forward pass of a prefill.
        adapted: mask rows, and they alone, run the model's gated adapters (`tidar_kernels.nn.adapters`).
        exact: what is committed has the bits of autoregressive decoding, see `tidar_kernels.decoding.exact`.
        packed: bfloat16 weights in the layout in which the CPU multiplies, see `tidar_kernels.decoding.packed`; None:
            as they are. Exact decoding, whose products are others, does without.

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
    packed: PackedWeights | None = None

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


class Captured(NamedTuple):
    """A step as a CUDA graph, and the forward passes in it."""

    graph: Any
    forwards: int


class SlotResult(NamedTuple):
    """What a step did in one slot.

    Attributes:
        tokens: the accepted drafts.
        is_bad: the logits after them give no token.
        forwards: forward passes that the step took.
        exception: what the slot's rows raised; nothing was accepted then.
    """

    tokens: list[int]
    is_bad: bool
    forwards: int
    exception: Exception | None = None


class StepRunner:
    """The slots of a batch on the device. One call at a time: the session sees to that.

    Args:
        model, config, batch_size, max_len, cuda_graph, page_size, num_pages: as for `Session`.

    Attributes:
        cache: the K/V of all slots.
        lengths: committed tokens of each slot, as the host knows them after a step.
        forwards, prefill_forwards: forward passes so far.
    """

    def __init__(
        self,
        model: DecoderModel,
        config: StepConfig,
        batch_size: int,
        max_len: int,
        cuda_graph: bool | None,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        check_interface(model)
        if not isinstance(config, StepConfig):
            raise TypeError(f"step: expected a StepConfig, got {type(config).__name__}")
        check_drafter(config.strategy, model)
        weight, shape = next(iter(model.parameters())), model.config
        self.model, self.config = model, config
        self.device, self.vocab_size = weight.device, shape.vocab_size
        self.cache = KVCache(
            num_layers=shape.num_layers,
            batch_size=batch_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_len=max_len,
            dtype=weight.dtype,
            device=weight.device,
            page_size=page_size,
            num_pages=num_pages,
        )
        for slot in range(batch_size):
            self.cache.release(slot)
        self.lengths = [0] * batch_size
        self._prompts: list[Any] = [None] * batch_size  # int64 arrays of tokens whose K/V is in the cache
        self._begun = [0] * batch_size  # tokens that a slot shares, or has copied, from another one
        self.forwards = self.prefill_forwards = 0
        self._choice = config.strategy.choice()
        self._active = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self._awake = torch.ones(batch_size, dtype=torch.int32, device=self.device)  # 0: left, and its K/V is not read
        # Of each slot's tokens those at its end that are drafts yet: the next step commits them, and brings none anew.
        self._known_drafts = [0] * batch_size
        drafts = torch.full((batch_size, config.drafts), -1, device=self.device)
        drafts[:, 0] = 0
        self._batch = Batch(
            model=model,
            cache=self.cache,
            mask_token_id=config.mask_token_id,
            rule=config.rule,
            beta=config.beta,
            state=sampling_tensors([SamplingParams()] * batch_size, self.device),
            drafts=drafts,
            adapted=config.adapted,
            exact=config.exact,
            awake=self._awake,
        )
        # [accepted, next token, bad row, drafts ..] of every slot
        self._report = torch.zeros(batch_size, config.drafts + 3, dtype=torch.int64, device=self.device)
        self._graphs: dict[str, Captured] = {}  # by the label of the strategy
        self._weights: tuple[int, ...] = ()  # where they lie, as a captured step knows them
        on_gpu = self.device.type == "cuda"
        self._use_graph = config.strategy.graphable and (on_gpu if cuda_graph is None else cuda_graph)

    # A prompt joins and leaves.

    def pages_for(self, prompt: list[int], num_tokens: int, without: Collection[int] = ()) -> int:
        """Free pages that a request needs, of `num_tokens` with its prompt and its drafts: those that it shares are
        there. 0 without pages.

        `without` are slots that it cannot share with, for they are about to be left.
        """
        size = self.cache.page_size
        return 0 if size is None else self.cache.pages_for(num_tokens) - self._shared(prompt, without)[1] // size

    def _shared(self, prompt: list[int], without: Collection[int] = ()) -> tuple[int, int]:
        """`(slot, tokens)`: the running request whose prompt begins as this one does for the longest, and for how long.

        At least one token is left to compute, for its logits. Where bits count, tokens are shared that the prompt would
        compute in the same whole chunks by itself.
        """
        best, longest, tokens = 0, 0, np.asarray(prompt)
        for slot, other in enumerate(self._prompts):
            if other is None or slot in without:
                continue
            n = min(len(tokens), len(other))
            differs = np.flatnonzero(tokens[:n] != other[:n])
            n = min(int(differs[0]) if len(differs) else n, len(tokens) - 1)
            if self.config.exact:
                n = min(n, len(other) - 1) // self.config.prefill_chunk * self.config.prefill_chunk
            n = self.config.strategy.kept(n)
            if n > longest:
                best, longest = slot, n
        return best, longest

    def reserve(self, slot: int, prompt: list[int], num_tokens: int) -> bool:
        """Take the pages of a request, with those that it shares; returns whether there are enough. Without pages there
        are."""
        if self.cache.page_size is None:
            return True
        if self.pages_for(prompt, num_tokens) > self.cache.free_pages:
            return False
        donor, tokens = self._shared(prompt)
        if tokens:
            self.cache.share(slot, donor, tokens)
        self._begun[slot] = tokens
        self.cache.reserve(slot, num_tokens)
        return True

    def join(self, slot: int, tokens: list[int], params: SamplingParams, known: int = 0) -> bool:
        """Commit tokens into a slot and make the first draft after them; it comes with the last chunk's forward pass.

        The first `known` of them are in the cache already: 0 for a prompt into a free slot, of which what it shares is
        there; else the others are decoded tokens, and so they are computed. Those that the strategy does not commit yet
        (`Strategy.kept`) are the first drafts instead.

        Returns whether the logits after the tokens give one; the slot is inactive if not, or if this raises.
        """
        self._make_room_for(params)
        one = replace(self._batch.sequence(slot), exact=self.config.exact and known > 0)
        self._active[slot], self._awake[slot] = 0, 1
        self._choice.began(slot)
        known = self.config.strategy.kept(known or self._begun[slot])
        self._set_length(one, slot, known)
        try:
            with self._inference():
                has_token = self._join(one, tokens, params, known)
        except BaseException:
            self._set_length(one, slot, known)
            raise
        kept = self.config.strategy.kept(len(tokens))
        self.lengths[slot], self._known_drafts[slot] = kept, len(tokens) - kept
        if self._prompts[slot] is None:
            self._prompts[slot] = np.asarray(tokens[:kept])
        self._active[slot] = int(has_token)
        return has_token

    def _set_length(self, one: Batch, slot: int, length: int) -> None:
        self.lengths[slot] = length
        one.cache.lengths.fill_(length)
        one.cache.lengths_known([length])

    def leave(self, slot: int) -> None:
        """Stop decoding a slot. Its K/V and length stay, as committed, until the next request joins there, but steps
        read none of it; with pages they go."""
        self._active[slot] = self._awake[slot] = 0
        self._prompts[slot], self._begun[slot] = None, 0
        if self.cache.page_size is None:
            self.cache.lengths[slot] = self.lengths[slot]
        else:
            self.cache.release(slot)
            self.lengths[slot] = 0

    def _join(self, one: Batch, tokens: list[int], params: SamplingParams, known: int) -> bool:
        for held, value in zip(one.state, sampling_tensors([params], self.device), strict=True):
            held.copy_(value)
        if one.seen is not None:
            one.seen.fill_(False)
            one.seen[0, torch.tensor(tokens, device=self.device)] = True

        strategy = self.config.strategy
        chunk = max(self.config.prefill_chunk // strategy.chunk_unit, 1) * strategy.chunk_unit
        kept = strategy.kept(len(tokens))
        last = known + max(kept - known - 1, 0) // chunk * chunk
        for start in range(known, last, chunk):
            self._prefill(one, tokens[start : start + chunk], strategy.context(chunk))
        if kept < len(tokens) or not strategy.seeded:
            if kept > last:
                self._prefill(one, tokens[last:kept], strategy.context(kept - last))
            one.drafts.fill_(-1)
            one.drafts[0, : len(tokens) - kept] = torch.tensor(tokens[kept:], dtype=torch.int64, device=self.device)
            return True
        n = len(tokens) - last
        # Exact decoding starts cold: with masks after them the tokens' bits would depend on how many there are.
        drafting = None if self.config.exact else strategy.first(n)
        pattern, rows = drafting or (strategy.context(n), [])
        hidden = self._prefill(one, tokens[last:], pattern)
        logits = one.logits(hidden[:, [n - 1, *rows]])
        here = torch.tensor([len(tokens)], device=self.device)
        first = sample(logits[:, :1], here, one.state, seen=one.seen)
        one.drafts.fill_(-1)
        one.drafts[:, :1] = first.clamp(min=0)
        if rows:
            one.drafts[:, 1:] = one.draft(logits[:, 1:], here + 1)
            if one.draft_logits is not None:
                one.draft_logits[:, 1:] = logits[:, 1:]
        return int(first) >= 0

    def _make_room_for(self, params: SamplingParams) -> None:
        """Buffers that only some requests need, made by the first of them; a captured step does not know them."""
        size = len(self.lengths)
        if self._batch.seen is None and params.repetition_penalty != 1.0:
            self._batch.seen = torch.zeros(size, self.vocab_size, dtype=torch.bool, device=self.device)
            self._graphs.clear()
        if self._batch.draft_logits is None and self.config.rule == "rejection" and self.config.drafts > 1:
            dtype = next(iter(self.model.parameters())).dtype
            shape = (size, self.config.drafts, self.vocab_size)
            self._batch.draft_logits = torch.zeros(shape, dtype=dtype, device=self.device)
            self._graphs.clear()

    def _prefill(self, one: Batch, prompt: list[int], pattern: patterns.Pattern) -> Tensor:
        """One forward pass over prompt tokens and the mask rows after them; commits the tokens."""
        masks = pattern.q_len - len(prompt)
        tokens = torch.tensor([prompt + [0] * masks], device=self.device)
        row = torch.arange(pattern.q_len, device=self.device)[None]
        hidden = one.forward(tokens, pattern, row >= len(prompt) if masks else False)
        one.cache.commit(len(prompt))
        self.prefill_forwards += 1
        return hidden

    # The step.

    def run(self, slots: Sequence[int]) -> dict[int, SlotResult]:
        """One step of all slots; what it did in those asked for.

        If it raises where no graph is used, each of them takes the step by itself, and only those that raise again
        have failed: a strategy commits nothing before it is done.
        """
        with self._inference():
            if self._use_graph:
                report, forwards = self._replay()
            else:
                try:
                    forwards = self._device_step(self._batch, self._active, self._report)
                except Exception:
                    return {slot: self._run_alone(slot) for slot in slots}
                report = self._report.tolist()
        self.forwards += forwards
        results = {slot: self._result(slot, report[slot], forwards) for slot in slots}
        self._choice.settle()
        return results

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """On the session's device, without gradients, and in the weights' dtype.

        The current device and autocast are a thread's own, and steps may run on any thread. Streams, events and graphs
        are made and used on the current device: a step that is captured on another one would record nothing.
        """
        kind = self.device.type
        off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        here = torch.cuda.device(self.device) if kind == "cuda" else nullcontext()
        packed = None if self.config.exact else self.config.packed
        with here, torch.inference_mode(), off, nullcontext() if packed is None else packed_linear(packed):
            yield

    def lengths_known(self) -> None:
        """The lengths are those of the host again: tighten the cache's bounds."""
        self.cache.lengths_known(self.lengths)

    def _run_alone(self, slot: int) -> SlotResult:
        at = slice(slot, slot + 1)
        try:
            forwards = self._device_step(self._batch.sequence(slot), self._active[at], self._report[at])
        except Exception as exception:
            return SlotResult([], False, 0, exception)
        self.forwards += forwards
        return self._result(slot, self._report[slot].tolist(), forwards)

    def _result(self, slot: int, report: list[int], forwards: int) -> SlotResult:
        accepted, _, bad, *drafts = report
        self._choice.saw(slot, sum(draft >= 0 for draft in drafts), accepted)
        known, self._known_drafts[slot] = self._known_drafts[slot], 0
        return SlotResult(drafts[known:accepted], bad >= 0, forwards)

    def _device_step(self, batch: Batch, active: Tensor, report: Tensor) -> int:
        """The step on the device, from the buffers into the buffers; returns how many forward passes it took."""
        strategy = self._choice.strategy
        found, drafts, following, logits, forwards, path = strategy.step(batch.narrowed(strategy.drafts))
        if strategy.drafts < batch.drafts.shape[1]:
            narrower = 0, batch.drafts.shape[1] - strategy.drafts
            drafts, following = (torch.nn.functional.pad(x, narrower, value=-1) for x in (drafts, following))
        report.copy_(torch.cat([torch.stack(found, dim=1), drafts], dim=1))
        kept = found.accepted * active
        if batch.seen is not None:
            taken = torch.arange(drafts.shape[1], device=self.device) < kept[:, None]
            batch.seen.scatter_(1, torch.where(taken, drafts, drafts[:, :1]), True)
        if path is not None:
            batch.cache.compact(path)
        batch.cache.commit(kept, at_most=strategy.drafts)
        batch.drafts[:, 0] = found.next_tokens.clamp(min=0 if self.config.strategy.seeded else -1)
        batch.drafts[:, 1:] = following
        if batch.draft_logits is not None and logits is not None:
            batch.draft_logits[:, 1 : strategy.drafts] = logits
        return forwards

    # Its graph.

    def replayed(self) -> Callable[[], object]:
        """The step on the device alone, for timing; see `Session.replayed`."""
        if not self._use_graph:

            def run() -> None:
                bounds = self.cache.length_bounds.copy()
                with self._inference():
                    self._device_step(self._batch, self._active, self._report)
                self.cache.length_bounds[:] = bounds

            return run
        with self._inference():
            captured = self._captured()
        replay: Callable[[], object] = captured.graph.replay  # which goes to the device that it was captured on
        return replay

    def weights_may_have_moved(self) -> None:
        """Forget captured steps whose weights lie elsewhere now, as after `load_state_dict(assign=True)`."""
        weights = tuple(x.data_ptr() for x in self.model.parameters()) if self._use_graph else ()
        if weights != self._weights:
            self._graphs.clear()
            self._weights = weights

    def _replay(self) -> tuple[list[list[int]], int]:
        captured = self._captured()
        self.cache.check_room(self._choice.strategy.slots)
        captured.graph.replay()
        self.cache.length_bounds += self._choice.strategy.drafts
        self._host_report.copy_(self._report, non_blocking=True)
        self._reported.record()
        self._reported.synchronize()
        return self._host_report.tolist(), captured.forwards

    def _captured(self) -> Captured:
        """The graph of the strategy that takes the next step."""
        label = self._choice.strategy.label
        if label not in self._graphs:
            self._graphs[label] = self._capture()
        return self._graphs[label]

    def _capture(self) -> Captured:
        """Record the step as a CUDA graph. Warm-up runs with every slot inactive, and leaves the buffers as found."""
        batch = self._batch
        buffers = [x for x in (batch.drafts, self._active, batch.seen, batch.draft_logits) if x is not None]
        saved, bounds = [x.clone() for x in buffers], self.cache.length_bounds.copy()
        self._active.zero_()
        graph = torch.cuda.CUDAGraph()
        # One pool for all: they run one after the other, and keep nothing in it from one replay to the next.
        pool = next((captured.graph.pool() for captured in self._graphs.values()), None)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._device_step(batch, self._active, self._report)
                    self.cache.length_bounds[:] = bounds
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool):
                forwards = self._device_step(batch, self._active, self._report)
        finally:  # what cannot be captured raises, and leaves the batch as it was
            self.cache.length_bounds[:] = bounds
            for buffer, content in zip(buffers, saved, strict=True):
                buffer.copy_(content)
        self._host_report = torch.empty(self._report.shape, dtype=torch.int64, pin_memory=True, device="cpu")
        self._reported = torch.cuda.Event()
        return Captured(graph, forwards)
