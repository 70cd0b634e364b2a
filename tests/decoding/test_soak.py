"""A short soak of the session in the suite, and three breaks that a soak must see. `make soak` runs a long one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding import soak as soak_module
from tests.decoding.soak import soak
from tidar_kernels import KVCache, Session
from tidar_kernels.decoding.runner import StepRunner
from tidar_kernels.decoding.strategies import Batch


@pytest.fixture(autouse=True)
def _few_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer prompts and seeds than a long soak draws from: each is decoded alone once."""
    monkeypatch.setattr(soak_module, "PROMPTS", 5)
    monkeypatch.setattr(soak_module, "SEEDS", 1)


def test_a_short_soak() -> None:
    found = soak(500, threads=3, seed=0, round_steps=80)
    assert found.wrong == []
    assert found.requests > 50
    assert found.cancelled > 0


def _commit_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = KVCache.commit

    def one_less(self: KVCache, accepted: Tensor | int, at_most: int | None = None) -> None:
        commit(self, accepted if isinstance(accepted, int) else (accepted - 1).clamp(min=0), at_most)

    monkeypatch.setattr(KVCache, "commit", one_less)


class _NoLock:
    """Whoever asks for it gets it."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return True

    def release(self) -> None: ...


def _no_session_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Session.__init__

    def without(self: Any, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        self._turn = _NoLock()

    monkeypatch.setattr(Session, "__init__", without)
    monkeypatch.setattr(Session, "_is_computing", property(lambda self: False, lambda self, value: None), raising=False)


def _rejected_drafts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot where a step begins holds what a rejected draft left there: it stays, and is committed."""
    device_step = StepRunner._device_step

    def keeping(self: StepRunner, batch: Batch, active: Tensor, report: Tensor) -> int:
        cache, rows = batch.cache, torch.arange(len(active))
        at = cache.lengths.long().clone()
        held = [x[:, rows, :, at].clone() for x in (cache.k, cache.v)]
        forwards = device_step(self, batch, active, report)
        for x, old in zip((cache.k, cache.v), held, strict=True):
            x[:, rows, :, at] = torch.where(old != 0, old, x[:, rows, :, at])  # 0: nothing was there
        return forwards

    monkeypatch.setattr(StepRunner, "_device_step", keeping)


@pytest.mark.parametrize(
    "break_it",
    [_commit_off_by_one, _no_session_lock, _rejected_drafts_are_kept],
    ids=lambda f: f.__name__.strip("_"),
)
def test_a_soak_sees(break_it: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    references = soak_module.References(soak_module.tiny_model())
    for prompt in range(soak_module.PROMPTS):  # of the package as it is
        for params in soak_module.SAMPLINGS:
            references.tokens(prompt, replace(params, seed=0))
    monkeypatch.setattr(soak_module, "PATIENCE", 5.0)  # without its lock a session may hang as well
    monkeypatch.setattr(soak_module, "References", lambda model: references)
    break_it(monkeypatch)
    assert soak(2000, threads=4, seed=1, round_steps=100, most_wrong=0).wrong
