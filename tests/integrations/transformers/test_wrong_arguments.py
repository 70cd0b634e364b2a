"""Every argument of what users of transformers call, given what it does not take; see tests/test_wrong_arguments.py."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tidar_kernels as tk
from tests.test_wrong_arguments import JUNK, defaults

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("tidar_kernels.integrations.transformers")

EXAMPLES: list[dict[str, Any]] = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [3, 4, 5]}]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    integration.register()
    model.set_attn_implementation("tidar")
    return model


def collator() -> Any:
    return integration.TiDARCollator(2, 39)


def packed(**arguments: Any) -> list[Any]:
    return list(integration.pack(**arguments))


def generated(**options: Any) -> Any:
    return integration.generate(llama(), torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, **options)


GENERATION = {"block_size": 2, "mask_token_id": 39, "mode": "tidar", "sampling": "coupled"}
Call = tuple[Callable[..., Any], dict[str, Any]]
CALLS: dict[str, Callable[[], Call]] = {
    "TiDARCache": lambda: (integration.TiDARCache, {"config": llama().config, "max_len": 16}),
    "TiDARCollator": lambda: (
        integration.TiDARCollator, defaults(integration.TiDARCollator, block_size=2, mask_token_id=39)
    ),
    "TiDARCollator.__call__": lambda: (collator(), {"examples": EXAMPLES}),
    "TransformersModel": lambda: (
        integration.TransformersModel, {"model": llama(), "block_size": 2, "mask_token_id": 39}
    ),
    "compute_loss": lambda: (
        integration.compute_loss, defaults(integration.compute_loss, model=llama(), batch=collator()(EXAMPLES))
    ),
    "tidar_generation": lambda: (generated, dict(GENERATION)),
    "count_labels": lambda: (integration.count_labels, {"batch": collator()(EXAMPLES)}),
    "pack": lambda: (packed, {"examples": EXAMPLES, "seq_len": 8, "too_long": "error"}),
    "Decoder.from_transformers": lambda: (
        tk.Decoder.from_transformers,
        defaults(tk.Decoder.from_transformers, model=llama(), block_size=2, mask_token_id=39),
    ),
}  # fmt: skip
# A name is looked up on the Hub.
NOT_TRIED = {("Decoder.from_transformers", "model", "text")}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function, arguments = CALLS[name]()
        function(**arguments)
        for argument in arguments:
            for what, junk in JUNK.items():
                if (name, argument, what) in NOT_TRIED:
                    continue
                function, arguments = CALLS[name]()
                if isinstance(arguments[argument], bool) and isinstance(junk, torch.Tensor):
                    continue
                try:
                    function(**(arguments | {argument: junk}))
                except (TypeError, ValueError, FileNotFoundError) as error:
                    if re.match(r"\w+[^:]*: expected", str(error)) is None:
                        wrong.append(f"{argument} = {what}: {type(error).__name__}: {error}")
                except Exception as error:
                    wrong.append(f"{argument} = {what}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
