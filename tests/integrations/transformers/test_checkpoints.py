"""Published checkpoints: recognised, read, and decoded as their authors' code decodes them.

The masks, positions and commit rules below are those of the public code, written down as facts. Nothing is cached and
nothing is shared with the package: every pass is a whole forward pass of a transformers model under a dense mask.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")


from safetensors.torch import load_file, save_file

from tests.integrations.transformers.published import MASK, PUBLISHED, VOCAB_SIZE, reference, write, write_adapter
from tidar_kernels import Decoder, strategies
from tidar_kernels.integrations.transformers.checkpoints import read_checkpoint, recognised_system
from tidar_kernels.integrations.transformers.checkpoints.reading import config_of
from tidar_kernels.nn.adapters import has_gated_lora

NEW_TOKENS = 24
PROMPTS = ([3, 9, 4, 1, 5], [7, 2, 6, 8, 3, 5, 4, 1], list(range(11, 28)))

Rule = Callable[[int, int], bool]


@torch.no_grad()
def logits_of(
    model: Any,
    tokens: list[int],
    sees: Rule,
    positions: list[int] | None = None,
    added: dict[str, Tensor] | None = None,
    adapted_from: int = 0,
) -> Tensor:
    """Logits `[rows, vocab]` of one forward pass in which row q sees key k if `sees(q, k)`.

    Rows from `adapted_from` on have `added[name]` added to the weight of the module of that name.
    """
    n = len(tokens)
    visible = torch.tensor([[sees(q, k) for k in range(n)] for q in range(n)])
    mask = torch.zeros(n, n).masked_fill(~visible, torch.finfo(torch.float32).min)
    at = torch.tensor([range(n) if positions is None else positions])
    gate = (torch.arange(n) >= adapted_from)[:, None]

    def adds(delta: Tensor) -> Any:
        return lambda module, inputs, output: output + gate * (inputs[0] @ delta.T)

    hooks = [model.get_submodule(name).register_forward_hook(adds(delta)) for name, delta in (added or {}).items()]
    try:
        found = model(input_ids=torch.tensor([tokens]), position_ids=at, attention_mask=mask[None, None])
    finally:
        for hook in hooks:
            hook.remove()
    return found.logits[0].float()


def causal(q: int, k: int) -> bool:
    return k <= q


def causal_then_block(start: int) -> Rule:
    """Causal tokens, then a block at `start` that sees them and itself whole."""
    return lambda q, k: k <= q if q < start else True


def block_causal(block: int) -> Rule:
    """Every token sees its own block whole, and all blocks before it."""
    return lambda q, k: k // block <= q // block


# The public decoders, greedily: new tokens, and what each step accepted or how many passes it took.


def autoregressive(model: Any, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + NEW_TOKENS:
        tokens.append(int(logits_of(model, tokens, causal)[-1].argmax()))
    return tokens[len(prompt) :]


def nemotron_linear(model: Any, added: dict[str, Tensor], prompt: list[int], block: int) -> tuple[list[int], list[int]]:
    """The seed and masks both ways, all of them with the adapter; then causally, without; the longest run that agrees
    stays, and one token more."""
    done, seed = list(prompt), int(logits_of(model, prompt, causal)[-1].argmax())
    accepted = []
    while len(done) < len(prompt) + NEW_TOKENS:
        n = len(done)
        rows = [*done, seed, *[MASK] * (block - 1)]
        found = logits_of(model, rows, causal_then_block(n), added=added, adapted_from=n)
        drafts = [seed, *found[n + 1 :].argmax(-1).tolist()]
        targets = logits_of(model, done + drafts, causal)[n:].argmax(-1).tolist()
        count = 1
        while count < block and targets[count - 1] == drafts[count]:
            count += 1
        done, seed = done + drafts[:count], targets[count - 1]
        accepted.append(count)
    return done[len(prompt) :], accepted


def quadratic(model: Any, prompt: list[int], block: int, weight: float) -> tuple[list[int], list[int]]:
    """Rows `[d_0, masks | d_1, masks | ..]`: masks see the drafts up to theirs and each other; both heads are mixed."""
    n = len(prompt)
    first = logits_of(model, prompt + [MASK] * block, causal_then_block(n))
    drafts = [int(first[n - 1].argmax()), *first[n + 1 :].argmax(-1).tolist()]
    done, accepted = list(prompt), []
    while len(done) < len(prompt) + NEW_TOKENS:
        n, width = len(done), block + 1

        def sees(q: int, k: int, n: int = n, width: int = width) -> bool:
            if q < n or k < n:
                return k <= q
            (i, own), (j, other) = divmod(q - n, width), divmod(k - n, width)
            return j <= i if other == 0 else i == j and own > 0

        rows = [token for draft in drafts for token in (draft, *[MASK] * block)]
        positions = [*range(n), *(n + i + m for i in range(block) for m in range(width))]
        found = logits_of(model, done + rows, sees, positions)[n:].view(block, width, VOCAB_SIZE)
        mixed = weight * found[:, 0] + (1 - weight) * found[:, 1]
        count = 1
        while count < block and int(mixed[count - 1].argmax()) == drafts[count]:
            count += 1
        done += drafts[:count]
        drafts = [int(mixed[count - 1].argmax()), *found[count - 1, 2:].argmax(-1).tolist()]
        accepted.append(count)
    return done[len(prompt) :], accepted


def confident(logits: Tensor, block: list[int], is_open: list[bool], threshold: float) -> list[int]:
    """A block with the tokens fixed that one pass fixes: those above the threshold, or the most probable one."""
    best, token = logits.softmax(-1).max(-1)
    best = best.masked_fill(~torch.tensor(is_open), -1.0)
    fixed = best > threshold
    if not bool(fixed.any()):
        fixed[best.argmax()] = True
    return [int(token[i]) if fixed[i] else old for i, old in enumerate(block)]


def nemotron_diffusion(model: Any, prompt: list[int], block: int, threshold: float) -> tuple[list[int], list[int]]:
    """Causal context; the first token of a block is the autoregressive one, the others are filled in both ways."""
    done, passes = list(prompt), []
    while len(done) < len(prompt) + NEW_TOKENS:
        n = len(done)
        own = [int(logits_of(model, done, causal)[-1].argmax()), *[-1] * (block - 1)]
        count = 1  # the causal pass that fills the cache
        while -1 in own:
            rows = done + [MASK if token < 0 else token for token in own]
            found = logits_of(model, rows, causal_then_block(n))[n:]
            own, count = confident(found, own, [token < 0 for token in own], threshold), count + 1
        done += own
        passes.append(count)
    return done[len(prompt) :], passes


def aligned_blocks(
    model: Any, prompt: list[int], block: int, threshold: float, mask: int, part: int, is_shifted: bool
) -> tuple[list[int], list[int]]:
    """SDAR, Fast-dLLM v2, LLaDA 2: blocks at multiples of their length, block-causal, the prompt's last one filled up.

    Shifted, row i - 1 of the block predicts its token i, and the last row of the block before it the first.
    """
    tokens, passes = list(prompt), []
    while len(tokens) < len(prompt) + NEW_TOKENS:
        start = len(tokens) // block * block
        if is_shifted and len(tokens) == start:
            tokens.append(int(logits_of(model, tokens, block_causal(block))[-1].argmax()))
        own = tokens[start:] + [-1] * (start + block - len(tokens))
        count = 1
        for low in range(0, block, part):
            while -1 in own[low : low + part]:
                rows = tokens[:start] + [mask if token < 0 else token for token in own]
                found = logits_of(model, rows, block_causal(block))[start:]
                if is_shifted:
                    found = torch.cat([found[:1], found[:-1]])
                is_open = [token < 0 and low <= i < low + part for i, token in enumerate(own)]
                own, count = confident(found, own, is_open, threshold), count + 1
        tokens = tokens[:start] + own
        passes.append(count)
    return tokens[len(prompt) :], passes


def strided(model: Any, added: dict[str, Tensor], prompt: list[int], stride: int) -> tuple[list[int], list[int]]:
    """I-DLM: `[pending, drafts, masks]`, all causal; a mask predicts the token after its position, with the adapter."""
    done, pending = list(prompt), int(logits_of(model, prompt, causal)[-1].argmax())
    drafts: list[int] = []
    accepted = []
    while len(done) < len(prompt) + NEW_TOKENS:
        k = len(drafts)
        rows = [*done, pending, *drafts]
        found = logits_of(model, rows + [MASK] * (stride - 1), causal, added=added, adapted_from=len(rows))
        targets = found[len(done) :].argmax(-1).tolist()
        count = 1
        while count <= k and targets[count - 1] == drafts[count - 1]:
            count += 1
        done += [pending, *drafts][:count]
        accepted.append(count)
        pending = targets[count - 1]
        drafts = targets[k + 1 :] if count == k + 1 else []
    return done[len(prompt) :], accepted


def cut(accepted: list[int], total: int = NEW_TOKENS) -> list[int]:
    """Accepted counts of a request that ends at its last token."""
    found: list[int] = []
    for count in accepted:
        found.append(min(count, total - sum(found)))
    return found


# Nemotron-Labs-Diffusion.


def test_nemotron_linear_self_speculation_with_its_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = reference("nemotron")
    folder = write("nemotron", tmp_path / "model", model)
    added = write_adapter(folder / "linear_spec_lora", model, "encoder.", ("o_proj",))
    with caplog.at_level(logging.INFO, logger="tidar_kernels"):
        decoder = Decoder.from_transformers(folder)
    said = "Nemotron-Labs-Diffusion as Ministral3ForCausalLM, self-speculation, L = 8, mask token 50, "
    said += "adapter linear_spec_lora"
    assert (str(decoder.recognised), repr(decoder)) == (said, f"Decoder({said})")
    assert [record.getMessage() for record in caplog.records] == [f"{folder}: {said}"]
    assert has_gated_lora(decoder.model.model)
    result = decoder.generate([list(prompt) for prompt in PROMPTS], NEW_TOKENS)
    expected = [nemotron_linear(model, added, prompt, 8) for prompt in PROMPTS]
    assert result.tokens == [tokens[:NEW_TOKENS] for tokens, _ in expected]
    assert result.tokens == [autoregressive(model, prompt) for prompt in PROMPTS]
    assert result.accepted == [cut(accepted) for _, accepted in expected]
    plain = Decoder.from_transformers(folder, adapter=False).generate([list(prompt) for prompt in PROMPTS], NEW_TOKENS)
    expected = [nemotron_linear(model, {}, prompt, 8) for prompt in PROMPTS]
    assert plain.accepted == [cut(accepted) for _, accepted in expected]
    assert plain.accepted != result.accepted  # else the adapter had no say


@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_nemotron_quadratic_self_speculation(tmp_path: Path, weight: float) -> None:
    model = reference("nemotron")
    folder = write("nemotron", tmp_path, model, ar_mix_weight=weight)
    decoder = Decoder.from_transformers(folder, strategy="tidar", block_size=4)
    result = decoder.generate([list(prompt) for prompt in PROMPTS], NEW_TOKENS)
    expected = [quadratic(model, prompt, 4, weight) for prompt in PROMPTS]
    assert result.tokens == [tokens[:NEW_TOKENS] for tokens, _ in expected]
    assert result.accepted == [cut(accepted) for _, accepted in expected]
    assert max(map(max, result.accepted)) > 1
    assert (result.tokens == [autoregressive(model, prompt) for prompt in PROMPTS]) == (weight == 1.0)


def test_nemotron_diffusion(tmp_path: Path) -> None:
    model = reference("nemotron")
    decoder = Decoder.from_transformers(write("nemotron", tmp_path, model), strategy="block_diffusion")
    for prompt in PROMPTS:
        result = decoder.generate(list(prompt), NEW_TOKENS)
        tokens, passes = nemotron_diffusion(model, prompt, 8, 0.9)
        assert (result.tokens, result.passes) == ([tokens[:NEW_TOKENS]], [passes])


def test_positions_of_nemotron_scale_its_queries(tmp_path: Path) -> None:
    """Far beyond the original length, where YaRN and the query scale both have a say."""
    model = reference("nemotron")
    prompt = torch.randint(8, (90,)).tolist()
    result = Decoder.from_transformers(write("nemotron", tmp_path, model)).generate(prompt, NEW_TOKENS)
    assert result.tokens == [autoregressive(model, prompt)]
    model.config.rope_parameters["llama_4_scaling_beta"] = 3.0
    assert result.tokens != [autoregressive(model, prompt)]


# TiDAR-LM.


@pytest.mark.parametrize("name", ["tidar", "tidar small"])
def test_tidar_lm(tmp_path: Path, name: str) -> None:
    model = reference(name)
    folder = write(name, tmp_path, model)
    decoder = Decoder.from_transformers(folder, block_size=4, mask_token_id=MASK)
    assert decoder.recognised.system == "TiDAR-LM"
    result = decoder.generate([list(prompt) for prompt in PROMPTS], NEW_TOKENS)
    expected = [quadratic(model, prompt, 4, 1.0) for prompt in PROMPTS]
    assert result.tokens == [tokens[:NEW_TOKENS] for tokens, _ in expected]
    assert result.accepted == [cut(accepted) for _, accepted in expected]


# I-DLM and R-ISD.


def test_idlm(tmp_path: Path) -> None:
    model = reference("i-dlm")
    decoder = Decoder.from_transformers(write("i-dlm", tmp_path, model))
    assert (decoder.recognised.system, decoder.recognised.strategy) == ("I-DLM", "ISD, N = 4")
    result = decoder.generate([list(prompt) for prompt in PROMPTS], NEW_TOKENS)
    expected = [strided(model, {}, prompt, 4) for prompt in PROMPTS]
    assert result.tokens == [tokens[:NEW_TOKENS] for tokens, _ in expected]
    assert result.accepted == [cut(accepted) for _, accepted in expected]
    assert max(map(max, result.accepted)) > 1


def test_the_caller_says_which_system_where_the_configuration_does_not(tmp_path: Path) -> None:
    model = reference("i-dlm")
    folder = write("i-dlm", tmp_path, model, use_regular_causal=None)
    assert Decoder.from_transformers(folder).recognised.system == "SDAR"
    decoder = Decoder.from_transformers(folder, system="i-dlm", stride=3)
    assert str(decoder.recognised) == "I-DLM as Qwen3ForCausalLM, ISD, N = 3, mask token 50"
    assert decoder.generate(PROMPTS[0], NEW_TOKENS).tokens == [autoregressive(model, PROMPTS[0])]
    with pytest.raises(ValueError, match=r"^system: expected one of nemotron-labs-diffusion, .*, got 'medusa'$"):
        Decoder.from_transformers(folder, system="medusa")


def test_risd_adapter_on_an_ordinary_model(tmp_path: Path) -> None:
    """The base model's tokens; masks, and they alone, run the adapter."""
    model = reference("qwen3")
    folder, adapter = write("qwen3", tmp_path / "base", model), tmp_path / "adapter"
    added = write_adapter(adapter, model, "model.", ("q_proj", "v_proj", "down_proj"))
    decoder = Decoder.from_transformers(folder, adapter=adapter, mask_token_id=MASK)
    assert str(decoder.recognised) == "transformers as Qwen3ForCausalLM, ISD, N = 4, mask token 50, adapter adapter"
    result = decoder.generate([list(prompt) for prompt in PROMPTS], NEW_TOKENS)
    assert result.tokens == [autoregressive(model, prompt) for prompt in PROMPTS]
    expected = [strided(model, added, prompt, 4) for prompt in PROMPTS]
    assert result.accepted == [cut(accepted) for _, accepted in expected]
    without = Decoder.from_transformers(folder, strategy=strategies.isd(4), mask_token_id=MASK)
    assert without.generate([list(prompt) for prompt in PROMPTS], NEW_TOKENS).accepted != result.accepted


# SDAR and Fast-dLLM v2.


@pytest.mark.parametrize("threshold", [0.85, 0.05])
def test_sdar(tmp_path: Path, threshold: float) -> None:
    model = reference("sdar")
    folder = write("sdar", tmp_path, model)
    decoder = Decoder.from_transformers(folder)
    assert decoder.recognised.strategy == "block diffusion, L = 4, threshold 0.85, aligned"
    if threshold != 0.85:
        own = strategies.BlockDiffusion(4, threshold, aligned=True)
        decoder = Decoder.from_transformers(folder, strategy=own)
    for prompt in (*PROMPTS, [5], [5, 6, 7, 1]):
        result = decoder.generate(list(prompt), NEW_TOKENS)
        tokens, passes = aligned_blocks(model, prompt, 4, threshold, MASK, 4, False)
        assert (result.tokens, result.passes) == ([tokens[:NEW_TOKENS]], [passes])
    assert threshold == 0.85 or min(min(passes) for passes in result.passes) < 5  # some passes fixed several


def test_sdar_in_a_batch_in_chunks_and_on_pages(tmp_path: Path) -> None:
    """Requests whose prompts end anywhere in a block, short chunks of prefill, shared pages: the tokens stay."""
    model = reference("sdar")
    folder = write("sdar", tmp_path, model)
    prompts = [list(prompt) for prompt in (*PROMPTS, PROMPTS[2] + [1, 2, 3])]
    expected = [aligned_blocks(model, prompt, 4, 0.85, MASK, 4, False)[0][:NEW_TOKENS] for prompt in prompts]
    decoder = Decoder.from_transformers(folder, prefill_chunk=6)
    assert decoder.generate(prompts, NEW_TOKENS).tokens == expected
    from tidar_kernels.decoding.session import Session

    session = Session(decoder.model, decoder._step, 4, 64, page_size=8)
    requests = [session.requests[session.add(prompt, NEW_TOKENS)] for prompt in prompts]
    while session.requests:
        session.step()
    assert [request.tokens for request in requests] == expected


def test_fast_dllm(tmp_path: Path) -> None:
    model = reference("fast-dllm")
    folder = write("fast-dllm", tmp_path, model)
    decoder = Decoder.from_transformers(folder, mask_token_id=MASK)
    label = "block diffusion, L = 16, threshold 0.95, aligned, shifted, parts of 8"
    assert str(decoder.recognised) == f"Fast-dLLM v2 as Qwen2ForCausalLM, {label}, mask token 50"
    for prompt in (*PROMPTS, list(range(1, 17))):
        result = decoder.generate(list(prompt), NEW_TOKENS)
        tokens, passes = aligned_blocks(model, prompt, 16, 0.95, MASK, 8, True)
        assert (result.tokens, result.passes) == ([tokens[:NEW_TOKENS]], [passes])


# LLaDA 2.x.


@pytest.mark.parametrize("threshold", [0.95, 0.05])
def test_llada2(tmp_path: Path, threshold: float) -> None:
    """Its layers are read into those of GLM; the other side is its own, written down in plain PyTorch."""
    model = reference("llada-2")
    folder = write("llada-2", tmp_path, model)
    decoder = Decoder.from_transformers(folder, mask_token_id=MASK)
    label = "block diffusion, L = 32, threshold 0.95, aligned"
    assert str(decoder.recognised) == f"LLaDA 2.x as Glm4MoeForCausalLM, {label}, mask token 50"
    size = 32
    if threshold != 0.95:
        size, own = 8, strategies.BlockDiffusion(8, threshold, aligned=True)
        decoder = Decoder.from_transformers(folder, strategy=own, mask_token_id=MASK)
    for prompt in (PROMPTS[0], PROMPTS[2], list(range(1, 9))):
        result = decoder.generate(list(prompt), NEW_TOKENS)
        tokens, passes = aligned_blocks(model, prompt, size, threshold, MASK, size, False)
        assert (result.tokens, result.passes) == ([tokens[:NEW_TOKENS]], [passes])


def test_logits_of_llada2_are_those_of_its_own_layers(tmp_path: Path) -> None:
    """Every rule of the router has a say at these sizes: groups, the bias that only chooses, scaling, shared expert."""
    model = reference("llada-2")
    folder = str(write("llada-2", tmp_path, model))
    config = config_of(folder)
    system = recognised_system(config)
    assert system is not None
    read = read_checkpoint(folder, system, config)
    tokens = torch.randint(0, VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 40, 40)
    with torch.no_grad():
        found = read(input_ids=tokens, attention_mask=mask).logits
        expected = model(tokens, torch.arange(40)[None], mask).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# What is wrong, or cannot be had.


def changed(folder: Path, **keys: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("nemotron", {"mask_token_id": None}, "mask_token_id: expected a token id here, in config.json of Nemotron"),
        ("nemotron", {"mask_token_id": 64}, "mask_token_id: expected < vocab_size = 64, got 64"),
        ("nemotron", {"block_size": None}, "block_size: expected one here or in config.json of Nemotron"),
        ("nemotron", {"block_size": "32"}, "block_size: expected one here or in config.json of Nemotron"),
        ("nemotron", {"block_size": 0}, "block_size: expected one here or in config.json of Nemotron"),
        ("nemotron", {"mlp_bias": True}, "mlp_bias: expected none in config.json of NemotronLabsDiffusionModel, got"),
        ("nemotron", {"intermediate_size": 64}, "model: expected weights of the shapes that config.json of Nemotron"),
        ("nemotron", {"num_hidden_layers": 3}, "model: expected all weights of Nemotron-Labs-Diffusion, got none for"),
        ("nemotron", {"num_hidden_layers": 1}, "model: expected the weights of Ministral3ForCausalLM alone for Nem"),
        ("tidar", {}, "mask_token_id: expected a token id here, in config.json of TiDAR-LM or as its tokenizer's"),
        ("sdar", {"use_sliding_window": True}, "use_sliding_window: expected none in config.json of SDARForCausalLM"),
        ("fast-dllm", {}, "mask_token_id: expected a token id here, in config.json of Fast-dLLM v2"),
        ("llada-2", {}, "mask_token_id: expected a token id here, in config.json of LLaDA 2.x"),
        (
            "llada-2",
            {"use_bias": True, "mask_token_id": 9},
            "use_bias: expected none in config.json of LLaDA2MoeModelLM, got True",
        ),
        (
            "llada-2",
            {"use_qkv_bias": True, "mask_token_id": 9},
            "use_qkv_bias: expected none in config.json of LLaDA2MoeModelLM",
        ),
        (
            "llada-2",
            {"score_function": "softmax", "mask_token_id": 9},
            "score_function: expected sigmoid in config.json",
        ),
        ("llada-2", {"num_experts": 16, "mask_token_id": 9}, "model: expected weights of the shapes that config.json"),
        ("llada-2", {"num_hidden_layers": 3, "mask_token_id": 9}, "model: expected all weights of LLaDA 2.x, got none"),
        ("fast-dllm", {"bd_size": None, "mask_token_id": 9}, "block_size: expected one here or in config.json of Fast"),
    ],
)
def test_half_a_checkpoint_is_an_error_of_one_line(tmp_path: Path, name: str, keys: dict[str, Any], said: str) -> None:
    folder = changed(write(name, tmp_path, reference(name)), **keys)
    with pytest.raises(ValueError, match=r"^\w+: expected ") as error:
        Decoder.from_transformers(folder)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_tensors_that_are_missing_or_left_over_are_named(tmp_path: Path) -> None:
    folder = write("nemotron", tmp_path, reference("nemotron"))
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("diffusion_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"got none for lm_head\.weight$"):
        Decoder.from_transformers(folder)
    both = {**tensors, "diffusion_head.weight": head, "encoder.layers.0.mamba.a_log": head[:1].clone()}
    save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"alone for Nemotron-Labs-Diffusion, got .*layers\.0\.mamba\.a_log$"):
        Decoder.from_transformers(folder)


def test_an_adapter_of_another_rank_or_another_model_is_refused(tmp_path: Path) -> None:
    model = reference("nemotron")
    folder = write("nemotron", tmp_path / "model", model)
    write_adapter(tmp_path / "rank", model, "encoder.", ("o_proj",), rank=4, r=8)
    with pytest.raises(ValueError, match=r"o_proj\.lora_A: expected shape \[8, 64\], got \[4, 64\]$"):
        Decoder.from_transformers(folder, adapter=tmp_path / "rank")
    write_adapter(tmp_path / "other", model, "decoder.", ("o_proj",))
    with pytest.raises(ValueError, match=r"expected modules of the model, got decoder\.layers"):
        Decoder.from_transformers(folder, adapter=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"^path: expected a folder with adapter_config"):
        Decoder.from_transformers(folder, adapter=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^adapter: expected with a path alone"):
        Decoder.from_transformers(model, adapter=tmp_path / "rank")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DFlash": (
        {"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "dflash_config": {"target_layer_ids": [1, 9]}},
        "got DFlashDraftModel, a drafter of the DFlash family: it drafts from the hidden states of its target's layers",
    ),
    "DFlash2": (
        {"architectures": ["DFlash2DraftModel"], "model_type": "qwen3", "dflash_config": {"target_layer_ids": [1, 9]}},
        "got DFlash2DraftModel, a drafter of the DFlash family: it drafts by another rule than DFlash",
    ),
    "DiffusionGemma": (
        {"architectures": ["DiffusionGemmaForBlockDiffusion"], "model_type": "diffusion_gemma"},
        "got DiffusionGemmaForBlockDiffusion, DiffusionGemma: its canvas holds random tokens in the place of masks",
    ),
    "LLaDA with experts": (
        {"architectures": ["LLaDAMoEModelLM"], "model_type": "llada_moe", "auto_map": {"AutoModel": "m.M"}},
        "got LLaDAMoEModelLM, a diffusion model without blocks: all its tokens see each other in every pass",
    ),
    "LLaDA": (
        {"architectures": ["LLaDAModelLM"], "model_type": "llada", "auto_map": {"AutoModel": "m.M"}},
        "got LLaDAModelLM, a diffusion model without blocks",
    ),
    "hybrids": (
        {
            "architectures": ["Qwen3_5DLLMForCausalLM"],
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"],
        },
        "got Qwen3_5DLLMForCausalLM, a hybrid of attention and state-space layers: the state of such layers cannot",
    ),
    "unknown code": (
        {"architectures": ["MyForCausalLM"], "model_type": "mine", "auto_map": {"AutoModel": "m.M"}},
        "expected a class that transformers has, got MyForCausalLM, whose code comes with its checkpoint and is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config, said = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "m.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match=r"^model: expected ") as error:
        Decoder.from_transformers(tmp_path)
    assert said in str(error.value)


def test_an_ordinary_checkpoint_is_read_as_it_was(tmp_path: Path) -> None:
    model = reference("qwen3")
    folder = write("qwen3", tmp_path, model, tidar={"block_size": 4, "mask_token_id": MASK})
    decoder = Decoder.from_transformers(str(folder), strategy="isd")
    assert (decoder.recognised.system, decoder.block_size, decoder.mask_token_id) == ("transformers", 4, MASK)
    assert decoder.generate(PROMPTS[0], NEW_TOKENS).tokens == [autoregressive(model, PROMPTS[0])]
    assert Decoder.from_transformers(model, block_size=4, mask_token_id=MASK).recognised is None
    plain = Decoder.from_transformers(folder, mode="autoregressive")
    assert plain.recognised.strategy == "autoregressive"
    with pytest.raises(FileNotFoundError, match=r"^model_path: expected a folder or a name on the Hub"):
        Decoder.from_transformers(tmp_path / "no where")


def test_every_system_has_a_checkpoint_here() -> None:
    from tidar_kernels.integrations.transformers.checkpoints import SYSTEMS, recognised_system

    found = {system.name for published in PUBLISHED.values() if (system := recognised_system(published.config))}
    assert found == {system.name for system in SYSTEMS}
