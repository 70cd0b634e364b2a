"""DFlash: a small drafter beside its target drafts a whole block in one pass (arXiv 2602.06036).

The drafter embeds nothing and keeps no text of its own. Its context is what the target has computed: the hidden states
that come out of some of the target's layers, of every committed token, from which each of its layers makes K/V. Its
rows are a block that sees this context and itself whole. One step, P tokens being committed:

    draft     [seed, M x (L - 1)] at P .. P + L - 1, by the drafter      row m drafts the token at P + m
    verify    [seed, its drafts], causal, by the target                  a accepted, and the token after them
    context   K/V of the drafter's layers for these rows                 from the target's hidden states of this pass

The drafter's layers stand in the same cache after the target's. Whatever rows the target writes after the committed
tokens, prompts and drafts alike, the drafter's layers get too, so one commit keeps those that were accepted and drops
the others; pages, slots and lengths are those of the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import patterns
from ...cache import KVCache
from ...patterns import Pattern
from .base import Batch, DecoderModel, StepResult, Strategy, check_interface, check_ready
from .self_speculation import then_verify

__all__ = ["DFlash", "DraftedModel", "Drafter", "check_drafter"]


class Drafter(Protocol):
    """What drafts beside a target. The cache that it is given has its own layers, and the target's lengths.

    `config` has `num_layers`, `num_kv_heads`, `head_dim`, `block_size` and `mask_token_id`, and `target_layers`, a
    tuple of the target's layers whose hidden states it reads, counted from 0. It may have fewer or narrower heads than
    the cache, whose first ones it then uses.

    Calling it with int64 tokens `[batch, pattern.q_len]` gives hidden states `[batch, q_len, hidden]`, and `logits` of
    these what tokens are drafted from. `remember` writes the K/V of rows after the committed tokens, from features as
    `DecoderModel.with_layers` gives them; it commits nothing.
    """

    @property
    def config(self) -> Any: ...

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def remember(self, features: Tensor, cache: KVCache) -> None: ...

    def parameters(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class DraftedConfig:
    """Of a target with the layers of its drafter; see `DecoderModel`."""

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    bounded_by: str
    block_size: int
    mask_token_id: int | None


class DraftedModel:
    """A target and its drafter as one `DecoderModel`: hidden states and logits are the target's.

    Args:
        target: a `DecoderModel` with `with_layers`.
        drafter: of the same dtype, on the same device.

    Raises:
        TypeError: the target does not hand out hidden states of its layers, or the drafter is no `Drafter`.
        ValueError: the drafter reads layers that the target does not have, or has another dtype or device.
    """

    def __init__(self, target: DecoderModel, drafter: Drafter) -> None:
        check_interface(target)
        if not hasattr(target, "with_layers"):
            raise TypeError(
                "model: expected one that hands out hidden states of its layers (`with_layers`) beside a drafter, got "
                f"{type(target).__name__}"
            )
        missing = [name for name in ("config", "logits", "remember", "parameters") if not hasattr(drafter, name)]
        if missing or not callable(drafter):
            raise TypeError(f"drafter: expected a Drafter, got {type(drafter).__name__}")
        own, drafts = target.config, drafter.config
        beyond = [layer for layer in drafts.target_layers if not 0 <= layer < own.num_layers]
        if beyond:
            raise ValueError(f"drafter: expected layers of its target, 0 .. {own.num_layers - 1}, got {beyond[0]}")
        weights = [next(iter(model.parameters())) for model in (target, drafter)]
        expected, found = [f"{weight.dtype} on {weight.device}" for weight in weights]
        if expected != found:
            raise ValueError(f"drafter: expected {expected} as its target, got {found}")
        self.target, self.drafter = target, drafter
        self.config = DraftedConfig(
            vocab_size=own.vocab_size,
            num_layers=own.num_layers + drafts.num_layers,
            num_kv_heads=max(own.num_kv_heads, drafts.num_kv_heads),
            head_dim=max(own.head_dim, drafts.head_dim),
            max_positions=getattr(own, "max_positions", None),
            bounded_by=getattr(own, "bounded_by", ""),
            block_size=drafts.block_size,
            mask_token_id=drafts.mask_token_id,
        )

    @property
    def model(self) -> Any:
        """The target's module, as a wrapper of a module has it."""
        return self.target if isinstance(self.target, nn.Module) else getattr(self.target, "model", None)

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache | None = None) -> Tensor:
        """The target's hidden states; the drafter's layers get the K/V of the rows that are written."""
        if cache is None:
            return self.target(tokens, pattern)
        target: Any = self.target
        hidden, features = target.with_layers(tokens, pattern, cache, self.drafter.config.target_layers)
        if pattern.kept_len:
            self.drafter.remember(features[:, : pattern.kept_len], self._own(cache))
        return hidden

    def draft(self, tokens: Tensor, pattern: Pattern, cache: KVCache) -> Tensor:
        """The drafter's hidden states."""
        return self.drafter(tokens, pattern, self._own(cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """The target's lm_head."""
        return self.target.logits(hidden)

    def parameters(self) -> Iterator[Any]:
        return chain(self.target.parameters(), self.drafter.parameters())

    def check_ready(self) -> None:
        """What the target asks once a run."""
        check_ready(self.target)

    def _own(self, cache: KVCache) -> KVCache:
        return cache.from_layer(self.target.config.num_layers)


class DFlash(Strategy):
    """A drafter's pass, then the target's causal pass over the block; see the module.

    The output is the target's own: with the coupled rule token for token that of autoregressive decoding. A step counts
    one forward pass, the target's.

    Args:
        length: L >= 2, the block size: the most tokens a step commits.

    Raises:
        TypeError, ValueError: `length` is not an int >= 2.
    """

    name = "dflash"
    title = "DFlash"
    has_drafter = True

    def __init__(self, length: int) -> None:
        self.drafts = patterns.check_int("length", length, 2)
        self._draft, self._verify = patterns.block_step(length), patterns.causal(length)

    def step(self, batch: Batch) -> StepResult:
        model: Any = batch.model
        is_mask = torch.ones_like(batch.drafts, dtype=torch.bool)
        is_mask[:, 0] = False
        tokens = batch.drafts[:, :1].expand_as(is_mask)
        hidden = batch.forward(tokens, self._draft, is_mask, run=model.draft)
        return then_verify(batch, model.drafter.logits(hidden[:, 1:]), self._verify, forwards=1)


def check_drafter(strategy: Strategy, model: DecoderModel) -> None:
    """Raise ValueError for a strategy that needs a drafter where there is none, and for another one where there is."""
    if strategy.has_drafter and not isinstance(model, DraftedModel):
        raise ValueError(f"model: expected a DraftedModel for {strategy.label}, got {type(model).__name__}")
    if isinstance(model, DraftedModel) and not strategy.has_drafter:
        raise ValueError(f"strategy: expected DFlash for a model with a drafter, got {strategy.label}")
