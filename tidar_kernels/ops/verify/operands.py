"""The bundles of `verify` and `sample`."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

__all__ = ["RULES", "Drafted", "Requests", "Rule", "Target"]

Rule = Literal["coupled", "rejection", "point_mass"]
RULES: tuple[Rule, ...] = get_args(Rule)


class Target(NamedTuple):
    """What rows are decided by: `beta * logits + (1 - beta) * mix`, or the logits alone; `[batch, rows, vocab]`."""

    logits: Tensor
    mix: Tensor | None = None
    beta: float = 1.0


class Drafted(NamedTuple):
    """What is decided about.

    Attributes:
        drafts: int64 `[batch, B]`, -1 for one that is missing.
        draft_logits: `[batch, B, vocab]`, what each was drawn from, for the rejection rule.
        rule: index into `RULES`.
    """

    drafts: Tensor
    draft_logits: Tensor | None = None
    rule: int = 0


class Requests(NamedTuple):
    """How each sequence samples.

    Attributes:
        positions: int `[batch]`, of the token of row 0.
        knobs, seeds: `tidar_kernels.ops.verify.SamplingTensors`.
        seen: bool `[batch, vocab]`, tokens committed so far, for the repetition penalty; or None.
    """

    positions: Tensor
    knobs: Tensor
    seeds: Tensor
    seen: Tensor | None = None
