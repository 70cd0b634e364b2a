"""The modes that we add to NeMo Automodel's recipe against dense masks: its own for I-DLM, one of ours for TiDAR."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nemo_automodel")

from tests.paths import REPOSITORY
from tidar_kernels.testing import budget

WORKER = Path(__file__).with_name("worker.py")
KINDS = ("qwen3", "llama")


def run(world: int, folder: Path) -> list[dict[Any, Any]]:
    """What each of `world` processes found; see `worker.main`."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + (os.getpid() * 7 + world) % 20000)}
    environment |= {"WORLD_SIZE": str(world), "HF_HUB_OFFLINE": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(WORKER), str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(said)
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return run(1, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run(2, tmp_path_factory.mktemp("two"))


def budgets(found: Any, one: dict[Any, Any], kind: str, dense: str) -> None:
    """Losses and gradients are as near to float64 as the dense mask's."""
    plain, exact = (one[key] for key in _dense(kind, dense))
    assert found.keys() == plain.keys() == exact.keys()
    assert len(found) > 20
    for name, value in found.items():
        budget(value, exact[name], plain[name], name)


def _dense(kind: str, dense: str) -> tuple[Any, Any]:
    plain = (kind, "idlm") if dense == "idlm" else (kind, dense, "float32")
    return plain, (kind, dense, "float64")


MODES = [("tidar_idlm", "idlm"), ("tidar", "dense")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "dense"), MODES)
def test_one_process_is_the_dense_mask(one: dict[Any, Any], kind: str, mode: str, dense: str) -> None:
    budgets(one[kind, mode], one, kind, dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "dense"), MODES)
@pytest.mark.parametrize("how", ["data", "context"])
def test_two_processes_are_the_dense_mask(
    one: dict[Any, Any], two: list[dict[Any, Any]], kind: str, mode: str, dense: str, how: str
) -> None:
    for rank in two:
        budgets(rank[kind, mode, how], one, kind, dense)


def test_automodels_own_mode_still_works(one: dict[Any, Any], two: list[dict[Any, Any]]) -> None:
    for kind in KINDS:
        budgets(two[0][kind, "idlm", "data"], one, kind, "idlm")


def test_what_cannot_be_trained_is_refused() -> None:
    from types import SimpleNamespace

    from nemo_automodel.recipes.dllm.strategy import get_dllm_strategy

    from tidar_kernels.integrations.automodel import register

    register()
    with pytest.raises(ValueError, match=r"^dllm.auto_balance_clean_loss: expected false .*, got true$"):
        get_dllm_strategy("tidar_idlm").create_loss_fn({"auto_balance_clean_loss": True})
    with pytest.raises(TypeError, match=r"^dllm.block_size: expected an int, got NoneType"):
        get_dllm_strategy("tidar").create_loss_fn({})
    recipe = SimpleNamespace(model_parts=[torch.nn.Linear(2, 2)] * 2, mask_token_id=3)
    with pytest.raises(ValueError, match=r"^distributed.pp_size: expected one stage, got 2$"):
        get_dllm_strategy("tidar").setup_extra(recipe)
    recipe.model_parts.pop()
    with pytest.raises(TypeError, match=r"^model: expected a causal language model of transformers, got Linear$"):
        get_dllm_strategy("tidar").setup_extra(recipe)
    batch = {"attention_mask": torch.tensor([[0, 1, 1]]), "input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(ValueError, match=r"^attention_mask: expected padding at the ends of examples only"):
        get_dllm_strategy("tidar_idlm")._rows(batch)
