"""Generations by several decoders that take turns, so that a drift of the machine meets all of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tidar_kernels import Decoder
from tidar_kernels.models.training import data

PROMPT_BYTES = 256
Key = TypeVar("Key")


def prompts() -> list[list[int]]:
    """One prompt a held-out module: 256 bytes from the end of its first quarter, where the code is."""
    return [excerpt(text) for text in data.held_out_texts().values()]


def excerpt(text: bytes) -> list[int]:
    return list(text[len(text) // 4 :][:PROMPT_BYTES])


@dataclass
class Turn:
    """What one decoder did.

    Attributes:
        seconds: of each group of prompts, the fastest repetition.
        forwards: passes over all groups, once.
        accepted: of every sequence, the tokens that each of its steps committed.
        identical: whether each output was that of the first decoder.
    """

    seconds: list[float] = field(default_factory=list)
    forwards: int = 0
    accepted: list[list[int]] = field(default_factory=list)
    identical: bool = True

    def figures(self, tokens: int, baseline: Turn) -> dict[str, Any]:
        """What every row says of its `tokens` new tokens, beside the first decoder's."""
        seconds = sum(self.seconds)
        return {
            "new_tokens": tokens,
            "forwards": self.forwards,
            "tokens_per_second": round(tokens / seconds, 2),
            "speedup": round(sum(baseline.seconds) / seconds, 4),
            "identical": self.identical,
        }


def described(line: dict[str, Any]) -> str:
    """The figures of a row for the terminal."""
    speed = f"{line['tokens_per_forward']:6.2f} tokens/forward {line['tokens_per_second']:7.1f} tokens/s"
    return f"{speed} {line['speedup']:5.2f} x  as autoregressive: {line['identical']}"


def take_turns(
    decoders: Mapping[Key, Decoder], groups: Sequence[list[list[int]]], new_tokens: int, repeats: int
) -> dict[Key, Turn]:
    """Decode every group of prompts with each decoder, `repeats` times, after a short run of each to warm up."""
    turns = {key: Turn() for key in decoders}
    for decoder in decoders.values():
        decoder.generate(groups[0], 16)
    for index, group in enumerate(groups):
        print(f"prompts {index + 1} of {len(groups)}", file=sys.stderr, flush=True)
        best = dict.fromkeys(decoders, float("inf"))
        reference: list[list[int]] = []
        for repeat in range(repeats):
            for key, decoder in decoders.items():
                result, turn = decoder.generate(group, new_tokens), turns[key]
                reference = reference or result.tokens
                turn.identical &= result.tokens == reference
                best[key] = min(best[key], result.seconds)
                if repeat == 0:
                    turn.forwards += result.forwards
                    turn.accepted += result.accepted
        for key, seconds in best.items():
            turns[key].seconds.append(seconds)
    return turns
