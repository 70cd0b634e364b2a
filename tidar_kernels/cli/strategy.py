"""Strategy options of `tidar-kernels generate`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .common import UserError, user_errors, whole_numbers

if TYPE_CHECKING:
    from ..decoding.session import DecoderModel
    from ..decoding.strategies import Strategy

Levels = tuple[int, ...] | Literal["auto"]

# Those of `decoding.strategies`, which is not asked because it would load PyTorch.
STRATEGIES = ("tidar", "isd", "flare", "self-speculation", "tree", "block-diffusion")


def _levels(text: str) -> Levels:
    """An argparse type: ascending numbers with commas between them, the first 1; or auto."""
    if text == "auto":
        return "auto"
    try:
        levels = whole_numbers(text)
    except argparse.ArgumentTypeError:
        levels = ()
    if levels[:1] != (1,) or list(levels) != sorted(set(levels)):
        raise argparse.ArgumentTypeError(f"expected auto, or ascending numbers from 1, as in 1,2,4, got {text!r}")
    return levels


def add_strategy_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        help="how --mode tidar drafts, up to --block-size tokens a step (default: as a folder's model or adapter was "
        "trained to, else tidar)",
    )
    parser.add_argument(
        "--levels",
        type=_levels,
        metavar="L,..",
        help="numbers of accepted drafts that get a block, as in 1,2,4: fewer rows a step, with --strategy tidar; "
        "auto: these, and the block size up to --block-size, by what drafts and rows are worth on this prompt and "
        "machine, measured first (default: all up to --block-size)",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="draft rows have the bits of single-token decoding; slower, and outputs cannot differ by rounding",
    )


@dataclass(frozen=True)
class Drafts:
    """How drafts are made: the name of a strategy on the command line, and what goes with it."""

    name: str
    levels: Levels | None
    exact: bool

    @classmethod
    def of(cls, options: argparse.Namespace) -> Drafts:
        """Raises UserError for options that do not go together."""
        if options.levels is not None and options.strategy not in (None, "tidar"):
            raise UserError(f"--levels: expected --strategy tidar beside it, got {options.strategy}")
        return cls(options.strategy or "tidar", options.levels, options.exact)

    def strategy(self, config: Any, block_size: int) -> Strategy:
        """What decodes a model of this configuration; before levels "auto" are settled, with a block for every draft.

        Raises:
            UserError: the block size or the levels do not suit it.
        """
        from ..decoding.strategies import by_name, tidar

        size = dict.fromkeys(("stride", "length", "shape"), "--block-size")
        with user_errors(ValueError, rename={"levels": "--levels", **size}):
            if isinstance(self.levels, tuple):
                return tidar(block_size, levels=self.levels)
            return by_name(self.name.replace("-", "_"), block_size, bool(getattr(config, "shifted_masks", False)))

    def settled(self, model: DecoderModel, prompt: list[int], block_size: int) -> tuple[Drafts, int]:
        """Itself and the block size, with levels "auto" replaced by what a profile on this prompt chooses."""
        if self.levels != "auto":
            return self, block_size
        from ..decoding.profile import profile
        from ..decoding.strategies import plan

        chosen = plan(profile(model, [prompt], max_block_size=block_size, new_tokens=96, repeats=7))
        return replace(self, levels=chosen.levels), chosen.block_size

    def as_json(self) -> dict[str, Any]:
        return {"strategy": self.name.replace("-", "_"), "levels": self.levels, "exact": self.exact}
