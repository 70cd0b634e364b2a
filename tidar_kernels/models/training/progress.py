"""What a training run shows while it runs: one line with losses, speed and the time that is left."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

__all__ = ["Progress"]

_SMOOTHING = 0.95
_LOG_EVERY = 50


class Progress:
    """A line rewritten in place on a terminal, and written every 50 steps into a log.

    Args:
        steps: of the whole run; `done` of them before.
        tokens: clean tokens of a step.
        curve: `[CE_AR, CE_Diff]` of the steps before, whose running mean goes on.
    """

    def __init__(
        self, steps: int, done: int, tokens: int, curve: list[list[float]], stream: TextIO | None = None
    ) -> None:
        self.steps, self.first, self.tokens = steps, done, tokens
        self.start = time.monotonic()
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.written = False
        self.mean: list[float] | None = None
        for losses in curve[-200:]:
            self._average(losses)

    def _average(self, losses: list[float]) -> list[float]:
        before = losses if self.mean is None else self.mean
        self.mean = [_SMOOTHING * old + (1 - _SMOOTHING) * new for old, new in zip(before, losses, strict=True)]
        return self.mean

    def update(self, done: int, ar: float, diffusion: float) -> None:
        """`done` steps are done, the last of them with these losses in nats a token."""
        mean_ar, mean_diffusion = self._average([ar, diffusion])
        if not (self.live or done % _LOG_EVERY == 0 or done == self.steps):
            return
        rate = (done - self.first) / max(time.monotonic() - self.start, 1e-9)
        line = (
            f"step {done}/{self.steps}  AR {mean_ar:.3f}  diffusion {mean_diffusion:.3f} nats/byte  "
            f"{rate * self.tokens:.0f} tokens/s  {_duration((self.steps - done) / rate)} left"
        )
        if self.live:
            # A line that wraps could not be rewritten.
            self.stream.write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K")
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
        self.written = True

    def close(self) -> None:
        """Leave the line as it is."""
        if self.live and self.written:
            self.stream.write("\n")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
