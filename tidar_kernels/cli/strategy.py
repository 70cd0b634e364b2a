"""Strategy options of `tidar-kernels generate`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .common import UserError

if TYPE_CHECKING:
    from ..decoding.decoder import Mode
    from ..decoding.session import DecoderModel

Levels = tuple[int, ...] | Literal["auto"]

# Names on the command line, and how the package calls them.
_STRATEGIES = {
    "tidar": "tidar",
    "isd": "isd",
    "flare": "flare",
    "self-speculation": "self_speculation",
    "tree": "tree",
    "block-diffusion": "block_diffusion",
}
_TITLES = {
    "tidar": "TiDAR",
    "isd": "ISD",
    "flare": "FLARE rows",
    "self_speculation": "self-speculation",
    "tree": "token tree",
    "block_diffusion": "block diffusion",
}


def _levels(text: str) -> Levels:
    """An argparse type: ascending numbers with commas between them, the first 1; or auto."""
    if text == "auto":
        return "auto"
    try:
        levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        levels = ()
    if levels[:1] != (1,) or list(levels) != sorted(set(levels)):
        raise argparse.ArgumentTypeError(f"expected auto, or ascending numbers from 1, as in 1,2,4, got {text!r}")
    return levels


def add_strategy_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--strategy",
        choices=tuple(_STRATEGIES),
        default="tidar",
        help="how --mode tidar drafts, up to --block-size tokens a step (default: tidar)",
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
    """How drafts are made."""

    strategy: str
    levels: Levels | None
    exact: bool

    @classmethod
    def of(cls, options: argparse.Namespace) -> Drafts:
        """Raises UserError for options that do not go together."""
        strategy = _STRATEGIES[options.strategy]
        if options.levels is not None and strategy != "tidar":
            raise UserError(f"--levels: expected --strategy tidar beside it, got {options.strategy}")
        if options.beta < 1 and (strategy != "tidar" or options.levels is not None):
            raise UserError("--beta: expected 1 with a strategy other than tidar, and with --levels")
        if strategy == "tree" and options.sampling != "coupled":
            raise UserError(f"--sampling: expected coupled with --strategy tree, got {options.sampling}")
        if strategy == "tree" and options.exact:
            raise UserError("--exact: expected a strategy other than tree beside it")
        return cls(strategy, options.levels, options.exact)

    @property
    def equals_autoregression(self) -> bool:
        """Whether the coupled rule gives the output of autoregressive decoding."""
        return self.strategy != "block_diffusion"

    def settled(self, model: DecoderModel, prompt: list[int], block_size: int) -> tuple[Drafts, int]:
        """Itself and the block size, with levels "auto" replaced by what a profile on this prompt chooses."""
        if self.levels != "auto":
            return self, block_size
        from ..decoding.profile import profile
        from ..decoding.strategies import plan

        chosen = plan(profile(model, [prompt], max_block_size=block_size, new_tokens=96, repeats=7))
        return replace(self, levels=chosen.levels), chosen.block_size

    def decoder_options(self, mode: Mode, block_size: int) -> dict[str, Any]:
        """Arguments of `Decoder` beyond the block size."""
        if mode == "autoregressive":
            return {"exact": self.exact}
        if self.levels is None or self.levels == "auto":
            return {"strategy": self.strategy, "exact": self.exact}
        from ..decoding.strategies import tidar

        return {"strategy": tidar(block_size, levels=self.levels), "exact": self.exact}

    def title(self, block_size: int) -> str:
        """What a table calls it."""
        levels = "" if self.levels is None else f", levels {' '.join(map(str, self.levels))}"
        return f"{_TITLES[self.strategy]}, B = {block_size}{levels}"

    def as_json(self) -> dict[str, Any]:
        return {"strategy": self.strategy, "levels": self.levels, "exact": self.exact}
