"""Tokens a step and acceptance by position in `/metrics`, under the names that vLLM gives them.

vLLM counts what its own speculative decoding accepts; rows of a step ride as its speculative tokens, but it registers
these counters for a `speculative_config` alone. This stat logger (entry point `vllm.stat_logger_plugins`) registers
them for our models, and counts drafts where vLLM would count mask rows too.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from .settings import Settings

__all__ = ["TidarStatLogger"]


class TidarStatLogger(AggregateStatLoggerBase):
    """Counters `vllm:spec_decode_*`, with the labels `model_name` and `engine`; nothing for models that are not ours.

    `num_drafts`: steps that had drafts to judge. `num_draft_tokens`: draft rows judged, without the first, which is
    always right. `num_accepted_tokens`: those that stayed. `num_accepted_tokens_per_pos`: the same by their place, the
    label `position`. Tokens a step are `1 + num_accepted_tokens / num_drafts`.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        model = vllm_config.model_config
        self._engines, self._name, self._places = engine_indexes or [0], model.served_model_name, 0
        if model.architecture.startswith("Tidar") and vllm_config.speculative_config is None:
            self._places = Settings.of(model.hf_config.tidar).drafting.drafts - 1

    def log_engine_initialized(self) -> None:
        # Not earlier: vLLM's own logger, which is made after this one, unregisters whatever has such a name.
        if not self._places:
            return
        labels = ["model_name", "engine"]
        self._drafts = Counter("vllm:spec_decode_num_drafts", "Steps that judged drafts.", labels)
        self._judged = Counter("vllm:spec_decode_num_draft_tokens", "Drafts that were judged.", labels)
        self._stayed = Counter("vllm:spec_decode_num_accepted_tokens", "Drafts that stayed.", labels)
        self._by_place = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafts that stayed, by place.", [*labels, "position"]
        )
        for engine in self._engines:  # a counter that was never counted is shown as 0
            self._count(engine, 0, 0, [0] * self._places)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        stats = getattr(scheduler_stats, "spec_decoding_stats", None)
        if self._places and stats is not None:
            judged = sum(stats.num_draft_tokens_per_pos[: self._places])
            self._count(engine_idx, stats.num_drafts, judged, stats.num_accepted_tokens_per_pos[: self._places])

    def _count(self, engine: int, drafts: int, judged: int, stayed: list[int]) -> None:
        labels = [self._name, str(engine)]
        self._drafts.labels(*labels).inc(drafts)
        self._judged.labels(*labels).inc(judged)
        self._stayed.labels(*labels).inc(sum(stayed))
        for place, count in enumerate(stayed):
            self._by_place.labels(*labels, str(place)).inc(count)
