"""What a decoder relies on and a user can change: it goes on with the tokens of `generate`, or says what changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.integrations.transformers.every_model import quiet  # noqa: E402
from tidar_kernels import Decoder  # noqa: E402
from tidar_kernels.integrations.transformers import TiDARCache, TransformersModel, tidar_generation  # noqa: E402
from tidar_kernels.integrations.transformers.lossless import lossless  # noqa: E402
from tidar_kernels.nn.adapters import add_gated_lora  # noqa: E402

PROMPT = list(range(5, 33))
OPTIONS: dict[str, Any] = {"block_size": 4, "mask_token_id": 3}


def tiny(kind: str = "llama", **changes: Any) -> Any:
    """A random model of a type, with weights so large that a wrong mask or position shows."""
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None}
    with quiet():
        config = transformers.AutoConfig.for_model(kind, **{**shape, **heads, "pad_token_id": 0, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model


def decoder(model: Any) -> Decoder:
    return Decoder.from_transformers(model, **OPTIONS)


def generated(model: Any, prompt: list[int] = PROMPT, new_tokens: int = 12) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    tokens = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
    found: list[int] = tokens[0, len(prompt) :].tolist()
    return found


def another_class(model: Any) -> None:
    kind = type(model)

    class Other(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = -out.logits
            return out

    model.__class__ = Other


def one_layer_eager(model: Any) -> None:
    layer = model.model.layers[1].self_attn
    layer.config = copy.deepcopy(layer.config)
    layer.config._attn_implementation = "eager"


def hooked(model: Any) -> None:
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits * 2))


def with_dropout(model: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "sdpa": (lambda m: m.set_attn_implementation("sdpa"), r'^model: expected attn_implementation="tidar" .* got sdpa;'),
    "eager": (lambda m: m.set_attn_implementation("eager"), r'^model: expected attn_implementation="tidar" .* eager'),
    "one layer": (one_layer_eager, r'^model: expected attn_implementation="tidar" in all layers of LlamaF.* got eager'),
    "training": (lambda m: m.train(), r"^model: expected evaluation mode, got training mode; call model\.eval"),
    "training of a layer": (lambda m: m.model.layers[1].train(), r"^model: expected evaluation mode, .* in model\.lay"),
    "dropout of an adapter": (
        with_dropout,
        r"^model: expected evaluation mode, got training mode in model.*q_proj",
    ),
    "vocabulary": (lambda m: m.resize_token_embeddings(101), r"^vocab_size: expected 97 as when the decoder was made"),
    "a device": (lambda m: m.model.layers[0].to("meta"), r"^model: expected all parameters on one device"),
    "a hook": (hooked, r"^model: expected logits as LlamaForCausalLM computes them"),
    "a class": (another_class, r"^model: expected logits as Other computes them"),
    "a direction": (
        lambda m: setattr(m.model.layers[1].self_attn, "is_causal", False),
        r"^model: expected logits as LlamaForCausalLM computes them",
    ),
    "gated adapters": (lambda m: add_gated_lora(m, 2, 4.0), r"^model: expected gated adapters False .* got True"),
    "rotary type": (
        lambda m: setattr(m.model.rotary_emb, "rope_type", "dynamic"),
        r"^max_positions: expected None as when the decoder was made, got 2048",
    ),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("what", REFUSED)
def test_a_change_is_refused_by_name_before_anything_runs(what: str) -> None:
    change, message = REFUSED[what]
    model = tiny()
    made = decoder(model)
    session = made.session
    with quiet():
        change(model)
    with pytest.raises(ValueError, match=message):
        made.generate([PROMPT], 12)
    with pytest.raises(ValueError, match=message):
        session.add(PROMPT, 12)
    assert not session.requests


def with_peft(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).eval()


def without_peft(model: Any) -> None:
    with_peft(model)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)


def another_head(model: Any) -> None:
    head = torch.nn.Linear(64, 97, bias=False)
    model.set_output_embeddings(head.eval())


ADAPTED: dict[str, Callable[[Any], object]] = {
    "nothing": lambda m: None,
    "float64": lambda m: m.double(),
    "PEFT": with_peft,
    "PEFT, disabled": without_peft,
    "another lm_head": another_head,
    "other weights": lambda m: m.model.layers[0].mlp.up_proj.weight.data.neg_(),
    "gradients": lambda m: m.requires_grad_(False),
    "back and forth": lambda m: (m.set_attn_implementation("sdpa"), m.set_attn_implementation("tidar")),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("what", ADAPTED)
def test_a_change_that_can_be_followed_is(what: str) -> None:
    model = tiny()
    made = decoder(model)
    ADAPTED[what](model)
    assert made.generate([PROMPT], 12).tokens == [generated(model)]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", lambda m: setattr(m.config, "final_logit_softcapping", 0.01)),
        ("granite", lambda m: setattr(m.config, "logits_scaling", -2.0)),
    ],
)
def test_changes_of_what_logits_are_scaled_by_are_followed(kind: str, change: Callable[[Any], object]) -> None:
    """Where the model reads its configuration; one that keeps the number itself is refused."""
    model = tiny(kind)
    made = decoder(model)
    change(model)
    with torch.no_grad():
        tokens = [int(model(torch.tensor([PROMPT]), use_cache=False).logits[0, -1].argmax())]
    assert made.generate([PROMPT], 1).tokens == [tokens]
    model = tiny("cohere")
    made = decoder(model)
    model.logit_scale = -1.0
    with pytest.raises(ValueError, match=r"^model: expected logits as CohereForCausalLM computes them"):
        made.generate([PROMPT], 1)


def test_a_switch_in_the_middle_of_a_run_is_noticed() -> None:
    model = tiny()
    stream = decoder(model).stream([PROMPT], 24)
    next(stream)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r'^model: expected attn_implementation="tidar"'):
        list(stream)


def test_a_default_dtype_changes_nothing() -> None:
    model = tiny()
    made, expected = decoder(model), generated(model)
    torch.set_default_dtype(torch.float64)
    try:
        assert made.generate([PROMPT], 12).tokens == [expected]
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_is_run_while_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, runs = TransformersModel(tiny()), []
    monkeypatch.setattr(TransformersModel, "_check_by_running", lambda self: runs.append(1))
    adapter.check_ready()
    assert not runs
    adapter.model.double()
    adapter.check_ready()
    adapter.check_ready()
    assert runs == [1]


def test_logits_processors_hand_the_question_on() -> None:
    model = tiny()
    options = {"max_new_tokens": 4, "do_sample": False, "no_repeat_ngram_size": 2, "custom_generate": tidar_generation}
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, **{**options, "custom_generate": None})
    assert torch.equal(model.generate(ids, **options, **OPTIONS), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_decoder_has_a_model_of_its_own(copied: Callable[[Any], Any]) -> None:
    model = tiny()
    made = decoder(model)
    expected = made.generate([PROMPT], 12).tokens
    other = copied(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert other.generate([PROMPT], 12).tokens == expected
    other.model.model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation"):
        other.generate([PROMPT], 2)


def test_offloaded_weights_are_refused_by_name() -> None:
    """Accelerate keeps them elsewhere, and the model on the device that has no data."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    made = decoder(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"^model: expected all parameters on one device, got meta"):
        made.generate([PROMPT], 2)


# Positions.

DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
PER_LAYER = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
BOUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"max_position_embeddings": 32, "rope_parameters": DYNAMIC}),
    "longrope": (
        "phi3",
        {"max_position_embeddings": 128, "rope_parameters": LONG, "original_max_position_embeddings": 32},
    ),
    "by layer": (
        "gemma3_text",
        {
            "max_position_embeddings": 32,
            "rope_parameters": PER_LAYER,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    "learned": ("gpt2", {"n_positions": 32}),
    "learned, with an offset": ("opt", {"max_position_embeddings": 32, "ffn_dim": 64, "word_embed_proj_dim": 64}),
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_bounded_positions(kind: str) -> None:
    """Up to the bound, tokens are those of `generate`, whoever else is in the batch; beyond it, an error says so."""
    model = tiny(BOUNDED[kind][0], **BOUNDED[kind][1])
    made = decoder(model)
    assert made.model.config.max_positions == 32
    prompts = [PROMPT, PROMPT[:7], PROMPT[3:20]]
    expected = [generated(model, prompt, 4) for prompt in prompts]
    assert made.generate(prompts, 4).tokens == expected
    assert made.generate([PROMPT[:20]], 12).tokens == [generated(model, PROMPT[:20], 12)]
    reason = r"max_new_tokens: expected <= 4 after a prompt of 28, for the model has 32 positions \(.+\), got 5"
    with pytest.raises(ValueError, match=f"^{reason}"):
        made.generate(prompts, 5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "by layer"])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:7]], ids=len)
def test_a_table_that_has_grown_is_taken_back(kind: str, prompt: list[int]) -> None:
    """Somebody runs a longer sequence between two runs; a look-ahead up to the bound must not keep its table."""
    model = tiny(BOUNDED[kind][0], **BOUNDED[kind][1])
    expected = generated(model, prompt, 32 - len(prompt))
    made = decoder(model)
    for _ in range(2):
        with torch.no_grad():
            model(torch.arange(60)[None] + 5)
        assert made.generate([prompt], 32 - len(prompt)).tokens == [expected]
        buffers = dict(model.named_buffers())
        for name in [name for name in buffers if name.endswith("original_inv_freq")]:
            assert torch.equal(buffers[name.replace("original_", "")], buffers[name]), name


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_rotary_tables_that_know_no_length_have_no_bound(kind: str) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "linear":
        del rope["original_max_position_embeddings"]
    model = tiny(max_position_embeddings=32, rope_parameters=rope)
    made = decoder(model)
    assert made.model.config.max_positions is None
    assert made.generate([PROMPT], 12).tokens == [generated(model)]


# Refusals.

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4}
UNSUITABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention twice": (
        "diffllama",
        {},
        "model: expected one call of attention in each layer, got DiffLlamaForCausalLM",
    ),
    "a mask of its own": ("doge", {}, "model: expected a class that attends by a pattern and a cache, got DogeForCaus"),
    "linear attention": ("mamba", {}, "model: expected layers of full or sliding attention, got MambaForCausalLM"),
    "its own positions": (
        "bart",
        {"decoder_layers": 2, "d_model": 64},
        "model: expected logits as BartForCausalLM comp",
    ),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_a_refusal_names_the_model_and_leaves_it_as_it_was(what: str) -> None:
    kind, changes, message = UNSUITABLE[what]
    model = tiny(kind, **changes)
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    before = model.config._attn_implementation
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{message}"), quiet():
            decoder(model)
        assert model.config._attn_implementation == before
        assert [m.training for m in model.modules()] == flags
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_implementations_of_parts_come_back_too() -> None:
    model = tiny("diffllama")
    own = copy.deepcopy(model.config)
    own._attn_implementation = "eager"
    model.model.layers[1].self_attn.config = own
    with pytest.raises(ValueError, match=r"^model: expected"):
        decoder(model)
    assert (model.config._attn_implementation, own._attn_implementation) == ("sdpa", "eager")


def test_autocast_and_broken_weights_are_called_what_they_are() -> None:
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            ValueError, match=r"^model: expected no torch\.autocast around decoding, got torch\.bfloat16"
        ):
            decoder(model)
        assert model.config._attn_implementation == "sdpa"
    made = decoder(model)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"^model: expected no torch\.autocast around decoding"),
    ):
        made.generate([PROMPT], 4)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(
        ValueError, match=r"^model: expected finite logits, got LlamaForCausalLM with NaN .*1\.mlp\.up_p"
    ):
        decoder(model)


@pytest.mark.parametrize("kind", ["deepseek_v3", "gemma4_text"])
def test_layers_of_several_shapes(kind: str) -> None:
    """Keys wider than values; heads and widths by layer, and layers that use the K and V of others."""
    shared = {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    gemma = {"global_head_dim": 32, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16, **shared}
    gemma |= {"sliding_window": 8}
    model = tiny(kind, **(LATENT if kind == "deepseek_v3" else gemma))
    expected = generated(model)
    made = decoder(model)
    assert made.generate([PROMPT], 12).tokens == [expected]
    assert generated(model) == expected  # under "tidar" too
    assert made.model.config.head_dim == 32


def test_ordinary_generation_goes_on_from_a_decoder() -> None:
    model = tiny()
    result = Decoder.from_transformers(model, **OPTIONS, max_len=64).generate([PROMPT], 12)
    cache = TiDARCache.from_kv(result.cache, sequence=0)
    cache.crop(-1)
    given = torch.tensor([PROMPT + result.tokens[0]])
    on = model.generate(given, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert on[0, given.shape[1] :].tolist() == generated(model, PROMPT + result.tokens[0], 8)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, r"^tidar: expected an object in the model's configuration, got int$"),
        ({"block_size": "a"}, r"^tidar: expected an int as block_size in the model's configuration, got 'a'$"),
        ({"mask_token_id": 1.5}, r"^tidar: expected an int as mask_token_id in the model's configuration, got 1\.5$"),
    ],
)
def test_a_bad_entry_of_the_configuration(entry: Any, message: str) -> None:
    model = tiny()
    model.config.tidar = entry
    with pytest.raises(ValueError, match=message):
        Decoder.from_transformers(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=message):
        lossless(model, [PROMPT], block_size=4, max_new_tokens=2)


def test_a_model_without_layers() -> None:
    with pytest.raises(ValueError, match=r"^model: expected at least one layer, got LlamaForCausalLM with 0$"):
        decoder(tiny(num_hidden_layers=0))
