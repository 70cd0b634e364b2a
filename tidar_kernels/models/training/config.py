"""What a training run is: every setting that its bits depend on, checked, and as TOML.

No PyTorch here: the command makes its options and its help from these fields.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..settings import MODEL_SIZES, check_settings, setting

__all__ = ["STATE", "TrainConfig", "read_toml"]

STATE = "state.pt"  # the file in a run's folder from which it goes on

# Steps are counted in int32, as tokens are; seeds are those of PyTorch's generators.
_MOST_STEPS, _LARGEST_SEED = 2**31 - 1, 2**64 - 1
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True)
class TrainConfig:
    """One training run of the package's own decoder on bytes.

    The learning rate rises over `warmup` steps, stays, and falls along a cosine over the last `decay` share of them.
    Before it falls, every sequence is cut in two halves: the same tokens with less attention. So two runs that differ
    in `steps` are the same run until the shorter one decays.

    A step is `workers * accumulate` shares, whose gradients are computed apart and added in their order. On a CPU the
    workers are threads, one core each: they meet once a step, where threads inside each operator would meet thousands
    of times and stall whenever one core is busy with something else.

    Raises:
        TypeError, ValueError: a setting is of the wrong type or out of range, or two do not fit together.
    """

    steps: int = setting(3600, "optimiser steps in all", 1, _MOST_STEPS)
    batch: int = setting(6, "sequences in a step", 1, 2**20)
    seq_len: int = setting(512, "S, clean tokens of a sequence; half as many before the learning rate decays", 2, 2**20)
    block_sizes: tuple[int, ...] = setting(
        (8, 16), "block lengths B that the shares of a step take in turn; decoding takes the first by default", 1, 2**16
    )
    alpha: float = setting(1.0, "weight of the autoregressive loss against the diffusion loss", 0, 1e6)
    lr: float = setting(4e-3, "peak learning rate", 0, 1e3)
    final_lr: float = setting(0.05, "what it falls to, as a share of the peak", 0, 1)
    warmup: int = setting(60, "steps in which the learning rate rises", 1, _MOST_STEPS)
    decay: float = setting(0.3, "share of the steps, at the end, in which it falls: 1 for all after the warm-up", 0, 1)
    weight_decay: float = setting(0.1, "decoupled weight decay of the layers' matrices", 0, 1e6)
    grad_clip: float = setting(1.0, "largest norm of a step's gradient")
    seed: int = setting(0, "fixes the first weights and every window of text", 0, _LARGEST_SEED)
    optimizer: str = setting(
        "muon", "muon for the layers' matrices, with AdamW for the rest; or adamw for all", choices=("muon", "adamw")
    )
    precision: str = setting(
        "bf16", "bf16 runs the forward pass under autocast, with float32 weights", choices=("bf16", "fp32")
    )
    workers: int = setting(2, "CPU threads that share a step by sequences, one core each", 1, 1024)
    accumulate: int = setting(1, "shares that each worker computes one after the other before a step", 1, 2**20)
    hidden_size: int = setting(192, "width of the model", 1, MODEL_SIZES["hidden_size"])
    intermediate_size: int = setting(640, "width inside its MLPs", 1, MODEL_SIZES["intermediate_size"])
    num_layers: int = setting(8, "its layers", 1, MODEL_SIZES["num_layers"])
    num_heads: int = setting(4, "query heads of a layer", 1, MODEL_SIZES["num_heads"])
    num_kv_heads: int = setting(2, "key and value heads of a layer", 1, MODEL_SIZES["num_kv_heads"])
    head_dim: int = setting(32, "dimension of a head", 1, MODEL_SIZES["head_dim"])

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch % self.shares:
            raise ValueError(f"batch: expected a multiple of workers x accumulate = {self.shares}, got {self.batch}")
        if self.seq_len % 2:
            raise ValueError(f"seq_len: expected an even number, which is halved at the start, got {self.seq_len}")
        if max(self.block_sizes) > self.seq_len // 2:
            raise ValueError(
                f"block_sizes: expected each <= seq_len / 2 = {self.seq_len // 2}, got {list(self.block_sizes)}"
            )
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a share in (0, 1], got {self.decay}")
        if self.grad_clip == 0:
            raise ValueError("grad_clip: expected > 0, got 0")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary positions, got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: expected a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The settings in `values`, defaults for the rest; ValueError for a name that is not a setting."""
        known = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{name}: expected one of the settings {', '.join(known)}, got {name!r}")
        return cls(**values)

    def to_toml(self) -> str:
        """The settings as a TOML file that `read_toml` reads, each below what it means."""
        lines = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            # JSON's strings, numbers and lists are TOML's too.
            lines += [f"# {entry.metadata['help']}", f"{entry.name} = {json.dumps(value)}"]
        return "\n".join(lines) + "\n"

    @property
    def shares(self) -> int:
        """Parts of a step whose gradients are computed apart."""
        return self.workers * self.accumulate

    @property
    def stable_steps(self) -> int:
        """Steps before the decay."""
        return self.steps - math.ceil(self.decay * self.steps)

    def window(self, step: int) -> tuple[int, int]:
        """`(sequences, clean tokens of each)` of a step."""
        if step < self.stable_steps:
            return 2 * self.batch, self.seq_len // 2
        return self.batch, self.seq_len

    def block_size(self, step: int, share: int) -> int:
        """Block length of one share of a step."""
        return self.block_sizes[(step * self.shares + share) % len(self.block_sizes)]

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, cosine decay."""
        progress = max(0, step - self.stable_steps) / (self.steps - self.stable_steps)
        decayed = self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * min(1.0, (step + 1) / self.warmup) * decayed


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, unchecked.

    Raises:
        OSError: it cannot be read. TypeError: `path` is none. ValueError: it is not TOML, or longer than any settings
            are.
    """
    if not isinstance(path, (str, os.PathLike)):  # an int would be an open file, and closed
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with open(path, "rb") as file:  # which may be a device that never ends
        raw = file.read(_MAX_FILE_BYTES + 1)
    if len(raw) > _MAX_FILE_BYTES:
        raise ValueError(f"path: expected TOML, got {path} (more than {_MAX_FILE_BYTES} bytes)")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"path: expected TOML, got {path} (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"path: expected TOML, got {path} ({error})") from None
