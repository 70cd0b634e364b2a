"""Loops over transformers models: the trainer, Accelerate, LoRA, sharded parameters."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import tidar_kernels.integrations.transformers  # noqa: E402, F401  (registers the attention)
from tests.integrations.transformers.training_toys import BLOCK, MASK, batch_of, old_name_in_peft, tiny  # noqa: E402
from tidar_kernels.integrations.transformers.collator import TiDARCollator  # noqa: E402
from tidar_kernels.integrations.transformers.training import TiDARTrainer, compute_loss, count_labels  # noqa: E402


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
    own = {
        name: options.pop(name)
        for name in ("alpha", "compute_metrics", "callbacks", "context_parallel")
        if name in options
    }
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


def test_trainer_shares_batches_out_over_whole_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^context_parallel: expected a divisor of 1 processes, got 2$"):
        trainer(tmp_path, tiny(), context_parallel=2)
    with pytest.raises(ValueError, match=r"^context_parallel: "):
        trainer(tmp_path, tiny(), context_parallel=0)
    run = trainer(tmp_path, tiny())
    for sizes, message in (
        ({"cp_size": 2}, r"^args.parallelism_config: expected cp_size = 1 .*, got 2$"),
        ({"sp_size": 2}, r"^args.parallelism_config: expected sp_size = 1 .*, got 2$"),
        ({"tp_size": 2}, r"^context_parallel: expected 1 beside tensor parallelism, got 2$"),
    ):
        of_accelerate = SimpleNamespace(**{"cp_size": 1, "sp_size": 1, "tp_size": 1} | sizes)
        monkeypatch.setattr(type(run.accelerator), "parallelism_config", of_accelerate)
        with pytest.raises(ValueError, match=message):
            run._shared_batches(2)


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
