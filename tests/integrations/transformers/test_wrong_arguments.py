"""Every argument of what users of transformers call, given what it does not take; see tests/test_wrong_arguments.py."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tidar_kernels as tk
from tests.wrong_arguments import Call, complaints, defaults, whole

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
integration = pytest.importorskip("tidar_kernels.integrations.transformers")
checkpoints = pytest.importorskip("tidar_kernels.integrations.transformers.checkpoints")
lossless = pytest.importorskip("tidar_kernels.integrations.transformers.lossless")

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


def tokenizer() -> Any:
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 39)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>")), unk_token="<unk>"
    )


@functools.lru_cache(maxsize=1)
def checkpoint() -> str:
    folder = tempfile.mkdtemp()
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def collator() -> Any:
    return integration.TiDARCollator(2, 39)


def packed(**arguments: Any) -> list[Any]:
    return list(integration.pack(**arguments))


def generated(**options: Any) -> Any:
    return integration.generate(llama(), torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, **options)


GENERATION = {"block_size": 2, "mask_token_id": 39, "mode": "tidar", "sampling": "coupled"}
BY_NAME: dict[str, Callable[[], Call]] = {
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
    "add_mask_token": lambda: (
        integration.add_mask_token, defaults(integration.add_mask_token, model=llama(), tokenizer=tokenizer())
    ),
    "convert": lambda: (
        integration.convert,
        defaults(
            integration.convert, model_path=checkpoint(), out_path=f"{tempfile.mkdtemp()}/out", block_size=2
        ),
    ),
    "checkpoints.load_any": lambda: (checkpoints.load_any, {"source": checkpoint(), "dtype": "auto"}),
    "checkpoints.prepared": lambda: (
        checkpoints.prepared, defaults(checkpoints.prepared, model=checkpoint(), block_size=2, mask_token_id=39)
    ),
    "checkpoints.recognised_system": lambda: (
        checkpoints.recognised_system, {"config": {"model_type": "llama"}}
    ),
    "lossless.lossless": lambda: (
        lossless.lossless,
        defaults(lossless.lossless, model=llama(), prompts=[[1, 2, 3]], block_size=2, max_new_tokens=2),
    ),
}  # fmt: skip
ALSO = {  # what the argument becomes
    "checkpoints.load_any": ("model_path",),
    "checkpoints.prepared": ("path",),
    "convert": ("token",),
    "lossless.lossless": ("input_ids", "path"),
}
# A method of the package's own, and a call of the hook, have the names that users give.
NAMES = {"Decoder.from_transformers": "Decoder.from_transformers", "TiDARCollator.__call__": "TiDARCollator.__call__"}
CALLS = {NAMES.get(name, f"integrations.transformers.{name}"): call for name, call in BY_NAME.items()}
ELSEWHERE = {
    f"integrations.transformers.{name}"
    for name in (
        # What transformers and Accelerate call.
        *("TiDARTrainer", "tidar_attention_forward", "tidar_mask"),
        *(f"TiDARTrainer.{name}" for name in ("compute_loss", "get_batch_samples", "train", "training_step")),
        # What a session calls of its model.
        *(f"TransformersModel.{name}" for name in ("check_layers", "logits", "with_layers")),
        # `tidar_generation` by another name; its line is that one's.
        "generate",
        # Results; a part of `prepared`, which has checked; no arguments.
        *("checkpoints.Prepared", "checkpoints.Recognised", "checkpoints.read_checkpoint", "register"),
        *(f"lossless.{name}" for name in ("Divergence", "LosslessReport", "Trajectory")),
    )
}
# A name is looked up on the Hub.
NOT_TRIED = {
    ("Decoder.from_transformers", "model"),
    ("Decoder.from_transformers", "drafter"),
    ("integrations.transformers.checkpoints.load_any", "source"),
    ("integrations.transformers.checkpoints.prepared", "model"),
    ("integrations.transformers.checkpoints.prepared", "drafter"),
    ("integrations.transformers.convert", "model_path"),
}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # names that go in the next release
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, arguments = whole(name, CALLS)
    function(**arguments)

    def skipped(argument: str, what: str) -> bool:
        return (name, argument) in NOT_TRIED and what == "text"

    called = functools.partial(whole, name, CALLS)
    assert complaints(called, ALSO.get(name.removeprefix("integrations.transformers."), ()), skipped=skipped) == []
