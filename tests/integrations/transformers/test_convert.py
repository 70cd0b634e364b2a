"""The mask token of tokenizers and embeddings, and checkpoints made ready for TiDAR."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from tidar_kernels import cli  # noqa: E402
from tidar_kernels.integrations.transformers.conversion import MASK_TOKEN, Conversion, add_mask_token, convert  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def letters(*special: str, **roles: str) -> Any:
    """A tokenizer of letters, 27 of them, with `<end>` as the 28th token, then special ones."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS.replace(" ", "Ġ"))}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", **roles)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def tiny(rows: int = 28, *, bias: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    shape = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": 27,
        "pad_token_id": 27,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    if bias:
        head = nn.Linear(32, rows)
        head.weight = model.lm_head.weight
        model.set_output_embeddings(head)
    return model.eval()


def greedy(model: Any, prompt: str, tokenizer: Any) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=27)
    return out[0].tolist()


@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("rows", [28, 30], ids=["full", "spare"])
@pytest.mark.parametrize("head", ["untied", "tied", "bias"])
def test_a_new_token_gets_the_mean_of_the_others(head: str, rows: int, multiple: int | None) -> None:
    model, tokenizer = tiny(rows, bias=head == "bias", tie_word_embeddings=head == "tied"), letters()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = greedy(model, "abc", tokenizer) if rows == 28 else None
    assert add_mask_token(model, tokenizer, block_size=4, pad_to_multiple_of=multiple) == 28
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (MASK_TOKEN, 28)
    assert tokenizer("ab" + MASK_TOKEN)["input_ids"] == [0, 1, 28]
    assert model.config.tidar == {"mask_token_id": 28, "block_size": 4}
    expected_rows = 30 if rows == 30 else 32 if multiple else 29
    assert model.config.vocab_size == expected_rows
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (head == "tied")
    for name, value in model.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
            assert value.shape[0] == expected_rows
            assert torch.equal(value[:28], before[name][:28])
            torch.testing.assert_close(value[28], before[name][:28].mean(0))
        else:
            assert torch.equal(value, before[name])
    if text is not None:
        assert tied or len(set(text)) > 4
        assert greedy(model, "abc", tokenizer) == text


def test_a_token_in_reserve_keeps_its_rows() -> None:
    model, tokenizer = tiny(31), letters("<spare_0>", "<spare_1>")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert add_mask_token(model, tokenizer, "<spare_1>") == 29
    assert tokenizer.mask_token_id == 29
    assert model.config.tidar == {"mask_token_id": 29}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert add_mask_token(model, tokenizer, block_size=8) == 29
    assert model.config.tidar == {"mask_token_id": 29, "block_size": 8}


def test_a_tokenizers_own_mask_token_is_taken() -> None:
    model, tokenizer = tiny(29), letters(mask_token="<m>")
    assert add_mask_token(model, tokenizer) == tokenizer.mask_token_id == 28
    assert tokenizer.mask_token == "<m>"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (27, {}, r"^tokenizer: expected ids below the 27 rows of the model's embedding, got up to 27"),
        (28, {"token": "a"}, r"^token: expected a special token or a new one, got 'a', which is ordinary text"),
        (28, {"token": "<end>"}, r"^token: expected one without another use, got '<end>', the tokenizer's eos_token"),
        (28, {"block_size": 0}, r"^block_size: expected >= 1, got 0"),
        (28, {"pad_to_multiple_of": 0}, r"^pad_to_multiple_of: expected >= 1, got 0"),
    ],
)
def test_misfits_are_refused_and_nothing_changes(rows: int, options: dict[str, Any], message: str) -> None:
    model, tokenizer = tiny(rows, eos_token_id=None, pad_token_id=None), letters()
    with pytest.raises(ValueError, match=message):
        add_mask_token(model, tokenizer, **options)
    assert tokenizer.mask_token is None
    assert len(tokenizer) == 28
    assert model.config.vocab_size == rows
    assert getattr(model.config, "tidar", None) is None


def test_other_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^model: expected a transformers\.PreTrainedModel, got Linear"):
        add_mask_token(nn.Linear(2, 2), letters())
    with pytest.raises(TypeError, match=r"^tokenizer: expected a transformers tokenizer, got str"):
        add_mask_token(tiny(), "letters")


# Checkpoints.


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def saved(path: Path, **changes: Any) -> Path:
    tiny(**changes).to(torch.bfloat16).save_pretrained(path)
    letters().save_pretrained(path)
    return path


# Plain transformers, in a process in which this package cannot be imported.
READER = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tidar_kernels":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, utils
utils.logging.disable_progress_bar()
read = []
for path in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("hello world", return_tensors="pt")
    more = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=27)
    read.append({
        "ids": inputs["input_ids"].tolist(),
        "logits": model(**inputs).logits[0, :, :28].tolist(),
        "greedy": more.tolist(),
        "mask": tokenizer.mask_token_id,
        "tidar": getattr(model.config, "tidar", None),
        "dtype": str(model.dtype),
    })
print(json.dumps(read))
"""


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_opens_without_this_package(tmp_path: Path, tied: bool) -> None:
    source, target = saved(tmp_path / "ar", tie_word_embeddings=tied), tmp_path / "new" / "tidar"
    done = convert(source, target, block_size=4)
    assert (done.mask_token, done.mask_token_id, done.added, done.vocab_size) == (MASK_TOKEN, 28, True, 29)
    assert (done.model, done.block_size, done.path) == ("Qwen3ForCausalLM", 4, str(target))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ar", "new"]
    assert [p.name for p in target.parent.iterdir()] == ["tidar"]
    assert (target / "model.safetensors").is_file()
    if not tied:  # a second interpreter is slow to start
        return
    read = subprocess.run(
        [sys.executable, "-c", READER, str(source), str(target)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    old, new = json.loads(read.stdout)
    assert new["tidar"] == {"block_size": 4, "mask_token_id": 28}
    assert (new["mask"], old["mask"], old["tidar"]) == (28, None, None)
    assert all(new[key] == old[key] for key in ("ids", "logits", "greedy", "dtype"))
    assert new["dtype"] == "torch.bfloat16"


def test_what_stands_at_the_target_is_left_alone(tmp_path: Path) -> None:
    source = saved(tmp_path / "ar")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for target in (source, source / "config.json"):
        with pytest.raises(FileExistsError, match=r"^out_path: expected a new or an empty folder, got "):
            convert(source, target, block_size=4)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", block_size=4)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = saved(tmp_path / "ar"), tmp_path / "tidar"

    def full_disk(self: Any, folder: Path, **options: Any) -> None:
        assert (Path(folder) / "model.safetensors").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        convert(source, target, block_size=4)
    assert [p.name for p in tmp_path.iterdir()] == ["ar"]


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_incomplete_and_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source, target = saved(tmp_path / "ar"), tmp_path / "tidar"
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"^model_path: expected all weights .* got none for model\.layers\.1\.mlp\.up_p"
    ):
        convert(source, target, block_size=4)
    with pytest.raises(FileNotFoundError, match=r"^model_path: expected a folder or a name on the Hub, got .*nowhere"):
        convert(tmp_path / "nowhere", target, block_size=4)
    with pytest.raises(ValueError, match=r"^block_size: expected >= 1, got 0"):
        convert(source, target, block_size=0)
    assert not target.exists()


# The command.


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(saved(tmp_path / "ar"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["convert", *arguments])
        out, err = capsys.readouterr()
        return code, out, "".join(re.findall(r"^tidar-kernels: error: .*", err, re.MULTILINE))

    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    code, out, _ = run(source, one, "--block-size", "4")
    assert code == 0
    assert out.splitlines()[0].startswith(f"{one}: Qwen3ForCausalLM, ")
    assert out.splitlines()[1] == "mask token <|mask|> = 28 (added), block size 4"
    code, out, _ = run(source, two, "--block-size", "8", "--mask-token", "<m>", "--json")
    report = json.loads(out)
    assert code == 0
    assert set(report) == {field.name for field in dataclasses.fields(Conversion)}
    assert (report["mask_token"], report["mask_token_id"], report["block_size"]) == ("<m>", 28, 8)
    assert report["path"] == two
    for arguments, message in (
        ((source, one, "--block-size", "4"), f"DST: expected a new or an empty folder, got {one}"),
        ((source, one), "the following arguments are required: --block-size"),
        ((source, one, "--block-size", "0"), "--block-size: expected a whole number >= 1, got '0'"),
        ((f"{source}/x", f"{one}/x", "--block-size", "4"), "SRC: expected a folder or a name on the Hub, got"),
        ((source, f"{one}-a", "--block-size", "4", "--mask-token", "a"), "--mask-token: expected a special token or a"),
    ):
        code, out, error = run(*arguments)
        assert (code, out) == (2, "")
        assert error.startswith(f"tidar-kernels: error: {message}")
    assert not Path(f"{one}-a").exists()


def test_command_without_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["convert", "SRC", str(tmp_path / "out"), "--block-size", "4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "tidar-kernels: error: transformers: expected it installed (pip install 'tidar-kernels[hf]')"
    )
