"""Training on the disk and on the screen: damage, full disks, interrupts, progress."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import signal

import pytest
import torch

from tests.models.training.runs import TINY, states_equal
from tidar_kernels.models.training.progress import Progress
from tidar_kernels.models.training.trainer import Trainer, read_state
from tidar_kernels.nn import files

# What is on the disk.


def damage(path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        at = data.find(b"state/data/0") + 200
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a state\n" * 100)
    elif how == "other":
        torch.save({"config": {}}, path)
    else:
        torch.save([1, 2], path)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "text", "other", "list"])
def test_a_damaged_state_is_named(corpus, tmp_path, how):
    trainer = Trainer(TINY, corpus)
    trainer.save(tmp_path)
    damage(tmp_path / "state.pt", how)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'state.pt'}: expected the whole state")):
        Trainer.resume(tmp_path, corpus)


def test_a_state_without_later_additions_is_read(corpus, tmp_path):
    trainer = Trainer(TINY, corpus)
    trainer.step()
    trainer.save(tmp_path)
    state = read_state(tmp_path)
    assert set(state) >= {"init", "files", "evaluations"}
    for name in ("init", "files", "evaluations"):
        del state[name]
    torch.save(state, tmp_path / "state.pt")
    resumed = Trainer.resume(tmp_path, corpus)
    assert states_equal(resumed, trainer)
    assert resumed.init_sha256 is None
    resumed.evaluations.append({"step": 1})
    assert Trainer.resume(tmp_path, corpus).evaluations == []


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


def killed(*_, **__):
    raise Killed


@pytest.mark.parametrize(("call", "fault"), [("fsync", full_disk), ("replace", full_disk), ("replace", killed)])
def test_a_save_that_fails_leaves_the_checkpoint_before(corpus, tmp_path, monkeypatch, call, fault):
    trainer, run = Trainer(TINY, corpus), tmp_path / "run"
    trainer.step()
    trainer.save(run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fault)
        if fault is killed:
            patch.setattr(files.Path, "unlink", killed)
        with pytest.raises((OSError, Killed)):
            trainer.save(run)
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert before.items() <= after.items()
    assert fault is killed or after == before, "what could not be finished must not stay"
    assert trainer.saved == 1
    assert Trainer.resume(run, corpus).done == 1
    trainer.save(run)
    assert Trainer.resume(run, corpus).done == 2


def test_replacing_shows_the_error_that_happened(tmp_path, monkeypatch):
    """Not the one of cleaning up behind it."""
    monkeypatch.setattr(files.Path, "unlink", full_disk)
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "file") as file:
        file.write(b"%d" % (1 / 0))
    assert not (tmp_path / "file").exists()


def interrupt_at(trainer: Trainer, monkeypatch, done: int, times: int = 1) -> None:
    """Ctrl-C in the middle of a step: between the two optimisers, where the state is torn."""
    step = trainer.optimisers[0].step

    def interrupted():
        step()
        if trainer.done == done:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.optimisers[0], "step", interrupted)


def test_interrupt_finishes_the_step_and_saves(corpus, tmp_path, monkeypatch):
    trainer, whole = Trainer(TINY, corpus), Trainer(TINY, corpus)
    interrupt_at(trainer, monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.run(tmp_path / "run")
    assert stopped.value.__cause__ is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = Trainer.resume(tmp_path / "run", corpus)
    assert resumed.done == trainer.done == trainer.saved == 3
    resumed.run(tmp_path / "run")
    whole.run(tmp_path / "whole")
    assert states_equal(resumed, whole)


def test_a_second_interrupt_does_not_wait_and_saves_no_half_step(corpus, tmp_path, monkeypatch):
    trainer = Trainer(TINY, corpus)
    interrupt_at(trainer, monkeypatch, 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path / "run", save_every=1)
    resumed, whole = Trainer.resume(tmp_path / "run", corpus), Trainer(TINY, corpus)
    assert resumed.done == trainer.saved == 2
    resumed.run(tmp_path / "run")
    whole.run(tmp_path / "whole")
    assert states_equal(resumed, whole)


def test_an_interrupt_on_a_full_disk_is_still_an_interrupt(corpus, tmp_path, monkeypatch):
    trainer = Trainer(TINY, corpus)
    interrupt_at(trainer, monkeypatch, 2)
    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.run(tmp_path / "run")
    assert isinstance(stopped.value.__cause__, OSError)
    assert trainer.saved is None


def test_a_loss_that_is_not_finite_leaves_the_weights(corpus, tmp_path):
    trainer = Trainer(TINY, corpus)
    trainer.save(tmp_path)
    with torch.no_grad():
        trainer.parameters[0][0, 0] = math.inf
        trainer.parameters[0][0] *= 0  # inf * 0
    before = [p.clone() for p in trainer.parameters]
    with pytest.raises(FloatingPointError, match="step 1: expected finite losses, got AR nan"):
        trainer.run(tmp_path)
    for a, b in zip(before, trainer.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert Trainer.resume(tmp_path, corpus).done == 0


# What a run shows.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_every_fifty_steps_or_a_live_one(monkeypatch):
    log, live = io.StringIO(), Terminal()
    for stream in (log, live):
        progress = Progress(120, 0, 1000, [], stream)
        for done in range(1, 121):
            progress.update(done, 2.0, 3.0)
        progress.close()
    lines = log.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["50/120", "100/120", "120/120"]
    assert re.fullmatch(r"step 120/120  AR 2\.000  diffusion 3\.000 nats/byte  \d+ tokens/s  0 s left", lines[-1])
    assert live.getvalue().count("\r") == 120
    assert live.getvalue().endswith("\x1b[K\n")
    monkeypatch.setenv("COLUMNS", "20")
    narrow = Terminal()
    Progress(120, 0, 1000, [], narrow).update(1, 2.0, 3.0)
    assert len(narrow.getvalue().strip("\r").removesuffix("\x1b[K")) == 19


def test_progress_goes_on_from_the_curve():
    stream = io.StringIO()
    Progress(50, 49, 1000, [[4.0, 5.0]] * 49, stream).update(50, 2.0, 3.0)
    assert "AR 3.900  diffusion 4.900" in stream.getvalue()
