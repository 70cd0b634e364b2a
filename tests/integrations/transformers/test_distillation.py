"""Adapters of transformers models: the base stays, the loss falls, a run goes on to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.integrations.transformers.test_convert import saved, tiny  # noqa: E402
from tests.paths import REPOSITORY  # noqa: E402
from tidar_kernels import Decoder  # noqa: E402
from tidar_kernels.integrations.transformers.distillation import (  # noqa: E402
    AdapterTrainer,
    DistillationConfig,
    _Windows,
    draft_figures,
    own_continuations,
    read_state,
    some_mask_token,
)
from tidar_kernels.integrations.transformers.model import TransformersModel  # noqa: E402
from tidar_kernels.nn.adapters import load_peft_adapter, lora_gate  # noqa: E402
from tidar_kernels.nn.distillation import adapter_pattern, distillation_loss  # noqa: E402
from tidar_kernels.patterns import Role  # noqa: E402

CONFIG = DistillationConfig(
    mask_token_id=20, block_size=4, rank=8, alpha=32.0, steps=12, batch_size=4, seq_len=16, lr=3e-2
)


def cycle(length: int = 80) -> list[list[int]]:
    """Texts that a model learns at once."""
    return [[(start + i) % 9 for i in range(length)] for start in range(4)]


def taught() -> Any:
    """A model that counts to nine for ever, so that there is something to draft."""
    model = tiny()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = torch.tensor(cycle(32))
    for _ in range(150):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize("strategy", ["isd", "tidar"])
def test_drafts_are_kept_more_often_and_the_text_stays(strategy: Any, tmp_path: Path) -> None:
    model = taught()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model.generate(torch.tensor([[3, 4]]), max_new_tokens=20, do_sample=False)[0, 2:].tolist()
    config = replace(CONFIG, strategy=strategy, steps=60, lr=1e-2)
    before = draft_figures(model, [[3, 4], [7]], config, 24)
    trainer = AdapterTrainer(model, cycle(), config)
    trainer.run(tmp_path)
    after = draft_figures(model, [[3, 4], [7]], config, 24)
    assert sum(trainer.losses[-5:]) < 0.5 * sum(trainer.losses[:5])
    assert after["tokens_per_forward"] > before["tokens_per_forward"] + 0.3
    assert after["acceptance"][0] > before["acceptance"][0]

    fresh = tiny()
    fresh.load_state_dict(weights)
    load_peft_adapter(fresh.eval(), tmp_path)
    for name, weight in fresh.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, weights[name.replace(".base.", ".")])
    decoder = Decoder.from_transformers(fresh, block_size=4, mask_token_id=20, strategy=strategy)
    result = decoder.generate([3, 4], 20)
    assert result.tokens[0] == expected
    assert result.tokens_per_forward > 1.2


@pytest.mark.parametrize("strategy", ["isd", "tidar"])
@pytest.mark.parametrize("lengths", [[16, 16], [5, 11, 9, 7]], ids=["whole", "packed"])
def test_tokens_are_run_once_without_gradients_and_the_gradient_is_that_of_all_rows(
    strategy: Any, lengths: list[int]
) -> None:
    model = tiny().eval()
    trainer = AdapterTrainer(model, cycle(), replace(CONFIG, strategy=strategy))
    for weight in trainer._trained:
        torch.nn.init.normal_(weight, std=0.2)
    tokens = torch.arange(32).remainder(9).view(2, 16)
    passes: list[tuple[int, bool]] = []
    layer = model.model.layers[0].self_attn.q_proj.base
    layer.register_forward_pre_hook(lambda _, args: passes.append((args[0].shape[1], torch.is_grad_enabled())))
    loss = trainer._objective(tokens, lengths)
    grads = torch.autograd.grad(loss, trainer._trained)
    rows = 16 if len(lengths) == 2 else 32
    assert passes == [(rows, False), (rows, True)]

    packed = tokens if len(lengths) == 2 else tokens.reshape(1, -1)
    pattern = adapter_pattern(strategy, packed.shape[1], 4, None if len(lengths) == 2 else lengths)
    is_mask = pattern.roles == int(Role.MASK)
    runner = TransformersModel(model)
    with lora_gate(is_mask):
        hidden = runner(packed.repeat(1, 2).masked_fill(is_mask, 20), pattern)
        expected = distillation_loss(hidden, runner.logits, pattern)
    torch.testing.assert_close(loss, expected)
    for grad, other in zip(grads, torch.autograd.grad(expected, trainer._trained), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["isd", "tidar"])
def test_a_decoder_of_a_folder_drafts_as_its_adapter_was_trained(strategy: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, strategy=strategy, block_size=3, steps=2)
    base = saved(tmp_path / "base")
    AdapterTrainer(tiny().eval(), cycle(), config).run(tmp_path / "adapter")
    decoder = Decoder.from_transformers(base, adapter=tmp_path / "adapter")
    label = {"isd": "ISD, N = 3", "tidar": "TiDAR, B = 3"}[strategy]
    assert str(decoder.recognised).endswith(f"{label}, mask token 20, adapter adapter")
    assert (
        decoder._step.strategy.pattern.name
        == {"isd": "isd_step(stride=3, shifted=False)", "tidar": "tidar_step(block_size=3)"}[strategy]
    )
    given = Decoder.from_transformers(base, adapter=tmp_path / "adapter", block_size=2, mask_token_id=5)
    assert (given.block_size, given.mask_token_id) == (2, 5)
    assert Decoder.from_transformers(base, adapter=tmp_path / "adapter", strategy="isd", stride=4).block_size == 4


def test_a_run_that_is_cut_short_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    AdapterTrainer(tiny().eval(), cycle(), CONFIG).run(whole)
    first = AdapterTrainer(tiny().eval(), cycle(), CONFIG)
    for _ in range(5):
        first.step()
    first.save(cut)
    second = AdapterTrainer(tiny().eval(), cycle(), CONFIG)
    second.resume(cut)
    assert second.done == 5
    second.run(cut)
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert read_state(cut)["losses"] == read_state(whole)["losses"]


def test_states_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    trainer = AdapterTrainer(tiny().eval(), cycle(), CONFIG)
    with pytest.raises(FileNotFoundError, match=r"^resume: expected .*state\.pt"):
        trainer.resume(tmp_path)
    trainer.save(tmp_path)
    other = AdapterTrainer(tiny().eval(), cycle(), replace(CONFIG, lr=1e-3))
    with pytest.raises(ValueError, match=r"^resume: expected the run of .*, got another lr"):
        other.resume(tmp_path)
    content = (tmp_path / "state.pt").read_bytes()
    for broken in (b"", content[: len(content) // 2], content[:4000] + b"x" + content[4001:]):
        (tmp_path / "state.pt").write_bytes(broken)
        with pytest.raises(ValueError, match="expected the whole state of a training run"):
            trainer.resume(tmp_path)


def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = AdapterTrainer(tiny().eval(), cycle(), CONFIG)
    trainer.step()
    trainer.save(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trainer.step()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tidar_kernels.nn.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_windows_follow_from_the_step_and_say_where_documents_end() -> None:
    windows = _Windows([[1] * 5, [], [2] * 7, [3] * 4], 6)
    for step in range(20):
        tokens, lengths = windows.of(step, 3, 1)
        again, _ = windows.of(step, 3, 1)
        assert torch.equal(tokens, again)
        assert sum(lengths) == 18
        for part in tokens.flatten().split(lengths):
            assert len(part.unique()) == 1
    with pytest.raises(ValueError, match=r"^documents: expected at least seq_len = 17 tokens, got 16"):
        _Windows([[1] * 16], 17)


def test_continuations_are_the_models_own() -> None:
    model = tiny().eval()
    prompts = [[1, 2], [3], [1, 2]]
    texts = own_continuations(model, prompts, 10, batch_size=2)
    assert [text[: len(prompt)] for text, prompt in zip(texts, prompts, strict=True)] == prompts
    assert texts[0] != texts[2]  # another seed
    assert own_continuations(tiny().eval(), prompts, 10, batch_size=2) == texts
    greedy = own_continuations(model, prompts, 10, temperature=0.0)
    assert greedy[0] == greedy[2] != texts[0]


def test_continuations_of_an_interrupted_run_go_on_to_the_same_texts() -> None:
    prompts, kept = [[1, 2], [3], [4], [5], [6]], []
    whole = own_continuations(tiny().eval(), prompts, 6, batch_size=2, progress=lambda texts: kept.append(len(texts)))
    assert kept == [2, 4, 5]
    assert own_continuations(tiny().eval(), prompts, 6, batch_size=2, known=whole[:2]) == whole


def test_a_mask_token_is_found() -> None:
    model = tiny()
    assert some_mask_token(model) == 27
    model.config.tidar = {"mask_token_id": 5}
    assert some_mask_token(model) == 5


@pytest.mark.parametrize(
    "change", [{"strategy": "tree"}, {"block_size": 1}, {"rank": 0}, {"lr": float("nan")}, {"mask_token_id": -1}]
)
def test_configurations_that_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(change))}: expected "):
        replace(CONFIG, **change)


@pytest.mark.thorough
def test_a_killed_command_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    model, out = saved(tmp_path / "model"), tmp_path / "out"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat " * 30)
    options = [
        *("train-adapter", str(model), "--data", str(tmp_path / "text"), "--steps", "60", "--seq-len", "32"),
        *("--rank", "4", "--save-every", "5", "--threads", "1", "--max-new-tokens", "8"),
    ]
    command = [sys.executable, "-m", "tidar_kernels", *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "--out", str(folder), *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    first = start(out)
    deadline = time.monotonic() + 120
    while not (out / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert 0 < read_state(out)["done"] < 60
    whole, resumed = start(tmp_path / "whole"), start(out, "--resume")
    for process in (whole, resumed):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    figures = [json.loads((folder / "training.json").read_text()) for folder in (out, tmp_path / "whole")]
    for figure in figures:
        figure.pop("seconds")
    assert figures[0] == figures[1]
