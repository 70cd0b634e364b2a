"""How a checkpoint is decoded: the entry `tidar` of its config.json, and the strategy that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from ...decoding.strategies import Drafting, StrategyName, class_of, isd, tidar
from ...patterns.arguments import check_int, check_ints

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The entry `tidar` of a configuration: `{"block_size": 8, "mask_token_id": 151669, ..}`.

    Args:
        block_size: the most tokens a step commits, >= 2; what "isd" calls its stride.
        mask_token_id: the token of mask rows.
        strategy: "tidar", "isd" or "flare"; see `tidar_kernels.strategies`.
        levels: numbers of accepted drafts that get a block of masks, for "tidar"; None for all of them.
        bidirectional: mask rows see their whole block, for "tidar".
        shifted_masks: a mask row predicts the token after its position (I-DLM), not the one at it; for "isd", "flare".

    Raises:
        TypeError, ValueError: an entry is unknown, missing, or does not fit, or vLLM cannot run the strategy.
    """

    block_size: int
    mask_token_id: int
    strategy: StrategyName = "tidar"
    levels: tuple[int, ...] | None = None
    bidirectional: bool = True
    shifted_masks: bool = False

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size, 2)
        check_int("mask_token_id", self.mask_token_id, 0)
        for name in ("bidirectional", "shifted_masks"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        class_of(self.strategy)
        if self.strategy not in ("tidar", "isd", "flare"):
            raise ValueError(
                f"strategy: expected tidar, isd or flare in vLLM, whose runner makes one forward pass a step and keeps "
                f"drafts as one chain, got {self.strategy!r}"
            )
        if self.strategy != "tidar" and (self.levels is not None or not self.bidirectional):
            raise ValueError(f"levels, bidirectional: expected for strategy tidar alone, got {self.strategy!r}")
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(check_ints("levels", self.levels, 1)))
        _ = self.drafting  # raises for levels that do not fit

    @classmethod
    def of(cls, entry: Any) -> Settings:
        """Of a configuration's entry.

        Raises:
            TypeError, ValueError: it is not a mapping, or as `Settings`.
        """
        if not isinstance(entry, Mapping):
            raise TypeError(f'tidar: expected an entry {{"block_size": .., "mask_token_id": ..}}, got {entry!r}')
        unknown = sorted(set(entry) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"tidar: expected entries {', '.join(cls.__dataclass_fields__)}, got {', '.join(unknown)}")
        missing = sorted({"block_size", "mask_token_id"} - set(entry))
        if missing:
            raise ValueError(f"tidar: expected entries block_size and mask_token_id, got none for {', '.join(missing)}")
        return cls(**entry)

    def entry(self) -> dict[str, Any]:
        """What `of` reads, as JSON has it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @cached_property
    def drafting(self) -> Drafting:
        """The strategy: its pattern, and where the next drafts are read."""
        if self.strategy == "tidar":
            return tidar(self.block_size, bidirectional=self.bidirectional, levels=self.levels)
        return isd(self.block_size, bidirectional=self.strategy == "flare", shifted=self.shifted_masks)

    @property
    def rows(self) -> int:
        """T, rows of a whole step. vLLM schedules the last token and T - 1 "speculative" ones."""
        return self.drafting.pattern.q_len

    @property
    def causal(self) -> bool:
        """The step is an ordinary causal sequence (ISD): any attention backend runs it."""
        pattern = self.drafting.pattern
        row = torch.arange(pattern.q_len, device="cpu")
        alone = pattern.own[:, 0] == pattern.own[:, 1]
        return bool((alone & (pattern.lead[:, 1] == row + 1) & (pattern.positions == row)).all())
