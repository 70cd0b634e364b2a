"""Ctrl-C while a session works: held back where half a change would be left, let through where the device computes.

Python raises KeyboardInterrupt between any two instructions of the main thread, in the middle of what other threads
only see whole. Inside `held` it comes at the end, but at once within `let_through`, whose caller must be ready for it.
Whoever presses twice is not kept waiting. Other threads never get one: there both do nothing.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["held", "let_through"]


class held:
    """A context in which SIGINT waits until the end, or for the next `let_through`."""

    def __init__(self) -> None:
        self._before: Any = None  # the handler that was there; None where there is nothing to hold back
        self._is_noted = False
        self.is_open = False

    def __enter__(self) -> held:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_open or self._is_noted:
            self._is_noted = False
            self._before(number, frame)
        else:
            self._is_noted = True

    def deliver(self) -> None:
        """Raise what was held back so far."""
        if self._is_noted:
            self._is_noted = False
            self._before(signal.SIGINT, None)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            if signal.getsignal(signal.SIGINT) == self._note:  # else somebody inside has set another
                signal.signal(signal.SIGINT, self._before)
            self.deliver()


class let_through:
    """Within `held`: what was held back comes now, and what follows comes at once."""

    def __enter__(self) -> None:
        handler = None
        if threading.current_thread() is threading.main_thread():
            handler = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        self._held = handler if isinstance(handler, held) else None
        if self._held is not None:
            self._held.deliver()
            self._held.is_open = True

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            self._held.is_open = False
