"""`model.generate(.., custom_generate=tidar_generation)`: what `generate` itself gives, and what it is asked for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from tests.integrations.transformers.compatibility import (
    BLOCK_SIZE,
    MASK_TOKEN_ID,
    MODELS,
    VOCAB_SIZE,
    padded_inputs,
    with_few_tokens,
)
from tidar_kernels.integrations import transformers as integration
from tidar_kernels.integrations.transformers import generate, tidar_generation
from tidar_kernels.integrations.transformers.processors import sampling_options

BY_NAME = {model.name: model for model in MODELS}
OURS = {"custom_generate": tidar_generation, "block_size": BLOCK_SIZE, "mask_token_id": MASK_TOKEN_ID}


@pytest.fixture(scope="module")
def model() -> Any:
    model = with_few_tokens(BY_NAME["Qwen3"].build())
    model.set_attn_implementation("sdpa")
    return model


def run(model: Any, inputs: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    inputs = padded_inputs("left") if inputs is None else inputs
    tokens: Tensor = model.generate(**inputs, **{"max_new_tokens": 32, "do_sample": False, **options})
    return tokens


def one(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1] for name, value in inputs.items()}


class RowWise(LogitsProcessor):
    """Bans a token that depends on the last two, as no processor of transformers does."""

    row_wise = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        banned = input_ids[:, -2:].sum(-1, keepdim=True) % 6
        return scores.scatter(1, banned, -torch.inf)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": 3, "max_new_tokens": 50},
        {"max_length": 40, "max_new_tokens": None},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 3, "sequence_bias": [[[2], 1.5]]},
        {"eos_token_id": 3, "min_new_tokens": 20, "suppress_tokens": [5], "forced_eos_token_id": 3},
        {"bad_words_ids": [[1, 2], [4]], "eos_token_id": [3, 5]},
        {"logits_processor": [RowWise()]},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_greedy_tokens_are_those_of_generate(model: Any, options: dict[str, Any], padding: str) -> None:
    inputs = padded_inputs(padding)
    assert torch.equal(run(model, inputs, **options, **OURS), run(model, inputs, **options))


def test_right_padding_is_stripped(model: Any) -> None:
    inputs = padded_inputs("right")
    tokens = run(model, inputs, **OURS)
    assert torch.equal(tokens[:, :21], inputs["input_ids"])
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        prompt = inputs["input_ids"][row, mask][None]
        assert torch.equal(tokens[row, 21:], run(model, {"input_ids": prompt})[0, prompt.shape[1] :])


class TestSampling:
    OPTIONS = ({"temperature": 0.7}, {"top_k": 4, "min_p": 0.05}, {"top_p": 0.8, "repetition_penalty": 1.3})

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_is_that_of_single_tokens(self, model: Any, options: dict[str, Any]) -> None:
        found = []
        for mode in ("tidar", "autoregressive"):
            torch.manual_seed(3)
            found.append(run(model, do_sample=True, mode=mode, **options, **OURS))
        assert torch.equal(*found)
        assert not torch.equal(found[0], run(model, do_sample=True, **options, **OURS))  # the next seed

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_on_the_device_and_by_processors_is_the_same(self, model: Any, options: dict[str, Any]) -> None:
        class Nothing(LogitsProcessor):
            row_wise = True

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                return scores

        found = []
        for more in ({}, {"logits_processor": [Nothing()]}):
            torch.manual_seed(3)
            found.append(run(model, do_sample=True, **options, **more, **OURS))
        assert torch.equal(*found)

    @pytest.mark.parametrize(
        "options", [{"temperature": 1e-6}, {"top_p": 0.0}, {"temperature": 1e-5, "top_k": 5}], ids=str
    )
    def test_beyond_what_the_device_takes(self, model: Any, options: dict[str, Any]) -> None:
        assert torch.equal(run(model, do_sample=True, **options, **OURS), run(model))

    def test_a_temperature_of_the_callers_own_does_not_sample(self, model: Any) -> None:
        options = {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(2.0), TopKLogitsWarper(7)])}
        assert torch.equal(run(model, **options, **OURS), run(model))

    def test_returns_several_sequences(self, model: Any) -> None:
        tokens = run(model, one(padded_inputs("none")), do_sample=True, num_return_sequences=3, **OURS)
        assert tokens.shape == (3, 53)
        assert len({tuple(row) for row in tokens.tolist()}) == 3


class EndsWith(StoppingCriteria):
    """A row is done once it ends with `token`; `asked` are the lengths it was asked about."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.asked: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.asked.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


class TestStopping:
    def test_after_every_token(self, model: Any) -> None:
        """A criterion is asked once a token, with all tokens so far, and nothing after it is kept."""
        inputs, varied = one(padded_inputs("none")), {"no_repeat_ngram_size": 2}
        plain = run(model, inputs, **varied)[0, 21:].tolist()
        at = max(plain.index(token) for token in set(plain))
        assert at > 3
        criterion = EndsWith(plain[at])
        tokens = run(model, inputs, stopping_criteria=[criterion], **varied, **OURS)
        assert tokens[0, 21:].tolist() == plain[: at + 1]
        assert criterion.asked == list(range(22, 22 + len(plain[: at + 1])))

    def test_of_some_rows(self, model: Any) -> None:
        token = int(run(model)[0, 25])
        # Rows that end are filled up only if there is an end token.
        options = {"stopping_criteria": [EndsWith(token)], "eos_token_id": 90}
        expected = run(model, **options)
        assert int((expected == 0).sum()) > 18  # some, beside the padding of the prompts
        assert torch.equal(run(model, **options, **OURS), expected)


class EndsWithEach(StoppingCriteria):
    """As lm-eval's `MultiTokenEOSCriteria`: remembers which rows of its batch are done, and ends all at once."""

    def __init__(self, ends: list[list[int]]) -> None:
        self.ends, self.done = ends, [False] * len(ends)
        self.asked: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.asked.append(input_ids.tolist())
        for row, (end, done) in enumerate(zip(self.ends, self.done, strict=True)):
            self.done[row] = done or input_ids[row, -len(end) :].tolist() == end
        return all(self.done)


@pytest.mark.parametrize("end_token", [None, 90, "of a row"])
def test_criteria_see_the_batch_that_generate_shows_them(model: Any, end_token: Any) -> None:
    plain = run(model)
    ends = [row[-n - 2 : -n].tolist() for row, n in zip(plain, (10, 17, 13), strict=True)]
    token = int(plain[1, 26]) if end_token == "of a row" else end_token
    mine, theirs = EndsWithEach(ends), EndsWithEach(ends)
    tokens = run(model, stopping_criteria=[mine], eos_token_id=token, **OURS)
    assert torch.equal(tokens, run(model, stopping_criteria=[theirs], eos_token_id=token))
    assert mine.asked == theirs.asked
    assert 1 < len(mine.asked) <= 32


def test_a_row_that_ends_without_an_end_token_goes_on(model: Any) -> None:
    """As in `generate`: only where there are end tokens is it filled up."""
    plain = run(model)
    options = {"stopping_criteria": [EndsWith(int(plain[0, 30]))]}
    assert torch.equal(run(model, **options, **OURS), run(model, **options))


def test_text_alone_of_a_model_of_images_and_text(model: Any) -> None:
    """transformers hands on what its encoder gave, nothing, as an argument of its own."""
    ids, config = torch.tensor([[5, 6, 7, 8]]), GenerationConfig(max_length=12, pad_token_id=0)
    options = {"block_size": BLOCK_SIZE, "mask_token_id": MASK_TOKEN_ID}
    tokens = tidar_generation(model, ids, [], [], config, mm_encoder_outputs={}, **options)
    assert torch.equal(tokens, run(model, {"input_ids": ids}, max_new_tokens=8))
    with pytest.raises(ValueError, match=r"^mm_encoder_outputs: expected tokens as the only input, got dict"):
        tidar_generation(model, ids, [], [], config, mm_encoder_outputs={"image": ids}, **options)


@pytest.mark.parametrize("token", [-1, [-1, 1000], 1000])
def test_end_tokens_that_no_row_can_choose(model: Any, token: Any) -> None:
    assert torch.equal(run(model, eos_token_id=token, **OURS), run(model, eos_token_id=token))


class Collected:
    """A streamer; `put` gets the prompt first."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = threading.Event()

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended.set()


class TestStreaming:
    @pytest.mark.parametrize("way", ["callable", "function", "folder"])
    def test_every_token_by_itself(self, model: Any, way: str) -> None:
        inputs, streamer = one(padded_inputs("none")), Collected()
        options = {"max_new_tokens": 9, "do_sample": False, "block_size": 4, "mask_token_id": MASK_TOKEN_ID}
        if way == "function":
            tokens = generate(model, inputs["input_ids"], streamer=streamer, **options)
        elif way == "folder":
            folder = str(Path(integration.__file__).parent)
            options |= {"custom_generate": folder, "trust_remote_code": True}
            tokens = model.generate(**inputs, streamer=streamer, **options)
        else:
            tokens = model.generate(**inputs, streamer=streamer, custom_generate=tidar_generation, **options)
        assert [len(part) for part in streamer.parts] == [21] + [1] * 9
        assert [token for part in streamer.parts for token in part] == tokens[0].tolist()
        assert streamer.ended.is_set()

    def test_of_several_prompts_is_refused(self, model: Any) -> None:
        with pytest.raises(ValueError, match=r"^streamer: expected a single prompt beside it, got 3"):
            run(model, streamer=Collected(), **OURS)


def letters() -> Any:
    """A tokenizer whose token i is the i-th character from "0" on."""
    vocabulary = {chr(48 + i): i for i in range(VOCAB_SIZE)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings(model: Any) -> None:
    inputs = one(padded_inputs("none"))
    plain = run(model, inputs)[0, 21:].tolist()
    text = "".join(chr(48 + token) for token in plain)
    stop = text[7:9]
    options = {"block_size": 4, "mask_token_id": MASK_TOKEN_ID, "max_new_tokens": 32, "do_sample": False}
    tokens = generate(model, inputs["input_ids"], stop_strings=[stop], tokenizer=letters(), **options)
    assert tokens[0, 21:].tolist() == plain[: text.index(stop) + 2]
    with pytest.raises(ValueError, match=r"^Stop string preprocessing was unable"):  # transformers', as in `generate`
        generate(model, inputs["input_ids"], stop_strings=[], tokenizer=letters(), **options)
    with pytest.raises(ValueError, match=r"^tokenizer: expected one beside stop_strings, got None"):
        generate(model, inputs["input_ids"], stop_strings=stop, **options)


def test_results_as_a_dictionary(model: Any) -> None:
    result = run(model, return_dict_in_generate=True, **OURS)
    assert torch.equal(result.sequences, run(model))


def test_defaults_come_from_the_configuration(model: Any) -> None:
    model.config.tidar = {"block_size": 4, "mask_token_id": MASK_TOKEN_ID}
    try:
        assert torch.equal(run(model, custom_generate=tidar_generation), run(model))
    finally:
        del model.config.tidar


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 2}, "generation_config: expected greedy search or sampling, got beam_search"),
            ({"prompt_lookup_num_tokens": 3}, "generation_config: expected greedy .* got assisted_generation"),
            ({"return_dict_in_generate": True, "output_scores": True}, "output_scores: expected False, got True"),
            ({"prefix_allowed_tokens_fn": lambda *_: [1]}, "logits_processor: .* got PrefixConstrainedLogitsProcessor"),
            ({"guidance_scale": 2.0}, "logits_processor: .* got UnbatchedClassifierFreeGuidanceLogitsProcessor"),
            ({"mask_token_id": None}, "mask_token_id: expected a token id here"),
        ],
    )
    def test_of_options(self, model: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            run(model, **{**OURS, **options})

    def test_of_a_processor_that_may_look_at_other_rows(self, model: Any) -> None:
        class Whole(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                return scores - scores.mean()

        with pytest.raises(ValueError, match=r"^logits_processor: .* got Whole; set its attribute `row_wise = True`"):
            run(model, logits_processor=[Whole()], **OURS)

    def test_of_processes_in_step(self, model: Any) -> None:
        with pytest.raises(ValueError, match=r"^synced_gpus: expected False, got True"):
            tidar_generation(model, torch.ones(1, 1), [], [], model.generation_config, synced_gpus=True)

    def test_of_a_filled_cache(self, model: Any) -> None:
        cache = DynamicCache()
        ids = padded_inputs("none")["input_ids"]
        model(ids[:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match=r"^past_key_values: expected none, or an empty cache, got a filled"):
            run(model, {"input_ids": ids}, past_key_values=cache, **OURS)

    def test_of_masks_with_holes(self, model: Any) -> None:
        inputs = padded_inputs("none")
        mask = torch.ones_like(inputs["input_ids"])
        mask[1, 5] = 0
        with pytest.raises(ValueError, match=r"^attention_mask: expected one run of tokens in each row, got 20 in"):
            run(model, {**inputs, "attention_mask": mask}, **OURS)

    @pytest.mark.parametrize("change", [lambda p: p + 7, lambda p: p * 2, lambda p: p.flip(-1)])
    @pytest.mark.parametrize("padding", ["none", "left"])
    def test_of_positions_of_the_callers_own(self, model: Any, padding: str, change: Any) -> None:
        inputs = padded_inputs(padding)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        assert torch.equal(run(model, {**inputs, "position_ids": positions}, **OURS), run(model, inputs))
        with pytest.raises(
            ValueError, match=r"^position_ids: expected 0, 1, \.\. for the tokens of each row, got others"
        ):
            run(model, {**inputs, "position_ids": change(positions)}, **OURS)

    def test_of_a_mask_for_other_tokens(self, model: Any) -> None:
        ids = padded_inputs("none")["input_ids"]
        with pytest.raises(
            ValueError, match=r"^attention_mask: expected shape \[3, 21\] as the tokens have, got \[3, 20\]"
        ):
            run(model, {"input_ids": ids, "attention_mask": torch.arange(20).expand(3, -1) > 0}, **OURS)

    def test_of_no_prompts(self, model: Any) -> None:
        with pytest.raises(ValueError, match=r"^input_ids: expected at least one prompt, got none"):
            run(model, {"input_ids": torch.ones(0, 4, dtype=torch.int64)}, **OURS)

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
    @pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
    def test_of_prompts_that_a_wrapper_adds(self, kind: str) -> None:
        peft = pytest.importorskip("peft")
        model = BY_NAME["Llama"].build()
        wrapped = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(
            ValueError, match=r"^model: expected inputs that LlamaForCausalLM prepares itself, got those"
        ):
            run(wrapped, **OURS)
        assert run(model, **OURS).shape == (3, 53)

    def test_of_inputs_that_are_no_tokens(self, model: Any) -> None:
        ids = padded_inputs("none")["input_ids"]
        with pytest.raises(ValueError, match=r"^inputs_embeds: expected tokens as the only input"):
            run(model, {"inputs_embeds": model.get_input_embeddings()(ids)}, **OURS)


def test_which_processors_the_device_knows() -> None:
    from transformers import (
        LogitNormalization,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TopPLogitsWarper,
    )

    penalty, heat, best = RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(0.5), TopKLogitsWarper(7)
    known = [penalty, heat, best, TopPLogitsWarper(0.9), MinPLogitsWarper(0.1), LogitNormalization()]
    expected = {"repetition_penalty": 1.5, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1}
    assert sampling_options(known, padded=False) == expected
    assert sampling_options([], padded=True) == {}
    for processors, padded in (
        ([penalty], True),  # it counts padding as seen
        ([best, heat], False),  # in another order
        ([heat, heat], False),
        ([TopPLogitsWarper(0.9, filter_value=-5.0)], False),
        ([TemperatureLogitsWarper(1e-6)], False),
        ([RowWise()], False),
    ):
        assert sampling_options(processors, padded) is None
