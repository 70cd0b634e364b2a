"""An adapter may hold anything: its rows only draft, so tokens are the base model's and no request ends early."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.toys import PROMPTS, sharp_model
from tidar_kernels import Decoder
from tidar_kernels.decoding.strategies import SelfSpeculation, Strategy, isd, tidar
from tidar_kernels.models import Transformer
from tidar_kernels.nn.adapters import add_gated_lora
from tidar_kernels.ops.verify import RULES, Rule

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "tidar": lambda: tidar(4),
    "tidar_levels": lambda: tidar(4, levels=[1, 3]),
    "isd": lambda: isd(4),
    "flare": lambda: isd(4, bidirectional=True),
    "self_speculation": lambda: SelfSpeculation(4),
}
SETTINGS: dict[str, dict[str, Any]] = {"greedy": {}, "coupled": {"temperature": 0.9, "seed": 5}}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharp_model()


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20], ids=str)
@pytest.mark.parametrize("name", STRATEGIES)
def test_tokens_are_the_base_models(model: Transformer, name: str, value: float, sampling: str) -> None:
    settings = SETTINGS[sampling]
    expected = Decoder(model, mode="autoregressive").generate(PROMPTS, 16, **settings)
    broken = copy.deepcopy(model)
    add_gated_lora(broken, 4, 8.0)
    with torch.no_grad():
        for parameter_name, parameter in broken.named_parameters():
            if "lora_" in parameter_name:
                parameter.fill_(value)
    found = Decoder(broken, strategy=STRATEGIES[name]()).generate(PROMPTS, 16, **settings)
    assert "error" not in found.finish_reasons
    assert found.finish_reasons == expected.finish_reasons
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_drafts_of_a_broken_row_end_no_request(model: Transformer, name: str, rule: Rule) -> None:
    broken = copy.deepcopy(model)
    add_gated_lora(broken, 4, 8.0)
    with torch.no_grad():
        for parameter_name, parameter in broken.named_parameters():
            if "lora_" in parameter_name:
                parameter.fill_(torch.nan)
    found = Decoder(broken, strategy=STRATEGIES[name](), sampling=rule).generate(PROMPTS, 16, temperature=0.9)
    assert "error" not in found.finish_reasons
    assert all(len(tokens) == 16 for tokens in found.tokens)
