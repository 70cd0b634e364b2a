"""`TiDARCache`: ordinary generation on preallocated buffers, and a rollback that only writes lengths."""

from __future__ import annotations

import copy
import pickle
from inspect import signature
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

from tests.integrations.transformers.compatibility import MODELS, generated, padded_inputs, with_few_tokens
from tests.integrations.transformers.every_model import KINDS, build, options, quiet
from tidar_kernels import KVCache
from tidar_kernels.integrations.transformers import TiDARCache
from tidar_kernels.integrations.transformers.cache import TiDARCacheLayer
from tidar_kernels.testing import check_equal

BY_NAME = {model.name: model for model in MODELS}


def tiny(name: str = "Llama") -> Any:
    return with_few_tokens(BY_NAME[name].build())


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2"])
@pytest.mark.parametrize("implementation", ["tidar", "eager"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generates_what_other_caches_do(name: str, implementation: str, options: dict[str, Any]) -> None:
    model = tiny(name)
    expected = generated(model, implementation, "left", max_new_tokens=24, **options)
    cache = TiDARCache(model.config, max_len=44)
    tokens = generated(model, implementation, "left", max_new_tokens=24, past_key_values=cache, **options)
    assert torch.equal(tokens, expected)
    assert cache.get_seq_length() == 44
    assert all(layer.lengths.tolist() == [44] * len(layer.keys) for layer in cache.layers)


@pytest.mark.skipif(
    "tokens_to_remove" not in signature(DynamicLayer.crop).parameters,
    reason="this transformers crops to absolute lengths",
)
def test_assisted_generation_rolls_it_back() -> None:
    """Drafts of a second model are rejected and cropped away all the time."""
    model, assistant = tiny(), BY_NAME["Llama"].build(seed=1)
    ids = padded_inputs("none")["input_ids"][:1]
    options = {"max_new_tokens": 24, "do_sample": False, "assistant_model": with_few_tokens(assistant)}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=TiDARCache(model.config, 64), **options), expected)


class TestLayer:
    @pytest.fixture
    def layer(self) -> TiDARCacheLayer:
        layer = TiDARCacheLayer(8)
        k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
        keys, values = layer.update(k, v)
        assert torch.equal(keys, k)
        assert torch.equal(values, v)
        return layer

    def test_what_is_taken_back_stays_where_it_was(self, layer: TiDARCacheLayer) -> None:
        before, address = layer.keys.clone(), layer.keys.data_ptr()
        layer.crop(-2)
        assert layer.lengths.tolist() == [3, 3]
        assert (layer.get_seq_length(), layer.get_mask_sizes(4), layer.get_max_length()) == (3, (7, 0), 8)
        check_equal(layer.keys, before, "keys")
        k = torch.randn(2, 3, 1, 4)
        keys, _ = layer.update(k, k)
        check_equal(keys, torch.cat([before[:, :, :3], k], dim=2), "keys")
        check_equal(layer.keys[:, :, 4:], before[:, :, 4:], "slots after")
        assert layer.keys.data_ptr() == address
        layer.reset()
        assert layer.get_seq_length() == 0

    def test_gradients_are_those_of_a_dynamic_cache(self) -> None:
        """Through several appends, a rollback and other sequences; tokens without gradients among them."""
        parts = [torch.randn(2, 3, n, 4, requires_grad=n != 2) for n in (3, 2, 4)]
        found = []
        for layer in (TiDARCacheLayer(12), DynamicLayer()):
            for part in parts[:2]:
                layer.update(part, part * 2)
            layer.crop(-1)
            layer.batch_select_indices(torch.tensor([1, 0]))
            keys, values = layer.update(parts[2], parts[2] * 2)
            found.append((keys, values, *torch.autograd.grad((keys * values.sin()).sum(), (parts[0], parts[2]))))
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        with torch.no_grad():
            layer = TiDARCacheLayer(12)
            keys, _ = layer.update(parts[0], parts[0])
            assert keys.data_ptr() == layer.keys.data_ptr()  # nothing is kept beside the buffers

    def test_keys_and_values_of_several_dtypes(self) -> None:
        """As under autocast, where rotated keys stay float32."""
        layer, expected = TiDARCacheLayer(6), DynamicLayer()
        for _ in range(2):
            k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4).bfloat16()
            for got, wanted in zip(layer.update(k, v), expected.update(k, v), strict=True):
                assert got.dtype == wanted.dtype
                assert torch.equal(got, wanted)

    def test_of_other_sequences(self, layer: TiDARCacheLayer) -> None:
        before, address = layer.keys.clone(), layer.keys.data_ptr()
        layer.reorder_cache(torch.tensor([1, 1]))
        check_equal(layer.keys[:, :, :5], before[[1, 1], :, :5], "keys")
        assert layer.keys.data_ptr() == address
        layer.batch_repeat_interleave(2)
        assert (layer.keys.shape[0], layer.batch_size, layer.lengths.tolist()) == (4, 4, [5] * 4)
        layer.batch_select_indices(torch.tensor([3]))
        check_equal(layer.keys[0, :, :5], before[1, :, :5], "keys")

    @pytest.mark.parametrize("sequences", [[1], [1, 0, 0]])
    def test_of_more_or_fewer_sequences(self, layer: TiDARCacheLayer, sequences: list[int]) -> None:
        before, new = layer.keys[:, :, :5].clone(), torch.randn(len(sequences), 3, 1, 4)
        layer.reorder_cache(torch.tensor(sequences))
        keys, _ = layer.update(new, new)
        check_equal(keys, torch.cat([before[sequences], new], dim=2), "keys")
        assert layer.lengths.tolist() == [6] * len(sequences)

    @pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 3, 5, 4), (2, 1, 5, 8)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_empty_one_takes_anything(self, layer: TiDARCacheLayer, shape: Any, dtype: torch.dtype) -> None:
        address = layer.keys.data_ptr()
        layer.reset()
        k = torch.randn(*shape, dtype=dtype)
        keys, values = layer.update(k, k)
        assert keys.dtype == values.dtype == dtype
        check_equal(keys, k, "keys")
        assert layer.lengths.tolist() == [5] * shape[0]
        assert (layer.keys.data_ptr() == address) == (shape == (2, 3, 5, 4) and dtype == torch.float32)

    @pytest.mark.parametrize("gradients", [False, True])
    def test_a_wider_dtype_is_kept(self, gradients: bool) -> None:
        """As in a `DynamicLayer`: what came in half precision under autocast, before what comes without."""
        layer, expected = TiDARCacheLayer(6), DynamicLayer()
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            k = torch.randn(1, 2, 2, 4, requires_grad=gradients).to(dtype)
            for got, wanted in zip(layer.update(k, k), expected.update(k, k), strict=True):
                assert got.dtype == wanted.dtype
                assert torch.equal(got, wanted)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
    def test_a_copy_made_in_inference_mode_is_written_outside(self, layer: TiDARCacheLayer, copied: Any) -> None:
        before, new = layer.keys.clone(), torch.randn(2, 3, 1, 4)
        with torch.inference_mode():
            other = copied(layer)
        keys, _ = other.update(new, new)
        assert torch.equal(keys, torch.cat([before[:, :, :5], new], 2))
        assert other.lengths.tolist() == [6, 6]
        assert layer.get_seq_length() == 5
        check_equal(layer.keys, before, "keys")

    def test_refusals(self, layer: TiDARCacheLayer) -> None:
        before = layer.keys.clone()
        x = torch.randn(2, 3, 4, 4)
        with pytest.raises(ValueError, match=r"^max_len: expected room for 4 more tokens, got 5 of 8 taken"):
            layer.update(x, x)
        with pytest.raises(
            ValueError, match=r"^v: expected shape \[2, 3, 1, 4\] like what is cached, got \[2, 3, 1, 2\]"
        ):
            layer.update(x[:, :, :1], x[:, :, :1, :2])
        check_equal(layer.keys, before, "keys")
        for count in (1, -6):
            with pytest.raises(ValueError, match=rf"^tokens_to_remove: expected between -5 and 0, got {count}"):
                layer.crop(count)


@pytest.mark.skipif(
    "tokens_to_remove" not in signature(DynamicLayer.crop).parameters,
    reason="this transformers crops to absolute lengths",
)
def test_layers_that_use_the_keys_of_another_are_rolled_back() -> None:
    with quiet():
        model = build("gemma4_text")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    drafted = {"past_key_values": TiDARCache(model.config, 64), "prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **drafted), expected)


@pytest.mark.parametrize("kind", ["jamba", "recurrent_gemma", "deepseek_v32", "lfm2"])
def test_of_a_model_whose_layers_keep_more(kind: str) -> None:
    if kind not in KINDS:
        pytest.skip("not in this transformers")
    config = AutoConfig.for_model(kind, **options(kind))
    with pytest.raises(
        ValueError, match=rf"^config: expected layers that keep keys and values alone, got {kind} with "
    ):
        TiDARCache(config, 64)


def test_a_model_under_autocast_and_with_gradients() -> None:
    model = tiny()
    model.set_attn_implementation("tidar")
    inputs = padded_inputs("none")
    found = []
    for cache in (TiDARCache(model.config, 64), DynamicCache(config=model.config)):
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                logits = model(**inputs, past_key_values=cache).logits
        found.append(torch.autograd.grad(logits.square().sum(), model.model.layers[0].self_attn.k_proj.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2 * float(found[1].abs().max()))
    assert float(found[0].norm()) > 0


def test_refusals() -> None:
    config = tiny().config
    with pytest.raises(ValueError, match=r"^max_len: expected >= 1, got 0"):
        TiDARCache(config, 0)
    with pytest.raises(TypeError, match=r"^kv: expected a tidar_kernels\.KVCache, got DynamicCache"):
        TiDARCache.from_kv(DynamicCache())  # type: ignore[arg-type]
    kv = KVCache(num_layers=1, batch_size=2, num_kv_heads=1, head_dim=4, max_len=4)
    kv.commit(torch.tensor([1, 2]), at_most=2)
    with pytest.raises(ValueError, match=r"^kv: expected one length for all sequences, got \[1, 2\]"):
        TiDARCache.from_kv(kv)
