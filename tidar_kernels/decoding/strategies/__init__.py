"""Ways to decode: each a small file with its pattern and its rule of what comes next; the loop is `session`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from .base import Batch, DecoderModel, Drafting, Outcome, Strategy
from .block_diffusion import BlockDiffusion
from .isd import isd
from .levels import Plan, Profile, auto, plan
from .self_speculation import SelfSpeculation
from .tidar import autoregressive, tidar
from .tree import Tree, tree

__all__ = [
    "Batch",
    "BlockDiffusion",
    "DecoderModel",
    "Drafting",
    "Outcome",
    "Plan",
    "Profile",
    "SelfSpeculation",
    "Strategy",
    "StrategyName",
    "Tree",
    "auto",
    "autoregressive",
    "by_name",
    "isd",
    "plan",
    "tidar",
    "tree",
]

StrategyName = Literal["tidar", "isd", "flare", "self_speculation", "tree", "block_diffusion"]


def by_name(name: str, drafts: int, shifted: bool = False) -> Strategy:
    """The strategy of that name with its usual options, committing up to `drafts` tokens a step.

    `shifted` says what the model's masks predict: the token behind their position, or the one at it.

    Raises:
        TypeError, ValueError: no such strategy, or `drafts` does not suit it.
    """
    make: dict[str, Callable[[int], Strategy]] = {
        "tidar": tidar,
        "isd": lambda n: isd(n, shifted=shifted),
        "flare": lambda n: isd(n, bidirectional=True, shifted=shifted),
        "self_speculation": SelfSpeculation,
        "tree": tree,
        "block_diffusion": BlockDiffusion,
    }
    if name not in make:
        raise ValueError(f"strategy: expected a Strategy or one of {', '.join(get_args(StrategyName))}, got {name!r}")
    return make[name](drafts)
