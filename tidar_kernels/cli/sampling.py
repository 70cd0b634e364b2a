"""Sampling options of `tidar-kernels generate`, and what they promise about its output."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .common import number

if TYPE_CHECKING:
    from ..ops.verify import Rule

_RULES: dict[str, Rule] = {"coupled": "coupled", "rejection": "rejection", "point-mass": "point_mass"}
_share = number(float, lambda value: 0.0 <= value <= 1.0, "a number in [0, 1]")
# What the demo samples by: greedy, a model of the shipped one's size repeats a line. The coupled rule keeps outputs
# identical.
_DEMO = {"temperature": 0.5, "seed": 1}

Promise = Literal["tokens", "distribution", "none"]


def add_sampling_arguments(parser: argparse._ActionsContainer) -> None:
    """Ranges are those of `SamplingParams`, which is not asked here because it would load PyTorch."""
    parser.add_argument(
        "--temperature",
        type=number(float, lambda value: value == 0 or 1e-4 <= value <= 1e4, "0, or a number in [1e-4, 1e4]"),
        metavar="T",
        help=f"divides the logits; 0 is greedy (default: 0; with --demo {_DEMO['temperature']})",
    )
    parser.add_argument(
        "--top-k",
        type=number(int, lambda value: 0 <= value < 2**31, "a 32-bit whole number >= 0"),
        default=0,
        metavar="K",
        help="keep the K largest logits; 0 keeps all (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, lambda value: 0.0 < value <= 1.0, "a number in (0, 1]"),
        default=1.0,
        metavar="P",
        help="then keep the fewest tokens with at least this share of the mass (default: 1)",
    )
    parser.add_argument(
        "--min-p",
        type=_share,
        default=0.0,
        metavar="P",
        help="then keep tokens with at least this share of the largest probability (default: 0)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=number(float, lambda value: 1e-4 <= value <= 1e4, "a number in [1e-4, 1e4]"),
        default=1.0,
        metavar="R",
        help="above 1, tokens of the prompt and of the text so far become less likely, greedy too (default: 1)",
    )
    parser.add_argument(
        "--sampling",
        choices=tuple(_RULES),
        default="coupled",
        help="how drafts are judged at a temperature above 0 (default: coupled)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, lambda value: -(2**63) <= value < 2**64, "a 64-bit whole number"),
        metavar="S",
        help=f"of the noise (default: 0; with --demo {_DEMO['seed']})",
    )
    parser.add_argument(
        "--beta",
        type=_share,
        default=1.0,
        metavar="X",
        help="trust in the autoregressive logits against the diffusion ones (default: 1; no effect on "
        "autoregressive decoding)",
    )


@dataclass(frozen=True)
class Sampling:
    """How a generation samples: `parameters` as `Decoder.stream` takes them, the decoder's rule and beta."""

    parameters: dict[str, Any]
    rule: Rule
    beta: float
    equals_autoregression: bool = True

    @classmethod
    def of(cls, options: argparse.Namespace) -> Sampling:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        defaults = _DEMO if options.demo else {"temperature": 0.0, "seed": 0}
        given = {name: getattr(options, name) for name in names}
        parameters = {name: defaults[name] if value is None else value for name, value in given.items()}
        return cls(parameters, _RULES[options.sampling], options.beta)

    @property
    def greedy(self) -> bool:
        return bool(self.parameters["temperature"] == 0)

    @property
    def promise(self) -> Promise:
        """What TiDAR's output shares with that of autoregressive decoding, whatever the model."""
        if self.beta < 1 or not self.equals_autoregression:
            return "none"
        return "tokens" if self.greedy or self.rule == "coupled" else "distribution"

    def verdict(self, strategy: str) -> str:
        """What to say of outputs that need not be identical; `strategy` is its title."""
        if self.promise == "distribution":
            rule = self.rule.replace("_", "-")
            return f"same distribution: by the {rule} rule; the tokens may differ, and are not compared"
        if not self.equals_autoregression:
            return f"outputs not compared: {strategy} decodes by the diffusion logits"
        return "outputs not compared: with --beta below 1 the diffusion logits have a say"

    def as_json(self) -> dict[str, Any]:
        return self.parameters | {"rule": self.rule, "beta": self.beta}

    def __str__(self) -> str:
        settings = self.parameters
        off = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        said = {name: f"{name.replace('_', '-')} {settings[name]}" for name in off if settings[name] != off[name]}
        if self.greedy:  # nothing else matters then
            words = ["greedy", *(said[name] for name in ("repetition_penalty",) if name in said)]
        else:
            words = [*said.values(), self.rule.replace("_", "-"), f"seed {settings['seed']}"]
        return ", ".join([*words, *([f"beta {self.beta}"] if self.beta < 1 else [])])
