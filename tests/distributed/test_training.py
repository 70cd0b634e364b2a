"""A training run on several processes: the run of one process, whatever the mesh, before and after a resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.processes import budgets, on_ranks
from tests.paths import REPOSITORY
from tidar_kernels.models import Transformer
from tidar_kernels.models.training.data import Corpus, folder_files
from tidar_kernels.models.training.parallel import Parallel
from tidar_kernels.models.training.trainer import TrainConfig, Trainer, read_state

CONFIG = TrainConfig(
    steps=6,
    batch=4,
    seq_len=22,
    block_sizes=(4, 3),
    warmup=2,
    decay=0.5,
    workers=2,
    accumulate=2,
    precision="fp32",
    optimizer="adamw",
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
# Processes over data and over context, and whether weights are sharded.
WAYS = {"ddp": (2, 1, False), "fsdp": (2, 1, True), "cp": (1, 2, False)}
MORE_WAYS = {"ddp x cp": (2, 2, False), "fsdp x cp": (2, 2, True), "cp of 4": (1, 4, True)}


def library(folder: Path) -> Corpus:
    """Text with ends of documents in most windows."""
    for i in range(8):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{i}.txt").write_text("".join(f"{i * j}," for j in range(5 + 4 * i)))
    return Corpus(folder_files(folder / "text", (".txt",)))


def parallel(way: str) -> Parallel:
    data, context, sharded = (WAYS | MORE_WAYS)[way]
    return Parallel(dist.init_device_mesh("cpu", (data, context), mesh_dim_names=("data", "context")), sharded)


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    model = trainer.whole_model()
    return {} if model is None else model.state_dict()


def runs(folder: Path, ways: tuple[str, ...]) -> dict[str, Any]:
    """Of each way: an uninterrupted run, one that stops and goes on, and one that goes on from one process's."""
    corpus, found = Corpus(folder_files(folder / "text", (".txt",))), {}
    for way in ways:
        there = parallel(way)
        trainer = Trainer(CONFIG, corpus, parallel=there)
        trainer.run(folder / way, save_every=2, steps=4)
        again = Trainer.resume(folder / way, corpus, parallel=there)
        from_one = Trainer.resume(folder / "one", corpus, parallel=there)
        for one in (trainer, again, from_one):
            for _ in range(2):
                one.step()
        found[way] = [(one.curve, whole(one)) for one in (trainer, again, from_one)]
    return found


Weights = dict[str, torch.Tensor]


@dataclass
class OneProcess:
    """The run of one process in a dtype: what every mesh is compared with."""

    losses: torch.Tensor
    weights: Weights


def one_process(corpus: Corpus, dtype: torch.dtype, folder: Path | None = None) -> OneProcess:
    """All steps; after four of them the run is saved to `folder`."""
    trainer = Trainer(CONFIG, corpus)
    trainer.model.to(dtype)
    losses = []
    for step in range(CONFIG.steps):
        if step == 4 and folder is not None:
            trainer.save(folder)
        losses.append(trainer.step())
    return OneProcess(torch.tensor(losses, dtype=torch.float64), trainer.model.state_dict())


def close(curve: list[list[float]], weights: Weights, exact: OneProcess, plain: OneProcess) -> None:
    """Losses and weights by the budget rule: at most twice as far from a run in float64 as one process in float32 is.

    A curve has four decimals, so half of the last may come on top.
    """
    budgets(weights, exact.weights, plain.weights)
    error, of_one = ((x - exact.losses).norm() for x in (torch.tensor(curve, dtype=torch.float64), plain.losses))
    assert error <= 2 * of_one + 1e-5 * exact.losses.norm() + 0.5e-4 * exact.losses.numel() ** 0.5


def check(tmp_path: Path, world: int, ways: tuple[str, ...]) -> None:
    corpus = library(tmp_path)
    exact, plain = one_process(corpus, torch.float64), one_process(corpus, torch.float32, tmp_path / "one")
    first, *others = on_ranks(world, runs, tmp_path, ways)
    for way in ways:
        for curve, weights in first[way]:
            close(curve, weights, exact, plain)
        (curve, weights), (same_curve, same_weights), _ = first[way]
        assert curve == same_curve
        # DDP reorders its buckets after a run's first step, and sums the gradients of three or more in another order.
        if way != "ddp x cp":
            assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
        for other in others:
            assert [one[0] for one in other[way]] == [one[0] for one in first[way]]
        resumed = Trainer.resume(tmp_path / way, corpus)
        assert resumed.done == 4
        for _ in range(2):
            resumed.step()
        close(resumed.curve, resumed.model.state_dict(), exact, plain)
        assert [path.name for path in (tmp_path / way).glob("shards-*")] == ["shards-4"]


def test_two_processes_are_one(tmp_path: Path) -> None:
    check(tmp_path, 2, ("fsdp", "cp"))


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "ways"), [(2, tuple(WAYS)), (4, tuple(MORE_WAYS))])
def test_every_mesh_is_one_process(tmp_path: Path, world: int, ways: tuple[str, ...]) -> None:
    check(tmp_path, world, ways)


def test_shares_are_dealt_whole() -> None:
    class Mesh:
        def size(self, dim: int) -> int:
            return 4

        def get_local_rank(self, dim: str) -> int:
            return 1

    there = Parallel(Mesh())  # type: ignore[arg-type]
    assert list(there.shares(8)) == [1, 5]
    with pytest.raises(ValueError, match=r"^workers x accumulate: expected a multiple of 4 groups of processes, got 6"):
        there.shares(6)


# The command.


def arguments(folder: Path, *more: str) -> list[str]:
    library(folder)
    (folder / "run.toml").write_text(CONFIG.to_toml())
    data = ["--data", str(folder / "text"), "--suffix", ".txt", "--device", "cpu", "--out", str(folder / "run")]
    return ["train", "--config", str(folder / "run.toml"), *data, *more]


def launched(world: int, arguments: list[str]) -> subprocess.Popen[str]:
    run = ["torch.distributed.run", "--standalone", "--nproc-per-node", f"{world}", "-m", "tidar_kernels", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", *run], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of torchrun in /proc")
def test_a_process_that_dies_ends_the_job_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """Killed in the middle of whatever it does, in the middle of a save too, several times over."""
    endless = ["--steps", "1000000", "--save-every", "3", "--eval-every", "0", "--fsdp"]
    begun = arguments(tmp_path, *endless)
    done = 0
    for victim in (1, 0):
        job = launched(2, begun)
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and job.poll() is None:
                if (tmp_path / "run" / "state.pt").exists() and read_state(tmp_path / "run")["done"] > done:
                    break
                time.sleep(0.05)
            assert job.poll() is None, job.communicate()[0]
            os.kill(sorted(children(job.pid))[victim], signal.SIGKILL)
            said = job.communicate(timeout=120)[0]
        finally:
            job.kill()
        assert job.returncode != 0, said
        state = read_state(tmp_path / "run")
        assert state["done"] > done
        assert state["done"] % 3 == 0
        done = state["done"]
        resumed = Trainer.resume(tmp_path / "run", library(tmp_path))
        assert resumed.done == done
        resumed.step()
        begun = ["train", "--out", str(tmp_path / "run"), "--device", "cpu", *endless[2:], "--resume"]


@pytest.mark.distributed
def test_the_command_on_several_processes(tmp_path: Path) -> None:
    job = launched(2, arguments(tmp_path, "--context-parallel", "2"))
    said = job.communicate(timeout=240)[0]
    assert job.returncode == 0, said
    assert "2 processes (data 1 x context 2, DDP)" in said
    assert said.count("held out, step 6") == 1
    corpus = library(tmp_path)
    resumed = Trainer.resume(tmp_path / "run", corpus)
    exact, plain = one_process(corpus, torch.float64), one_process(corpus, torch.float32)
    close(resumed.curve, resumed.model.state_dict(), exact, plain)
    assert isinstance(resumed.model, Transformer)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"state.pt", "model.safetensors", "figures.json"}


@pytest.mark.distributed
@pytest.mark.parametrize(("more", "message"), [
    (("--context-parallel", "3"), "--context-parallel: expected a divisor of 2 processes, got 3"),
    (("--workers", "1", "--accumulate", "1"), "workers x accumulate: expected a multiple of 2 groups of processes"),
])  # fmt: skip
def test_a_mesh_that_does_not_fit_is_one_line(tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    job = launched(2, arguments(tmp_path, *more))
    said = job.communicate(timeout=120)[0]
    assert job.returncode != 0
    assert f"tidar-kernels: error: {message}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [("--fsdp",), ("--context-parallel", "2")])
def test_one_process_alone_has_no_mesh(
    tmp_path: Path, option: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidar_kernels import cli

    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(arguments(tmp_path, *option)) == 2
    expected = f"tidar-kernels: error: {option[0]}: expected processes started by torchrun, got one process without\n"
    assert capsys.readouterr().err == expected
