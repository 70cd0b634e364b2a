"""What the tests of shared sessions share: a model that waits, and what each request is alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tests.toys import CONFIG, PROMPTS, sharp_model
from tidar_kernels import Decoder, Session
from tidar_kernels.decoding.requests import Event
from tidar_kernels.decoding.session import StepConfig
from tidar_kernels.decoding.strategies import Strategy, tidar

A, B, C = PROMPTS
PATIENCE = 60.0  # seconds until a test gives up waiting


class GatedModel:
    """A `DecoderModel` whose next forward pass waits in the middle, once `close` was called, until `open`."""

    def __init__(self) -> None:
        self.model = sharp_model()
        self.config = self.model.config
        self.parameters = self.model.parameters
        self.logits = self.model.logits
        self.entered, self.may_go, self.closed = threading.Event(), threading.Event(), False
        self.running = self.most_running = 0

    def close(self) -> None:
        self.entered.clear()
        self.may_go.clear()
        self.closed = True

    def open(self) -> None:
        self.may_go.set()

    def wait_for_it(self) -> None:
        assert self.entered.wait(PATIENCE)

    def __call__(self, tokens: Tensor, pattern: Any, cache: Any = None) -> Tensor:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        hidden: Tensor = self.model(tokens, pattern, cache)
        if self.closed:
            self.closed = False
            self.entered.set()
            assert self.may_go.wait(PATIENCE)
        self.running -= 1
        return hidden


def session_of(model: Any, strategy: Strategy | None = None, slots: int = 3) -> Session:
    return Session(model, StepConfig(strategy or tidar(4), CONFIG.mask_token_id or 0), slots, 128)


def alone(prompt: list[int], new_tokens: int, seed: int = 0, temperature: float = 0.0) -> list[int]:
    plain = Decoder(sharp_model(), mode="autoregressive")
    return plain.generate([prompt], new_tokens, seed=seed, temperature=temperature).tokens[0]


def collected(into: dict[int, list[int]], events: list[Event]) -> None:
    for event in events:
        into.setdefault(event.id, []).extend(event.tokens)


def finish(session: Session, into: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
    into = {} if into is None else into
    while session.requests:
        collected(into, session.step())
    return into


@contextmanager
def step_under_way(model: GatedModel, session: Session) -> Iterator[list[list[Event]]]:
    """Inside, a step of another thread has run the model and not yet read it; after it, what the step returned."""
    returned: list[list[Event]] = []
    model.close()
    thread = threading.Thread(target=lambda: returned.append(session.step()))
    thread.start()
    model.wait_for_it()
    try:
        yield returned
    finally:
        model.open()
        thread.join(PATIENCE)
        assert not thread.is_alive()
