"""Every argument of how the package's own decoder is trained and measured; see tests/test_wrong_arguments.py."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.test_wrong_arguments import ints, model
from tests.toys import CONFIG
from tests.wrong_arguments import Call, complaints, defaults, whole
from tidar_kernels.models import Transformer
from tidar_kernels.models.training import adapter, config, data, evaluate, trainer
from tidar_kernels.models.training.config import TrainConfig

SETTINGS = TrainConfig(
    steps=2, batch=2, seq_len=8, block_sizes=(2,), workers=1, hidden_size=16, intermediate_size=16, num_layers=1,
    num_heads=2, num_kv_heads=1, head_dim=8, warmup=1,
)  # fmt: skip
TEXTS = {"a": bytes(range(60, 100))}


@functools.lru_cache(maxsize=1)
def text_folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    for name in "ab":
        (folder / f"{name}.py").write_text("x = 1\n" * 20)
    return folder


def files() -> data.TextFiles:
    return data.folder_files(text_folder())


def corpus() -> data.Corpus:
    return data.Corpus(files())


def bytes_model() -> Transformer:
    return Transformer(replace(CONFIG, vocab_size=258, mask_token_id=256, block_size=2))


def run() -> trainer.Trainer:
    return trainer.Trainer(SETTINGS, corpus())


CALLS: dict[str, Callable[[], Call]] = {
    "models.training.adapter.AdapterConfig": lambda: (
        adapter.AdapterConfig, defaults(adapter.AdapterConfig)
    ),
    "models.training.config.TrainConfig": lambda: (TrainConfig, defaults(TrainConfig)),
    "models.training.config.read_toml": lambda: (config.read_toml, {"path": toml()}),
    "models.training.data.Corpus": lambda: (data.Corpus, {"files": files()}),
    "models.training.data.Corpus.windows": lambda: (
        corpus().windows, {"first": 0, "count": 2, "length": 8, "seed": 0}
    ),
    "models.training.data.document_lengths": lambda: (
        data.document_lengths, {"tokens": ints([1, 257, 2], dtype=torch.int64)}
    ),
    "models.training.data.folder_files": lambda: (
        data.folder_files, {"folder": text_folder(), "suffixes": (".py",), "held_out": ()}
    ),
    "models.training.data.stdlib_files": lambda: (data.stdlib_files, {"folder": text_folder()}),
    "models.training.evaluate.evaluate_block_lengths": lambda: (
        evaluate.evaluate_block_lengths,
        {"model": bytes_model(), "prompts": [b"abc"], "block_sizes": [2], "max_new_tokens": 2},
    ),
    "models.training.evaluate.evaluate_briefly": lambda: (
        evaluate.evaluate_briefly,
        {
            "model": bytes_model(), "texts": TEXTS, "block_sizes": [2], "seq_len": 8, "max_windows": 2,
            "max_prompts": 2, "max_new_tokens": 2,
        },
    ),
    "models.training.evaluate.evaluate_decoding": lambda: (
        evaluate.evaluate_decoding, {"model": bytes_model(), "prompts": {"a": [b"abc"]}, "max_new_tokens": 2}
    ),
    "models.training.evaluate.evaluate_likelihood": lambda: (
        evaluate.evaluate_likelihood,
        {"model": bytes_model(), "texts": [*TEXTS.values()], "seq_len": 8, "block_size": 2, "max_windows": 2},
    ),
    "models.training.evaluate.held_out_prompts": lambda: (
        evaluate.held_out_prompts, {"texts": TEXTS, "prompt_len": 4, "per_module": 2}
    ),
    "models.training.trainer.Trainer": lambda: (
        trainer.Trainer, {"config": SETTINGS, "corpus": corpus(), "init": None, "device": "cpu"}
    ),
    "models.training.trainer.Trainer.batch": lambda: (run().batch, {"step": 1}),
    "models.training.trainer.Trainer.save": lambda: (run().save, {"folder": Path(tempfile.mkdtemp())}),
    "models.training.trainer.Trainer.run": lambda: (
        run().run, {"folder": Path(tempfile.mkdtemp()), "save_every": 5, "steps": 1}
    ),
    "models.training.trainer.model_config": lambda: (trainer.model_config, {"config": SETTINGS}),
    "models.training.trainer.read_state": lambda: (trainer.read_state, {"folder": saved()}),
    "models.training.trainer.training_loss": lambda: (
        trainer.training_loss,
        {"model": bytes_model(), "tokens": ints([1, 2, 3, 4], dtype=torch.int64), "block_size": 2, "alpha": 1.0},
    ),
    "models.training.trainer.weights_sha256": lambda: (trainer.weights_sha256, {"model": model()}),
}  # fmt: skip


def toml() -> Path:
    path = Path(tempfile.mkdtemp()) / "a.toml"
    path.write_text(SETTINGS.to_toml())
    return path


@functools.lru_cache(maxsize=1)
def saved() -> Path:
    folder = Path(tempfile.mkdtemp())
    run().save(folder)
    return folder


ALSO = {
    "models.training.trainer.read_state": ("resume",),
    "models.training.trainer.training_loss": ("mesh",),
    "models.training.evaluate.evaluate_block_lengths": ("input_ids", "block_size"),
}
ELSEWHERE = {
    # Of several processes: tests/models/test_distributed.py.
    "models.training.parallel.Parallel",
    *(f"models.training.parallel.Parallel.{name}" for name in (
        "accumulating", "keep_only", "save_shards", "shares", "sum", "whole_weights", "wrap",
    )),
    *(f"models.training.parallel.{name}" for name in ("load_shards", "load_whole_weights", "place_optimiser_state")),
    # Commands of a source checkout, and their parts: how the shipped model and its adapter are made.
    *(f"models.training.adapter.{name}" for name in ("AdapterConfig.lr_at", "main", "train")),
    *(f"models.training.publish.{name}" for name in ("document", "main", "measure", "measure_again", "publish")),
    # What a run and the command ask of its settings, and leave beside its weights.
    *(f"models.training.config.TrainConfig.{name}" for name in ("block_size", "lr_at", "window")),
    *(f"models.training.report.{name}" for name in ("draw_curve", "evaluate_run", "run_figures", "write_figures")),
    # The line that `Trainer.run` shows.
    *("models.training.progress.Progress", "models.training.progress.Progress.update"),
    # Made by `folder_files` and `stdlib_files`, or without arguments.
    *(f"models.training.data.{name}" for name in ("TextFiles", "held_out_texts", "stdlib_folder")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # names that go in the next release
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, arguments = whole(name, CALLS)
    function(**arguments)
    # Without a folder it is the whole standard library: seconds.
    unlimited = {"models.training.data.Corpus", "models.training.data.stdlib_files"}
    skipped = lambda argument, what: name in unlimited and what == "None"  # noqa: E731
    assert complaints(functools.partial(whole, name, CALLS), ALSO.get(name, ()), skipped=skipped) == []
