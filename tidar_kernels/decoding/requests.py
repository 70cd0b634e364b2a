"""A request of a session, from its prompt to its last token, and what a step brings it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..ops.verify import SamplingParams

__all__ = ["Event", "FinishReason", "Request", "Taken"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Taken(NamedTuple):
    """What a request takes of the tokens that a step accepted.

    Attributes:
        tokens: as many as its own limits let through.
        finish_reason: "stop" or "length" if the last of them ends it.
        exception: what its `decode` raised after the last of them; it is then at its end.
    """

    tokens: list[int]
    finish_reason: FinishReason | None = None
    exception: Exception | None = None


@dataclass
class Request:
    """One sequence, from its prompt to its last token.

    Attributes:
        tokens: the new tokens so far; a stop token, or the token that completed a stop string, is the last.
        accepted, passes: tokens accepted by each of its steps, and the forward passes that it took.
        finish_reason: None while it runs; "stop" (a stop token or string), "length", "cancelled" or "error".
        error: what went wrong, if something did.
        exception: what its `decode`, its `on_tokens` or its own rows of a step raised, if that is what went wrong.
    """

    id: int
    prompt: list[int]
    max_new_tokens: int
    params: SamplingParams
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None
    on_tokens: Callable[[int, list[int]], object] | None = None
    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    exception: Exception | None = None

    def taken_of(self, tokens: list[int]) -> Taken:
        """What it takes of accepted tokens; changes nothing."""
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            try:
                stops = token in self.stop_tokens or self._ends_with_stop_string(taken)
            except Exception as exception:  # a user's function: whatever it raises is this request's own
                return Taken(taken, exception=exception)
            if stops:
                return Taken(taken, "stop")
            if len(self.tokens) + len(taken) == self.max_new_tokens:
                return Taken(taken, "length")
        return Taken(taken)

    def keep(self, exception: Exception) -> None:
        """Keep what ended it with "error"."""
        self.exception, self.error = exception, f"{type(exception).__name__}: {exception}"

    def _ends_with_stop_string(self, taken: list[int]) -> bool:
        """Whether the last token completed one, wherever token boundaries lie: looked for in the decoded end."""
        if not self.stop_strings or self.decode is None:
            return False
        # Tokens that decode to nothing make the window too short in theory; sixteen of them are allowed for.
        window = max(len(stop.encode()) for stop in self.stop_strings) + 16
        text = self.decode([*self.tokens[-window:], *taken][-window:])
        return any(stop in text for stop in self.stop_strings)


@dataclass(frozen=True)
class Event:
    """What a step brought one request: its new tokens, maybe none, and why it ended, if it did."""

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
