"""`attn_implementation="tidar"`: every supported model against "eager", every path a mask can take, every refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, BertConfig, BertModel, StaticCache

from tests.integrations.transformers.compatibility import (
    MODELS,
    generate_is_equal,
    generated,
    padded_inputs,
    parity,
    training_inputs,
    with_few_tokens,
)
from tidar_kernels import KVCache, ops, patterns
from tidar_kernels.integrations.transformers import attention, tidar_attention_forward, tidar_mask
from tidar_kernels.testing import relative_error

ALL = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
BY_NAME = {model.name: model for model in MODELS}


def tiny(name: str = "Llama", implementation: str = "tidar") -> Any:
    model = BY_NAME[name].build()
    model.set_attn_implementation(implementation)
    return model


def both(model: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Logits under "tidar" and under "sdpa"."""
    found = []
    for implementation in ("tidar", "sdpa"):
        model.set_attn_implementation(implementation)
        found.append(model(**inputs).logits)
    return found[0], found[1]


@ALL
def test_logits_and_gradients_are_those_of_eager(model: Any) -> None:
    assert len(list(parity(model.build()))) == 4  # raises where one is over budget


@ALL
def test_generate_gives_the_tokens_of_transformers(model: Any) -> None:
    assert generate_is_equal(with_few_tokens(model.build()), model.baseline)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-OSS"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False, "max_new_tokens": 16},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    ],
    ids=["beams", "static", "no cache", "sampled beams"],
)
def test_other_ways_to_generate(name: str, options: dict[str, Any]) -> None:
    model = with_few_tokens(tiny(name))
    tokens = []
    for implementation in ("tidar", BY_NAME[name].baseline):
        torch.manual_seed(0)
        tokens.append(generated(model, implementation, "left", **{"max_new_tokens": 24, **options}))
    assert torch.equal(*tokens)


def test_loaded_by_name(tmp_path: Any) -> None:
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="tidar")
    assert model.config._attn_implementation == "tidar"
    with mock.patch.object(ops, "attention", wraps=ops.attention) as kernel:
        model(**padded_inputs("none"))
    assert kernel.call_count == 2


def counted(counts: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def spy(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return spy


class TestPaths:
    """Which of them a call takes; the results are those of "sdpa" or "eager" above and below."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
        counts: Counter[str] = Counter()
        for module, name in (
            (ops, "attention"),
            (ops, "step_attention"),
            (attention, "sdpa_attention_forward"),
            (attention, "masked_attention"),
        ):
            monkeypatch.setattr(module, name, counted(counts, name, getattr(module, name)))
        return counts

    @pytest.mark.parametrize(
        ("name", "padding", "taken"),
        [
            ("Llama", "none", "attention"),
            ("Llama", "left", "sdpa_attention_forward"),
            ("Mistral", "none", "sdpa_attention_forward"),
            ("Gemma 2", "left", "masked_attention"),
        ],
    )
    def test_of_a_whole_sequence(self, calls: Counter[str], name: str, padding: str, taken: str) -> None:
        tiny(name)(**padded_inputs(padding))
        assert calls == {taken: 2}

    def test_of_a_cached_token(self, calls: Counter[str]) -> None:
        model = tiny()
        with torch.no_grad():
            cache = model(**padded_inputs("none")).past_key_values
            model(torch.ones(3, 1, dtype=torch.int64), past_key_values=cache)
        assert calls == {"attention": 2, "step_attention": 2}

    def test_of_a_pattern(self, calls: Counter[str]) -> None:
        inputs, pattern = training_inputs()
        tiny("GPT-OSS")(**inputs, tidar_pattern=pattern, use_cache=False)
        assert calls == {"attention": 2}


class TestMasks:
    def test_documents_in_one_sequence_do_not_see_each_other(self) -> None:
        inputs = padded_inputs("none")
        positions = torch.cat([torch.arange(8), torch.arange(13)]).expand(3, -1)
        model = tiny()
        packed, expected = both(model, **inputs, position_ids=positions, use_cache=False)
        torch.testing.assert_close(packed, expected)
        alone = model(inputs["input_ids"][:, 8:], use_cache=False).logits
        torch.testing.assert_close(packed[:, 8:], alone)

    @pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
    @pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
    def test_of_four_dimensions(self, name: str, additive: bool) -> None:
        """A prefix that sees itself in both directions; nothing but the mask says so."""
        seen = torch.ones(21, 21, dtype=torch.bool).tril()
        seen[:6, :6] = True
        least = torch.finfo(torch.float32).min
        added = torch.zeros(21, 21).masked_fill(~seen, least)[None, None]
        ids = padded_inputs("none")["input_ids"]
        kinds = {"Llama": lambda m: m, "Gemma 2": lambda m: {"full_attention": m, "sliding_attention": m}}[name]
        model = tiny(name)
        out = model(ids, attention_mask=kinds(added if additive else seen[None, None])).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(out, model(ids, attention_mask=kinds(added)).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(out, model(ids).logits, atol=1e-3)

    def test_an_encoder_sees_both_ways(self) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model, found = BertModel(BertConfig(vocab_size=96, **sizes)).eval(), []
        for implementation in ("tidar", "sdpa"):
            model.set_attn_implementation(implementation)
            found += [model(**padded_inputs(padding)).last_hidden_state for padding in ("none", "right")]
        for got, expected in zip(found[:2], found[2:], strict=True):
            torch.testing.assert_close(got, expected)

    def test_a_prefill_into_an_unfilled_static_cache(self) -> None:
        model, found = tiny(), []
        for implementation in ("tidar", "sdpa"):
            model.set_attn_implementation(implementation)
            cache = StaticCache(config=model.config, max_cache_len=40)
            found.append(model(**padded_inputs("none"), past_key_values=cache).logits)
        torch.testing.assert_close(*found)

    def test_a_compiled_step_over_a_static_cache(self) -> None:
        model, found = tiny("Mistral"), []
        for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
            cache = StaticCache(config=model.config, max_cache_len=40)
            with torch.no_grad():
                model(**padded_inputs("none"), past_key_values=cache)
                step = {"position_ids": torch.full((3, 1), 21), "past_key_values": cache}
                found.append(run(torch.ones(3, 1, dtype=torch.int64), **step).logits)
        torch.testing.assert_close(*found)

    def test_several_tokens_behind_a_cache(self) -> None:
        ids, found = padded_inputs("none")["input_ids"], []
        model = tiny("Mistral")
        for implementation in ("tidar", "sdpa"):
            model.set_attn_implementation(implementation)
            cache = model(ids[:, :14]).past_key_values
            found.append(model(ids[:, 14:], past_key_values=cache).logits)
        torch.testing.assert_close(*found)

    def test_the_structure_is_built_only_if_asked_for(self) -> None:
        inputs, pattern = training_inputs()
        model = tiny("Qwen2")
        with mock.patch.object(attention, "sdpa_mask", side_effect=AssertionError("a mask was built")):
            model(**inputs, tidar_pattern=pattern, use_cache=False)
            with pytest.raises(AssertionError, match="a mask was built"):
                model(**inputs, use_cache=False)

    def test_the_structure_looks_like_a_mask(self) -> None:
        options = {"q_length": 3, "kv_length": 3, "allow_is_causal_skip": False}
        if "cache_position" in attention.sdpa_mask.__code__.co_varnames:
            options["cache_position"] = torch.arange(3)
        mask = tidar_mask(2, **options)
        assert isinstance(mask, attention.StructureMask)
        assert mask.shape == (2, 1, 3, 3)
        assert mask.to("cpu") is mask
        assert torch.equal(mask.dense()[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())
        assert mask.dense() is mask.dense()

    def test_the_structure_is_a_tensor_to_whoever_looks(self) -> None:
        """Functions of PyTorch, operators and indices give what they give for the dense mask."""
        options = {"q_length": 4, "kv_length": 4, "allow_is_causal_skip": False, "local_size": 2}
        if "cache_position" in attention.sdpa_mask.__code__.co_varnames:
            options["cache_position"] = torch.arange(4)
        mask = tidar_mask(2, **options)
        dense = mask.dense()
        one = torch.zeros(())
        for ask in (
            lambda m: torch.where(m, 0.0, -1.0),
            lambda m: torch.cat([m, m]),
            lambda m: torch.stack((m, m)),
            lambda m: torch.logical_not(m),
            lambda m: m[:, :, 1:],
            lambda m: m[..., -1],
            lambda m: ~m,
            lambda m: m & m,
            lambda m: dense & m,
            lambda m: one.masked_fill(m, 1.0),
            lambda m: m == dense,
            lambda m: m * 2.0,
            lambda m: 1.0 - m.float(),
            lambda m: torch.tensor(len(m)),
        ):
            assert torch.equal(ask(mask), ask(dense))
        assert mask[:, :, 0:, :] is mask  # all of it is still no tensor
        assert len({mask, mask}) == 1

    @pytest.mark.parametrize("mask", ["ones", "4-D ones"])
    def test_packed_documents_under_a_mask_of_ones_are_warned_of(self, mask: str) -> None:
        ids = padded_inputs("none")["input_ids"]
        positions = torch.cat([torch.arange(8), torch.arange(13)]).expand(3, -1)
        ones = torch.ones_like(ids) if mask == "ones" else torch.ones(3, 1, 21, 21, dtype=torch.bool).tril()
        with pytest.warns(UserWarning, match=r"^attention_mask: expected None beside position_ids that start again"):
            tiny()(ids, attention_mask=ones, position_ids=positions, use_cache=False)
        apart = (positions[:, :, None] - torch.arange(21)[:, None] == positions[:, None] - torch.arange(21)).unsqueeze(
            1
        )
        tiny()(ids, attention_mask=apart & torch.ones(21, 21, dtype=torch.bool).tril(), position_ids=positions)
        tiny()(ids, position_ids=positions, use_cache=False)
        for padding in ("left", "right"):
            inputs = padded_inputs(padding)
            rows = inputs["attention_mask"]
            tiny()(**inputs, position_ids=(rows.cumsum(-1) - 1).masked_fill(rows == 0, 1))


def test_the_result_lies_as_that_of_sdpa_does() -> None:
    """Contiguous on every path, for models that call `.view` on it."""
    module = torch.nn.Module()
    module.layer_idx, module.num_key_value_groups = 0, 2
    q, kv, pattern = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), patterns.causal(5)
    cache = KVCache(num_layers=1, batch_size=2, num_kv_heads=2, head_dim=8, max_len=8)
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        for rows, mask, options in (
            (q, None, {}),
            (q[:, :, -1:], None, {}),
            (q, seen, {}),
            (q, seen, {"softcap": 3.0}),
            (q, None, {"tidar_pattern": pattern}),
            (q, None, {"tidar_pattern": pattern, "tidar_cache": cache}),
        ):
            out, _ = tidar_attention_forward(module, rows, kv, kv, mask, **options)
            assert out.shape == (2, rows.shape[2], 4, 8)
            assert out.is_contiguous()


@pytest.mark.parametrize("widths", [(8, 4), (4, 8)], ids=str)
def test_keys_and_values_of_several_widths(widths: tuple[int, int]) -> None:
    """With a pattern: zeros follow the narrower ones, in a cache too; gradients are those of the parts."""
    module = torch.nn.Module()
    module.layer_idx = 0
    pattern = patterns.tidar_prefill(3, 2)
    q, k = torch.randn(2, 4, 5, widths[0]), torch.randn(2, 2, 5, widths[0], requires_grad=True)
    v, sinks = torch.randn(2, 2, 5, widths[1], requires_grad=True), torch.randn(4)
    mask = pattern.dense()[None, None]
    expected = attention.masked_attention(q, k, v, mask, sinks=sinks)
    out, _ = tidar_attention_forward(module, q, k, v, None, tidar_pattern=pattern, s_aux=sinks)
    torch.testing.assert_close(out, expected)
    for got, wanted in zip(*(torch.autograd.grad(x.square().sum(), (k, v)) for x in (out, expected)), strict=True):
        torch.testing.assert_close(got, wanted)
    cache = KVCache(num_layers=1, batch_size=2, num_kv_heads=3, head_dim=9, max_len=4)  # larger than this layer's
    cache.k.fill_(torch.nan)
    with torch.no_grad():
        out, _ = tidar_attention_forward(module, q, k, v, None, tidar_pattern=pattern, tidar_cache=cache, s_aux=sinks)
    torch.testing.assert_close(out, expected)
    assert torch.equal(cache.k[0, :, :2, :3, : widths[0]], k[:, :, :3])
    assert torch.equal(cache.v[0, :, :2, :3, : widths[1]], v[:, :, :3])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "taken"),
    [
        (torch.bfloat16, 512, True),
        (torch.bfloat16, 520, False),
        (torch.float32, 256, True),
        (torch.float32, 264, False),
    ],
)
def test_widths_of_ordinary_calls_that_operators_take(
    dtype: torch.dtype, head_dim: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *arguments, **more: asked.append(1) or real(*arguments, **more))
    q, k, v = (torch.randn(1, heads, 3, head_dim, dtype=dtype) for heads in (2, 1, 1))
    out, _ = tidar_attention_forward(torch.nn.Module(), q, k, v, None)
    assert bool(asked) is taken
    assert relative_error(out, attention.masked_attention(q, k, v, None)) < 0.02


def test_masked_attention_in_all_its_parts() -> None:
    """Against the twin, which has boolean masks, softcap and sinks; rows that see nothing are 0."""
    from tidar_kernels import eager

    pattern = patterns.tidar_training(6, 3)
    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    sinks, mask = torch.randn(4), pattern.dense()[None, None]
    numbers: dict[str, Any] = {"softcap": 2.0, "sinks": sinks}
    expected = eager.attention(q, k, v, pattern, 0.3, **numbers).transpose(1, 2)
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for given in (mask, added):
        torch.testing.assert_close(attention.masked_attention(q, k, v, given, 0.3, **numbers), expected)
    nothing = torch.zeros_like(mask)
    assert torch.equal(attention.masked_attention(q, k, v, nothing, 0.3), torch.zeros(2, 12, 4, 8))
    causal = eager.attention(q, k, v, patterns.causal(12), **numbers).transpose(1, 2)
    torch.testing.assert_close(attention.masked_attention(q, k, v, None, **numbers), causal)


class TestPatterns:
    def test_gradient_checkpointing_changes_nothing(self) -> None:
        inputs, pattern = training_inputs()
        model = tiny("Gemma 2").train()
        found = []
        for on in (False, True):
            if on:
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable()
            model.zero_grad()
            for extra in ({"tidar_pattern": pattern}, {}):
                model(**inputs, **extra, use_cache=False).logits.square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        for got, expected in zip(*found, strict=True):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
    def test_compiled_as_one_graph(self, name: str) -> None:
        inputs, pattern = training_inputs()
        pattern.windowed(8)  # made once, before: cutting a pattern reads it, which no graph can
        model = tiny(name)
        for extra in ({"tidar_pattern": pattern}, {}):
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            got = compiled(**inputs, **extra, use_cache=False).logits
            torch.testing.assert_close(got, model(**inputs, **extra, use_cache=False).logits, rtol=1e-4, atol=1e-5)

    def test_sinks_have_gradients(self) -> None:
        inputs, pattern = training_inputs()
        model = tiny("GPT-OSS")
        model(**inputs, tidar_pattern=pattern, use_cache=False).logits.square().sum().backward()
        assert all(layer.self_attn.sinks.grad.abs().max() > 0 for layer in model.model.layers)

    @pytest.mark.cuda
    @pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "GPT-OSS"])
    def test_on_the_gpu(self, name: str) -> None:
        """The kernels against the CPU path, in float32."""
        inputs, pattern = training_inputs()
        model = tiny(name)
        expected = model(**inputs, tidar_pattern=pattern, use_cache=False).logits
        on_gpu = {key: value.cuda() for key, value in inputs.items()}
        got = model.cuda()(**on_gpu, tidar_pattern=pattern, use_cache=False).logits
        assert relative_error(got.cpu(), expected) < 1e-2  # TF32 in the model's own products


class TestRefusals:
    """What cannot be done is said, by name."""

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"attention_mask": torch.ones(3, 21, 21)}, r"^attention_mask: expected 2 dim.* \[3, 21, 21\]"),
            ({"attention_mask": torch.ones(3, 1, 21, 20)}, r"^attention_mask: expected \[3, 4, 21, 21\] or 1 .* 20\]"),
            ({"output_attentions": True}, r"^output_attentions: expected none under attn_implementation=\"tidar\""),
        ],
    )
    def test_of_ordinary_calls(self, inputs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tiny()(**padded_inputs("none"), **inputs)

    def test_of_dropout(self) -> None:
        model = tiny().train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        with pytest.raises(ValueError, match=r'^dropout: expected 0 under attn_implementation="tidar", got 0\.1'):
            model(**padded_inputs("none"))
        model.eval()(**padded_inputs("none"))

    def test_of_masks_beside_a_pattern(self) -> None:
        inputs, pattern = training_inputs()
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :4] = 0
        with pytest.raises(ValueError, match=r"^attention_mask: expected None beside tidar_pattern"):
            tiny()(**inputs, attention_mask=mask, tidar_pattern=pattern)

    def test_of_a_filled_cache_beside_a_pattern(self) -> None:
        inputs, pattern = training_inputs()
        model = tiny()
        cache = model(inputs["input_ids"][:, :4]).past_key_values
        with pytest.raises(ValueError, match=r"^(past_key_values|attention_mask): expected"):
            model(**inputs, past_key_values=cache, tidar_pattern=pattern)

    def test_of_a_window_that_the_layer_does_not_know(self) -> None:
        inputs, pattern = training_inputs()
        model = tiny("Qwen2")
        model.model.layers[0].self_attn.sliding_window = None
        with pytest.raises(ValueError, match=r"^sliding_window: expected 8 as in the layer's mask, got None"):
            model(**inputs, tidar_pattern=pattern, use_cache=False)

    def test_of_the_function_itself(self) -> None:
        module, x = torch.nn.Module(), torch.randn(1, 2, 4, 8)
        pattern, cache = patterns.causal(4), KVCache(num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8, max_len=8)

        def call(**options: Any) -> None:
            tidar_attention_forward(module, x, x, x, options.pop("mask", None), **options)

        for error, options, message in (
            (TypeError, {"tidar_pattern": "causal"}, "tidar_pattern: expected a tidar_kernels.Pattern, got str"),
            (ValueError, {"tidar_cache": cache}, "tidar_pattern: expected a Pattern beside tidar_cache, got None"),
            (TypeError, {"tidar_pattern": pattern, "tidar_cache": [x]}, "tidar_cache: expected a tidar_k"),
            (ValueError, {"tidar_pattern": pattern, "tidar_cache": cache}, r"layer_idx: expected an int in \[0, 1\)"),
            (ValueError, {"head_mask": x}, "head_mask: expected none"),
            (ValueError, {"position_bias": x}, "position_bias: expected none"),
            (ValueError, {"indices": x.long()}, "indices: expected none under attn_implementation=.tidar., got Tensor"),
            (ValueError, {"block_indices": x.long()}, "block_indices: expected none"),
            (TypeError, {"mask": "causal"}, "attention_mask: expected a tensor, got str"),
            (TypeError, {"mask": x.int()}, "attention_mask: expected booleans, or floats to add, got torch.int32"),
            (ValueError, {"mask": x[0]}, "attention_mask: expected 4 dimensions"),
        ):
            with pytest.raises(error, match=f"^{message}"):
                call(**options)
