"""What decoding relies on and a user can change: noticed at the start of a run, and asked once a run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.toys import CONFIG, sharp_model
from tidar_kernels import Decoder
from tidar_kernels.models import Transformer
from tidar_kernels.nn.adapters import add_gated_lora

PROMPT = [3, 1, 4, 1, 5]


def _resize(model: Transformer) -> None:
    model.embed_tokens = nn.Embedding(CONFIG.vocab_size + 2, CONFIG.hidden_size)


class _Dropped(nn.Module):
    """A projection with dropout before it, as adapters have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.dropout(x))
        return out


def _drop(model: Transformer) -> None:
    mlp: Any = model.layers[0].mlp
    mlp.down_proj = _Dropped(mlp.down_proj)


CHANGES: dict[str, tuple[Callable[[Transformer], object], str]] = {
    "dtype": (lambda m: m.double(), r"^model: expected dtype torch.float32 .* got torch.float64; make a new one$"),
    "device": (lambda m: m.to("meta"), r"^model: expected device cpu .* got meta; make a new one$"),
    "adapters": (lambda m: add_gated_lora(m, 2, 4.0), r"^model: expected gated adapters False .* got True; make"),
    "vocabulary": (_resize, r"^vocab_size: expected 30 rows as in the config, got 32$"),
    "dropout": (_drop, r"^model: expected evaluation mode, got dropout in layers.0.mlp.down_proj.dropout; call"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("when", ["before add", "before the first step", "before steps"])
def test_a_session_notices(what: str, when: str) -> None:
    change, message = CHANGES[what]
    model = sharp_model()
    decoder = Decoder(model, 4, batch_size=2, max_len=64)
    session = decoder.session
    if when != "before add":
        decoder.add(PROMPT, 8)
    if when == "before steps":
        decoder.step()
    change(model)
    run: dict[str, Callable[[], object]] = {
        "before add": lambda: decoder.add(PROMPT, 8),
        "before the first step": decoder.step,
        "before steps": lambda: asyncio.run(anext(session.steps())),  # type: ignore[arg-type]
    }
    with pytest.raises(ValueError, match=message):
        run[when]()
    assert len(session.requests) == (when != "before add")


@pytest.mark.parametrize("what", ["vocabulary", "dropout"])
def test_generate_notices_before_it_allocates(what: str) -> None:
    change, message = CHANGES[what]
    model = sharp_model()
    decoder = Decoder(model, 4)
    change(model)
    for call in (decoder.generate, decoder.stream):
        with pytest.raises(ValueError, match=message):
            call([PROMPT], 8)


def test_training_mode_of_layers_that_draw_nothing_is_no_reason() -> None:
    model = sharp_model().eval()
    decoder = Decoder(model, 4)
    expected = decoder.generate([PROMPT], 8).tokens
    model.train()
    assert decoder.generate([PROMPT], 8).tokens == expected


def test_the_model_is_asked_once_a_run_and_not_once_a_step() -> None:
    model = sharp_model()
    asked: list[int] = []
    inner = model.check_ready

    def check_ready() -> None:
        asked.append(1)
        inner()

    model.check_ready = check_ready  # type: ignore[method-assign]
    counts = []
    for new_tokens in (4, 40):
        asked.clear()
        result = Decoder(model, 2).generate([PROMPT], new_tokens)
        counts.append(len(asked))
    assert result.forwards > 10
    assert counts[0] == counts[1] <= 3


def test_a_captured_step_is_forgotten_when_weights_move() -> None:
    """It reads them where they lay when it was captured: `load_state_dict(assign=True)` puts others in their place."""
    model = sharp_model()
    runner: Any = Decoder(model, 4, batch_size=1, max_len=64).session._runner
    runner._use_graph = True  # as on a GPU
    runner.weights_may_have_moved()
    captured = {"a step": object()}
    runner._graphs.update(captured)
    runner.weights_may_have_moved()
    assert runner._graphs == captured
    model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    runner.weights_may_have_moved()
    assert not runner._graphs


@pytest.mark.parametrize("where", ["made", "run"])
def test_autocast_changes_nothing(where: str) -> None:
    """It holds for the thread that opened it, and a session's steps may run on any: they keep the weights' dtype."""
    model = sharp_model()
    expected = Decoder(model, 4).generate([PROMPT], 8).tokens
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast if where == "made" else nullcontext():
        decoder = Decoder(model, 4)
    with autocast if where == "run" else nullcontext():
        result = decoder.generate([PROMPT], 8)
    assert result.tokens == expected
    assert result.cache.k.dtype == torch.float32


def test_weights_of_nan_end_the_request_and_say_so() -> None:
    model = sharp_model()
    mlp: Any = model.layers[0].mlp
    torch.nn.init.constant_(mlp.down_proj.weight, math.nan)
    result = Decoder(model, 4).generate([PROMPT], 8)
    assert (result.tokens, result.finish_reasons) == ([[]], ["error"])
    assert result.errors == ["expected finite logits, got NaN, inf or nothing above -inf after the prompt"]
