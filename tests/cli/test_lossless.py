"""`tidar-kernels lossless`: the report, its exit code, and input that does not fit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.cli.shell import Run, refused
from tests.integrations.transformers.published import reference, write, write_adapter
from tests.integrations.transformers.test_convert import saved, tiny
from tests.integrations.transformers.test_lossless import plant_sampler
from tidar_kernels.cli.checkpoints import read_prompts
from tidar_kernels.integrations.transformers.distillation import AdapterTrainer, DistillationConfig


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = saved(tmp_path / "model")
    capsys.readouterr()
    return path


def test_the_command_reports_and_its_exit_code_says_whether_texts_are_equal(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl.gz"
    prompts.write_bytes(gzip.compress(b'{"prompt": "abc def"}\n\n{"prompt": "the end", "id": 3}\n'))
    common = ("lossless", folder, "--max-new-tokens", 6, "--prompts", prompts)
    code, out, err = run(*common, "--exact", "--json")
    found = json.loads(out)
    assert (code, err, found["prompts"], found["equal"], found["equal_bits"]) == (0, "", 2, 2, 2)
    plant_sampler(None, monkeypatch)
    code, out, err = run(*common)
    assert (code, err) == (1, "")
    assert out.startswith("0 of 2 texts equal")
    assert "sampler" in out


@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b"\xff\xfe", b"[1]\n", b'{"text": "x"}\n', b"{", b'{"prompt": "\\ud800"}\n'],
    ids=lambda content: repr(content),
)
def test_files_without_prompts_are_refused(run: Run, folder: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert refused(run("lossless", folder, "--prompts", path)).startswith("--prompts: expected ")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffone\x0ctwo\r\n\r\nthree\u2028four", ["one\x0ctwo", "three\u2028four"]),
        ("a.jsonl", '\ufeff{"prompt": "one\u2028two\u0085"}\r\n{"prompt": "three"}\n', ["one\u2028two\u0085", "three"]),
    ],
)
def test_lines_end_where_files_of_prompts_end_them(
    tmp_path: Path, name: str, content: str, expected: list[str]
) -> None:
    """Not at other characters that separate lines in Unicode; and a byte-order mark belongs to none."""
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_prompts(path) == expected


def test_other_bad_input_is_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    assert refused(run("lossless", tmp_path / "nowhere")).startswith("MODEL: expected a folder or a name on the Hub")
    assert refused(run("lossless", folder, "--strategy", "tree", "--exact")).startswith("exact: ")
    assert refused(run("lossless", folder, "--assistant", folder)).startswith("--assistant: expected with --strategy")
    assert refused(run("lossless", folder, "--prompts", tmp_path / "none")).startswith("--prompts: ")
    (folder / "model.safetensors").write_bytes(b"")
    assert refused(run("lossless", folder)).startswith("MODEL: expected a checkpoint that transformers can read")


def test_an_adapter_drafts_as_it_was_trained(run: Run, folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    config = DistillationConfig(20, block_size=3, rank=2, steps=3, batch_size=1, seq_len=8, lr=0.1)
    AdapterTrainer(tiny().eval(), [list(range(1, 20))], config).run(adapter)
    common = ("lossless", folder, "--adapter", adapter, "--max-new-tokens", 8)
    code, out, err = run(*common, "--exact", "--json")
    found = json.loads(out)
    assert (code, err, found["equal"], found["equal_bits"]) == (0, "", found["prompts"], found["prompts"])
    assert (found["strategy"], found["block_size"], found["adapter"]) == ("isd", 3, str(adapter))
    code, out, err = run(*common, "--strategy", "tidar", "--block-size", 2)
    assert (code, err) == (0, "")
    assert f"(tidar, B = 2, float32, adapter {adapter}, " in out

    (adapter / "training.json").unlink()  # now it is one of R-ISD, whose masks predict the token after theirs
    found = json.loads(run(*common, "--json")[1])
    assert (found["strategy"], found["block_size"], found["equal"]) == ("isd", 4, found["prompts"])


def test_the_adapter_of_a_system_is_read_under_its_names(run: Run, folder: Path) -> None:
    model = reference("nemotron")
    write("nemotron", folder, model)
    write_adapter(folder / "linear_spec_lora", model, "encoder.", ("o_proj",))
    asked = ("lossless", folder, "--adapter", folder / "linear_spec_lora", "--max-new-tokens", 6, "--json")
    code, out, err = run(*asked)
    found = json.loads(out)
    assert (code, err, found["equal"]) == (0, "", found["prompts"])
    assert (found["strategy"], found["block_size"]) == ("self-speculation", 8)


def test_an_adapter_that_does_not_fit_is_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    asked = ("lossless", folder, "--max-new-tokens", 4, "--adapter")
    assert refused(run(*asked, tmp_path / "none")).startswith("--adapter: expected a folder with adapter_config.json")
    write_adapter(tmp_path / "other", reference("qwen3"), "model.", ("o_proj",))
    assert refused(run(*asked, tmp_path / "other")).startswith("model.layers.0.self_attn.o_proj.lora_A: expected shape")
    assert refused(run(*asked, tmp_path / "other", "--strategy", "prompt-lookup")).startswith(
        "--adapter: expected a strategy of this package beside it, got prompt-lookup"
    )
    (tmp_path / "other" / "adapter_config.json").write_text("{")
    assert "adapter_config.json: expected JSON, got" in refused(run(*asked, tmp_path / "other"))
