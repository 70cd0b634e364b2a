"""Every argument of what is made of a mesh of processes, here of one; see tests/test_wrong_arguments.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.test_wrong_arguments import CAUSAL, model, operands, randn
from tests.wrong_arguments import Call, complaints, defaults, whole
from tidar_kernels.distributed import ContextParallel, shared_out
from tidar_kernels.models import tensor_parallel


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def parallel() -> ContextParallel:
    return ContextParallel(mesh(), CAUSAL)


CALLS: dict[str, Callable[[], Call]] = {
    "distributed.ContextParallel": lambda: (
        ContextParallel, defaults(ContextParallel, mesh=mesh(), pattern=CAUSAL)
    ),
    "distributed.ContextParallel.windowed": lambda: (parallel().windowed, {"window": 2}),
    "distributed.ContextParallel.shard": lambda: (parallel().shard, {"x": randn(2, 3), "dim": 1, "of": "rows"}),
    "distributed.ContextParallel.gather": lambda: (parallel().gather, {"x": randn(2, 3), "dim": 1, "of": "rows"}),
    "distributed.ContextParallel.attention": lambda: (
        parallel().attention, operands("q", "k", "v", scale=0.2, softcap=3.0, sinks=torch.zeros(4), backend=None)
    ),
    "distributed.shared_out": lambda: (shared_out, {"mesh": mesh(), "pattern": CAUSAL}),
    "models.tensor_parallel": lambda: (tensor_parallel, {"model": model(), "mesh": mesh()}),
}  # fmt: skip
# What its attention is made of.
ELSEWHERE = {"distributed.ContextParallel.gathered", "distributed.ContextParallel.summed"}


@pytest.mark.filterwarnings("ignore")  # names that go in the next release
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name: str) -> None:
    function, arguments = whole(name, CALLS)
    function(**arguments)
    assert complaints(functools.partial(whole, name, CALLS)) == []
