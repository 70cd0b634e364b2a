"""Logits processors of transformers, honoured exactly while several tokens are decoded a forward pass.

A processor maps a row's history and scores to scores. In a step, row i of the drafts has the history of everything
committed and the drafts up to its own, so each such row is handed to the processors as a batch of one. That is exact
for processors that look at nothing else: those listed here, and others that say so with an attribute `row_wise = True`.

Where a list holds nothing but what `SamplingParams` knows, the device does it instead, without Python between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from ...cache import KVCache
from ...ops.verify import SamplingParams
from ...patterns import Pattern
from .model import TransformersModel

__all__ = ["ProcessedModel", "check_row_wise", "sampling_options"]

ROW_WISE = frozenset({
    "EpsilonLogitsWarper", "EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper", "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper",
    "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper",
})  # fmt: skip


def check_row_wise(processors: Sequence[Any]) -> None:
    """Raise ValueError naming the first processor that is not known to look at its own row alone."""
    for processor in processors:
        name = type(processor).__name__
        known = name in ROW_WISE and type(processor).__module__ == logits_process.__name__
        if not known and not getattr(processor, "row_wise", False):
            raise ValueError(
                f"logits_processor: expected processors that look at one row's history and scores alone, got {name}; "
                "set its attribute `row_wise = True` if it does"
            )


def sampling_options(processors: Sequence[Any], padded: bool) -> dict[str, Any] | None:
    """`processors` as arguments of `SamplingParams`, or None if they do more, or anything in another order or range.

    Args:
        processors: as `generate` prepares them.
        padded: some prompt is padded; a repetition penalty that counts padding as seen is then not ours.
    """
    options: dict[str, Any] = {}
    order: list[int] = []
    for processor in processors:
        match type(processor).__name__:
            case "RepetitionPenaltyLogitsProcessor":
                ignored = getattr(processor, "prompt_ignore_length", None)
                if padded if ignored is None else not isinstance(ignored, Tensor):
                    return None
                options["repetition_penalty"] = float(processor.penalty)
                order.append(0)
            case "TemperatureLogitsWarper":
                options["temperature"] = float(processor.temperature)
                order.append(1)
            case "TopKLogitsWarper" if processor.filter_value == -torch.inf:
                options["top_k"] = processor.top_k
                order.append(2)
            case "TopPLogitsWarper" if processor.filter_value == -torch.inf and processor.min_tokens_to_keep == 1:
                options["top_p"] = float(processor.top_p)
                order.append(3)
            case "MinPLogitsWarper" if processor.filter_value == -torch.inf and processor.min_tokens_to_keep == 1:
                options["min_p"] = float(processor.min_p)
                order.append(4)
            case "LogitNormalization":  # sampling does it anyway
                order.append(5)
            case _:
                return None
    if order != sorted(set(order)):
        return None
    try:
        SamplingParams(**options)
    except (TypeError, ValueError):  # beyond the device's ranges: a temperature of 1e-6, say
        return None
    return options


class ProcessedModel:
    """A decoder's model whose draft rows' logits have gone through `processors`.

    Rows are known by two more columns of the hidden states, whatever is gathered from them: zero in rows that are not
    causal, whose tokens are guesses that no processor decides about.

    Args:
        model: what it wraps.
        processors: row-wise, in their order.
        prefixes: for each sequence of the batch, the padding that its history starts with, int64 `[n]`.
        max_len: tokens per sequence, padding excluded.
    """

    def __init__(
        self, model: TransformersModel, processors: Sequence[Any], prefixes: Sequence[Tensor], max_len: int
    ) -> None:
        self.model, self.config, self.prefixes = model, model.config, prefixes
        device = next(model.parameters()).device
        self._processors = [[_for_row(p, row) for p in processors] for row in range(len(prefixes))]
        self._tokens = torch.zeros(len(prefixes), max_len, dtype=torch.int64, device=device)
        self._first, self._lengths = 0, [0]

    def __call__(self, tokens: Tensor, pattern: Pattern, cache: KVCache | None = None) -> Tensor:
        hidden = self.model(tokens, pattern, cache)
        if cache is None:
            raise ValueError("cache: expected one, got None")
        if pattern.tree_mask is not None:
            raise ValueError(f"pattern: expected one without tree mask beside logits processors, got {pattern.name}")
        keep = pattern.causal_len
        self._first = int(cache.lengths.storage_offset())  # a prefill runs on one sequence's view of the cache
        self._lengths = cache.lengths.tolist()
        for sequence, length in enumerate(self._lengths):
            self._tokens[self._first + sequence, length : length + keep] = tokens[sequence, :keep]
        # Row r as r + 1 in base 128: exact in every float dtype.
        row = torch.arange(1, pattern.q_len + 1, device=hidden.device)
        row = torch.where(row <= keep, row, 0)
        marks = torch.stack([row // 128, row % 128], dim=-1).to(hidden.dtype)
        return torch.cat([hidden, marks.expand(len(hidden), -1, -1)], dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden[..., :-2]).float()
        high, low = hidden[..., -2:].long().unbind(-1)
        rows = high * 128 + low
        for sequence, index in rows.nonzero().tolist():
            slot, row = self._first + sequence, int(rows[sequence, index])
            seen = self._tokens[slot, : self._lengths[sequence] + row]
            history, scores = torch.cat([self.prefixes[slot], seen])[None], logits[sequence, index][None]
            for processor in self._processors[slot]:
                scores = processor(history, scores)
            logits[sequence, index] = scores[0]
        return logits

    def parameters(self) -> Iterator[Any]:
        return self.model.parameters()

    def check_ready(self) -> None:
        """As that of the model it wraps."""
        self.model.check_ready()


def _for_row(processor: Any, row: int) -> Any:
    """`processor` for a batch that is row `row` alone: penalties know how much padding each row has."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor):
        return processor
    return type(processor)(processor.penalty, prompt_ignore_length=ignored[row : row + 1])
