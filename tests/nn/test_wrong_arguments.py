"""Every argument of what `tidar_kernels.nn` has beside the package's own names; see tests/test_wrong_arguments.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.test_wrong_arguments import adapted, ints, randn, rotary
from tests.wrong_arguments import Call, complaints, defaults, whole
from tidar_kernels import patterns
from tidar_kernels.nn import adapters, attention, distillation, loss

ADAPTER = distillation.adapter_pattern("isd", 6, 2)

CALLS: dict[str, Callable[[], Call]] = {
    "nn.adapters.has_gated_lora": lambda: (adapters.has_gated_lora, {"model": adapted()}),
    "nn.attention.RMSNorm": lambda: (attention.RMSNorm, defaults(attention.RMSNorm, dim=8)),
    "nn.attention.RMSNorm.forward": lambda: (attention.RMSNorm(8), {"x": randn(2, 8)}),
    "nn.attention.RotaryEmbedding": lambda: (
        attention.RotaryEmbedding, defaults(attention.RotaryEmbedding, head_dim=16)
    ),
    "nn.attention.RotaryEmbedding.forward": lambda: (
        attention.RotaryEmbedding(16), {"positions": ints(0, 1, 2), "dtype": torch.float32}
    ),
    "nn.attention.apply_rotary": lambda: (attention.apply_rotary, {"x": randn(2, 3, 4, 16), "rotary": rotary()}),
    "nn.distillation.adapter_pattern": lambda: (
        distillation.adapter_pattern,
        {"kind": "isd", "seq_len": 6, "block_size": 2, "document_lengths": [2, 4]},
    ),
    "nn.distillation.clean_then_masks": lambda: (distillation.clean_then_masks, {"pattern": ADAPTER}),
    "nn.distillation.distillation_loss": lambda: (
        distillation.distillation_loss,
        {"hidden": randn(1, 12, 8), "head": lambda rows: rows @ randn(8, 9), "pattern": ADAPTER, "chunk_size": 4},
    ),
    "nn.loss.label_counts": lambda: (
        loss.label_counts,
        {"tokens": ints([1, 2, 3, 4, 5, 6], dtype=torch.int64), "pattern": patterns.tidar_training(6, 2)},
    ),
}  # fmt: skip
ALSO = {"nn.distillation.adapter_pattern": ("pattern",)}  # what `kind` chooses
# What the modules of `nn` share; their public functions check.
ELSEWHERE = {
    "nn.loss.check_logits",
    *(f"nn.files.{name}" for name in ("loading_state", "read_json", "read_state", "replacing")),
    *(f"nn.gated_lora.{name}" for name in ("check_base", "kind_of")),
    *(f"nn.peft_files.{name}" for name in ("number_of", "read_config", "read_weights", "write")),
}


@pytest.mark.filterwarnings("ignore")  # names that go in the next release
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, arguments = whole(name, CALLS)
    function(**arguments)
    assert complaints(functools.partial(whole, name, CALLS), ALSO.get(name, ())) == []
