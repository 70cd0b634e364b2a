"""The reference decoder: generate, stream, and a batch that requests join and leave.

TiDAR and plain autoregression are the same loop, `tidar_kernels.decoding.session`; this is its front door.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .. import patterns
from ..cache import KVCache
from ..nn.adapters import has_gated_lora
from ..ops.verify import RULES, Rule, SamplingParams
from ..patterns.arguments import check_bool
from .costs import row_costs
from .packed import PackedWeights, can_pack
from .prompts import as_prompts, as_stop_tokens
from .session import DecoderModel, Event, FinishReason, Request, Session, StepConfig
from .strategies import Adaptive, Profile, Strategy, StrategyName, autoregressive, by_name
from .strategies.base import check_interface, check_positions, check_ready
from .strategies.dflash import DraftedModel, check_drafter

__all__ = ["DecoderModel", "GenerationResult", "ModelDecoder", "TokenStream"]

Mode = Literal["tidar", "autoregressive"]

AUTO_BLOCK_SIZE = 16  # the longest block of "auto" for a model that does not say with which it was trained
AUTO_CONTEXT = 512  # committed tokens while "auto" measures what rows cost
AUTO_REPEATS = 5


@dataclass
class GenerationResult:
    """What a generation produced, and what it took.

    Attributes:
        tokens: the new tokens of each sequence; a stop token, if one ended it, is the last.
        accepted: for each sequence, tokens accepted by each of its steps.
        finish_reasons: for each sequence "stop", "length" or "error"; None while it runs.
        cache: the K/V of prompts and new tokens, committed; a drafter's layers stand after the model's.
        passes: for each sequence, forward passes of each of its steps; one each but for strategies that take more.
        forwards: decode forward passes of the batch; prefill is counted apart.
        prefill_forwards: forward passes of prefill.
        seconds: wall time of decoding, prefill excluded; `prefill_seconds` is the rest.
        errors: for each sequence that ended with "error", what went wrong; None for the others.
    """

    tokens: list[list[int]]
    accepted: list[list[int]]
    finish_reasons: list[FinishReason | None]
    cache: KVCache
    passes: list[list[int]] = field(default_factory=list)
    forwards: int = 0
    prefill_forwards: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    errors: list[str | None] = field(default_factory=list)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per sequence and decode forward pass (the papers' T/NFE); 0 before the first step."""
        passes = sum(map(sum, self.passes))
        return sum(map(len, self.tokens)) / passes if passes else 0.0

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

    def __getstate__(self) -> Any:
        raise TypeError("stream: expected to be used where it was made, got copy or pickle; make another one")


class ModelDecoder:
    """Decoding of a `DecoderModel`, several tokens a forward pass.

    With `mode="tidar"` and the coupled rule the output equals that of `mode="autoregressive"` token for token, greedy
    or sampled, for every block size and batch: drafts only decide how many forward passes it takes.

    Args:
        model: the model; its parameters' dtype and device are those of the cache.
        block_size: B, the most tokens a step commits; default what the model was trained with. Unused autoregressively.
            "auto": up to that, the block length and the levels follow the running acceptance, by what rows cost. That
            is measured before the first step, once for each number of sequences: a few steps of each setting
            (`strategies.adaptive`). The output is the same.
        mask_token_id: the token of mask rows; default the model's own. Unused autoregressively.
        mode: "tidar" (draft and verify, by `strategy`) or "autoregressive".
        strategy: "tidar"; "isd", "flare", "self_speculation", "tree" or "block_diffusion" with their usual options; or
            one made by `tidar_kernels.strategies`, which then sets the block size. Masks predict the token at their
            position, unless the model's `config.shifted_masks` says that they predict the one after it (I-DLM).
        stride: what "isd" and "flare" call their block size.
        sampling: how drafts are judged at temperature > 0: "coupled" (the very tokens of autoregressive sampling with
            the same seed), "rejection" (its distribution, more drafts accepted), or "point_mass" (its distribution,
            with argmax drafts). See `tidar_kernels.ops.verify`.
        beta: trust in the autoregressive logits against the diffusion ones for the next token, in [0, 1].
        batch_size: slots of the batch that `add`, `step` and `remove` work on.
        max_len: cache slots per sequence; default as many as each generation needs, and 4096 for `add`.
        prefill_chunk: prompt tokens per prefill forward pass, >= 1.
        adapted: the model's gated adapters run on mask rows (`tidar_kernels.nn.adapters`); default if it has any. The
            output is then that of the model without them.
        exact: every committed bit is that of autoregressive decoding, as far as the platform goes: the same K/V, and
            the same logits (`tidar_kernels.decoding.exact`); autoregressive decoding must be exact too.
        cuda_graph: capture a step as one CUDA graph; default where there is a GPU.
        packed: on a CPU that multiplies bfloat16, keep a second copy of the bfloat16 weights in the layout in which it
            does: steps of few rows are faster, with the same bits (`tidar_kernels.decoding.packed`).

    Raises:
        TypeError, ValueError: an argument does not fit, or the model has no default for it.
    """

    def __init__(
        self,
        model: DecoderModel,
        block_size: int | Literal["auto"] | None = None,
        mask_token_id: int | None = None,
        *,
        mode: Mode = "tidar",
        strategy: StrategyName | Strategy = "tidar",
        stride: int | None = None,
        sampling: Rule = "coupled",
        beta: float = 1.0,
        batch_size: int = 16,
        max_len: int | None = None,
        prefill_chunk: int = 512,
        adapted: bool | None = None,
        exact: bool = False,
        cuda_graph: bool | None = None,
        packed: bool = False,
    ) -> None:
        if mode not in ("tidar", "autoregressive"):
            raise ValueError(f'mode: expected "tidar" or "autoregressive", got {mode!r}')
        if sampling not in RULES:
            raise ValueError(f"sampling: expected one of {', '.join(RULES)}, got {sampling!r}")
        if not isinstance(beta, (int, float)) or isinstance(beta, bool):
            raise TypeError(f"beta: expected a number, got {type(beta).__name__}")
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
        check_interface(model)
        self.model, self.mode, self.max_len = model, mode, max_len
        self.prefill_chunk = patterns.check_int("prefill_chunk", prefill_chunk, 1)
        self.batch_size = patterns.check_int("batch_size", batch_size, 1)
        self._session: Session | None = None
        self._session_lock = threading.Lock()
        self._cuda_graph = cuda_graph
        if max_len is not None:
            patterns.check_int("max_len", max_len, 1)
        if not isinstance(exact, bool):
            raise TypeError(f"exact: expected a bool, got {type(exact).__name__}")
        adapted = has_gated_lora(model) if adapted is None else adapted
        weights = PackedWeights() if check_bool("packed", packed) and can_pack() else None
        common: dict[str, Any] = {
            "prefill_chunk": self.prefill_chunk, "adapted": adapted, "exact": exact, "packed": weights
        }  # fmt: skip
        self._auto: dict[int, StepConfig] | None = None  # by the number of sequences, where the block size is "auto"
        if mode == "autoregressive":
            if isinstance(model, DraftedModel):  # nothing is drafted
                self.model = model.target
            self.block_size, self.mask_token_id = 1, 0
            self._step = StepConfig(autoregressive(), **common)
            return
        if stride is not None:
            if block_size is not None or strategy not in ("isd", "flare"):
                raise ValueError(f'stride: expected for strategy "isd" or "flare" without block_size, got {stride}')
            block_size = stride
        if block_size == "auto":
            if strategy != "tidar":
                name = strategy.name if isinstance(strategy, Strategy) else strategy
                raise ValueError(f'block_size: expected a number for strategy "{name}", got "auto"')
            longest = getattr(model.config, "block_size", None) or AUTO_BLOCK_SIZE
            strategy, self._auto = Adaptive(Profile((), (1,), (1.0,)), longest), {}
        elif not isinstance(strategy, Strategy):
            block_size = getattr(model.config, "block_size", None) if block_size is None else block_size
            shifted = bool(getattr(model.config, "shifted_masks", False))
            strategy = by_name(strategy, patterns.check_int("block_size", block_size, 1), shifted)
        elif block_size not in (None, strategy.drafts):
            raise ValueError(f"block_size: expected that of the strategy, {strategy.drafts}, got {block_size}")
        if beta < 1.0 and not strategy.takes_beta:
            raise ValueError(f'beta: expected 1 for strategies but "tidar" with all its blocks, got {beta}')
        check_drafter(strategy, model)
        self.block_size = strategy.drafts
        mask_token_id = getattr(model.config, "mask_token_id", None) if mask_token_id is None else mask_token_id
        self.mask_token_id = patterns.check_int("mask_token_id", mask_token_id, 0)
        if self.mask_token_id >= model.config.vocab_size:
            raise ValueError(f"mask_token_id: expected < vocab_size = {model.config.vocab_size}, got {mask_token_id}")
        self._step = StepConfig(strategy, self.mask_token_id, sampling, beta, **common)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or of one in a pickle: the model and how it is decoded, without the requests of this one."""
        return {name: value for name, value in vars(self).items() if name not in ("_session", "_session_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _session=None, _session_lock=threading.Lock())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._step.strategy.label})"

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
    ) -> GenerationResult:
        """Decode every prompt of a batch to the end.

        Args:
            input_ids: integer tensor or NumPy array `[batch, n]` or `[n]`, a prompt (a list of ints), or a list of
                prompts of any lengths >= 1.
            max_new_tokens: new tokens per sequence, >= 1.
            temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingParams`; greedy by default.
            seed: of the first prompt's noise; prompt i has `seed + i`.
            stop_tokens: token ids that end a sequence; the stop token is kept as its last.

        Raises:
            TypeError, ValueError: an empty prompt, a token outside the vocabulary, a prompt that does not fit `max_len`
                together with `max_new_tokens`, a sampling parameter out of range; before anything runs.
        """
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        stream = self._start(input_ids, max_new_tokens, params, stop_tokens)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        input_ids: Any,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
    ) -> TokenStream:
        """Like `generate`, but an iterator of `(sequence index, its new tokens)`, yielded after every step.

        Arguments are checked here and now; the model runs as the iterator is consumed. Its `result` is up to date
        whenever an item is yielded, and counts no time that the consumer took.
        """
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        return self._start(input_ids, max_new_tokens, params, stop_tokens)

    def add(self, prompt: Any, max_new_tokens: int = 256, params: SamplingParams | None = None, **more: Any) -> int:
        """Let a request join the running batch; returns its id. Arguments and errors: `Session.add`."""
        return self.session.add(prompt, max_new_tokens, params, **more)

    def step(self) -> list[Event]:
        """One forward pass for all requests that joined; see `Session.step`."""
        return self.session.step()

    def remove(self, request_id: int) -> Request:
        """Cancel a request; see `Session.remove`."""
        return self.session.remove(request_id)

    @property
    def session(self) -> Session:
        """The batch of `add`, `step` and `remove`; made when it is first asked for."""
        with self._session_lock:
            if self._session is None:
                self._session = self._new_session(self.batch_size, self.max_len or 4096)
            return self._session

    def _new_session(self, batch_size: int, max_len: int) -> Session:
        return Session(self.model, self._step_of(batch_size), batch_size, max_len, cuda_graph=self._cuda_graph)

    def _step_of(self, batch_size: int) -> StepConfig:
        """How a session of so many sequences decodes; with block size "auto" its rows are timed first."""
        if self._auto is None or not isinstance(self._step.strategy, Adaptive):
            return self._step
        if batch_size not in self._auto:
            strategies = [setting.strategy for setting in self._step.strategy.settings]
            costs = row_costs(
                self.model, self._step, strategies, batch_size, AUTO_CONTEXT, AUTO_REPEATS, self._cuda_graph
            )
            adaptive = Adaptive(Profile((), *costs), self.block_size)
            self._auto[batch_size] = replace(self._step, strategy=adaptive)
        return self._auto[batch_size]

    def _start(
        self, input_ids: Any, max_new_tokens: int, params: SamplingParams, stop_tokens: Sequence[int]
    ) -> TokenStream:
        """Check every argument, and only then allocate."""
        prompts = as_prompts("input_ids", input_ids, self.model.config.vocab_size)
        patterns.check_int("max_new_tokens", max_new_tokens, 1)
        needed = max(map(len, prompts)) + max_new_tokens + self._step.slots
        if self.max_len is not None and needed > self.max_len:
            raise ValueError(
                f"max_len: expected >= {needed} (longest prompt {max(map(len, prompts))} + max_new_tokens "
                f"{max_new_tokens} + {self._step.slots} drafts), got {self.max_len}"
            )
        check_positions(self.model, max(map(len, prompts)), max_new_tokens)
        stops = as_stop_tokens(stop_tokens, self.model.config.vocab_size)
        check_ready(self.model)
        session = self._new_session(len(prompts), self.max_len or needed)
        empty: list[FinishReason | None] = [None] * len(prompts)
        lists: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(3)]
        result = GenerationResult(lists[0], lists[1], empty, session.cache, lists[2], errors=[None] * len(prompts))
        return TokenStream(result, self._steps(session, prompts, max_new_tokens, params, stops, result))

    @staticmethod
    def _steps(
        session: Session,
        prompts: list[list[int]],
        max_new_tokens: int,
        params: SamplingParams,
        stop_tokens: frozenset[int],
        result: GenerationResult,
    ) -> Iterator[tuple[int, list[int]]]:
        requests = []
        for index, prompt in enumerate(prompts):
            own = replace(params, seed=_wrapped(params.seed + index))
            request = session.requests[session.add(prompt, max_new_tokens, own, stop_tokens=stop_tokens)]
            result.tokens[index], result.accepted[index] = request.tokens, request.accepted
            result.passes[index] = request.passes
            requests.append(request)
        result.prefill_forwards, result.prefill_seconds = session.prefill_forwards, session.prefill_seconds
        while session.requests:
            events = session.step()
            result.forwards, result.seconds = session.forwards, session.seconds
            for event in events:
                result.finish_reasons[event.id] = event.finish_reason
                result.errors[event.id] = requests[event.id].error
            yield from ((event.id, event.tokens) for event in events if event.tokens)
        # Where no prompt came to its end, it is the model that fails, not a prompt.
        exceptions = [request.exception for request in requests]
        if exceptions[0] is not None and all(exceptions):
            raise exceptions[0]


def _wrapped(seed: int) -> int:
    """`seed` as an unsigned 64-bit number, so that counting on from the last one starts again at 0."""
    return seed % 2**64
