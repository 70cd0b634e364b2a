"""The decoder and its loss under DeepSpeed's ZeRO, two processes on gloo: three steps later, the weights of one.

Needs DeepSpeed, which no extra installs; tried with 0.19.8 and PyTorch 2.13 on the CPU.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.models.test_distributed import WORLD, WithLoss, batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed"),
]

STAGES, STEPS, CLIP = (0, 1, 2, 3), 3, 1.0


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)


def weights_of_one_process() -> dict[str, Tensor]:
    module = WithLoss()
    optimizer = adam(module)
    tokens, pattern, counts = batch()
    for _ in range(STEPS):
        optimizer.zero_grad()
        module(tokens, pattern, counts).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def weights_of_deepspeed(deepspeed: Any, stage: int, rank: int) -> dict[str, Tensor]:
    module = WithLoss()
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adam(module),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": CLIP,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    tokens, pattern, counts = batch()
    share = slice(2 * rank, 2 * rank + 2)
    for _ in range(STEPS):
        # DeepSpeed averages gradients over processes: each divides by its share of the labels of all.
        engine.backward(engine(tokens[share], pattern, counts / WORLD))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def process(rank: int, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import deepspeed

    # It would compile an operator for memory that processes share, for minutes.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {stage: weights_of_deepspeed(deepspeed, stage, rank) for stage in STAGES}
    if rank == 0:
        torch.save(found, f"{folder}/weights.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Tensor]]:
    """Weights of every stage, from one pair of processes."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=WORLD)
    return torch.load(folder / "weights.pt")


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_those_of_one_process(found: dict[int, dict[str, Tensor]], stage: int) -> None:
    """Compared with how far training moved them."""
    expected, start = weights_of_one_process(), dict(WithLoss().named_parameters())
    assert found[stage].keys() == expected.keys()
    for name, weight in found[stage].items():
        moved = (expected[name] - start[name].detach()).norm()
        assert float((weight - expected[name]).norm() / moved) < 1e-4, name
