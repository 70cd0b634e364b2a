"""The parts human_eval and lossless of the results: texts are `generate`'s, and commands measure a row again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from benchmarks.decoding import human_eval, lossless  # noqa: E402
from tests.benchmarks.benching import part_of  # noqa: E402
from tests.integrations.transformers.test_convert import tiny  # noqa: E402
from tidar_kernels import Decoder, cli  # noqa: E402
from tidar_kernels.integrations.transformers import loading  # noqa: E402
from tidar_kernels.integrations.transformers.distillation import AdapterTrainer, DistillationConfig  # noqa: E402


class Letters:
    """A tokenizer of nine letters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 9 for letter in text]}

    def __len__(self) -> int:
        return 16


def measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str, part: str = "human_eval"
) -> list[dict[str, Any]]:
    """The rows of a run on a tiny random model and three prompts of other lengths."""
    model = tiny().eval()
    monkeypatch.setattr(loading, "load", lambda *_: (model, Letters()))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "a longer one", "abc")))
    arguments = ["MODEL", "--title", "tiny", "--prompts", str(prompts), "--out", str(folder), *more]
    assert human_eval.main(arguments) == 0
    return part_of(folder, part)


def test_texts_are_those_of_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(tmp_path, monkeypatch, "--max-new-tokens", "6", "--batch-size", "2")
    assert [row["strategy"] for row in rows] == list(human_eval.STRATEGIES)
    assert all(row["equal"] == row["prompts"] == 3 for row in rows)
    assert not list(tmp_path.glob("human-eval-*.jsonl"))  # nothing to resume is left


def test_a_row_says_how_to_measure_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--max-new-tokens", "5", "--batch-size", "2", "--limit", "2")
    first = measured(tmp_path, monkeypatch, "--strategies", "tree", "isd", *sizes)[0]
    said = shlex.split(first["command"])
    again = said[said.index("FILE") + 1 :]  # what follows the paths
    assert measured(tmp_path, monkeypatch, *again) == [first]


def test_what_is_kept_is_of_one_model_and_one_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was cut short goes on with its own texts, never with those of other weights."""
    kept = human_eval.kept

    def cut(path: Path, batches: Any, compute: Any) -> Any:
        if path.stem.endswith("generate"):
            return kept(path, batches, compute)
        kept(path, batches[:1], compute)
        raise KeyboardInterrupt

    def asked(model: Any, adapter: Path | None) -> list[str]:
        """What a run that is cut short after a batch leaves in a folder of its own."""
        folder = tmp_path / "out"
        before = {path.name for path in folder.glob("*.jsonl")} if folder.exists() else set()
        monkeypatch.setattr(loading, "load", lambda *_: (model, Letters()))
        arguments = ["MODEL", "--title", "tiny", "--prompts", str(prompts), "--out", str(folder)]
        arguments += ["--strategies", "isd"] if adapter is None else ["--adapter", str(adapter)]
        with pytest.raises(KeyboardInterrupt):
            human_eval.main([*arguments, "--batch-size", "1", "--max-new-tokens", "4"])
        return sorted({path.name for path in folder.glob("*.jsonl")} - before)

    monkeypatch.setattr(human_eval, "kept", cut)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ab\nabc\n")
    for name, seed in (("one", 1), ("other", 2)):
        trained(tmp_path / name, seed)
    weights = tiny().eval().state_dict()
    another = tiny().eval()
    another.load_state_dict({name: weight * 1.5 for name, weight in weights.items()})

    assert len(asked(tiny().eval(), None)) == 2
    assert asked(tiny().eval(), None) == []  # it went on
    assert len(asked(another, None)) == 2
    assert len(asked(tiny().eval(), tmp_path / "one")) == 1  # `generate`'s texts are the model's
    assert asked(tiny().eval(), tmp_path / "one") == []
    assert len(asked(tiny().eval(), tmp_path / "other")) == 1


def trained(folder: Path, seed: int) -> None:
    """An adapter for `tiny`, of block size 3 and mask token 5."""
    config = DistillationConfig(5, block_size=3, rank=2, steps=1, batch_size=1, seq_len=6, seed=seed)
    AdapterTrainer(tiny().eval(), [[1, 2, 3, 4, 5, 6, 7]], config).run(folder)


def test_an_adapter_drafts_as_it_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "adapter", 1)
    made = []
    monkeypatch.setattr(
        human_eval,
        "Decoder",
        SimpleNamespace(
            from_transformers=lambda *args, **options: (
                made.append(options) or Decoder.from_transformers(*args, **options)
            )
        ),
    )
    measured(
        tmp_path,
        monkeypatch,
        "--adapter",
        str(tmp_path / "adapter"),
        "--max-new-tokens",
        "4",
        part="human_eval_adapter",
    )
    rows = part_of(tmp_path, "human_eval_adapter")
    assert [(row["strategy"], row["block_size"], row["equal"]) for row in rows] == [
        ("isd, adapter", 3, 3),
        ("tidar, causal blocks, adapter", 3, 3),
    ]
    assert {options["mask_token_id"] for options in made} == {5}


def test_chat_prompts_are_in_the_models_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    def template(self: Letters, messages: list[dict[str, str]], **options: Any) -> str:
        said.append((messages, options))
        return f"<{messages[0]['content']}>"

    monkeypatch.setattr(Letters, "apply_chat_template", template, raising=False)
    (tmp_path / "chat.txt").write_text("hello\nwho are you\n")
    rows = measured(
        tmp_path, monkeypatch, "--chat", str(tmp_path / "chat.txt"), "--strategies", "isd", "--max-new-tokens", "4"
    )
    assert [(row["kind"], row["prompts"]) for row in rows] == [("HumanEval", 3), ("chat", 2)]
    assert said[0] == ([{"role": "user", "content": "hello"}], {"tokenize": False, "add_generation_prompt": True})


def test_lossless_commands_name_the_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(arguments: list[str]) -> int:
        ran.append(arguments)
        print("{}")
        return 0

    monkeypatch.setattr(cli, "main", run)
    assert lossless.main(["folder", "--title", "tiny", "--max-new-tokens", "7", "--out", str(tmp_path)]) == 0
    commands = [row["command"].split() for row in part_of(tmp_path, "lossless")]
    # "tidar-kernels lossless tiny .." ran as "lossless folder .. --json".
    assert [command[3:] for command in commands] == [arguments[2:-1] for arguments in ran]
    assert all(command[-2:] == ["--max-new-tokens", "7"] for command in commands)
