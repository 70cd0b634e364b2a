"""What the plug-in does where no vLLM is installed, or one that was not tried."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tidar_kernels.integrations.vllm import engine_options, plugin
from tidar_kernels.integrations.vllm.settings import Settings

ENTRY = {"block_size": 8, "mask_token_id": 9}


def a_checkpoint(folder: Path, **values: Any) -> Path:
    config = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 10, "tidar": ENTRY} | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.32.1")


def test_nothing_of_vllm_is_imported() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"  # importing it raises
        "import tidar_kernels.integrations.vllm, tidar_kernels.integrations.vllm.attention, tidar_kernels.cli.serve"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_vllm_or_another_version_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plugin, "installed_version", lambda: None)
    with pytest.raises(ImportError, match=r"^vllm: expected it installed, version 0\.32\.x, got none$"):
        engine_options(a_checkpoint(tmp_path))
    for version in ("0.31.4", "0.320.1", "1.0"):
        monkeypatch.setattr(plugin, "installed_version", lambda version=version: version)
        with pytest.raises(ValueError, match=rf"^vllm: expected version 0\.32\.x, .* got {version}$"):
            engine_options(a_checkpoint(tmp_path))


def test_a_vllm_that_was_not_tried_serves_other_models(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.99.0")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert "0.99.0" in caplog.text


@pytest.mark.usefixtures("tried")
def test_options_are_what_a_user_would_have_to_know(tmp_path: Path) -> None:
    options = engine_options(a_checkpoint(tmp_path), max_num_seqs=64, seed=3)
    assert options["model"] == str(tmp_path)
    assert options["hf_overrides"]["architectures"] == ["TidarQwen3ForCausalLM"]
    assert Settings.of(options["hf_overrides"]["tidar"]) == Settings(8, 9)
    assert options["diffusion_config"] == {"canvas_length": 71}
    assert options["max_num_batched_tokens"] == 64 * 72
    assert options["attention_backend"] == "CUSTOM"  # on GPUs; CPUs know one backend alone
    assert "attention_backend" not in engine_options(tmp_path, "isd")
    assert engine_options(tmp_path, attention_backend="FLASH_ATTN")["attention_backend"] == "FLASH_ATTN"
    assert options["seed"] == 3
    assert engine_options(tmp_path, max_num_batched_tokens=100)["max_num_batched_tokens"] == 100


@pytest.mark.usefixtures("tried")
def test_what_is_given_wins_over_the_checkpoint(tmp_path: Path) -> None:
    entry = ENTRY | {"levels": [1, 4]}
    folder = a_checkpoint(tmp_path, tidar=entry)
    assert engine_options(folder)["diffusion_config"] == {"canvas_length": 23}
    assert engine_options(folder, levels=[1])["diffusion_config"] == {"canvas_length": 15}
    assert engine_options(folder, "isd", block_size=4)["diffusion_config"] == {"canvas_length": 7}
    bare = a_checkpoint(tmp_path, tidar=None)
    assert engine_options(bare, block_size=2, mask_token_id=0)["diffusion_config"] == {"canvas_length": 5}


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, {}, "folder: expected an architecture among .*, got GPT2LMHeadModel"),
        ({"tidar": None}, {}, "tidar: expected entries block_size and mask_token_id, got none for block_size, mask"),
        ({"tidar": ENTRY | {"blocks": 3}}, {}, "tidar: expected entries .*, got blocks"),
        ({"vocab_size": 9}, {}, "mask_token_id: expected < 9, the vocabulary, got 9"),
        ({}, {"strategy": "tree"}, "strategy: expected tidar, isd or flare in vLLM, .* got 'tree'"),
        ({}, {"strategy": "self_speculation"}, "strategy: .* one forward pass a step .* got 'self_speculation'"),
        ({}, {"strategy": "isd", "levels": [1]}, "levels, bidirectional: expected for strategy tidar alone"),
        ({}, {"levels": [2, 4]}, "levels: expected ascending ints from 1"),
        ({}, {"block_size": 1}, "block_size: expected >= 2, got 1"),
        ({}, {"max_num_seqs": 0}, "max_num_seqs: expected >= 1, got 0"),
    ],
)
def test_refusals(tmp_path: Path, values: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        engine_options(a_checkpoint(tmp_path, **values), **given)


def test_which_steps_are_plainly_causal() -> None:
    assert Settings(4, 0, "isd").causal
    assert Settings(4, 0, "isd", shifted_masks=True).causal
    assert not Settings(4, 0, "flare").causal
    assert not Settings(4, 0).causal
    assert not Settings(4, 0, levels=(1,)).causal
