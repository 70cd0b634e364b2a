"""What a decoding strategy is: the rows of a step, and where the next step's drafts are read. The loop is not its own.

All strategies that verify share one step (`Drafting.step`):

    rows      [d_0 .. d_{n-1} | mask rows]          one forward pass over the strategy's pattern
    verify    `sampling.verify` on the draft rows   a accepted drafts and the token after them
    next      that token, and a token of each row `sources[a]`

A draft may be missing: it is -1 in the buffer, its row is a mask row, and acceptance ends before it. A step whose
first draft is its only one is *cold*; strategies whose draft rows then serve as mask rows say so in `cold`. Whether a
row is a mask row is known from that alone, never guessed from token ids: a prompt may hold the mask token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ...cache import KVCache
from ...nn.adapters import lora_gate
from ...ops.verify import RULES, Rule, SamplingTensors, Verified, sample, verify
from ...ops.verify.noise import Stream
from ...patterns import Pattern, Role, causal
from ...patterns.rows import ordinary
from ..exact import exact_rows
from .head import one_pass_rows

__all__ = [
    "Batch",
    "Choice",
    "DecoderModel",
    "Drafting",
    "StepResult",
    "Strategy",
    "check_interface",
    "check_positions",
    "check_ready",
    "judge",
]


class DecoderModel(Protocol):
    """What decoding needs of a model; `tidar_kernels.models.Transformer` is one.

    `config` has `vocab_size`, `num_layers`, `num_kv_heads` and `head_dim`. Calling the model with int64 tokens
    `[batch, pattern.q_len]` gives hidden states `[batch, q_len, hidden]` and writes the K/V of the pattern's causal
    rows after the cache's committed tokens; `logits` is the lm_head.

    Three things are optional:

    `check_ready()` raises TypeError or ValueError if something that decoding relies on has changed since the model was
    given to the decoder (training mode, the attention implementation, ..). It is called once a run, not once a step:
    by `Decoder.generate` and `stream`, by `Session.add`, and by the first step after one.

    `config.max_positions` is an int for a model that has no position from there on (learned positions). A request's
    prompt and new tokens must fit. Rows look further ahead than that, so the model clamps the positions of its rows to
    the last one: such a row is a mask row, which only guesses, or a draft after the request's last token.
    `config.bounded_by`, a str, says in errors why.

    `with_layers(tokens, pattern, cache, layers)` is the call, for a drafter that reads hidden states of the model: it
    gives `(hidden, features)`, features `[batch, q_len, len(layers) * hidden]` what comes out of these layers, counted
    from 0, side by side.
    """

    @property
    def config(self) -> Any: ...

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Any]: ...


def check_interface(model: Any) -> None:
    """Raise TypeError for what is no `DecoderModel`; a model of transformers is none before it is prepared."""
    missing = [name for name in ("config", "logits", "parameters") if not hasattr(model, name)]
    if missing or not callable(model):
        raise TypeError(
            f"model: expected a DecoderModel, or one of transformers by Decoder.from_transformers, got "
            f"{type(model).__name__}, which {f'has no {missing[0]}' if missing else 'cannot be called'}"
        )


def check_ready(model: DecoderModel) -> None:
    """Ask a model that has `check_ready` whether it is still what it was; see `DecoderModel`."""
    check: Callable[[], None] | None = getattr(model, "check_ready", None)
    if check is not None:
        check()


def check_positions(model: DecoderModel, prompt_len: int, max_new_tokens: int) -> None:
    """Raise ValueError if a request's tokens do not fit the model's positions; see `DecoderModel`."""
    limit: int | None = getattr(model.config, "max_positions", None)
    if limit is not None and prompt_len + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: expected <= {limit - prompt_len} after a prompt of {prompt_len}, for the model has "
            f"{limit} positions{getattr(model.config, 'bounded_by', '')}, got {max_new_tokens}"
        )


@dataclass
class Batch:
    """The batch as a strategy sees it: buffers on the device that never move, one entry a sequence.

    Attributes:
        model, cache: of the session.
        mask_token_id: the token of mask rows.
        rule, beta: how drafts are judged, see `tidar_kernels.ops.verify`.
        state: sampling parameters of every sequence.
        drafts: int64 `[batch, drafts]`; the first is always there, -1 where another is missing.
        draft_logits: `[batch, drafts, vocab]`, what they were drawn from; for the rejection rule, else None.
        seen: bool `[batch, vocab]` for repetition penalties, or None.
        adapted: the model's gated adapters are on for mask rows, see `tidar_kernels.nn.adapters`.
        exact: draft rows have the bits of single-token decoding, see `tidar_kernels.decoding.exact`.
        awake: int32 `[batch]`, 0 for a sequence that is idle, whose K/V is not read, else 1; None: all are awake.
    """

    model: DecoderModel
    cache: KVCache
    mask_token_id: int
    rule: Rule
    beta: float
    state: SamplingTensors
    drafts: Tensor
    draft_logits: Tensor | None = None
    seen: Tensor | None = None
    adapted: bool = False
    exact: bool = False
    awake: Tensor | None = None

    def sequence(self, index: int) -> Batch:
        """Sequence `index` alone, on the same memory."""
        at = slice(index, index + 1)

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[at]

        return replace(
            self,
            cache=self.cache.sequence(index),
            state=SamplingTensors(*(x[at] for x in self.state)),
            drafts=self.drafts[at],
            draft_logits=part(self.draft_logits),
            seen=part(self.seen),
            awake=part(self.awake),
        )

    def narrowed(self, drafts: int) -> Batch:
        """The first `drafts` drafts of every sequence, on the same memory; itself if that is all of them."""
        if drafts == self.drafts.shape[1]:
            return self
        logits = None if self.draft_logits is None else self.draft_logits[:, :drafts]
        return replace(self, drafts=self.drafts[:, :drafts], draft_logits=logits)

    def forward(
        self,
        tokens: Tensor,
        pattern: Pattern,
        is_mask: Tensor | Literal[False],
        gate: bool | None = None,
        run: Callable[[Tensor, Pattern, KVCache], Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of `tokens [batch, q_len]`; rows where `is_mask [batch, q_len]` get the mask token.

        Rows that are no masks run the base model where it has adapters, unless `gate` says otherwise for all rows.
        `run` is called in the model's place, where another one drafts.
        """
        if is_mask is not False:
            tokens = tokens.masked_fill(is_mask, self.mask_token_id)
        with (
            nullcontext() if self.awake is None else self.cache.reading(self.cache.lengths * self.awake),
            exact_rows(pattern) if self.exact else nullcontext(),
            lora_gate(is_mask if gate is None else gate) if self.adapted else nullcontext(),
        ):
            return (self.model if run is None else run)(tokens, pattern, self.cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """The lm_head on draft rows."""
        with exact_rows() if self.exact else nullcontext():
            return self.model.logits(hidden)

    def draft(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Draft tokens `[batch, rows]` from mask rows' logits, by the rule that will judge them.

        `positions [batch]` is that of each sequence's first row, the others count on.
        """
        if self.rule == "point_mass":
            return logits.argmax(-1)
        stream = Stream.TOKEN if self.rule == "coupled" else Stream.DRAFT
        # Bad logits give -1, which reads as: no draft.
        return sample(logits, positions, self.state, seen=self.seen, stream=stream)


class StepResult(NamedTuple):
    """What a step did, on the device.

    Attributes:
        verified: accepted counts, the tokens after them, bad rows.
        drafts: int64 `[batch, drafts]`, what was judged.
        following: int64 `[batch, drafts - 1]`, the next drafts after the first; -1 for none.
        logits: `[batch, drafts - 1, vocab]`, what those were drawn from; None if nobody asks.
        forwards: forward passes that the step took.
        path: int64 `[batch, drafts]`, in which slots after the committed ones the accepted drafts' K/V lies, then -1;
            None if it is 0, 1, ... already.
    """

    verified: Verified
    drafts: Tensor
    following: Tensor
    logits: Tensor | None = None
    forwards: int = 1
    path: Tensor | None = None


class Choice:
    """Which strategy takes the next step of a session: here always the same one.

    Attributes:
        strategy: of the next step.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def began(self, slot: int) -> None:
        """A request has joined a slot."""

    def saw(self, slot: int, drafts: int, accepted: int) -> None:
        """The step accepted so many of a slot's drafts."""

    def settle(self) -> None:
        """The step is over, and all of its slots were seen: choose the next one's strategy."""


class Strategy(ABC):
    """A way to decode.

    What is true of every strategy of a class is a class attribute, so that it can be asked before one is made
    (`strategies.class_of`); what depends on its options is a property.

    Attributes:
        name: as in `Decoder(strategy=...)`.
        drafts: the most tokens that a step commits.
        title: what tables and messages call it.
        symbol: what the literature calls the number of its drafts: "B" (block size), "N" (stride), "L" (length).
        options: names of what can be chosen beside the number of drafts, keywords of the function that makes it.
        rules: how its drafts can be judged, see `tidar_kernels.ops.verify`.
        equals_autoregression: with the coupled rule, the output is that of autoregressive decoding, token for token.
        can_be_exact: rows that verify can have the bits of single-token decoding (`tidar_kernels.decoding.exact`).
        graphable: the step reads nothing from the device, so that it can be one CUDA graph.
        seeded: the first draft of a step is the token after the committed ones; else it may be missing as others are.
        has_drafter: another model drafts (`tidar_kernels.decoding.strategies.dflash`).
    """

    name: str
    drafts: int
    title: str = ""
    symbol: str = "L"
    options: tuple[str, ...] = ()
    rules: tuple[str, ...] = RULES
    equals_autoregression: bool = True
    can_be_exact: bool = True
    graphable: bool = True
    seeded: bool = True
    has_drafter: bool = False

    @property
    def label(self) -> str:
        """The strategy and its options, as a table names it: "TiDAR, B = 8, levels 1 2 4"."""
        return f"{self.title or self.name}, {self.symbol} = {self.drafts}"

    @property
    def takes_beta(self) -> bool:
        """Whether `beta` can be below 1: every draft row has a mask row that predicts the same token."""
        return False

    @abstractmethod
    def step(self, batch: Batch) -> StepResult:
        """One step of every sequence; commits nothing."""

    def choice(self) -> Choice:
        """What chooses the strategy of each step of one session."""
        return Choice(self)

    @property
    def slots(self) -> int:
        """The most cache slots that a step writes after the committed ones."""
        return self.drafts

    @property
    def chunk_unit(self) -> int:
        """Chunks of a prefill are multiples of so many tokens, as far as there are any."""
        return 1

    def kept(self, tokens: int) -> int:
        """How many of a request's tokens a prefill commits; those after them are the first step's first drafts."""
        return tokens

    def context(self, tokens: int) -> Pattern:
        """The pattern of a chunk of prefill."""
        return causal(tokens)

    def first(self, prompt_rows: int) -> tuple[Pattern, list[int]] | None:
        """The pattern of a prefill's last chunk that drafts too, and the rows of drafts 1..; None: start cold."""
        return None


@dataclass
class Drafting(Strategy):
    """A strategy that drafts and verifies in one forward pass; see the module.

    Args:
        name: of the strategy.
        pattern: its first `drafts` rows are the drafts, causal.
        drafts: n, drafts a step, the first of which always stays.
        sources: int64 `[n + 1, n - 1]`: with a drafts accepted, draft m of the next step is a token of row
            `sources[a, m - 1]`; -1 for no draft.
        cold: int64 `[n - 1]`, the same for a step whose only draft is the first; None: `sources[1]`.
        mix: int64 `[n]`, for every draft row the mask row that predicts the same token; None if there are none.
    """

    name: str
    pattern: Pattern
    drafts: int
    sources: Tensor
    cold: Tensor | None = None
    mix: Tensor | None = None

    @property
    def takes_beta(self) -> bool:
        return self.mix is not None

    def __post_init__(self) -> None:
        self._on_device: dict[torch.device, tuple[Tensor, ...]] = {}

    def _tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """`(sources by state, mask rows, rows to mix, rows of one lm_head pass, sources among these)`.

        Row n + 1 of the sources is the cold step's.
        """
        if device not in self._on_device:
            cold = self.sources[1] if self.cold is None else self.cold
            is_mask = self.pattern.roles == int(Role.MASK)
            mix = torch.empty(0, device="cpu") if self.mix is None else self.mix
            sources = torch.cat([self.sources, cold[None]])
            drafts = torch.arange(self.drafts, device="cpu")
            head = torch.cat([drafts, sources[sources >= self.drafts].unique()])
            place = torch.full((self.pattern.q_len + 1,), -1, device="cpu")
            place[head] = torch.arange(len(head), device="cpu")
            tables = sources, is_mask, mix, head, place[sources]  # no source, -1, is the last place, -1 too
            self._on_device[device] = tuple(ordinary(x, device) for x in tables)
        return self._on_device[device]

    def step(self, batch: Batch) -> StepResult:
        count, drafts = self.drafts, batch.drafts.clone()
        if count == self.pattern.q_len == 1:
            hidden = batch.forward(drafts, self.pattern, False)
            return StepResult(judge(batch, batch.logits(hidden), drafts), drafts, drafts[:, 1:])
        sources, is_mask, mix, head, in_head = self._tables(drafts.device)
        missing = drafts < 0
        rows = torch.cat([missing, is_mask[count:].expand(len(drafts), -1)], dim=1)
        tokens = torch.nn.functional.pad(drafts, (0, self.pattern.q_len - count))
        hidden = batch.forward(tokens, self.pattern, rows)
        in_one_pass = not batch.exact and len(drafts) * len(head) <= one_pass_rows(drafts.device)
        head_logits = batch.model.logits(hidden[:, head]) if in_one_pass else batch.logits(hidden[:, :count])
        verified = judge(batch, head_logits[:, :count], drafts, hidden[:, mix] if batch.beta < 1.0 else None)
        if count == 1:
            return StepResult(verified, drafts, drafts[:, 1:])
        state = torch.where(missing[:, 1], count + 1, verified.accepted)
        at = sources[state]
        logits = _rows(head_logits, in_head[state]) if in_one_pass else batch.model.logits(_rows(hidden, at))
        # The next first draft takes the position after the accepted ones, and these the positions after that.
        following = batch.draft(logits, batch.cache.lengths + verified.accepted + 1)
        return StepResult(verified, drafts, following.masked_fill(at < 0, -1), logits)


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at [batch, n]` of `x [batch, rows, width]`; any row where there is none, -1."""
    return x.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))


def judge(batch: Batch, logits: Tensor, drafts: Tensor, mix: Tensor | None = None) -> Verified:
    """Verify `drafts [batch, n]` by the logits of their rows, and by the hidden states `mix` where those have a say."""
    single = drafts.shape[1] == 1
    return verify(
        logits,
        drafts,
        batch.cache.lengths + 1,
        batch.state,
        rule="coupled" if single else batch.rule,
        draft_logits=None if single else batch.draft_logits,
        mix=None if mix is None else batch.model.logits(mix),
        beta=batch.beta,
        seen=batch.seen,
        check=False,
    )
