"""Attention backends of vLLM that let rows in flight see what a step's pattern says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from ...ops.operands import Scores
from .attention import Rows, append, attend
from .settings import Settings

__all__ = ["TidarCPUBackend", "takes_rows"]


def takes_rows(builder: Any) -> bool:
    """Whether a builder of metadata is one of ours, whose `build` takes `rows`."""
    return isinstance(builder, TidarCPUBuilder)


def _has_patterns() -> bool:
    """Whether the model that is being built has steps that are not plainly causal."""
    entry = getattr(get_current_vllm_config().model_config.hf_config, "tidar", None)
    served = get_current_vllm_config().model_config.architecture.startswith("Tidar")
    return served and not Settings.of(entry).causal


@dataclass
class TidarCPUMetadata(CPUAttentionMetadata):
    """vLLM's, and what rows see; None for models that are not ours."""

    rows: Rows | None = None


class TidarCPUBuilder(CPUAttentionMetadataBuilder):
    """Adds the rows that `TidarModelState` hands over."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        rows: Rows | None = None,
    ) -> CPUAttentionMetadata:
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return made if rows is None else TidarCPUMetadata(**vars(made), rows=rows)


class TidarCPUImpl(CPUAttentionBackendImpl):
    """vLLM's own for every model but ours; for those, cache and attention of `attention`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patterns = _has_patterns()
        if not self._patterns:
            return
        refused = {
            "sliding_window": self.sliding_window != -1,
            "logits_soft_cap": self.logits_soft_cap != 0,
            "alibi_slopes": self.alibi_slopes is not None,
            "sinks": self.sinks is not None,
            "kv_cache_dtype": self.is_fp8_kv_cache,
        }
        for name, there in refused.items():
            if there:
                raise ValueError(f"{name}: expected none with strategy tidar, got one; strategy isd takes it")

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None or not self._patterns:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        count, width = attn_metadata.num_actual_tokens, kv_cache.shape[-1] // 2  # a key, then a value
        attend(
            *(query[:count], key[:count], value[:count], (kv_cache[..., :width], kv_cache[..., width:])),
            *(attn_metadata.block_table, attn_metadata.seq_lens, attn_metadata.query_start_loc, attn_metadata.rows),
            *(Scores(self.scale), output[:count]),
            max_query_len=attn_metadata.max_query_len,
        )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self._patterns:
            append(kv_cache, key, value, slot_mapping)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


class TidarCPUBackend(CPUAttentionBackend):
    """In place of vLLM's CPU backend, the only one that its CPU platform takes."""

    @staticmethod
    def get_impl_cls() -> type[TidarCPUImpl]:
        return TidarCPUImpl

    @staticmethod
    def get_builder_cls() -> type[TidarCPUBuilder]:
        return TidarCPUBuilder
