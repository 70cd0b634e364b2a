"""The attention backend that vLLM gets for CUDA, driven as vLLM's runner drives it, its kernels interpreted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="needs vLLM: make vllm")

from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_layout import KVCacheLayout

from tidar_kernels.integrations.vllm import models, plugin
from tidar_kernels.integrations.vllm.backend import TidarBackend, TidarBuilder, TidarImpl
from tidar_kernels.integrations.vllm.settings import Settings

from .passes import COLUMNS, DIM, HEADS, KV_HEADS, LAYOUTS, MIX, MOST_REQUESTS, MOST_ROWS, PAGE, Pass

pytestmark = pytest.mark.interpret


def a_builder() -> TidarBuilder:
    scheduler = SimpleNamespace(max_num_seqs=MOST_REQUESTS, max_num_batched_tokens=MOST_ROWS)
    config: Any = SimpleNamespace(scheduler_config=scheduler)
    return TidarBackend.get_builder_cls()(None, ["layer"], config, torch.device("cpu"))


def an_impl(**changes: Any) -> TidarImpl:
    given = {"num_heads": HEADS, "head_size": DIM, "scale": DIM**-0.5, "num_kv_heads": KV_HEADS} | changes
    return TidarBackend.get_impl_cls()(**given)


def common(one: Pass) -> CommonAttentionMetadata:
    """What the runner says of a pass that is padded for a graph."""
    return CommonAttentionMetadata(
        query_start_loc=one.starts,
        query_start_loc_cpu=one.starts,
        seq_lens=one.seq_lens,
        num_reqs=MOST_REQUESTS,
        num_actual_tokens=MOST_ROWS,
        max_query_len=MOST_ROWS,
        max_seq_len=COLUMNS * PAGE,
        block_table_tensor=one.table,
        slot_mapping=one.slots,
    )


def forward(impl: TidarImpl, one: Pass, metadata: Any) -> Tensor:
    scales = one.scales or (torch.tensor(1.0),) * 2
    layer = SimpleNamespace(_k_scale=scales[0], _v_scale=scales[1])
    cache = one.cache if one.scales is None else one.cache.view(torch.uint8)  # as vLLM keeps it
    out = torch.full((MOST_ROWS, HEADS, DIM), torch.nan)
    assert impl.forward(layer, one.q, one.k, one.v, cache, metadata, out) is out
    return out.flatten(1)


def test_the_layouts_are_vllms() -> None:
    assert {layout.name: layout.value for layout in KVCacheLayout} == LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_sees_its_intervals(layout: str) -> None:
    one = Pass(MIX, layout)
    one.check(forward(an_impl(), one, a_builder().build(0, common(one), rows=one.rows())))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8", torch.float8_e4m3fn), ("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_float8(name: str, dtype: torch.dtype) -> None:
    one = Pass(MIX, "LBHNC", dtype)
    one.check(forward(an_impl(kv_cache_dtype=name), one, a_builder().build(0, common(one), rows=one.rows())))


def test_a_graph_finds_every_tensor_where_it_was_captured() -> None:
    builder, one = a_builder(), Pass(MIX, "LBHNC")
    captured = builder.build_for_cudagraph_capture(common(one))
    later = builder.build(0, common(one), rows=one.rows())
    for before, after in zip(captured, later, strict=True):
        if isinstance(before, Tensor):
            assert (before.data_ptr(), before.shape, before.stride()) == (after.data_ptr(), after.shape, after.stride())
        else:
            assert before == after
    one.check(forward(an_impl(), one, captured))


def test_without_metadata_there_are_zeros() -> None:
    one = Pass(MIX, "LBHNC")
    before = one.cache.clone()
    assert not forward(an_impl(), one, None).any()
    torch.testing.assert_close(one.cache, before, rtol=0, atol=0, equal_nan=True)


def reasons(**changes: Any) -> list[str]:
    """Why vLLM would refuse the backend."""
    given = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
    }
    return TidarBackend.validate_configuration(**given | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "kv_cache_dtype": "float16"},
        {"dtype": torch.float32, "head_size": 80, "block_size": 64},
        {"kv_cache_dtype": "fp8", "device_capability": DeviceCapability(8, 0)},
        {"kv_cache_dtype": "fp8_e4m3", "use_batch_invariant": True, "head_size": 256},
        {"head_size": 512},
        {"kv_cache_dtype": "fp8_e5m2", "block_size": None, "use_kv_connector": True},
    ],
)
def test_vllm_takes_the_backend(changes: dict[str, Any]) -> None:
    assert reasons(**changes) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 513}, "head_size"),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype: expected auto, bfloat16 or fp8 with a model of bfloat16"),
        ({"kv_cache_dtype": "fp8_per_token_head"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales"),
        ({"has_sliding_window": True}, "sliding window"),
        ({"has_sink": True}, "sinks"),
        ({"use_mla": True}, "MLA"),
        ({"attn_type": "encoder"}, "attention type"),
        ({"use_dcp": True}, "DCP"),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability"),
    ],
)
def test_vllm_is_told_what_the_backend_cannot_do(changes: dict[str, Any], reason: str) -> None:
    assert any(reason in each for each in reasons(**changes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sliding_window": 64}, "sliding_window: expected none with strategy tidar"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap: expected none"),
        ({"alibi_slopes": [0.1] * HEADS}, "alibi_slopes: expected none"),
        ({"sinks": torch.zeros(HEADS)}, "sinks: expected none"),
        ({"attn_type": "encoder_only"}, "attn_type: expected none"),
        ({"kv_sharing_target_layer_name": "another"}, "kv_sharing_target_layer_name: expected none"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype: expected auto, float32, fp8, .* got int8"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype: expected auto, float32, fp8, .* got bfloat16"),
    ],
)
def test_layers_of_other_kinds_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        an_impl(**given)


def test_graphs_and_batches() -> None:
    builder: Any = TidarBackend.get_builder_cls()
    assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.ALWAYS
    assert builder.reorder_batch_threshold is None  # any order of requests will do
    assert TidarBackend.supported_kv_cache_layouts() is None  # any


def test_gpus_get_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    custom, settings = AttentionBackendEnum.CUSTOM, Settings(4, 0)
    custom.clear_override()
    plugin.register()
    plugin.register()
    assert custom.get_class() is TidarBackend
    assert AttentionBackendEnum[TidarBackend.get_name()] is custom

    def platform(kind: str) -> Any:
        return SimpleNamespace(is_cpu=lambda: kind == "cpu", is_cuda=lambda: kind == "cuda", device_name=kind)

    def engine(backend: Any) -> Any:
        return SimpleNamespace(attention_config=SimpleNamespace(backend=backend))

    monkeypatch.setattr(models, "current_platform", platform("cuda"))
    models.check_attention(engine(custom), settings)
    for other, got in ((None, "none"), (AttentionBackendEnum.FLASH_ATTN, "FLASH_ATTN")):
        with pytest.raises(ValueError, match=rf"attention_backend: expected CUSTOM, .*\.TidarBackend, .* got {got}"):
            models.check_attention(engine(other), settings)
    monkeypatch.setattr(models, "current_platform", platform("rocm"))
    with pytest.raises(ValueError, match="strategy: expected isd on rocm"):
        models.check_attention(engine(custom), settings)
    monkeypatch.setattr(models, "current_platform", platform("cpu"))
    models.check_attention(engine(None), settings)


def test_the_backend_of_another_plugin_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    custom = AttentionBackendEnum.CUSTOM
    custom.clear_override()
    plugin.register()
    monkeypatch.setattr(plugin, "BACKEND", ("CUSTOM", "another.Backend"))
    plugin.register()
    assert custom.get_class() is TidarBackend
    assert "attention backend CUSTOM is" in caplog.text
