"""Two processes on gloo against one, by gradients and weights: DDP, FSDP2, context parallelism and the Trainer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.paths import REPOSITORY

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")


IN_EVERY_RUN = ("ddp", "fsdp_bf16", "trainer_evaluated")
LONGER = [pytest.param(how, marks=pytest.mark.thorough) for how in ("fsdp", "tp", "cp", "trainer", "trainer_cp")]


@pytest.mark.parametrize("how", [*IN_EVERY_RUN, *LONGER])
def test_two_processes_are_one_large_batch(how: str, tmp_path: Path) -> None:
    compare(2, how, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["uneven", "stream", "stream_cp", "refused"])
def test_two_processes_have_their_shares(how: str, tmp_path: Path) -> None:
    compare(2, f"trainer_{how}", tmp_path)


@pytest.mark.distributed
def test_two_by_two_processes_are_one_large_batch(tmp_path: Path) -> None:
    compare(4, "trainer_cp", tmp_path)


def compare(world: int, how: str, tmp_path: Path) -> None:
    """The worker compares; it prints what it compared, so that none passes by comparing nothing."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {
        "WORLD_SIZE": str(world),
        "USE_LIBUV": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    port = str(20000 + (os.getpid() * 7 + hash(how)) % 20000)
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), how, str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(said)
    counts = [re.search(r"compared (\d+)", text) for text in said]
    assert all(count is not None and int(count[1]) > 20 for count in counts), said
