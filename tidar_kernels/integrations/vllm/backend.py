"""Attention backends of vLLM that let rows in flight see what a step's pattern says.

`TidarBackend` is for CUDA, where it is vLLM's backend CUSTOM. vLLM's CPU platform knows one backend alone, so
`TidarCPUBackend` takes its place there: for our models it is the same implementation, for all others vLLM's own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from ...ops.operands import Scores
from .attention import KERNELS, ON_CPU, Batch, Buffers, Path, Rows, step
from .settings import Settings

__all__ = ["TidarBackend", "TidarBuilder", "TidarCPUBackend", "TidarImpl", "takes_rows"]

# vLLM keeps a float8 cache as bytes.
FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def takes_rows(builder: Any) -> bool:
    """Whether a builder of metadata is one of ours, whose `build` takes `rows`."""
    return isinstance(builder, (TidarBuilder, TidarCPUBuilder))


def _has_patterns(config: VllmConfig) -> bool:
    """Whether a model has steps that are not plainly causal."""
    model = config.model_config
    return model.architecture.startswith("Tidar") and not Settings.of(getattr(model.hf_config, "tidar", None)).causal


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class TidarBuilder(AttentionMetadataBuilder[Batch]):
    """Puts each pass into `Buffers`. A captured graph replays any mix of requests up to its sizes."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        scheduler = vllm_config.scheduler_config
        self._buffers = Buffers(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        rows: Rows | None = None,
    ) -> Batch:
        """The pass; `rows` comes from `TidarModelState`: None where all are causal, or a graph is captured."""
        common = common_attn_metadata
        return self._buffers.fill(
            *(common.query_start_loc, common.seq_lens, common.block_table_tensor, common.slot_mapping, rows),
            num_rows=common.num_actual_tokens,
            max_rows=common.max_query_len,
            max_seq_len=common.max_seq_len,
        )


class TidarImpl(AttentionImpl[Batch]):
    """Attention of one layer, its writes into the cache included. Arguments as vLLM's attention layer gives them.

    Raises:
        ValueError: the layer has what no layer of our models has, or a cache dtype that the kernels do not read.
    """

    path: ClassVar[Path] = KERNELS

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        refused = {
            "sliding_window": sliding_window is not None,
            "logits_soft_cap": bool(logits_soft_cap),
            "alibi_slopes": alibi_slopes is not None,
            "sinks": sinks is not None,
            "attn_type": attn_type != AttentionType.DECODER,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name is not None,
        }
        for name, there in refused.items():
            if there:
                raise ValueError(f"{name}: expected none with strategy tidar, got one; strategy isd takes it")
        own = _name(torch.get_default_dtype())  # the model's, while vLLM builds it
        if kv_cache_dtype not in ("auto", own, *FLOAT8):
            raise ValueError(
                f"kv_cache_dtype: expected auto, {own}, {', '.join(FLOAT8)} with strategy tidar, got {kv_cache_dtype}"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write into the cache and attend; zeros in a run without metadata, which measures memory.

        Args:
            layer: has `_k_scale` and `_v_scale` of a float8 cache.
            query: `[tokens, heads, head_size]`. key, value: `[tokens, kv_heads, head_size]`.
            kv_cache: `[pages, kv_heads, page_size, 2 * head_size]`, any strides: a key, then a value.
            attn_metadata: of the builder.
            output: `[tokens, heads, head_size]` or `[tokens, heads * head_size]`; returned.
        """
        if attn_metadata is None:
            return output.fill_(0)
        scales = None
        if self.kv_cache_dtype in FLOAT8:
            kv_cache, scales = kv_cache.view(FLOAT8[self.kv_cache_dtype]), (layer._k_scale, layer._v_scale)
        cache = kv_cache[..., : self.head_size], kv_cache[..., self.head_size :]
        step(self.path, query, key, value, cache, attn_metadata, Scores(self.scale), output, scales)
        return output


class TidarBackend(AttentionBackend):
    """For CUDA GPUs from compute capability 8.0 on, any page size, and any of vLLM's layouts of the cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *FLOAT8]
    # Keys are stored by where their request is, which the metadata of `forward` says.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the name up among its own

    @staticmethod
    def get_impl_cls() -> type[TidarImpl]:
        return TidarImpl

    @staticmethod
    def get_builder_cls() -> type[TidarBuilder]:
        return TidarBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        from ...ops._triton.configs import HEAD_DIM_TILES

        return head_size <= HEAD_DIM_TILES[-1]

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability.major >= 8

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True  # a row's bits depend on its request alone

    @classmethod
    def supports_combination(cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: Any, *others: Any) -> str | None:
        if kv_cache_dtype in (None, "auto", _name(dtype), *FLOAT8):
            return None
        return f"kv_cache_dtype: expected auto, {_name(dtype)} or fp8 with a model of {_name(dtype)}"


class _OnCPU(TidarImpl):
    path: ClassVar[Path] = ON_CPU


class TidarCPUBuilder(CPUAttentionMetadataBuilder):
    """vLLM's own for every model but ours."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        self._ours: TidarBuilder | None = None
        if _has_patterns(vllm_config):
            self._ours = TidarBuilder(kv_cache_spec, layer_names, vllm_config, device)
            AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        else:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        rows: Rows | None = None,
    ) -> CPUAttentionMetadata | Batch:
        if self._ours is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return self._ours.build(common_prefix_len, common_attn_metadata, fast_build, rows)


class TidarCPUImpl(CPUAttentionBackendImpl):
    """vLLM's own for every model but ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ours = _OnCPU(*args, **kwargs) if _has_patterns(get_current_vllm_config()) else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        run = super().forward if self._ours is None else self._ours.forward
        output: Tensor = run(*args, **kwargs)
        return output

    def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
        if self._ours is None:  # ours writes in `forward`
            super().do_kv_cache_update(*args, **kwargs)


class TidarCPUBackend(CPUAttentionBackend):
    """In place of vLLM's CPU backend, the only one that its CPU platform takes."""

    @staticmethod
    def get_impl_cls() -> type[TidarCPUImpl]:
        return TidarCPUImpl

    @staticmethod
    def get_builder_cls() -> type[TidarCPUBuilder]:
        return TidarCPUBuilder
