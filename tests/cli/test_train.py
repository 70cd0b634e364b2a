"""`tidar-kernels train`: settings and where they come from, what it writes, and how it refuses and stops."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.cli.shell import Run
from tests.paths import REPOSITORY
from tidar_kernels import cli
from tidar_kernels.cli import train
from tidar_kernels.models import load_checkpoint
from tidar_kernels.models.training.config import read_toml
from tidar_kernels.models.training.trainer import STATE, TrainConfig, Trainer, read_state, weights_sha256
from tidar_kernels.nn import files

SETTINGS = {
    "steps": 6,
    "batch": 2,
    "seq_len": 16,
    "block_sizes": [4, 2],
    "warmup": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `tidar-kernels train` in this process: `(exit code, standard output, standard error)`."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main(["train", *(str(argument) for argument in arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny settings as a file."""
    path = tmp_path / "tiny.toml"
    path.write_text("".join(f"{name} = {value}\n" for name, value in SETTINGS.items()))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of text in an encoding of its own."""
    folder = tmp_path / "data"
    for i in range(6):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "sub" / f"{i}.txt").write_bytes(f"\xe4\xf6 line {i}\n".encode("latin-1") * 30)
    return folder


@pytest.fixture
def tiny(config: Path, data: Path, tmp_path: Path) -> list[Any]:
    """Arguments of a run of a second."""
    return ["--config", config, "--data", data, "--suffix", "txt", "--out", tmp_path / "run", "--device", "cpu"]


def refused(result: tuple[int, str, str], out: Path | None = None) -> str:
    """The one line that a refused command printed: nothing else, exit code 2, and nothing written."""
    code, printed, err = result
    assert (code, printed) == (2, "")
    assert re.fullmatch(r"tidar-kernels: error: [^\n]+\n", err)
    assert out is None or not out.exists()
    return err.removeprefix("tidar-kernels: error: ").rstrip("\n")


def weights(folder: Path) -> str:
    return weights_sha256(load_checkpoint(folder / "model.safetensors"))


# Settings.


def test_help_needs_no_torch() -> None:
    code = (
        "import json, sys\nfrom tidar_kernels import cli\ncode = cli.main(['train', '--help'])\n"
        "code += cli.main(['train', '--print-config', '--steps', '7'])\n"
        "print(json.dumps([code, sorted(sys.modules)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    *lines, last = done.stdout.splitlines()
    code, modules = json.loads(last)
    assert code == 0
    assert lines[0] == "usage: tidar-kernels train --out DIR [options]"
    assert "steps = 7" in lines
    assert not {"torch", "numpy", "triton", "tidar_kernels.models.training.trainer"} & set(modules)


def test_every_setting_is_an_option(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for entry in fields(TrainConfig):
        assert f"--{entry.name.replace('_', '-')} " in out


def test_printed_settings_are_a_file_of_them(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--print-config", "--block-sizes", "4,2", "--lr", "1e-5", "--optimizer", "adamw")
    assert (code, err) == (0, "")
    (tmp_path / "run.toml").write_text(out, encoding="utf-8-sig")  # as editors on Windows save it
    expected = TrainConfig(block_sizes=(4, 2), lr=1e-5, optimizer="adamw")
    assert TrainConfig.from_dict(read_toml(tmp_path / "run.toml")) == expected
    assert run("--print-config", "--config", tmp_path / "run.toml") == (0, out, "")


def test_options_win_over_the_file_and_the_file_over_defaults(run: Run, config: Path) -> None:
    code, out, _ = run("--print-config", "--config", config, "--steps", "9", "--batch", "4")
    assert code == 0
    expected = TrainConfig.from_dict(SETTINGS | {"steps": 9, "batch": 4})
    assert out == expected.to_toml()
    assert (expected.warmup, expected.lr) == (2, TrainConfig.lr)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 3", r"{}: step: expected one of the settings steps, batch, .*, got 'step'"),
        ("steps = 'many'", r"{}: steps: expected a whole number, got 'many'"),
        ("steps = true", r"{}: steps: expected a whole number, got True"),
        ("lr = [1]", r"{}: lr: expected a number, got \[1\]"),
        ("batch = 3", r"{}: batch: expected a multiple of workers x accumulate = 2, got 3"),
        ("block_sizes = 8", r"{}: block_sizes: expected a list of one or more whole numbers, got 8"),
        ("optimizer = 'sgd'", r"{}: optimizer: expected one of muon, adamw, got 'sgd'"),
        ("[train]\nsteps = 3", r"{}: train: expected one of the settings"),
        ("steps: 3", r"--config: expected TOML, got {} \(.*\)"),
        ("\xff", r"--config: expected TOML, got {} \(.*\)"),
    ],
)
def test_bad_files(run: Run, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    out = tmp_path / "run"
    assert re.fullmatch(message.format(re.escape(str(path))) + ".*", refused(run("--out", out, "--config", path), out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.toml"], "--config: expected a readable file, got nowhere.toml"),
        (["--steps", "0"], "--steps: expected a whole number >= 1, got '0'"),
        (["--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["--lr", "nan"], "--lr: expected a number, got nan"),
        (["--block-sizes", "8;16"], "--block-sizes: expected whole numbers with commas between them, got '8;16'"),
        (["--block-sizes", "8,512"], "--block-sizes: expected each <= seq_len / 2 = 256"),
        (["--batch", "5"], "--batch: expected a multiple of workers x accumulate = 2, got 5"),
        (["--optimizer", "sgd"], "--optimizer: invalid choice: 'sgd'"),
        (["--suffix", ".txt"], "--suffix, --held-out: expected --data beside them"),
        (["--suffix", "."], "--suffix: expected how names end, like .txt, got '.'"),
        (["--data", "nowhere"], "--data: expected a folder, got nowhere"),
        (["--data", "docs"], "--data: expected .py files in docs"),
        (["--init", "nowhere.safetensors"], "--init: expected a checkpoint file, got nowhere.safetensors"),
        (["--device", "cuda:99"], "--device: expected a device of this machine, got cuda:99"),
        (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["--resume"], "--resume: expected {out}/state.pt, got no such file"),
        (["--resume", "--lr", "1"], "--resume: expected no setting but --steps beside it, got --lr"),
        (["--resume", "--config", "x.toml"], "--resume: expected no setting but --steps beside it, got --config"),
    ],
)
def test_bad_arguments(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert refused(run("--out", out, *arguments), out).startswith(message.format(out=out))


def test_out_is_needed(run: Run, tmp_path: Path) -> None:
    assert refused(run("--steps", "3")).startswith("--out: expected a folder, got none")
    (tmp_path / "file").touch()
    assert refused(run("--out", tmp_path / "file")).startswith("--out: expected a folder, got the file")


def test_text_that_does_not_do(run: Run, tiny: list[Any], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert refused(run(*tiny, "--seq-len", 4000), out).startswith("--data: expected at least seq_len = 4000 tokens")
    assert refused(run(*tiny, "--held-out", "sub/9.txt"), out).startswith("--held-out: expected names of .txt files")
    for path in sorted(data.glob("sub/*"))[1:]:
        path.unlink()
    assert refused(run(*tiny), out).startswith("--data: expected two or more .txt files")


def test_weights_that_do_not_fit(run: Run, tiny: list[Any], tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    message = refused(run(*tiny, "--init", tmp_path / "bad.safetensors"), tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'bad.safetensors'}: expected a complete safetensors file")
    assert run(*tiny)[0] == 0
    init = tmp_path / "run" / "model.safetensors"
    other = [*tiny, "--out", tmp_path / "other", "--init", init, "--num-layers", 2]
    assert refused(run(*other), tmp_path / "other") == "--init: expected a model with num_layers = 2, got 1"


# A run.


def test_what_a_run_leaves(run: Run, tiny: list[Any], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, printed, err = run(*tiny, "--eval-every", 4, "--held-out", "sub/2.txt")
    assert code == 0
    assert re.fullmatch(r"step 6/6  AR \S+  diffusion \S+ nats/byte  \d+ tokens/s  0 s left\n", err)
    assert "parameters on cpu; 5 files of" in printed
    assert "1 more held out; step 0 of 6" in printed
    assert [line for line in printed.splitlines() if line.startswith("held out")] == [
        "held out, step 4:",
        "held out, step 6:",
    ]
    assert re.search(r"\n  B  bits/byte AR  diffusion  AR right  tokens/forward  mask rows right, %\n  4  ", printed)
    assert sorted(path.name for path in out.iterdir()) == [
        *("figures.json", "loss_curve.png", "model.safetensors", "state.pt")
    ]
    figures = json.loads((out / "figures.json").read_text())
    assert TrainConfig.from_dict(figures["training"]) == TrainConfig.from_dict(SETTINGS)
    assert figures["data"] == {"folder": str(data), "suffixes": [".txt"], "held_out": ["sub/2.txt"]}
    assert [one["step"] for one in figures["evaluations"]] == [4, 6]
    for one, block_size in zip(figures["evaluations"][-1]["blocks"], (4, 2), strict=True):
        assert one["block_size"] == len(one["mask_row_accuracy"]) == block_size
        assert 1 <= one["tokens_per_forward"] <= block_size
        assert 0 < one["ar_bits_per_byte"] < 10
    assert [point[0] for point in figures["curve"]] == [1, 2, 3, 4, 5, 6]
    assert (figures["steps"], figures["init"], figures["device"]) == (6, None, "cpu")
    assert set(figures["versions"]) >= {"tidar_kernels", "python", "torch"}
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    model = load_checkpoint(out / "model.safetensors")
    assert model.config.block_size == 4


def test_json_is_the_last_line(run: Run, tiny: list[Any], tmp_path: Path) -> None:
    code, out, err = run(*tiny, "--json")
    assert code == 0
    (line,) = out.splitlines()
    report = json.loads(line)
    assert report["steps"] == 6
    assert report["tokens_per_second"] == pytest.approx(6 * 2 * 16 / report["seconds"])
    assert report["losses"].keys() == {"autoregressive", "diffusion"}
    assert report["evaluation"]["step"] == 6
    assert all(Path(path).is_file() for path in report["files"].values())
    assert "held out, step 6:" in err


def test_the_command_evaluates_without_changing_the_run(run: Run, tiny: list[Any], tmp_path: Path) -> None:
    assert run(*tiny, "--eval-every", 0, "--save-every", 100)[0] == 0
    assert run(*tiny, "--out", tmp_path / "watched", "--eval-every", 1)[0] == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "watched")


def test_resume_finds_the_files_of_the_run(run: Run, tiny: list[Any], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*tiny)[0] == 0
    (held_out,) = read_state(out)["files"]["held_out"]
    code, printed, _ = run("--out", out, "--resume", "--device", "cpu")
    assert code == 0
    assert "5 files of" in printed
    assert "step 6 of 6" in printed
    # The run has decayed towards step 6.
    assert refused(run("--out", out, "--resume", "--steps", 12)).startswith("--steps: expected 6")
    moved = data.rename(tmp_path / "moved")
    assert refused(run("--out", out, "--resume")) == f"--data: expected a folder, got {data}"
    assert run("--out", out, "--resume", "--device", "cpu", "--data", moved, "--suffix", "txt")[0] == 0
    (moved / held_out).unlink()
    assert refused(run("--out", out, "--resume")).startswith("--held-out: expected names of .txt files")
    (moved / held_out).write_text("held out")
    (moved / "new.txt").write_text("more")
    assert refused(run("--out", out, "--resume")).startswith("--resume: expected a corpus with sha256")


def test_a_run_is_not_lost_by_accident(run: Run, tiny: list[Any], tmp_path: Path) -> None:
    assert run(*tiny)[0] == 0
    before = (tmp_path / "run" / "state.pt").read_bytes()
    message = refused(run(*tiny, "--seed", 1))
    assert message.startswith(f"--out: expected a folder without a run, got {tmp_path / 'run' / 'state.pt'}")
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert run(*tiny, "--seed", 1, "--overwrite")[0] == 0
    assert read_state(tmp_path / "run")["config"]["seed"] == 1


def test_a_damaged_state_is_one_line(run: Run, tiny: list[Any], tmp_path: Path) -> None:
    assert run(*tiny)[0] == 0
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    message = refused(run("--out", tmp_path / "run", "--resume"))
    assert message.startswith(f"{state}: expected the whole state of a training run, got")


def test_init_starts_from_a_run(run: Run, tiny: list[Any], tmp_path: Path) -> None:
    assert run(*tiny)[0] == 0
    init = tmp_path / "run" / "model.safetensors"
    assert run(*tiny, "--out", tmp_path / "second", "--init", init, "--seed", 1)[0] == 0
    figures = json.loads((tmp_path / "second" / "figures.json").read_text())
    assert figures["init"] == weights_sha256(load_checkpoint(init))


def test_too_little_text_to_evaluate(run: Run, tiny: list[Any], data: Path, tmp_path: Path) -> None:
    (data / "short.txt").write_text("short")
    code, out, _ = run(*tiny, "--held-out", "short.txt")
    assert code == 0
    assert "  not measured, bits a byte: no held-out text is longer than seq_len = 16 bytes\n" in out
    assert "  not measured, tokens a forward: no held-out text is as long as a prompt of 16 bytes\n" in out
    assert (tmp_path / "run" / "loss_curve.png").is_file()


def test_without_matplotlib(run: Run, tiny: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, _ = run(*tiny, "--eval-every", 2)
    assert code == 0
    assert out.count("loss_curve.png: not drawn, for matplotlib is not installed\n") == 1
    assert "figures.json" in out
    assert not (tmp_path / "run" / "loss_curve.png").exists()


# The end of a run that does not finish.


def interrupt_at(monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    step = Trainer.step

    def interrupted(trainer: Trainer) -> tuple[float, float]:
        if trainer.done == done:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted)


def test_interrupt_saves_and_says_how_to_go_on(
    run: Run, tiny: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*tiny, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "a run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        code, _, err = run(*tiny, "--out", out)
    assert code == 130
    assert err == f"stopped after step 4 of 6; step 4 is saved, tidar-kernels train --out '{out}' --resume goes on\n"
    assert run("--out", out, "--resume", "--device", "cpu")[0] == 0
    assert weights(out) == weights(tmp_path / "whole")


def test_interrupt_on_a_full_disk(run: Run, tiny: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    interrupt_at(monkeypatch, 3)
    monkeypatch.setattr(files.os, "fsync", full)
    code, _, err = run(*tiny)
    assert code == 130
    assert err == (
        "stopped after step 4 of 6; not saved ([Errno 28] No space left on device); "
        "there is no checkpoint of this run\n"
    )


def test_a_full_disk_keeps_the_checkpoint(
    run: Run, tiny: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 4:  # the checkpoints of steps 2 and 4, of two files each
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*arguments)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        code, _, err = run(*tiny, "--save-every", 2, "--eval-every", 0)
    assert code == 2
    assert err.splitlines()[-1] == (
        f"tidar-kernels: error: {out}: [Errno 28] No space left on device; "
        f"step 4 is saved, tidar-kernels train --out {out} --resume goes on"
    )
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "state.pt"]
    assert run("--out", out, "--resume", "--device", "cpu")[0] == 0


def test_a_loss_that_is_not_finite(run: Run, tiny: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(*tiny, "--lr", 1000, "--warmup", 1)
    assert code == 1
    assert re.fullmatch(
        r"tidar-kernels: error: step \d: expected finite losses, got AR nan, diffusion nan; "
        r"there is no checkpoint of this run\n",
        err,
    )


def test_one_name_of_the_state() -> None:
    assert train.STATE == STATE
