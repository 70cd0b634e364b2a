"""What the tests of training share: settings of a tiny run, and when two runs are the same."""

from __future__ import annotations

import torch

from tidar_kernels.models.training.trainer import TrainConfig, Trainer

TINY = TrainConfig(
    steps=6,
    batch=2,
    seq_len=16,
    block_sizes=(4,),
    warmup=2,
    decay=0.5,
    workers=2,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def changed(**changes) -> TrainConfig:
    return TrainConfig(**{**vars(TINY), **changes})


def states_equal(a: Trainer, b: Trainer) -> bool:
    return a.curve == b.curve and all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )
