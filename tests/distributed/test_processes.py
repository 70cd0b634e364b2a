"""The harness itself: what processes return, and what it says of one that fails or dies."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist

from tests.distributed.processes import on_ranks


def rank() -> int:
    return dist.get_rank()


def failing() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of rank 1")
    dist.barrier()


def dying() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGABRT)
    dist.barrier()


@pytest.mark.distributed
def test_processes_return_fail_and_die() -> None:
    assert on_ranks(2, rank) == [0, 1]
    with pytest.raises(Exception, match=r"of rank 1"):
        on_ranks(2, failing)
    with pytest.raises(AssertionError, match=r"rank 1 of 2: .*SIGABRT(.|\n)*, line \d+ in dying\n"):
        on_ranks(2, dying)
