"""DFlash drafters beside a target: read, and decoded as the public code decodes them; `dflash.py` beside this file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import save_file
from torch import Tensor

from tests.integrations.transformers import dflash
from tests.integrations.transformers.dflash import BLOCK, CONFIG, LAYERS, decoded, random_tensors, write_drafter
from tests.integrations.transformers.published import MASK, reference, write
from tests.integrations.transformers.test_checkpoints import autoregressive, cut
from tests.toys import CONFIG as TOY
from tidar_kernels import Decoder, KVCache, Session, patterns, strategies
from tidar_kernels.integrations.transformers import TransformersModel
from tidar_kernels.integrations.transformers.checkpoints.dflash import DFlashDrafter, read_drafter
from tidar_kernels.models import Transformer
from tidar_kernels.ops.verify import SamplingParams

NEW_TOKENS = 24
RANDOM = random_tensors(CONFIG)
SLIDING = {
    **CONFIG, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "use_sliding_window": True
}  # fmt: skip
NARROW = {**CONFIG, "num_key_value_heads": 1, "head_dim": 8}
WIDE = {**CONFIG, "num_key_value_heads": 4, "head_dim": 24}
SCALED = {
    **CONFIG,
    "dflash_config": {
        **CONFIG["dflash_config"],
        "input_embedding_scale": 1.5,
        "output_multiplier": 0.5,
        "final_logit_softcapping": 2.0,
    },
}
CONFIGS = {"plain": CONFIG, "sliding": SLIDING, "narrow": NARROW, "wide": WIDE, "scaled": SCALED}


@pytest.fixture(scope="module")
def target() -> Any:
    """The model itself, with plain attention."""
    return reference("qwen3", num_hidden_layers=4)


@pytest.fixture(scope="module")
def learnt(target: Any) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Ragged prompts, and a drafter that knows what the target says after them."""
    prompts = torch.tensor([[3, 9, 4, 1], [7, 2, 6, 8], [5, 4, 3, 2]])
    ragged = [p.tolist() + autoregressive(target, p.tolist())[: 2 * i] for i, p in enumerate(prompts)]
    return ragged, dflash.trained(target, prompts)


@pytest.fixture(scope="module")
def ready(target: Any) -> TransformersModel:
    return TransformersModel(copy.deepcopy(target))


def beside(target: Any, folder: Path, **options: Any) -> Decoder:
    return Decoder.from_transformers(copy.deepcopy(target), drafter=folder, **options)


def batches(prompts: list[list[int]]) -> list[list[int]]:
    return [list(prompt) for prompt in prompts]


# The drafter's own pass.


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_public_rule(target: Any, tmp_path: Path, name: str) -> None:
    """After a prompt in chunks, and after a step of which some rows stay, in two sequences of other lengths."""
    config = CONFIGS[name]
    tensors = random_tensors(config)
    layers = tuple(config["dflash_config"]["target_layer_ids"])
    decoder = beside(target, write_drafter(tmp_path, tensors, **config))
    model: Any = decoder.model
    shape = model.config
    cache = KVCache(
        num_layers=shape.num_layers, batch_size=2, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, max_len=40
    )
    for stale in (cache.k, cache.v):
        stale.fill_(torch.nan)
    texts = [[3, 9, 4, 1, 5], [7, 2, 6, 8, 3, 5, 4, 1, 1, 6, 2]]
    with torch.no_grad():
        for index, text in enumerate(texts):
            one = cache.sequence(index)
            for chunk in (text[:3], text[3:]):
                model(torch.tensor([chunk]), patterns.causal(len(chunk)), one)
                one.commit(len(chunk))

        def check(seeds: Tensor) -> None:
            rows = torch.full((2, BLOCK), MASK)
            rows[:, 0] = seeds
            found = model.drafter.logits(model.draft(rows, patterns.block_step(BLOCK), cache)[:, 1:])
            for index, text in enumerate(texts):
                features = dflash.features_of(target, torch.tensor([text]), layers)
                expected = dflash.dense_logits(target, tensors, features, seeds[index : index + 1], config)
                torch.testing.assert_close(found[index : index + 1], expected, rtol=1e-4, atol=1e-4)

        check(torch.tensor([8, 9]))
        drafts = torch.tensor([[8, 1, 2, 3], [9, 4, 5, 6]])
        model(drafts, patterns.causal(BLOCK), cache)
        kept = torch.tensor([1, 3])
        cache.commit(kept, at_most=BLOCK)
        texts = [text + drafts[i, : kept[i]].tolist() for i, text in enumerate(texts)]
        check(torch.tensor([2, 7]))


# Decoding.


def test_steps_accept_what_the_public_loop_accepts(
    target: Any, learnt: tuple[list[list[int]], dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole passes on the other side; the tokens are `generate`'s own, and most steps keep several."""
    prompts, tensors = learnt
    folder = write("qwen3", tmp_path / "target", target, num_hidden_layers=4)
    with caplog.at_level("INFO", logger="tidar_kernels"):
        decoder = Decoder.from_transformers(folder, drafter=write_drafter(tmp_path / "drafter", tensors))
    said = "transformers as Qwen3ForCausalLM, DFlash, L = 4, mask token 50, drafter drafter"
    assert (str(decoder.recognised), repr(decoder)) == (said, f"Decoder({said})")
    assert [record.getMessage() for record in caplog.records] == [f"{folder}: {said}"]
    result = decoder.generate(batches(prompts), NEW_TOKENS)
    expected = [decoded(target, tensors, prompt, NEW_TOKENS) for prompt in prompts]
    own = [
        target.generate(torch.tensor([p]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)[0, len(p) :]
        for p in prompts
    ]
    assert result.tokens == [tokens.tolist() for tokens in own] == [tokens[:NEW_TOKENS] for tokens, _ in expected]
    assert result.accepted == [cut(accepted) for _, accepted in expected]
    assert result.tokens_per_forward > 1.5
    assert all(set(passes) == {1} for passes in result.passes)


@pytest.mark.parametrize(
    "fault",
    ["features", "positions", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("layers", "first row"))],
)
def test_a_fault_in_what_is_remembered_shows(
    target: Any,
    learnt: tuple[list[list[int]], dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """The same text, by more steps: features of the row before, K/V one position on, layers in another order, or the
    first row's features for all rows of a step."""
    prompts, tensors = learnt
    remember = DFlashDrafter.remember

    def wrong(self: DFlashDrafter, features: Tensor, cache: KVCache) -> None:
        if fault == "features":
            features = features.roll(1, dims=1)
        elif fault == "layers":
            features = features.roll(features.shape[-1] // len(LAYERS), dims=-1)
        elif fault == "first row" and len(features) > 1:
            features = features[:, :1].expand_as(features)
        if fault != "positions":
            return remember(self, features, cache)
        with monkeypatch.context() as patched:
            table = self.layers.rotary_emb.forward
            patched.setattr(self.layers.rotary_emb, "forward", lambda x, positions: table(x, positions + 1))
            return remember(self, features, cache)

    decoder = beside(target, write_drafter(tmp_path, tensors))
    right = decoder.generate(batches(prompts), NEW_TOKENS)
    monkeypatch.setattr(DFlashDrafter, "remember", wrong)
    found = decoder.generate(batches(prompts), NEW_TOKENS)
    assert found.tokens == right.tokens
    assert found.accepted != right.accepted
    assert found.tokens_per_forward < right.tokens_per_forward


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(options, marks=pytest.mark.thorough) for options in ({"prefill_chunk": 3}, {"block_size": 2}))],
    ids=str,
)
def test_tokens_are_those_of_autoregressive_decoding(
    target: Any, learnt: tuple[list[list[int]], dict[str, Tensor]], tmp_path: Path, options: dict[str, Any]
) -> None:
    prompts, tensors = learnt
    decoder = beside(target, write_drafter(tmp_path, tensors), **options)
    assert decoder.block_size == options.get("block_size", BLOCK)
    plain = Decoder.from_transformers(copy.deepcopy(target), mode="autoregressive")
    for more in ({"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1}):
        found = decoder.generate(batches(prompts), 12, **more)
        assert found.tokens == plain.generate(batches(prompts), 12, **more).tokens
        assert found.tokens_per_forward > 1.05


@pytest.mark.parametrize("page_size", [pytest.param(None, marks=pytest.mark.thorough), 8])
def test_requests_join_and_leave(
    target: Any, learnt: tuple[list[list[int]], dict[str, Tensor]], tmp_path: Path, page_size: int | None
) -> None:
    """On slots and on pages, which a request shares with one whose prompt begins alike, the drafter's layers too."""
    prompts, tensors = learnt
    decoder = beside(target, write_drafter(tmp_path, tensors))
    prompts = [prompts[0] * 3, prompts[1], prompts[0] * 3 + [8], prompts[2]]
    params = [SamplingParams(temperature=0.8 * (i % 2), seed=i) for i in range(4)]
    alone = []
    for prompt, own in zip(prompts, params, strict=True):
        session = Session(decoder.model, decoder._step, 1, 64)
        request = session.requests[session.add(prompt, NEW_TOKENS, own)]
        while session.requests:
            session.step()
        alone.append(request)
    session = Session(decoder.model, decoder._step, 3, 64, page_size=page_size)
    requests = [session.requests[session.add(prompts[i], NEW_TOKENS, params[i])] for i in (0, 1)]
    session.step()
    requests.append(session.requests[session.add(prompts[2], NEW_TOKENS, params[2])])
    session.step()
    session.remove(requests[1].id)
    requests.append(session.requests[session.add(prompts[3], NEW_TOKENS, params[3])])
    while session.requests:
        session.step()
    for index, (found, expected) in enumerate(zip(requests, alone, strict=True)):
        count = len(found.tokens)
        assert count == NEW_TOKENS or index == 1
        assert found.tokens == expected.tokens[:count]
        assert found.accepted == expected.accepted[: len(found.accepted)]


def test_exact_rows_are_the_target_s(
    target: Any, learnt: tuple[list[list[int]], dict[str, Tensor]], tmp_path: Path
) -> None:
    prompts, tensors = learnt
    model = copy.deepcopy(target).bfloat16()
    folder = write_drafter(tmp_path, tensors)
    found = beside(model, folder, exact=True).generate(batches(prompts), NEW_TOKENS)
    plain = Decoder.from_transformers(model, mode="autoregressive", exact=True)
    expected = plain.generate(batches(prompts), NEW_TOKENS)
    assert found.tokens == expected.tokens
    assert found.tokens_per_forward > 1.5
    for index, tokens in enumerate(found.tokens):
        length = len(prompts[index]) + len(tokens)
        for own, other in ((found.cache.k, expected.cache.k), (found.cache.v, expected.cache.v)):
            assert torch.equal(own[:4, index, :, :length], other[:, index, :, :length])


def test_other_rules_keep_the_greedy_text(
    target: Any, learnt: tuple[list[list[int]], dict[str, Tensor]], tmp_path: Path
) -> None:
    prompts, tensors = learnt
    found = beside(target, write_drafter(tmp_path, tensors), sampling="rejection").generate(batches(prompts), 12)
    assert found.tokens == [autoregressive(target, prompt)[:12] for prompt in prompts]
    assert found.tokens_per_forward > 1.5


@pytest.mark.cuda
def test_a_step_is_one_graph(target: Any, learnt: tuple[list[list[int]], dict[str, Tensor]], tmp_path: Path) -> None:
    prompts, tensors = learnt
    model, folder = copy.deepcopy(target).cuda(), write_drafter(tmp_path, tensors)
    eager = Decoder.from_transformers(model, drafter=folder, cuda_graph=False).generate(batches(prompts), NEW_TOKENS)
    graph = Decoder.from_transformers(model, drafter=folder, cuda_graph=True).generate(batches(prompts), NEW_TOKENS)
    assert (graph.tokens, graph.accepted) == (eager.tokens, eager.accepted)


# Who may draft for whom.


def test_a_drafter_may_be_given_as_an_object(target: Any, tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, RANDOM)
    model = copy.deepcopy(target)
    drafter = read_drafter(folder, TransformersModel(model))
    by_object = Decoder.from_transformers(model, drafter=drafter, strategy=strategies.DFlash(3))
    assert (by_object.block_size, by_object.mask_token_id, repr(by_object)) == (3, MASK, "Decoder(DFlash, L = 3)")
    prompt = [3, 9, 4, 1, 5]
    assert by_object.generate(prompt, 8).tokens == [autoregressive(target, prompt)[:8]]
    both = strategies.DraftedModel(TransformersModel(model), drafter)
    assert Decoder(both, mode="autoregressive").generate(prompt, 8).cache.num_layers == 4
    with pytest.raises(ValueError, match=r"^strategy: expected DFlash for a model with a drafter, got TiDAR, B = 4$"):
        Decoder(both)
    with pytest.raises(ValueError, match=r"^model: expected a DraftedModel for DFlash, L = 3, got TransformersModel$"):
        Decoder(both.target, strategy=strategies.DFlash(3), mask_token_id=MASK)
    with pytest.raises(ValueError, match=r"^model: expected a DraftedModel for DFlash, L = 3, got TransformersModel$"):
        Session(both.target, by_object._step, 1, 32)
    with pytest.raises(TypeError, match=r"^drafter: expected a Drafter, got int$"):
        Decoder.from_transformers(model, drafter=3)
    with pytest.raises(ValueError, match=r"^drafter: expected torch.bfloat16 on cpu as its target, got torch.float"):
        Decoder.from_transformers(copy.deepcopy(model).bfloat16(), drafter=drafter)
    with pytest.raises(TypeError, match=r"^model: expected one that hands out hidden states .* got Transformer$"):
        strategies.DraftedModel(Transformer(TOY), drafter)
    with pytest.raises(ValueError, match=r"^drafter: expected layers of its target, 0 \.\. 1, got 2$"):
        strategies.DraftedModel(TransformersModel(reference("qwen3")), drafter)


def test_a_class_without_hidden_states_is_refused(target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(target)
    forward = type(model.model).forward

    def without(self: Any, *args: Any, output_hidden_states: Any = None, **more: Any) -> Any:
        return forward(self, *args, **more)

    monkeypatch.setattr(type(model.model), "forward", without)
    with pytest.raises(ValueError, match=r"^model: expected a class that hands out the hidden states of its layers"):
        Decoder.from_transformers(model, drafter=write_drafter(tmp_path, RANDOM))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "tidar"}, "strategy: expected a strategies.DFlash, or none, beside a drafter, got 'tidar'"),
        ({"stride": 4}, "stride: expected none beside a drafter, got 4"),
        ({"mode": "autoregressive"}, "drafter: expected none where nothing is drafted"),
        ({"block_size": 1}, "block_size: expected >= 2, got 1"),
        ({"block_size": "auto"}, 'block_size: expected a number for strategy "dflash", got "auto"'),
        ({"mask_token_id": 64}, "mask_token_id: expected < vocab_size = 64, got 64"),
        ({"beta": 0.5}, "beta: expected 1 for strategies but"),
    ],
)
def test_what_does_not_go_with_a_drafter(target: Any, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^\w+: expected ") as error:
        beside(target, write_drafter(tmp_path, RANDOM), **options)
    assert str(error.value).startswith(said)


def own(**changed: Any) -> dict[str, Any]:
    return {"dflash_config": {**CONFIG["dflash_config"], **changed}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (own(mask_token_id=None), "mask_token_id: expected a token id here or in config.json of a DFlash drafter, got"),
        (own(mask_token_id="50"), "mask_token_id: expected an int, got str"),
        (own(target_layer_ids=[0, 4]), "drafter: expected target_layer_ids below the target's 4 layers, got 4"),
        (own(target_layer_ids=[0, -1]), "target_layer_ids: expected >= 0, got -1"),
        (own(target_layer_ids=[]), "target_layer_ids: expected at least one in config.json of a DFlash drafter"),
        (own(target_layer_ids=None), "target_layer_ids: expected"),
        (own(target_layer_ids=[0, 1, 2]), "drafter: expected weights of the shapes that config.json of a DFlash"),
        (own(selector_rank=8), "drafter: expected the rule of DFlash in config.json, got selector_rank"),
        (own(causal=False), "drafter: expected the rule of DFlash in config.json, got causal"),
        (own(block_size=1), "block_size: expected >= 2, got 1"),
        ({"dflash_config": [1]}, "dflash_config: expected an object in config.json of a drafter, got list"),
        ({"sample_from_anchor": False}, "drafter: expected the rule of DFlash in config.json, got sample_from_anchor"),
        ({"is_causal": True}, "drafter: expected the rule of DFlash in config.json, got is_causal"),
        ({"hidden_size": 64}, "drafter: expected hidden_size 32 as its target has, got 64"),
        (
            {"num_hidden_layers": "two"},
            "drafter: expected a configuration of layers of Qwen3, got TypeError: ",
        ),
        (
            {"layer_types": ["linear_attention"] * 2},
            "drafter: expected layers of full or sliding attention, got ",
        ),
        ({"num_target_layers": 36}, "drafter: expected num_target_layers 4 as its target has, got 36"),
        (
            {"intermediate_size": 64},
            "drafter: expected weights of the shapes that config.json of a DFlash drafter",
        ),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "drafter: expected the weights of DFlashLayers"),
        ({"architectures": ["DFlash2DraftModel"]}, "drafter: expected a checkpoint of DFlashDraftModel, got DFlash2"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "drafter: expected rotary positions default, linear, llama3, yarn, got dynamic",
        ),
    ],
)
def test_half_a_drafter_is_an_error_of_one_line(
    ready: TransformersModel, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^\w+: expected ") as error:
        read_drafter(write_drafter(tmp_path, RANDOM, **changed), ready)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_tensors_of_a_drafter_that_are_missing_or_left_over_are_named(target: Any, tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, {name: x for name, x in RANDOM.items() if name != "fc.weight"})
    with pytest.raises(ValueError, match=r"^drafter: expected all weights of a DFlash drafter, got none for fc\.w"):
        beside(target, folder)
    both = {**RANDOM, "candidate_selector.hidden_projection.weight": torch.zeros(2, 2)}
    save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"alone for a DFlash drafter, got candidate_selector\.hidden_projection"):
        beside(target, folder)
    with pytest.raises(FileNotFoundError, match=r"^drafter: expected a folder or a name on the Hub, got "):
        beside(target, tmp_path / "no where")


@pytest.mark.parametrize("name", ["DFlash2DraftModel", "Qwen3DSparkModel", "JetSpecDraftModel"])
def test_others_of_the_family_are_refused_by_name(target: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": [name]}))
    with pytest.raises(ValueError, match=rf"got {name}, a drafter of the DFlash family: it drafts by another rule"):
        Decoder.from_transformers(tmp_path)
    with pytest.raises(ValueError, match=rf"^drafter: expected a checkpoint of DFlashDraftModel, got {name}$"):
        beside(target, tmp_path)
