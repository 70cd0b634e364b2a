"""The bits of every module of a model, by position in the sequence: where do two ways to run a model first differ?

    with Trace(model) as autoregressive:
        ...                                          # decode a prompt one way
    with Trace(model) as speculative:
        ...                                          # and the same prompt another way
    autoregressive.first_difference(speculative, tokens)

What a module takes and gives is kept as one 64-bit hash a row. A row counts for a position if it was computed from the
tokens that the sequence has there, row by row from the first of its forward pass: rejected drafts, and mask rows, which
only guess, are not compared. It works for every way to decode that calls the model, one sequence at a time: single
tokens, the steps of this package, transformers' assisted generation. A projection with a gated adapter counts as one
module, under the projection's own name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...nn.adapters import GatedLoRA, lora_gate
from ...patterns import Pattern, Role

__all__ = ["Difference", "Trace"]

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class Difference(NamedTuple):
    """The first bits in which two runs differ, all before them being equal.

    Attributes:
        position: of the token in the sequence, from 0.
        module: path of the module in the model.
        stage: "embedding", "projection", "norm", "attention" (rotary positions, cache and softmax: what lies between
            the projections of q, k, v and the output projection), "lm_head", "mlp" (activation and gating), or the
            class of another module.
    """

    position: int
    module: str
    stage: str


@dataclass
class _Pass:
    """One forward pass: its rows, and what each module took ("in") and gave ("out"), as hashes `[rows]`."""

    first: int
    tokens: list[int]
    compared: int  # leading rows of tokens, one position after the other
    verifies: bool  # the first of them computes what autoregressive decoding would
    bits: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    hidden: list[int] = field(default_factory=list)  # what the last module gave: the lm_head takes rows of it
    has_logits: bool = False


class Trace:
    """A context in which a model notes the bits of its modules.

    Args:
        model: a causal language model of transformers; batches of one sequence.
        alone_from: run every module once more on the first row of its input by itself, in forward passes that begin at
            this position or later, and count in which modules that row's bits depend on the rows beside it (`rows`,
            `depending`). Default never.

    Attributes:
        rows, depending: by stage, rows that were run alone, and how many of them had other bits then.
    """

    def __init__(self, model: Any, *, alone_from: int | None = None) -> None:
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings()
        self._alone_from = alone_from
        self._passes: list[_Pass] = []
        self._logits: dict[int, tuple[int, int]] = {}  # of the lm_head: hash of a row -> hash and argmax of its logits
        self._names = {module: name for name, module in self._decoder.named_modules()}
        self._handles: list[Any] = []
        self._current: _Pass | None = None
        self._weights: dict[tuple[int, torch.device], Tensor] = {}
        self.rows: Counter[str] = Counter()
        self.depending: Counter[str] = Counter()

    def __enter__(self) -> Trace:
        add = self._handles.append
        add(self._decoder.register_forward_pre_hook(self._begins, with_kwargs=True))
        for module in (*_leaves(self._decoder), *_leaves(self._head)):
            add(module.register_forward_hook(self._ran, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._current = None

    def clear(self) -> None:
        """Forget what was noted so far."""
        self._passes.clear()
        self._logits.clear()
        self.rows.clear()
        self.depending.clear()

    def first_difference(self, other: Trace, tokens: list[int]) -> Difference | None:
        """Where the bits of `other` leave those of this run, on the way of `tokens`; None if they never do.

        `tokens` are those of the sequence that both runs have: the prompt and what they agree on.
        """
        mine, others = self._by_position(tokens), other._by_position(tokens)
        for position in sorted(mine.keys() & others.keys()):
            before = ""
            for event, bits in mine[position].items():
                name, what = event
                found = others[position].get(event)
                if found is not None and found != bits:
                    return Difference(position, name, self._stage(name, what, before))
                before = name
        return None

    def preferred(self, tokens: list[int]) -> int | None:
        """The token with the largest logit after `tokens`; None if no row computed it."""
        for each in reversed(self._passes):
            row = len(tokens) - 1 - each.first
            if 0 <= row < each.compared and each.verifies and each.tokens[: row + 1] == tokens[each.first :]:
                logits = self._logits.get(each.hidden[row])
                return None if logits is None else logits[1]
        return None

    def _by_position(self, tokens: list[int]) -> dict[int, dict[tuple[str, str], int]]:
        """Of each position the bits of the last row that was computed for it from these tokens."""
        found: dict[int, dict[tuple[str, str], int]] = {}
        for each in self._passes:
            for row, token in enumerate(each.tokens[: each.compared]):
                position = each.first + row
                if position >= len(tokens) or tokens[position] != token:
                    break
                bits = {event: rows[row] for event, rows in each.bits.items() if row < len(rows)}
                logits = self._logits.get(each.hidden[row])
                found[position] = bits if logits is None else {**bits, ("lm_head", "out"): logits[0]}
        return found

    def _begins(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = None
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None or len(tokens) != 1:
            return
        positions, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        first = 0 if cache is None else int(cache.get_seq_length())
        first = first if positions is None else int(positions.flatten()[0])
        pattern = kwargs.get("tidar_pattern")
        compared, verifies = tokens.shape[1], True
        if isinstance(pattern, Pattern):
            compared, verifies = _token_rows(pattern), pattern.causal_len > 0
        self._current = _Pass(first, tokens[0].tolist(), compared, verifies)
        self._passes.append(self._current)

    def _ran(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        current = self._current
        taken = args[0] if args else next(iter(kwargs.values()), None)
        if current is None or not isinstance(taken, Tensor) or not isinstance(output, Tensor):
            return
        if module is self._head:
            best = output.flatten(0, -2).argmax(-1).tolist()
            for row, *logits in zip(self._hashes(taken), self._hashes(output), best, strict=True):
                self._logits.setdefault(row, (logits[0], logits[1]))  # a row that verifies is there before it drafts
        elif taken.shape[:2] == (1, len(current.tokens)):
            name = self._names[module]
            current.bits[name, "in"] = self._hashes(taken)
            current.bits[name, "out"] = current.hidden = self._hashes(output)
        if self._is_step(module) and taken.ndim == 3 and taken.shape[1] > 1:
            self._run_alone(module, taken, output)

    def _is_step(self, module: nn.Module) -> bool:
        """Whether the rows of the module's input are to be run alone; of the lm_head's, those that verify."""
        current = self._current
        if current is None or self._alone_from is None:
            return False
        if current.first < self._alone_from or not current.verifies:
            return False
        if module is not self._head:
            return True
        verifies, current.has_logits = not current.has_logits, True
        return verifies

    def _run_alone(self, module: nn.Module, taken: Tensor, output: Tensor) -> None:
        stage = "lm_head" if module is self._head else self._kind(module)
        with lora_gate(False):  # the row is of a token, on which no adapter runs
            alone = type(module).forward(module, taken[:, :1])
        self.rows[stage] += 1
        self.depending[stage] += self._hashes(alone) != self._hashes(output[:, :1])

    def _hashes(self, rows: Tensor) -> list[int]:
        """64 bits of each row of `[1, rows, features]`: equal for equal bits, and hardly for others."""
        words = rows.detach().flatten(2) if rows.ndim > 2 else rows.detach()[..., None]
        words = words[0].contiguous().view(_WORDS[words.element_size()]).to(torch.int64)
        key = words.shape[1], words.device
        if key not in self._weights:
            generator = torch.Generator().manual_seed(words.shape[1])
            weights = torch.randint(-(2**63), 2**63 - 1, (words.shape[1],), generator=generator, device="cpu") | 1
            self._weights[key] = weights.to(words.device)
        return (words * self._weights[key]).sum(1).tolist()

    def _stage(self, name: str, what: str, before: str) -> str:
        if name == "lm_head":
            return name
        module, parent = self._module(name), name.rpartition(".")[0]
        if what == "out":
            return self._kind(module)
        # It took other bits, although the modules before it gave the same: they differ by what is computed in between.
        is_attention = "attention" in type(self._module(parent)).__name__.lower()
        return "attention" if is_attention and before.rpartition(".")[0] == parent else "mlp"

    def _module(self, name: str) -> nn.Module:
        module: nn.Module = self._decoder.get_submodule(name)
        return module

    @staticmethod
    def _kind(module: nn.Module) -> str:
        kind = type(module).__name__
        if isinstance(module, (nn.Linear, GatedLoRA)):
            return "projection"
        if isinstance(module, nn.Embedding):
            return "embedding"
        return "norm" if "norm" in kind.lower() else kind


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in which nothing is called that would be looked at."""
    if isinstance(module, GatedLoRA) or not any(module.children()):
        yield module
        return
    for child in module.children():
        yield from _leaves(child)


def _token_rows(pattern: Pattern) -> int:
    """Leading rows of tokens, not masks, at positions that count up by one."""
    in_order = pattern.positions == torch.arange(pattern.q_len, device=pattern.positions.device)
    return int((in_order & (pattern.roles != int(Role.MASK))).to(torch.int32).cumprod(0).sum())
