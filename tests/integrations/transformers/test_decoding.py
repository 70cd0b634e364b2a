"""`Decoder.from_transformers`: token for token what transformers generates, from caches that are exact."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

from tests.integrations.transformers.compatibility import (
    BLOCK_SIZE,
    MASK_TOKEN_ID,
    MODELS,
    NEW_TOKENS,
    VOCAB_SIZE,
    decode_is_equal,
    decoded,
    ragged_prompts,
    with_few_tokens,
)
from tidar_kernels import Decoder, KVCache, patterns
from tidar_kernels.integrations.transformers import TiDARCache, TransformersModel, tidar_generation
from tidar_kernels.nn.adapters import GatedLoRA, add_gated_lora
from tidar_kernels.testing import relative_error

BY_NAME = {model.name: model for model in MODELS}


def tiny(name: str = "Llama") -> Any:
    return with_few_tokens(BY_NAME[name].build())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_tokens_are_those_of_transformers(model: Any) -> None:
    same, tokens_per_forward = decode_is_equal(with_few_tokens(model.build()), model.baseline)
    assert same
    assert tokens_per_forward > 1.05  # else no draft was ever accepted, and nothing was shown


@pytest.mark.parametrize("options", [{"strategy": "isd"}, {"sampling": "rejection"}, {"prefill_chunk": 4}], ids=str)
def test_the_options_of_a_decoder(options: dict[str, Any]) -> None:
    model = tiny("Gemma 2")
    assert decoded(model, **options).tokens == decoded(model, mode="autoregressive").tokens


@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "GPT-OSS"])
def test_the_cache_is_that_of_a_prefill(name: str) -> None:
    """K/V that steps have written against one causal forward pass over the same tokens, and nothing beside it."""
    model = tiny(name)
    result = decoded(model)
    adapter = TransformersModel(model)
    for index, (prompt, tokens) in enumerate(zip(ragged_prompts(), result.tokens, strict=True)):
        length = int(result.cache.lengths[index])
        assert length == len(prompt) + len(tokens)
        fresh = KVCache(num_layers=2, batch_size=1, num_kv_heads=2, head_dim=adapter.config.head_dim, max_len=length)
        with torch.no_grad():
            adapter(torch.tensor([prompt + tokens]), patterns.causal(length), fresh)
        for own, expected in ((result.cache.k, fresh.k), (result.cache.v, fresh.v)):
            assert relative_error(own[:, index, :, :length], expected[:, 0]) < 1e-5


def test_generation_goes_on_from_the_decoder_s_cache() -> None:
    """And is not disturbed by what lies after the committed tokens."""
    model = tiny("Mistral")
    result = decoded(model)
    model.set_attn_implementation("sdpa")
    prompt, tokens = ragged_prompts()[1], result.tokens[1]
    given = torch.tensor([[*prompt, *tokens, 1]])
    kept = TiDARCache.from_kv(result.cache, sequence=1)
    assert kept.get_seq_length() == given.shape[1] - 1
    on = model.generate(given, past_key_values=kept, max_new_tokens=1, do_sample=False)
    assert torch.equal(on, model.generate(given, max_new_tokens=1, do_sample=False))


@pytest.mark.parametrize(
    ("name", "options"),
    [("Gemma2", {"final_logit_softcapping": 3.0}), ("Granite", {"logits_scaling": 7.0}), ("Cohere", {})],
)
def test_logits_are_the_model_s_own(name: str, options: dict[str, float]) -> None:
    """Capped, divided or multiplied after the lm_head."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**shape, **more, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    adapter = TransformersModel(model)
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        own = model(tokens).logits
        torch.testing.assert_close(adapter.logits(adapter(tokens, patterns.causal(9))), own, rtol=1e-4, atol=1e-4)


def test_defaults_come_from_the_configuration(tmp_path: Any) -> None:
    model = tiny()
    model.config.tidar = {"block_size": 3, "mask_token_id": 7}
    model.save_pretrained(tmp_path)
    decoder = Decoder.from_transformers(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (decoder.block_size, decoder.mask_token_id) == (3, 7)
    decoder = Decoder.from_transformers(model, block_size=5, mask_token_id=9)
    assert (decoder.block_size, decoder.mask_token_id) == (5, 9)
    del model.config.tidar
    tokenizer = Tokenizer(VOCAB_SIZE, mask_token_id=11)
    assert Decoder.from_transformers(model, tokenizer, block_size=2).mask_token_id == 11


class Tokenizer:
    def __init__(self, size: int, mask_token_id: int | None = None) -> None:
        self.size, self.mask_token_id = size, mask_token_id

    def __len__(self) -> int:
        return self.size


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_of_peft_stay_in_the_model() -> None:
    peft = pytest.importorskip("peft")
    model = tiny()
    before = decoded(model, mode="autoregressive").tokens
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    after = decoded(adapted, mode="autoregressive").tokens
    assert after != before
    assert decoded(adapted).tokens == after


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
@pytest.mark.parametrize("wrapped", ["twice", "mixed", "compiled"])
def test_wrappers_of_peft_and_compile(wrapped: str) -> None:
    peft, model = pytest.importorskip("peft"), tiny()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    if wrapped == "mixed":
        outer = peft.PeftMixedModel(model, lora)
    else:
        outer = peft.get_peft_model(model, lora)
        others = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
        outer = peft.get_peft_model(outer, others) if wrapped == "twice" else torch.compile(outer, backend="eager")
    outer = outer.eval()
    with torch.no_grad():
        own = getattr(outer, "_orig_mod", outer)(input_ids=torch.tensor([[5, 6, 7]])).logits
        adapter = TransformersModel(outer)
        logits = adapter.logits(adapter(torch.tensor([[5, 6, 7]]), patterns.causal(3)))
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_from_an_invocation_on_are_refused() -> None:
    """PEFT's aLoRA: which rows they change depends on the prompt, and a decoder's rows are not those of a prompt."""
    peft, message = pytest.importorskip("peft"), r"^model: expected PEFT adapters for all tokens, got one from an invo"
    alora = {"alora_invocation_tokens": [7, 8], "init_lora_weights": False}
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"]), "first").eval()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **alora))
    decoder = Decoder.from_transformers(model, block_size=4, mask_token_id=1)
    decoder.generate([[5, 7, 8, 9]], 4)
    model.set_adapter("second")
    for call in (
        lambda: decoder.generate([[5, 7, 8, 9]], 4),
        lambda: Decoder.from_transformers(model, block_size=4, mask_token_id=1),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    options = {"custom_generate": tidar_generation, "block_size": 4, "mask_token_id": 1, "max_new_tokens": 4}
    model = peft.get_peft_model(
        tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **alora)
    ).eval()
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=torch.tensor([[5, 7, 8, 9]]), **options)


class Around(nn.Module):
    """A module around another that does not say how many tokens it has, as those that cast logits are."""

    def __init__(self, inner: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out * self.scale


def test_modules_around_the_embedding_and_the_head() -> None:
    model = tiny()
    expected = decoded(model).tokens
    model.model.embed_tokens, model.lm_head = Around(model.model.embed_tokens), Around(model.lm_head)
    assert decoded(model.eval()).tokens == expected


def test_layers_that_were_copied() -> None:
    """A deeper model from its own layers: the copies have configurations of their own."""
    model = tiny()
    model.set_attn_implementation("sdpa")
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.model.layers[2].self_attn.layer_idx = model.config.num_hidden_layers = 2
    model.config.num_hidden_layers = 3
    prompt = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 4:].tolist()
    assert Decoder.from_transformers(model, block_size=4, mask_token_id=1).generate([[5, 6, 7, 8]], 8).tokens == [
        expected
    ]


@pytest.mark.parametrize("by", [0.01, 0.04])
def test_a_small_change_of_the_logits_is_noticed_in_float32(by: float) -> None:
    model = tiny()
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits * (1 + by)))
    with pytest.raises(ValueError, match=r"^model: expected logits as LlamaForCausalLM computes them, got 0\.0"):
        TransformersModel(model)


def test_gated_adapters_run_on_mask_rows_alone() -> None:
    """So the tokens stay those of the model, by the decoder and by the strategy; the drafts do not."""
    base, model = tiny(), tiny()
    add_gated_lora(model, rank=4, alpha=64.0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GatedLoRA):
                module.lora_b.normal_()
    expected, result = decoded(base), decoded(model)
    assert result.tokens == expected.tokens
    assert result.accepted != expected.accepted
    options = {"max_new_tokens": 16, "do_sample": False}
    ids = torch.tensor(ragged_prompts()[:1])
    ours = {"custom_generate": tidar_generation, "block_size": BLOCK_SIZE, "mask_token_id": MASK_TOKEN_ID}
    assert torch.equal(model.generate(ids, **options, **ours), base.generate(ids, **options))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "GPT-OSS"])
def test_on_the_gpu(name: str) -> None:
    """Steps captured as CUDA graphs decode what single tokens do."""
    model = tiny(name).cuda()
    model.set_attn_implementation("tidar")
    tidar, autoregressive = decoded(model), decoded(model, mode="autoregressive")
    assert tidar.tokens == autoregressive.tokens


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda model: model.train(), "model: expected evaluation mode, got training mode"),
            (lambda model: setattr(model.config, "vocab_size", 90), "vocab_size: expected 90 rows .* got 96"),
            (lambda model: setattr(model.config, "layer_types", ["chunked_attention"]), "model: expected layers of"),
            (lambda model: model.to("meta"), "model: expected all parameters on one device, got meta"),
            (lambda model: model.set_output_embeddings(None), "model: expected one with a language modelling head"),
        ],
    )
    def test_of_models_that_are_not_ready(self, change: Any, message: str) -> None:
        model = tiny()
        change(model)
        with pytest.raises(ValueError, match=f"^{message}"):
            Decoder.from_transformers(model, block_size=4, mask_token_id=1)

    def test_of_what_is_no_such_model(self) -> None:
        with pytest.raises(TypeError, match=r"^model: expected a transformers model, got Linear"):
            Decoder.from_transformers(torch.nn.Linear(2, 2))
        config = transformers.T5Config(vocab_size=96, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        model = transformers.T5ForConditionalGeneration(config).eval()
        with pytest.raises(ValueError, match=r"^model: expected a decoder-only model, got T5ForConditionalGeneration"):
            Decoder.from_transformers(model, block_size=4, mask_token_id=1)

    def test_of_a_class_without_the_interface(self) -> None:
        """One that keeps its attention to itself, and one whose layers drop what they are given."""
        model = tiny()
        model._can_set_attn_implementation = lambda: False
        with pytest.raises(ValueError, match=r"^model: expected a class with transformers' attention interface"):
            Decoder.from_transformers(model, block_size=4, mask_token_id=1)
        model = tiny()
        for layer in model.model.layers[1:]:
            drop(layer.self_attn)
        with pytest.raises(ValueError, match=r"^model: expected every layer's attention to take.* layer 1 "):
            Decoder.from_transformers(model, block_size=4, mask_token_id=1)

    def test_of_logits_that_are_made_otherwise(self) -> None:
        model = tiny()
        forward = model.forward

        def doubled(*args: Any, **kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            outputs.logits = outputs.logits * 2
            return outputs

        model.forward = doubled
        with pytest.raises(ValueError, match=r"^model: expected logits as Llama.* computes them, got 0\.5 off"):
            Decoder.from_transformers(model, block_size=4, mask_token_id=1)

    def test_of_a_missing_mask_token(self) -> None:
        with pytest.raises(ValueError, match=r"^mask_token_id: expected a token id here, in the config's entry"):
            Decoder.from_transformers(tiny(), Tokenizer(VOCAB_SIZE), block_size=4)
        Decoder.from_transformers(tiny(), mode="autoregressive")

    def test_of_a_vocabulary_that_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match=rf"^tokenizer: expected at most the model's {VOCAB_SIZE} tokens, got 97"):
            Decoder.from_transformers(tiny(), Tokenizer(97), block_size=4, mask_token_id=1)
        with pytest.raises(ValueError, match=rf"^mask_token_id: expected < vocab_size = {VOCAB_SIZE}, got 96"):
            Decoder.from_transformers(tiny(), block_size=4, mask_token_id=96)

    def test_of_another_cache(self) -> None:
        adapter, cache = TransformersModel(tiny()), transformers.DynamicCache()
        cache.lengths = torch.zeros(1, dtype=torch.int64)
        with pytest.raises(TypeError, match=r"^tidar_cache: expected a tidar_kernels\.KVCache, got DynamicCache"):
            adapter(torch.tensor([[1, 2]]), patterns.causal(2), cache)

    def test_of_prompt_learning(self) -> None:
        wrapped = SimpleNamespace(
            get_base_model=tiny, active_peft_config=SimpleNamespace(is_prompt_learning=True), config=None
        )
        with pytest.raises(ValueError, match=r"^model: expected PEFT adapters inside its layers, got prompt learning"):
            Decoder.from_transformers(wrapped, block_size=4, mask_token_id=1)


def drop(module: Any) -> None:
    """Let `module` lose the arguments that it does not know, as model code that takes no `**kwargs` on does."""
    forward = module.forward

    def without(*args: Any, tidar_pattern: Any = None, tidar_cache: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    module.forward = without


def test_decoding_leaves_the_model_as_it_was() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    decoded(model)
    assert model.config._attn_implementation == "tidar"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert BLOCK_SIZE < NEW_TOKENS
    assert MASK_TOKEN_ID < VOCAB_SIZE
