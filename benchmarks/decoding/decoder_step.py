"""Whole decoder steps at the shapes of known models.

On CUDA every step is one graph, the autoregressive one too. On a CPU bfloat16 weights are packed. The floor: the
weights and the K/V read once at the measured bandwidth, or the multiplications at the measured rate, whichever takes
longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from tidar_kernels.decoding import strategies
from tidar_kernels.decoding.session import Session, StepConfig

from ..core.operands import OURS, Implementation, Operands, Prepared, workload
from .models import LARGE, SHAPES, SMALL, fill, floor_of, model_of, packing

# `levels`: how many numbers of accepted drafts have a block of masks, as in `levels.shapes`; 0: all.
WholeStep = workload("WholeStep", model=str, block_size=int, context_len=int, levels=0)


def _ladder(model: str, *contexts: int) -> list[Any]:
    return [WholeStep(model, block, context) for context in contexts for block in (0, 4, 8, 16)]


def _replayed(o: DecoderStep) -> Prepared:
    return Prepared(o.session.replayed())


class DecoderStep(Operands):
    """A step of a model after `context_len` committed tokens; a block size of 0 is autoregressive."""

    operator = "decoder_step"
    workload = WholeStep
    implementations: ClassVar = {name: Implementation(name, _replayed) for name in ("tidar", "autoregressive")}
    own = ("tidar", "autoregressive")
    cpu = (
        *_ladder(SMALL, 512),
        *(WholeStep(SMALL, block, 512, levels) for block in (4, 8, 16) for levels in (1, 2)),
    )
    cuda = tuple(case for model in LARGE for case in _ladder(model, 512, 4096, 32768))
    tiny = tuple(_ladder("tiny", 24))
    sets = 1  # weights are larger than any cache
    graph = False  # the step has its own

    @classmethod
    def offered(cls, case: Any, device: str) -> list[str]:
        return ["tidar" if case.block_size else "autoregressive"]

    @classmethod
    def before(cls, case: Any) -> Sequence[Any]:
        return [replace(case, block_size=0, levels=0)] if case.block_size else []

    def make(self) -> None:
        case = self.case
        model = model_of(case.model, self.device, self.dtype)
        self.config = model.config
        levels = [1, max(2, case.block_size // 2)][: case.levels] or None
        self.strategy = (
            strategies.tidar(case.block_size, levels=levels) if case.block_size else strategies.autoregressive()
        )
        packed = packing(self.device, self.dtype)
        step = StepConfig(self.strategy, self.config.vocab_size - 1, packed=packed)
        self.session = Session(model, step, 1, case.context_len + max(case.block_size, 1))
        # No request runs: the step is the same, and commits nothing, so that every repetition is alike.
        fill(self.session.cache, case.context_len)

    def check(self, name: str, prepared: Prepared) -> float:
        """The tests of decoding compare tokens; random weights have none to compare."""
        prepared.run()
        return 0.0

    def floor(self, name: str = OURS) -> dict[str, float]:
        # The lm_head: on the drafts, and on the chosen block without its first row.
        pattern, rows = self.strategy.pattern, 2 * self.strategy.drafts - 1
        return floor_of(self.config, pattern, self.case.context_len, self.dtype, logits_rows=rows)

    def further(self, line: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Times an autoregressive step, and the speed-up at the acceptance that TiDAR publishes for the model."""
        case, here = self.case, (self.case.model, self.case.context_len, line["dtype"])
        plain = [row for row in (line, *rows) if row.get("implementation") == "autoregressive" and "p50_us" in row]
        times = [row["p50_us"] for row in plain if (row["model"], row["context_len"], row["dtype"]) == here]
        if not times:
            return {}
        found = {"of_autoregressive": round(line["p50_us"] / times[0], 4)}
        published = SHAPES[case.model].published.get(case.block_size) if case.model in SHAPES else None
        return found | ({"projected_speedup": round(published * times[0] / line["p50_us"], 3)} if published else {})
