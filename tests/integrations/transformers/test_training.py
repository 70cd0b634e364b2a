"""The loss of transformers models, inside the forward pass of a model of whatever kind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import tidar_kernels.integrations.transformers  # noqa: E402, F401  (registers the attention)
from tests.integrations.transformers.training_toys import BLOCK, EXAMPLES, MASK, VOCAB, batch_of, old_name_in_peft, tiny  # noqa: E402
from tidar_kernels.integrations.transformers.collator import batch_pattern  # noqa: E402
from tidar_kernels.integrations.transformers.training import compute_loss, count_labels  # noqa: E402


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
