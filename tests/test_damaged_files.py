"""Files that are damaged, or hold something else: a result, or an error of one line that names file or argument."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import tidar_kernels as tk
from tests.models.test_wrong_arguments import SETTINGS, files
from tests.test_wrong_arguments import adapted, model
from tidar_kernels import models, patterns
from tidar_kernels.integrations import vllm
from tidar_kernels.integrations.vllm import plugin
from tidar_kernels.models.training import config, data, trainer

BYTES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda raw: b"",
    "one byte": lambda raw: raw[:1],
    "half of it": lambda raw: raw[: len(raw) // 2],
    "all but the last byte": lambda raw: raw[:-1],
    "another first byte": lambda raw: b"\xff" + raw[1:],
    "another byte in the middle": lambda raw: raw[: len(raw) // 2] + b"\x01" + raw[len(raw) // 2 + 1 :],
    "twice": lambda raw: raw + raw,
    "zeros": lambda raw: bytes(len(raw)),
    "text": lambda raw: b"hello\n",
    "Latin-1": lambda raw: b'{"a": "\xe9"}',
    "a byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "CRLF": lambda raw: raw.replace(b"\n", b"\r\n"),
    "null": lambda raw: b"null",
    "a number": lambda raw: b"3",
    "a string": lambda raw: b'"x"',
    "a list": lambda raw: b"[]",
    "an object": lambda raw: b"{}",
    "nested too deeply": lambda raw: b"[" * 100_000,
    "objects nested too deeply": lambda raw: b'{"a":' * 100_000,
    "a number too long": lambda raw: b'{"r": ' + b"9" * 5000 + b"}",
    "a header too long": lambda raw: b"\xff" * 8 + raw[8:],
}


def folder_in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop_in_place(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def nowhere_in_place(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pipe_in_place(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


PLACES: dict[str, Callable[[Path], None]] = {
    "no file": Path.unlink, "a folder": folder_in_place, "a link to itself": loop_in_place,
    "a link to nothing": nowhere_in_place, "a pipe": pipe_in_place,
}  # fmt: skip


def resumed(folder: Path) -> Any:
    run = trainer.Trainer.resume(folder, data.Corpus(files()))
    run.step()
    return run


def served(folder: Path) -> Any:
    with mock.patch.object(plugin, "installed_version", return_value="0.32.1"):
        return vllm.engine_options(folder)


def a_checkpoint(folder: Path) -> Path:
    models.save_checkpoint(model(), folder / "model")
    return folder / "model"


def an_adapter(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tk.save_adapter(adapted(), folder, base_model="base")
        return folder / name

    return make


def a_run(folder: Path) -> Path:
    trainer.Trainer(SETTINGS, data.Corpus(files())).save(folder)
    return folder / "state.pt"


def settings(folder: Path) -> Path:
    (folder / "run.toml").write_text(SETTINGS.to_toml())
    return folder / "run.toml"


def a_served_checkpoint(folder: Path) -> Path:
    entry = {"block_size": 4, "mask_token_id": 29, "strategy": "tidar", "levels": [1, 2], "bidirectional": True}
    values = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 30, "tidar": entry}
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "config.json"


# How a file is made, and how it is read.
READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "a checkpoint": (a_checkpoint, models.load_checkpoint),
    "an adapter's configuration": (
        an_adapter("adapter_config.json"),
        lambda p: tk.load_peft_adapter(model(), p.parent),
    ),
    "an adapter's weights": (
        an_adapter("adapter_model.safetensors"),
        lambda p: tk.load_peft_adapter(model(), p.parent),
    ),
    "the state of a run": (a_run, lambda p: resumed(p.parent)),
    "settings": (settings, lambda p: config.TrainConfig.from_dict(config.read_toml(p))),
    "a checkpoint for vLLM": (a_served_checkpoint, lambda p: served(p.parent)),
}
VALUES: dict[str, Any] = {
    "null": None, "text": "x", "true": True, "-1": -1, "0": 0, "2**70": 2**70, "1.5": 1.5, "NaN": float("nan"),
    "infinity": float("inf"), "[]": [], "[1]": [1], "[null]": [None], "{}": {}, '{"x": null}': {"x": None},
    '{"(": 1}': {"(": 1}, '{".*": "x"}': {".*": "x"}, '["("]': ["("], "10**400": 10**400,
}  # fmt: skip


def tried(read: Callable[[Any], Any], path: Any, names: tuple[str, ...] = ()) -> str | None:
    """What is wrong with how a file is read; None if nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
    except (TypeError, ValueError, OSError) as error:
        text = str(error)
        known = (*names, *([str(path), path.name, str(path.parent)] if isinstance(path, Path) else [str(path)]))
        if not any(name in text for name in known) or "\n" in text:
            return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_named(kind: str, tmp_path: Path) -> None:
    make, read = READERS[kind]
    path = make(tmp_path)
    raw = path.read_bytes()
    read(path)
    wrong = {}
    for what, damage in BYTES.items():
        path.write_bytes(damage(raw))
        wrong[what] = tried(read, path, NAMES.get(kind, ()))
    for what, place in PLACES.items():
        if kind == "settings" and what == "a pipe":
            continue  # which is what a shell's <(..) is
        path.write_bytes(raw)
        place(path)
        wrong[what] = tried(read, path, NAMES.get(kind, ()))
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    wrong = {what: error for what, error in wrong.items() if error}
    assert wrong == {}, "\n".join(f"{what}: {error}" for what, error in wrong.items())


# What errors name instead of the file: the argument or the entry.
NAMES = {
    "the state of a run": ("resume", "corpus"),
    "settings": tuple(vars(SETTINGS)),
    "a checkpoint for vLLM": ("folder", "tidar", "mask_token_id"),
}


def entries(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values inside nested dicts."""
    for name, value in values.items():
        yield (*at, name)
        if isinstance(value, dict):
            yield from entries(value, (*at, name))


def replaced(values: Any, at: tuple[Any, ...], value: Any) -> Any:
    name, *rest = at
    return {**values, name: replaced(values[name], tuple(rest), value) if rest else value}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def read_header(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["transformer_config"])


def write_header(path: Path, values: Any) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, {"transformer_config": json.dumps(values)})


FORMATS: dict[str, tuple[Callable[[Path], Any], Callable[[Path, Any], None]]] = {
    "a checkpoint": (read_header, write_header),
    "an adapter's configuration": (read_json, write_json),
    "the state of a run": (lambda path: torch.load(path), lambda path, values: torch.save(values, path)),
    "a checkpoint for vLLM": (read_json, write_json),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_wrong_entries_are_named(kind: str, tmp_path: Path) -> None:
    make, read = READERS[kind]
    path = make(tmp_path)
    load, save = FORMATS[kind]
    values = load(path)
    wrong = {}
    for at in entries(values):
        if len(at) > 1 and kind == "the state of a run":
            continue  # settings, which have their own test; and tensors
        for what, value in VALUES.items():
            save(path, replaced(values, at, value))
            names = (*map(str, at), *NAMES.get(kind, ()), *RELATED)
            wrong[f"{'.'.join(map(str, at))} = {what}"] = tried(read, path, names)
    wrong = {what: error for what, error in wrong.items() if error}
    assert wrong == {}, "\n".join(f"{what}: {error}" for what, error in wrong.items())


# What an entry of a configuration becomes.
RELATED = ("rank", "alpha", "targets", "adapter_config.json", "config", "block_size", "strategy")


# How a file is written to a path.
WRITERS: dict[str, Callable[[Any], Any]] = {
    "a checkpoint": lambda path: models.save_checkpoint(model(), path),
    "an adapter": lambda path: tk.save_adapter(adapted(), path, base_model="base"),
    "a picture": lambda path: patterns.causal(3).draw(path),
    "a run": lambda path: trainer.Trainer(SETTINGS, data.Corpus(files())).save(path),
}
TARGETS: dict[str, Callable[[Path], Any]] = {
    "below a file": lambda folder: folder / "file" / "below",
    "a link to itself": lambda folder: folder / "loop" / "below",
    "no folder that can be made": lambda folder: "/proc/none/below",
    "a device": lambda folder: "/dev/full",
    "a name too long": lambda folder: folder / ("x" * 300),
    "NUL": lambda folder: f"{folder}/a\0b",
    "bytes": lambda folder: os.fsencode(folder / "bytes"),
    "nothing": lambda folder: "",
    "a surrogate": lambda folder: folder / "a\udcff",
    "a lone surrogate": lambda folder: folder / "a\ud800",
    "another script": lambda folder: folder / "é 日本",
}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_that_cannot_be_written_are_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    wrong = []
    for what, target in TARGETS.items():
        before = sorted(os.listdir(tmp_path))
        error = tried(WRITERS[kind], target(tmp_path), ("path", "folder", "/proc/none", str(target(tmp_path))[:200]))
        if error is not None:
            wrong.append(f"{what}: {error}")
        if any(name.endswith(".tmp") for name in os.listdir(tmp_path)):
            wrong.append(f"{what}: leaves {set(os.listdir(tmp_path)) - set(before)}")
    assert wrong == [], "\n".join(wrong)
    assert (tmp_path / "file").read_text() == "kept"
    assert not Path("/dev/full").is_file()
