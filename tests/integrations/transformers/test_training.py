"""Training transformers models: the collator, the loss inside the model's forward pass, and the trainer."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import tidar_kernels.integrations.transformers  # noqa: E402, F401  (registers the attention)
from tidar_kernels.integrations.transformers.collator import TiDARCollator, batch_pattern, pack  # noqa: E402
from tidar_kernels.integrations.transformers.training import TiDARTrainer, compute_loss, count_labels  # noqa: E402

VOCAB, MASK, BLOCK = 40, 39, 4

# peft asks the newest transformers by a name that it deprecates.
old_name_in_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Documents of different lengths, with and without prompts: a first one that is all prompt but one token.
EXAMPLES: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9], "prompt_length": 4},
    {"input_ids": list(range(1, 14))},
    {"input_ids": [20, 21, 22, 23, 24, 25, 26], "labels": [-100, -100, 22, 23, -100, 25, 26]},
]


def tiny(kind: str = "Qwen3", implementation: str = "tidar", seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of two layers, of the real class."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": implementation,
    }
    config = getattr(transformers, f"{kind}Config")(**shape | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # logits that differ, so that a wrong one shows
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def batch_of(examples: list[dict[str, Any]] = EXAMPLES, **options: Any) -> dict[str, Any]:
    return TiDARCollator(BLOCK, MASK, **options)(examples)


# The collator.


def test_a_batch_is_its_documents_one_after_another() -> None:
    batch = batch_of()
    assert batch["document_lengths"] == (5, 13, 7)
    assert batch["prompt_lengths"] == (4, 0, 2)
    clean = [token for example in EXAMPLES for token in example["input_ids"]]
    assert batch["input_ids"].tolist() == [clean + [MASK] * (1 + 13 + 5)]
    positions = [*range(5), *range(13), *range(7), 4, *range(13), *range(2, 7)]
    assert batch["position_ids"].tolist() == [positions]
    ignored = {0, 1, 2, 3, 18, 19, 22}
    assert batch["labels"].tolist() == [[-100 if i in ignored else token for i, token in enumerate(clean)]]
    pattern = batch_pattern(batch)
    assert pattern is batch_pattern(dict(batch, document_lengths=[5, 13, 7]))  # as pinning memory hands it on
    assert (pattern.q_len, pattern.kv_len) == (44, 44)
    assert count_labels(batch).tolist() == [1 + 12 + 4, 1 + 13 + 4]


def test_prompts_as_labels_padding_and_tensors_mean_the_same() -> None:
    tokens = [3, 4, 5, 6, 7, 8]
    expected = batch_of([{"input_ids": tokens, "prompt_length": 2}])
    others = [
        {"input_ids": tokens, "labels": [-100, -100, *tokens[2:]]},
        {"input_ids": torch.tensor(tokens), "prompt_length": torch.tensor(2), "labels": torch.tensor(tokens)},
        {"input_ids": [0, 0, *tokens], "attention_mask": [0, 0] + [1] * 6, "labels": [-100] * 4 + tokens[2:]},
        {"input_ids": [*tokens, 0], "attention_mask": [1] * 6 + [0], "prompt_length": 2, "token_type_ids": [0] * 7},
    ]
    for example in others:
        batch = batch_of([example])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(expected[key])) for key in batch)


@pytest.mark.parametrize(
    ("too_long", "documents", "prompts"),
    [("truncate", (5, 5, 5), (4, 0, 2)), ("split", (5, 5, 5, 3, 5, 2), (4, 0, 0, 0, 2, 0))],
)
def test_long_examples(too_long: Any, documents: tuple[int, ...], prompts: tuple[int, ...]) -> None:
    batch = batch_of(seq_len=5, too_long=too_long)
    assert (batch["document_lengths"], batch["prompt_lengths"]) == (documents, prompts)
    packs = list(pack(EXAMPLES, 10, too_long))
    assert all(len(p["input_ids"]) <= 10 for p in packs)


def test_pieces_of_nothing_but_prompt_are_left_out() -> None:
    long = {"input_ids": list(range(1, 12)), "prompt_length": 7}
    assert batch_of([long], seq_len=4, too_long="split")["document_lengths"] == (4, 3)
    assert batch_of([long], seq_len=4, too_long="split")["prompt_lengths"] == (3, 0)
    assert batch_of([long, EXAMPLES[1]], seq_len=5, too_long="truncate")["document_lengths"] == (5,)
    with pytest.raises(ValueError, match=r"^examples: expected a token to predict, got none in 1 examples"):
        batch_of([long], seq_len=5, too_long="truncate")


def test_packs_are_the_examples_in_order() -> None:
    packs = list(pack(EXAMPLES * 2, 20))
    assert [p["document_lengths"] for p in packs] == [[5, 13], [7, 5], [13, 7]]
    whole, packed = batch_of(EXAMPLES * 2), batch_of(packs)
    assert all(torch.equal(torch.as_tensor(whole[key]), torch.as_tensor(packed[key])) for key in whole)


@pytest.mark.parametrize("multiple", [8, 16, 50])
def test_padded_rows_change_nothing(multiple: int) -> None:
    model, plain = tiny(), batch_of()
    for examples in (EXAMPLES, EXAMPLES[:1], [{"input_ids": list(range(1, 9))}]):
        plain, padded = batch_of(examples), batch_of(examples, pad_to_multiple_of=multiple)
        assert padded["labels"].shape[1] % multiple == padded["input_ids"].shape[1] % multiple == 0
        assert padded["input_ids"].shape[1] - plain["input_ids"].shape[1] < 3 * multiple
        for one, other in zip(compute_loss(model, plain), compute_loss(model, padded), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_collates_in_the_workers_of_a_loader() -> None:
    loader = torch.utils.data.DataLoader(
        EXAMPLES * 2, batch_size=3, collate_fn=TiDARCollator(BLOCK, MASK), num_workers=1, multiprocessing_context="fork"
    )
    first, second = loader
    assert batch_pattern(first) is batch_pattern(second)
    assert torch.equal(first["input_ids"], batch_of()["input_ids"])


BAD_EXAMPLES = [
    ([1, 2], TypeError, r"^examples\[0\]: expected a mapping with input_ids, got list"),
    ({"text": "a"}, ValueError, r"^examples\[0\]: expected input_ids, got text"),
    ({"input_ids": []}, ValueError, r"^examples\[0\]: expected at least one token, got none"),
    ({"input_ids": [[1, 2]]}, TypeError, r"^examples\[0\]\.input_ids: expected a list of ints or an int tensor \[n\]"),
    ({"input_ids": [1.5, 2]}, TypeError, r"^examples\[0\]\.input_ids: expected a list of ints .* got torch\.float32"),
    ({"input_ids": [1, 2], "prompt_length": 3}, ValueError, r"prompt_length: expected at most its 2 tokens, got 3"),
    ({"input_ids": [1, 2], "prompt_length": -1}, ValueError, r"prompt_length: expected >= 0, got -1"),
    ({"input_ids": [1, 2], "labels": [1]}, ValueError, r"labels: expected 2 entries like input_ids, got 1"),
    (
        {"input_ids": [1, 2], "labels": [2, -100]},
        ValueError,
        r"labels: expected input_ids, not shifted, or -100, got 2",
    ),
    ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, ValueError, r"attention_mask: expected zeros at the ends"),
    ({"input_ids": [1, MASK]}, ValueError, r"^examples: expected text without the mask token 39, got it to predict"),
    ({"input_ids": [1, 2], "document_lengths": [1, 2]}, ValueError, r"document_lengths: expected a sum of 2 tokens"),
    ({"input_ids": [1, 2], "document_lengths": [1, 1], "prompt_lengths": [0]}, ValueError, r"one for each of 2 docu"),
    ({"input_ids": list(range(9))}, ValueError, r"^examples\[0\]: expected at most seq_len = 8 tokens, got 9 .*split"),
]


@pytest.mark.parametrize(("example", "error", "message"), BAD_EXAMPLES)
def test_bad_examples_are_refused(example: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batch_of([example], seq_len=8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_token_id": None}, TypeError, r"^mask_token_id: expected an int, got None \(add_mask_token"),
        ({"mask_token_id": -1}, ValueError, r"^mask_token_id: expected >= 0, got -1"),
        ({"block_size": 0}, ValueError, r"^block_size: expected >= 1, got 0"),
        ({"seq_len": 0}, ValueError, r"^seq_len: expected >= 1, got 0"),
        ({"too_long": "wrap"}, ValueError, r'^too_long: expected "error", "truncate" or "split", got \'wrap\''),
        ({"pad_to_multiple_of": 0}, ValueError, r"^pad_to_multiple_of: expected >= 1, got 0"),
    ],
)
def test_bad_collators_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TiDARCollator(**{"block_size": BLOCK, "mask_token_id": MASK} | options)
    with pytest.raises(ValueError, match=r"^seq_len: expected >= 1, got 0"):
        pack([], 0)


# The loss.


def plain_loss(model: Any, examples: list[dict[str, Any]], alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The objective document by document, as the paper writes it: a dense mask each, whole logits, eager attention."""
    ar, diffusion = [], []
    for example in examples:
        tokens = torch.tensor(example["input_ids"])
        labels = torch.tensor(example.get("labels", example["input_ids"]))
        known = (labels != -100).nonzero()
        prompt, n = example.get("prompt_length", int(known[0])), len(tokens)
        rows = torch.cat([torch.arange(n), torch.arange(prompt, n)])
        clean = torch.arange(len(rows)) < n
        block = torch.where(clean, -1, (rows - prompt) // BLOCK)
        start = prompt + block * BLOCK
        seen = torch.where(
            clean[:, None],
            clean & (rows <= rows[:, None]),
            (clean & (rows < start[:, None])) | (~clean & (block == block[:, None])),
        )
        mask = torch.zeros(1, 1, *seen.shape, dtype=model.dtype).masked_fill(~seen, float("-inf"))
        inputs = torch.cat([tokens, torch.full((n - prompt,), MASK)])
        logits = model(input_ids=inputs[None], attention_mask=mask, position_ids=rows[None], use_cache=False).logits[0]
        wanted = torch.where(torch.arange(n) < prompt, -100, labels)
        ar.append(F.cross_entropy(logits[: n - 1], wanted[1:], ignore_index=-100, reduction="none")[wanted[1:] >= 0])
        diffusion.append(F.cross_entropy(logits[n:], wanted[prompt:], reduction="none")[wanted[prompt:] >= 0])
    means = torch.cat(ar).mean(), torch.cat(diffusion).mean()
    return (alpha * means[0] + means[1]) / (1 + alpha), *means


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], init_lora_weights=False,
        trainable_token_indices={"embed_tokens": [MASK]},
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def with_bias(model: Any) -> Any:
    head = nn.Linear(32, VOCAB)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    return model


MODELS: dict[str, Any] = {
    "qwen3": lambda how: tiny(implementation=how),
    "tied": lambda how: tiny(implementation=how, tie_word_embeddings=True),
    "softcap": lambda how: tiny("Gemma2", how, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
    "scaled": lambda how: tiny("Granite", how, logits_scaling=4.0),
    "bias": lambda how: with_bias(tiny(implementation=how)),
    "lora": lambda how: with_lora(tiny(implementation=how)),
    "moe": lambda how: tiny("Qwen3Moe", how, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
}


@old_name_in_peft
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_the_formulas(kind: str, alpha: float) -> None:
    """Packed documents with prompts, against each document by itself under a dense mask with whole logits."""
    model, reference = MODELS[kind]("tidar"), MODELS[kind]("eager")
    got = compute_loss(model, batch_of(), alpha, chunk_size=7)
    got.loss.backward()
    expected = plain_loss(reference, EXAMPLES, alpha)
    expected[0].backward()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    compared = 0
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            error = (one.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-6)
            assert error < 1e-4, f"{name}: {error}"
            compared += 1
    assert compared > 5


def test_a_compiled_model_is_one_graph_a_layout() -> None:
    """The same documents' lengths with other tokens run the same graph, with their own labels."""
    model, reference = tiny(), tiny()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for shift, stance in ((0, "default"), (5, "fail_on_recompile")):
        batch = batch_of([{"input_ids": [1 + (token + shift) % 30 for token in e["input_ids"]]} for e in EXAMPLES])
        with torch.compiler.set_stance(stance):
            got = compute_loss(compiled, batch).loss
        expected = compute_loss(reference, batch).loss
        torch.testing.assert_close(got, expected)
        model.zero_grad()
        reference.zero_grad()
        got.backward()
        expected.backward()
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks
def test_a_compiled_loss() -> None:
    """The whole of it in a compiled function: the forward pass is compiled, the rest runs beside it."""
    model, reference, batch = tiny(), tiny(), batch_of()
    expected = compute_loss(reference, batch).loss
    expected.backward()
    compiled = torch.compile(lambda given: compute_loss(model, given).loss, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        got = compiled(batch)
        torch.testing.assert_close(got.detach(), expected.detach())
        got.backward()
        del got
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_threads_do_not_meet() -> None:
    """Losses and ordinary forward passes of one model at the same time are what they are alone."""
    model, batches = tiny().eval(), [batch_of(), batch_of(EXAMPLES[1:2])]
    ids = torch.randint(1, VOCAB, (2, 9))
    with torch.no_grad():
        losses_alone = [compute_loss(model, batch).loss for batch in batches]
        alone = model(ids, labels=ids)
    wrong: list[str] = []

    def lose(index: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(compute_loss(model, batches[index]).loss, losses_alone[index]):
                    wrong.append(f"loss {index}")

    def run() -> None:
        for _ in range(40):
            with torch.no_grad():
                out = model(ids, labels=ids)
                if not (torch.equal(out.logits, alone.logits) and torch.equal(out.loss, alone.loss)):
                    wrong.append("logits")

    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(lose, 0), pool.submit(lose, 1), pool.submit(run), pool.submit(run)]
        for each in work:
            each.result()
    assert not wrong
    assert not {"forward", "_loss_function"} & (vars(model).keys() | vars(model.lm_head).keys())


def test_a_mask_of_ones_in_a_batch_opens_no_document() -> None:
    """The pattern says what is seen, whatever a wrapper of the collator puts beside it."""
    model, batch = tiny(), batch_of()
    ones = {"attention_mask": torch.ones_like(batch["input_ids"])}
    assert torch.equal(compute_loss(model, batch | ones).loss, compute_loss(model, batch).loss)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_autocast_where_keys_stay_float32(kind: str) -> None:
    model, batch = tiny(kind), batch_of()
    expected = compute_loss(model, batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = compute_loss(model, batch).loss
    half.backward()
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0)


def test_the_model_is_itself_again_afterwards() -> None:
    model, batch = tiny(), batch_of()
    inputs = torch.randint(0, VOCAB, (2, 9))
    before = model(input_ids=inputs, labels=inputs)
    compute_loss(model, batch)
    with pytest.raises(ValueError, match="alpha"):
        compute_loss(model, batch, -1.0)
    after = model(input_ids=inputs, labels=inputs)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert not {"forward", "_loss_function"} & (vars(model).keys() | vars(model.lm_head).keys())


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widest = tiny(), 0
    linear = F.linear

    def watched(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal widest
        out = linear(rows, weight, bias)
        widest = max(widest, out.numel() if out.shape[-1] == VOCAB else 0)
        return out

    monkeypatch.setattr(F, "linear", watched)
    compute_loss(model, batch_of(), chunk_size=8).loss.backward()
    model(input_ids=torch.ones(1, 9, dtype=torch.int64))
    assert widest == 9 * VOCAB  # that of the plain call, which shows that the watch works


def test_no_row_sees_its_label() -> None:
    """Whatever stands at a position, all rows that predict it give the same bits, in the whole model."""
    model, batch = tiny().eval(), batch_of()
    pattern, tokens = batch_pattern(batch), batch["input_ids"].expand(25, -1).clone()
    for at in range(25):
        tokens[at, at] = (tokens[at, at] + 1 + at) % MASK
    with torch.no_grad():
        rest = {"position_ids": batch["position_ids"], "tidar_pattern": pattern, "use_cache": False}
        before = model(input_ids=batch["input_ids"].expand(25, -1), **rest).logits
        after = model(input_ids=tokens, **rest).logits
    moved = (before != after).any(-1)
    for at in range(25):
        rows = (pattern.predicts == at).nonzero().flatten()
        assert not moved[at, rows].any(), f"rows {rows.tolist()} see token {at}"
    assert moved.any(1).sum() == 25


def test_gradient_checkpointing_and_autocast_and_evaluation() -> None:
    model, batch = tiny().train(), batch_of()
    expected = compute_loss(model, batch)
    expected.loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    # Its older name is deprecated in the newest transformers, the newer one missing in the oldest.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again = compute_loss(model, batch)
    again.loss.backward()
    assert torch.equal(expected.loss, again.loss)
    assert all(torch.equal(one, other.grad) for one, other in zip(grads, model.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(compute_loss(model.eval(), batch).loss, expected.loss)
    with torch.autocast("cpu", torch.bfloat16):
        half = compute_loss(model, batch).loss
    half.backward()
    torch.testing.assert_close(half, expected.loss, rtol=0.05, atol=0)
    low = tiny().to(torch.bfloat16)
    compute_loss(low, batch).loss.backward()
    assert low.lm_head.weight.grad.dtype == torch.bfloat16


def test_accumulated_batches_add_up_to_one() -> None:
    model, batches = tiny(), [batch_of([example]) for example in EXAMPLES]
    compute_loss(model, batch_of()).loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    counts = torch.stack([count_labels(batch) for batch in batches]).sum(0)
    assert torch.equal(counts, count_labels(batch_of()))
    for batch in batches:
        compute_loss(model, batch, counts=counts).loss.backward()
    for one, other in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one, rtol=1e-4, atol=1e-6)


def test_wrong_models_and_batches_are_refused() -> None:
    batch = batch_of()
    with pytest.raises(TypeError, match=r"^model: expected a causal language model of transformers, got Linear"):
        compute_loss(nn.Linear(2, 2), batch)
    with pytest.raises(TypeError, match=r"^model: expected a causal language model of transformers, got Qwen3Model"):
        compute_loss(tiny().model, batch)
    with pytest.raises(ValueError, match=r'^model: expected attn_implementation="tidar", got \'sdpa\''):
        compute_loss(tiny(implementation="sdpa"), batch)
    with pytest.raises(ValueError, match=r"^batch: expected tokens below the model's vocab_size = 39, got 39"):
        compute_loss(tiny(vocab_size=39), batch)
    with pytest.raises(ValueError, match=r"^batch: expected a batch of TiDARCollator, got one without block_size, doc"):
        compute_loss(tiny(), {"input_ids": batch["input_ids"]})

    class NoLoss(type(tiny())):  # type: ignore[misc]
        def forward(self, labels: Any = None, **inputs: Any) -> Any:
            return super().forward(**inputs)

    class OtherLogits(type(tiny())):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            outputs = super().forward(**inputs)
            outputs.logits = outputs.logits.clamp(max=30)
            return outputs

    model = tiny()
    model.__class__ = OtherLogits
    with pytest.raises(ValueError, match=r"^model: expected logits .* got OtherLogits, which shapes them otherwise"):
        compute_loss(model, batch)
    model.__class__ = NoLoss
    with pytest.raises(ValueError, match=r"^model: expected a forward pass that calls lm_head and then loss_function"):
        compute_loss(model, batch)


# Loops: Trainer, Accelerate, LoRA, FSDP2.


def corpus(count: int = 64) -> list[dict[str, Any]]:
    """Sentences of a small grammar, each with a prompt of two tokens: counting up in steps of 1, 2 or 3."""
    draw = random.Random(0)
    examples = []
    for _ in range(count):
        start, step = draw.randrange(3, 20), draw.randrange(1, 4)
        tokens = [3 + (start + step * i) % 30 for i in range(draw.randrange(8, 20))]
        examples.append({"input_ids": tokens, "prompt_length": 2})
    return examples


def trainer(path: Path, model: Any, collator: Any = None, **options: Any) -> TiDARTrainer:
    own = {name: options.pop(name) for name in ("alpha", "compute_metrics", "callbacks") if name in options}
    arguments = {
        "output_dir": str(path),
        "max_steps": 50,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TiDARTrainer(
        model=model,
        args=transformers.TrainingArguments(**arguments | options),
        data_collator=collator or TiDARCollator(BLOCK, MASK),
        train_dataset=corpus(),
        eval_dataset=corpus(6),
        **own,
    )


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """No progress bars on standard error."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def losses(run: TiDARTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_fifty_steps_a_checkpoint_and_a_resumed_run(tmp_path: Path) -> None:
    """The loss falls; what was saved opens in plain transformers; the run resumed half-way ends bit for bit alike."""
    run = trainer(tmp_path / "a", tiny(), save_strategy="steps", save_steps=25)
    run.train()
    curve = losses(run)
    assert len(curve) == 10
    assert curve[-1] < 0.6 * curve[0]
    evaluated = run.evaluate()["eval_loss"]
    assert evaluated == pytest.approx(compute_loss(run.model, run.data_collator(corpus(6))).loss.item(), rel=1e-5)

    saved = tmp_path / "a" / "checkpoint-50"
    assert (saved / "model.safetensors").is_file()
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")
    assert same_weights(plain, run.model)
    inputs = torch.randint(0, MASK, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(plain(inputs).logits, run.model.eval()(inputs).logits, rtol=1e-4, atol=1e-4)

    resumed = trainer(tmp_path / "b", tiny(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-25"))
    assert resumed.state.global_step == 50
    assert same_weights(resumed.model, run.model)
    assert losses(resumed)[5:] == curve[5:]


def test_trainer_accumulates_as_one_large_batch(tmp_path: Path) -> None:
    """One step on eight documents of different lengths is the same step, however it is cut into batches."""
    models, logged = [], []
    for size in (8, 2, 1):
        options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "logging_steps": 1}
        run = trainer(
            tmp_path, tiny(), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **options
        )
        run.train()
        models.append(run.model)
        logged += losses(run)
    start = tiny()
    assert not torch.equal(start.lm_head.weight, models[0].lm_head.weight)
    for model in models[1:]:
        for one, other in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert logged == pytest.approx([logged[0]] * 3, rel=1e-4)


def test_trainer_keeps_prompts_and_evaluates_both_means(tmp_path: Path) -> None:
    """`prompt_length` is no argument of the model, and yet not dropped on the way to the collator."""
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {name: float(v.mean()) for name, v in zip(("ar", "diffusion"), prediction.predictions, strict=True)}

    run = trainer(tmp_path, tiny(), compute_metrics=metrics, alpha=0.5, per_device_eval_batch_size=3)
    batches = list(run.get_train_dataloader())
    assert {prompt for batch in batches for prompt in batch["prompt_lengths"]} == {2}
    report = run.evaluate()
    assert len(seen[0][0]) == 2
    with torch.no_grad():
        expected = [compute_loss(run.model, run.data_collator(corpus(6)[i : i + 3]), 0.5) for i in (0, 3)]
    assert report["eval_ar"] == pytest.approx(sum(float(e.autoregressive) for e in expected) / 2, rel=1e-5)
    assert report["eval_loss"] == pytest.approx(sum(float(e.loss) for e in expected) / 2, rel=1e-5)


@old_name_in_peft
def test_trainer_trains_lora_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", trainable_token_indices={"embed_tokens": [MASK]})
    run = trainer(tmp_path, peft.get_peft_model(tiny(), config), max_steps=20, learning_rate=2e-2)
    base = {name: p.clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    assert all(torch.equal(base[name], dict(run.model.named_parameters())[name]) for name in base)
    run.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter"))
    batch = batch_of()
    with torch.no_grad():
        torch.testing.assert_close(compute_loss(again.eval(), batch).loss, compute_loss(run.model.eval(), batch).loss)


def test_a_loop_with_accelerate() -> None:
    """Documents of different lengths over accumulated steps: each update is that of one large batch."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = torch.utils.data.DataLoader(corpus(8), batch_size=2, collate_fn=TiDARCollator(BLOCK, MASK))
    reference = copy.deepcopy(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = list(loader)
    for group in (batches[:2], batches[2:]):
        counts = torch.stack([count_labels(batch) for batch in group]).sum(0)
        for batch in group:
            with accelerator.accumulate(model):
                loss = compute_loss(model, batch, counts=counts).loss
                accelerator.backward(loss * accelerator.gradient_accumulation_steps)  # which it divides by
                optimizer.step()
                optimizer.zero_grad()
    plain = torch.optim.SGD(reference.parameters(), lr=1.0)
    for group in (corpus(8)[:4], corpus(8)[4:]):
        compute_loss(reference, TiDARCollator(BLOCK, MASK)(group)).loss.backward()
        plain.step()
        plain.zero_grad()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_sharded_parameters_are_whole_when_they_are_read(tmp_path: Path) -> None:
    """FSDP2 in a world of one: parameters are DTensors outside of the forward pass, and gradients come out as such."""
    from torch.distributed.fsdp import fully_shard

    model, reference, batch = tiny(), tiny(), batch_of()
    compute_loss(reference, batch).loss.backward()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        got = compute_loss(model, batch)
        got.loss.backward()
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert type(one.grad).__name__ == "DTensor"
            torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_trainer_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data_collator: expected a mask_token_id below the model's vocab_size = 39"):
        trainer(tmp_path, tiny(vocab_size=39))
    with pytest.raises(TypeError, match=r"^data_collator: expected a TiDARCollator, got function"):
        trainer(tmp_path, tiny(), transformers.default_data_collator)
    with pytest.raises(ValueError, match=r"^args: expected no label_smoothing_factor"):
        trainer(tmp_path, tiny(), label_smoothing_factor=0.1)
    sdpa = trainer(tmp_path, tiny(implementation="sdpa"))
    with pytest.raises(ValueError, match=r'^model: expected attn_implementation="tidar", got \'sdpa\''):
        sdpa.train()
