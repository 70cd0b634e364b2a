"""Block length and levels by the running acceptance: a session goes from one of a few settings to another as it runs.

The rule. Every setting is a strategy of this package with the measured seconds of its step. A session counts, of the
drafts r positions after the first whose predecessors stayed, how many stayed; the counts fade with every step, slowly
with those that judge no draft. Every `PERIOD` steps it takes the setting with the most expected tokens a second at
these shares (`levels.expected_tokens`), if that is better than the present one by a margin.

A place that was never judged, or long ago, has the share of the place before it: so a session whose short blocks are
accepted tries longer ones, and one that has come down to single tokens tries drafts again once it has forgotten why.

Changing over takes no pass of its own. A longer block finds its last drafts missing, a shorter one drops them; both are
what steps with few levels meet anyway. The output is that of autoregressive decoding under every setting, so it does
not depend on what is chosen, or when.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...patterns import Pattern
from ...patterns.arguments import check_int
from .base import Batch, Choice, Drafting, StepResult, Strategy
from .levels import Profile, expected_tokens, shapes
from .tidar import autoregressive, tidar

__all__ = ["Adaptive", "Setting", "adaptive"]

PERIOD = 16  # steps from one choice to the next
FADING = 1 - 1 / 32  # of a count, a step that judges drafts
FORGETTING = 1 - 1 / 256  # a step of single tokens
BELIEF = 4.0  # drafts that a share which nobody has seen yet counts for
FIRST_SHARE = 0.8  # of drafts that stay, before any was judged, where no profile says better
MARGIN = 1.03  # how much better another setting must be


class Setting(NamedTuple):
    """One of the choices: its block size, its levels, its strategy, and the seconds of its step."""

    block_size: int
    levels: tuple[int, ...]
    strategy: Drafting
    seconds: float

    def tokens_per_second(self, shares: Sequence[float]) -> float:
        """Expected, where entry r - 1 of `shares` is that of the drafts r positions after the first."""
        return expected_tokens(shares, self.block_size, self.levels) / self.seconds


class Adaptive(Strategy):
    """TiDAR that chooses its block length and levels as it runs; see the module.

    Args:
        profile: what drafts are worth at first, maybe nothing, and what rows cost in the session that decodes: with as
            many sequences, on that machine.
        max_block_size: the longest block.

    Attributes:
        settings: what a session chooses from: single tokens, and blocks of 2, 4, 8, .. drafts with one, two or all
            levels.

    Raises:
        TypeError, ValueError: `profile` is no `Profile`, or `max_block_size` not an int >= 1.
    """

    name = "tidar"
    title = "TiDAR"
    symbol = "B"

    def __init__(self, profile: Profile, max_block_size: int = 16) -> None:
        if not isinstance(profile, Profile):
            raise TypeError(f"profile: expected a Profile, got {type(profile).__name__}")
        self.drafts = check_int("max_block_size", max_block_size, 1)
        self.acceptance = profile.acceptance
        made = []
        for block_size, levels in shapes(max_block_size):
            strategy = autoregressive() if block_size == 1 else tidar(block_size, levels=levels)
            chosen = tuple(range(1, block_size + 1)) if levels is None else tuple(levels)
            made.append(Setting(block_size, chosen, strategy, profile.latency(strategy.pattern.q_len)))
        self.settings = tuple(made)

    @property
    def label(self) -> str:
        return f"{self.title}, {self.symbol} <= {self.drafts}, by the running acceptance"

    def step(self, batch: Batch) -> StepResult:
        return self.settings[-1].strategy.step(batch)

    def first(self, prompt_rows: int) -> tuple[Pattern, list[int]] | None:
        widest = self.settings[-1].strategy
        return None if self.drafts == 1 else widest.first(prompt_rows)

    def choice(self) -> Choice:
        return RunningChoice(self)


class RunningChoice(Choice):
    """The choice of one session, by what it has seen; see the module."""

    def __init__(self, adaptive: Adaptive) -> None:
        self._settings, self._at_first = adaptive.settings, adaptive.acceptance
        places = max(adaptive.drafts - 1, 0)
        self._judged, self._stayed = [0.0] * places, [0.0] * places
        # How many positions further out a slot's drafts lie than they could: those after a level that had no block.
        self._skipped: dict[int, int] = {}
        self._fading = FORGETTING  # of this step
        self._steps = 0
        self._setting = max(self._settings, key=lambda setting: setting.tokens_per_second(self.shares))
        super().__init__(self._setting.strategy)

    @property
    def shares(self) -> list[float]:
        """Of the drafts 1, 2, .. positions after the first whose predecessors stayed, the share that is expected to."""
        found: list[float] = []
        for place, (judged, stayed) in enumerate(zip(self._judged, self._stayed, strict=True)):
            before = found[-1] if found else FIRST_SHARE
            belief = self._at_first[place] if place < len(self._at_first) else before
            found.append((stayed + BELIEF * belief) / (judged + BELIEF))
        return found

    def began(self, slot: int) -> None:
        self._skipped[slot] = 0

    def saw(self, slot: int, drafts: int, accepted: int) -> None:
        skipped = self._skipped.get(slot, 0)
        for draft in range(1, min(accepted + 1, drafts)):
            place = skipped + draft - 1
            self._fading = FADING
            self._judged[place] += 1.0
            self._stayed[place] += draft < accepted
        self._skipped[slot] = accepted - max(level for level in self._setting.levels if level <= accepted)

    def settle(self) -> None:
        for counts in (self._judged, self._stayed):
            counts[:] = [self._fading * count for count in counts]
        self._fading = FORGETTING
        self._steps += 1
        if self._steps % PERIOD:
            return
        shares = self.shares
        best = max(self._settings, key=lambda setting: setting.tokens_per_second(shares))
        if best.tokens_per_second(shares) > MARGIN * self._setting.tokens_per_second(shares):
            self._setting, self.strategy = best, best.strategy


def adaptive(profile: Profile, max_block_size: int = 16) -> Adaptive:
    """TiDAR with the block length and levels, up to `max_block_size`, that the running acceptance asks for.

    `tidar_kernels.decoding.profile.profile` measures the profile. `Decoder(block_size="auto")` measures what rows cost
    itself, once for each number of sequences.

    Raises:
        TypeError, ValueError: `profile` is no `Profile`, or `max_block_size` not an int >= 1.
    """
    return Adaptive(profile, max_block_size)
