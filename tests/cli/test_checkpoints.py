"""Published checkpoints on the command line: read like any other; what is wrong with one is a line, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from tests.cli.shell import Run, refused
from tests.integrations.transformers.dflash import BLOCK, CONFIG, random_tensors, write_drafter
from tests.integrations.transformers.published import reference, write
from tests.integrations.transformers.test_convert import letters, saved, tiny
from tidar_kernels.cli import loading
from tidar_kernels.integrations.transformers.distillation import AdapterTrainer, DistillationConfig


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Nemotron-Labs-Diffusion with a tokenizer."""
    path = saved(tmp_path / "model")
    capsys.readouterr()
    return write("nemotron", path, reference("nemotron"))


def test_a_published_checkpoint_is_read(run: Run, folder: Path) -> None:
    code, out, err = run("lossless", folder, "--strategy", "self-speculation", "--max-new-tokens", 4, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["prompts"] == found["equal"] > 0


def test_generate_decodes_a_folder_as_it_was_trained(run: Run, folder: Path) -> None:
    asked = ("generate", "--checkpoint", folder, "--prompt", "hello world", "--max-new-tokens", 9, "--device", "cpu")
    code, out, err = run(*asked, "--compare", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["identical"]
    assert (found["drafts"]["strategy"], found["block_size"]) == ("self_speculation", 8)
    assert found["prompt"]["tokens"] == len("hello world")
    assert found["text"] == letters().decode(found["tokens"])
    code, out, err = run(*asked, "--strategy", "tidar", "--block-size", 2, "--json")
    assert json.loads(out)["tokens"] == found["tokens"]
    assert (json.loads(out)["drafts"]["strategy"], json.loads(out)["block_size"]) == ("tidar", 2)
    assert refused(run(*asked, "--levels", "1,2")).startswith(
        "--levels: expected a checkpoint that drafts by tidar, got"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert refused(run(*asked)).startswith("--checkpoint: expected a tokenizer in the folder, got none")


def test_generate_takes_the_adapter_of_an_ordinary_model(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(tmp_path / "base")
    config = DistillationConfig(20, block_size=3, rank=2, steps=3, batch_size=1, seq_len=8, lr=0.1)
    AdapterTrainer(tiny().eval(), [list(range(1, 20))], config).run(tmp_path / "adapter")
    capsys.readouterr()
    asked = ("generate", "--checkpoint", base, "--prompt", "a cat", "--max-new-tokens", 9, "--device", "cpu", "--json")
    code, out, err = run(*asked, "--adapter", tmp_path / "adapter", "--compare", "--dtype", "float32")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["identical"], found["drafts"]["strategy"], found["block_size"]) == (True, "isd", 3)
    assert found["dtype"] == "float32"
    plain = json.loads(run(*asked, "--mode", "autoregressive", "--dtype", "float32")[1])
    assert plain["tokens"] == found["tokens"]
    assert refused(run(*asked)).startswith("--mask-token-id: expected a token id here")
    assert refused(run(*asked, "--mask-token-id", 20)).startswith("--block-size: expected one")
    assert refused(run(*asked, "--adapter", tmp_path / "none")).startswith("--adapter: expected")
    assert refused(run(*asked[:1], *asked[3:], "--dtype", "float32")).startswith(
        "--dtype: expected beside --checkpoint"
    )
    (base / "config.json").write_text(json.dumps({"architectures": ["LLaDAMoEModelLM"], "model_type": "llada_moe"}))
    assert refused(run(*asked)).startswith("--checkpoint: expected a checkpoint that can be decoded, got LLaDAMoE")


def test_generate_with_a_drafter(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write("qwen3", saved(tmp_path / "target"), reference("qwen3", num_hidden_layers=4), num_hidden_layers=4)
    drafter = write_drafter(tmp_path / "drafter", random_tensors(CONFIG))
    capsys.readouterr()
    asked = ("generate", "--checkpoint", folder, "--prompt", "hello world", "--max-new-tokens", 9, "--device", "cpu")
    code, out, err = run(*asked, "--drafter", drafter, "--compare", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["identical"], found["drafts"]["strategy"], found["block_size"]) == (True, "dflash", BLOCK)
    plain = json.loads(run(*asked, "--mode", "autoregressive", "--json")[1])
    assert plain["tokens"] == found["tokens"]
    assert refused(run(*asked, "--drafter", tmp_path / "none")).startswith("--drafter: expected a folder or a name")
    assert refused(run(*asked, "--drafter", drafter, "--strategy", "isd")).startswith("--strategy: expected a strat")
    assert refused(run(*asked, "--drafter", drafter, "--levels", "1,2")).startswith("--levels: expected a checkpoint")
    assert refused(run(*asked[:1], *asked[3:], "--drafter", drafter)).startswith("--drafter: expected beside --check")
    tensors = load_file(drafter / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, drafter / "model.safetensors")
    assert refused(run(*asked, "--drafter", drafter)).startswith("--drafter: expected all weights of a DFlash drafter")


def test_text_comes_when_a_character_is_whole() -> None:
    stream = loading.TextStream(letters())
    tokens = letters()("hello world")["input_ids"]
    assert [stream.push(tokens[:3]), stream.push(tokens[3:]), stream.finish()] == ["hel", "lo world", ""]

    class Pairs:
        """Two tokens a character."""

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "é" * (len(tokens) // 2) + "\ufffd" * (len(tokens) % 2)

    stream = loading.TextStream(Pairs())
    assert [stream.push([1]), stream.push([2]), stream.push([3]), stream.finish()] == ["", "é", "", "\ufffd"]


def test_what_is_wrong_with_one_is_a_line(run: Run, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())

    def said(**changed: object) -> str:
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        return refused(run("lossless", folder))

    assert said(num_hidden_layers=3).startswith("MODEL: expected all weights of Nemotron-Labs-Diffusion, got none for")
    assert said(intermediate_size=64).startswith("MODEL: expected weights of the shapes that config.json of Nemotron")
    assert said(architectures=["LLaDAMoEModelLM"], model_type="llada_moe").startswith(
        "MODEL: expected a checkpoint that can be decoded, got LLaDAMoEModelLM, a diffusion model without blocks"
    )
    assert said(architectures=["DFlashDraftModel"], model_type="qwen3").startswith(
        "MODEL: expected a checkpoint that can be decoded, got DFlashDraftModel, a drafter"
    )
    (folder / "config.json").write_text("{")
    assert refused(run("lossless", folder)).startswith("MODEL: expected a checkpoint that transformers can read")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert refused(run("lossless", folder)).startswith("MODEL: expected a tokenizer in the checkpoint of Nemotron")
