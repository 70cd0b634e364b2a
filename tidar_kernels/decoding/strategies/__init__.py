"""Ways to decode: each a small file with its pattern and its rule of what comes next; the loop is `session`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

from .adaptive import Adaptive, adaptive
from .base import Batch, DecoderModel, Drafting, StepResult, Strategy
from .block_diffusion import BlockDiffusion
from .dflash import DFlash, DraftedModel, Drafter
from .isd import FLARE, ISD, isd
from .levels import Plan, Profile, auto, plan
from .self_speculation import SelfSpeculation
from .tidar import TiDAR, autoregressive, tidar
from .tree import Tree, tree

__all__ = [
    "Adaptive",
    "Batch",
    "BlockDiffusion",
    "DFlash",
    "DecoderModel",
    "DraftedModel",
    "Drafter",
    "Drafting",
    "Plan",
    "Profile",
    "SelfSpeculation",
    "StepResult",
    "Strategy",
    "StrategyName",
    "Tree",
    "adaptive",
    "auto",
    "autoregressive",
    "by_name",
    "class_of",
    "isd",
    "plan",
    "tidar",
    "tree",
]

StrategyName = Literal["tidar", "isd", "flare", "self_speculation", "tree", "block_diffusion"]


# A name's class says what is true of every strategy of that name; the function makes one.
_KINDS: dict[str, tuple[type[Strategy], Callable[[int, bool], Strategy]]] = {
    "tidar": (TiDAR, lambda drafts, shifted: tidar(drafts)),
    "isd": (ISD, lambda drafts, shifted: isd(drafts, shifted=shifted)),
    "flare": (FLARE, lambda drafts, shifted: isd(drafts, bidirectional=True, shifted=shifted)),
    "self_speculation": (SelfSpeculation, lambda drafts, shifted: SelfSpeculation(drafts)),
    "tree": (Tree, lambda drafts, shifted: tree(drafts)),
    "block_diffusion": (BlockDiffusion, lambda drafts, shifted: BlockDiffusion(drafts)),
}


def class_of(name: str) -> type[Strategy]:
    """The class of the strategies of that name: its title, rules and whether it can be exact, before one is made.

    Raises:
        ValueError: no such strategy.
    """
    return _kind(name)[0]


def by_name(name: str, drafts: int, shifted: bool = False) -> Strategy:
    """The strategy of that name with its usual options, committing up to `drafts` tokens a step.

    `shifted` says what the model's masks predict: the token after their position, or the one at it.

    Raises:
        TypeError, ValueError: no such strategy, or `drafts` does not suit it.
    """
    return _kind(name)[1](drafts, shifted)


def _kind(name: str) -> tuple[type[Strategy], Callable[[int, bool], Strategy]]:
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"strategy: expected a Strategy or one of {', '.join(get_args(StrategyName))}, got {name!r}")
    return _KINDS[name]


def __getattr__(name: str) -> Any:
    if name == "Outcome":
        warnings.warn(f"{__name__}.Outcome is StepResult now; its old name goes in the next release", FutureWarning, 2)
        return StepResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
