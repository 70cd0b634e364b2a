"""What a system is: how its checkpoints are recognised, which layers of transformers they have, and how they decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ....decoding.strategies import Strategy, by_name

__all__ = ["Config", "Refused", "System", "architecture", "as_built_in"]

Config = Mapping[str, Any]
"""The content of a checkpoint's config.json."""

# Keys of config.json that say which code runs, not what it computes.
_CODE = (
    "_attn_implementation",
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)


class Refused(ABC):
    """Checkpoints that are recognised, and cannot be decoded here.

    Attributes:
        name: as in `Decoder.from_transformers(system=...)`.
        title: what messages and tables call it.
        reason: why not.
    """

    name: str
    title: str
    reason: str

    @abstractmethod
    def recognises(self, config: Config) -> bool:
        """Whether a checkpoint with this configuration is one of this system."""


class System(ABC):
    """Checkpoints that are read into layers that transformers has, and decoded as their authors do.

    Attributes:
        name: as in `Decoder.from_transformers(system=...)`.
        title: what messages and tables call it.
        strategies: names of the ways to decode it, its authors' own default first.
        adapter: the folder in a checkpoint with a gated adapter for drafting, None if there is none.
        renames: pairs of a regular expression over the names of its tensors, and what to put in its place.
        layers: the class of transformers that it is read into; None where the class of the configuration says so.
    """

    name: str
    title: str
    strategies: tuple[str, ...]
    adapter: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    layers: Any = None

    @abstractmethod
    def recognises(self, config: Config) -> bool:
        """Whether a checkpoint with this configuration is one of this system."""

    @abstractmethod
    def built_in(self, config: Config) -> PreTrainedConfig:
        """The configuration of the class of transformers whose layers are equal.

        Raises:
            ValueError: the configuration asks for what these layers do not have.
        """

    def block_size(self, config: Config, strategy: str) -> int | None:
        """The most tokens that a step of a strategy commits, as the authors run it; None if the checkpoint must say."""
        size: int | None = config.get("block_size")
        return size

    def mask_token_id(self, config: Config) -> int | None:
        """The token of mask rows; None if the configuration does not say."""
        token: int | None = config.get("mask_token_id")
        return token

    def strategy(self, name: str, size: int) -> Strategy:
        """The strategy of that name with this system's options."""
        return by_name(name, size)

    def beta(self, config: Config) -> float | None:
        """Trust in the autoregressive logits, for strategies that take one; None for the default."""
        return None


def architecture(config: Config) -> str:
    """The class that a configuration names, "" if it names none."""
    names = config.get("architectures") or [""]
    return str(names[0])


def as_built_in(kind: type[PreTrainedConfig], config: Config, *, without: tuple[str, ...] = ()) -> PreTrainedConfig:
    """A configuration of a class of transformers with the values of a checkpoint's own.

    Args:
        kind: the class of the configuration.
        without: names of features that its layers do not have.

    Raises:
        ValueError: the checkpoint has one of these features, by name.
    """
    for name in without:
        if config.get(name):
            raise ValueError(f"{name}: expected none in config.json of {architecture(config)}, got {config[name]!r}")
    return kind(**{key: value for key, value in config.items() if key not in _CODE})
