"""How a request samples, on the host and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ...patterns.arguments import check_device, check_instances

__all__ = ["Knob", "SamplingParams", "SamplingTensors", "sampling_tensors"]


class Knob(IntEnum):
    """Columns of `SamplingTensors.knobs`."""

    TEMPERATURE = 0
    TOP_K = 1
    TOP_P = 2
    MIN_P = 3
    REPETITION_PENALTY = 4


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples. Tokens tied at an edge of top-k, top-p or min-p stay.

    Args:
        temperature: 0, which takes the argmax, ties to the lowest id; or 1e-4 .. 1e4.
        top_k: keep the k largest logits; 0 keeps all.
        top_p: then keep the fewest tokens with at least this share of the mass, in (0, 1].
        min_p: then keep tokens with at least this share of the largest probability, in [0, 1].
        repetition_penalty: divides positive logits of tokens that the request has seen, multiplies negative ones;
            1e-4 .. 1e4.
        seed: of the request's noise, any 64-bit int.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        for name, good, expected in (
            # Beyond these, scores would leave float32.
            ("temperature", self.temperature == 0 or 1e-4 <= self.temperature <= 1e4, "0, or a number in [1e-4, 1e4]"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "a number in (0, 1]"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "a number in [0, 1]"),
            ("repetition_penalty", 1e-4 <= self.repetition_penalty <= 1e4, "a number in [1e-4, 1e4]"),
            ("seed", -(2**63) <= self.seed < 2**64, "a 64-bit int"),
        ):
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


_knobs = attrgetter(*(knob.name.lower() for knob in Knob))


class SamplingTensors(NamedTuple):
    """The parameters of a batch on its device: `knobs` float32 `[batch, len(Knob)]`, `seeds` int64 `[batch]`."""

    knobs: Tensor
    seeds: Tensor


def sampling_tensors(params: Sequence[SamplingParams], device: torch.device | str) -> SamplingTensors:
    """`params`, one for each sequence, as the operators take them.

    Raises:
        TypeError, ValueError: these are no `SamplingParams`, or `device` is none.
    """
    params, device = check_instances("params", params, SamplingParams), check_device("device", device)
    knobs = [list(_knobs(p)) for p in params]
    for row in knobs:
        row[Knob.TOP_K] = min(row[Knob.TOP_K], 2**24)  # no vocabulary has as many, and float32 counts no further
    seeds = [p.seed - 2**64 if p.seed >= 2**63 else p.seed for p in params]
    return SamplingTensors(
        torch.tensor(knobs, dtype=torch.float32, device=device), torch.tensor(seeds, dtype=torch.int64, device=device)
    )
