"""One of two processes of test_distributed.py: `python distributed_worker.py ddp|fsdp|fsdp_bf16|cp|trainer FOLDER`."""

from __future__ import annotations

import copy
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

from tidar_kernels.integrations.transformers import TiDARCollator, TiDARTrainer, compute_loss, count_labels

MASK, RANK = 39, int(os.environ["RANK"])
COLLATE = TiDARCollator(4, MASK)


def tiny(**more: Any) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="tidar",
        **more,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # logits that differ, so that a wrong one shows
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def corpus(count: int) -> list[dict[str, Any]]:
    """Documents of many lengths, so that the two processes have different numbers of labels."""
    draw = random.Random(0)
    lengths = [draw.randrange(6, 24) for _ in range(count)]
    return [{"input_ids": [3 + draw.randrange(30) for _ in range(n)], "prompt_length": 2} for n in lengths]


def shares() -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """This process's batch, that of both, and the labels of both."""
    documents = corpus(8)
    whole = COLLATE(documents)
    return COLLATE(documents[RANK::2]), whole, count_labels(whole)


def close(model: nn.Module, reference: nn.Module, tolerance: float) -> int:
    """How many gradients were compared with those of `reference`."""
    compared = 0
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        got = one.grad.full_tensor() if hasattr(one.grad, "full_tensor") else one.grad
        error = float((got.float() - other.grad).norm() / other.grad.norm().clamp(min=1e-6))
        assert error < tolerance, f"{name}: {error}"
        compared += 1
    return compared


def gradients(how: str) -> int:
    """Two steps, by the loss of an accumulated batch: gradients are averaged over processes, hence `* 2`."""
    reference, (own, whole, counts) = tiny(), shares()
    model: nn.Module = copy.deepcopy(reference)
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = dist.init_device_mesh("cpu", (2,))
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": half} if how == "fsdp_bf16" else {"mesh": mesh}
        for layer in model.model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
    compared = 0
    for _ in range(2):
        model.zero_grad()
        reference.zero_grad()
        (compute_loss(model, own, counts=counts).loss * 2).backward()
        compute_loss(reference, whole).loss.backward()
        compared += close(model, reference, 0.2 if how == "fsdp_bf16" else 1e-4)
    return compared


def context_parallel() -> int:
    """Both processes have the whole batch and share out its rows; one layer of two has a window, or none has."""
    mesh, (_, whole, _), compared = dist.init_device_mesh("cpu", (2,)), shares(), 0
    for more in ({}, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}):
        model, reference = tiny(**more), tiny(**more)
        found, expected = compute_loss(model, whole, cp=mesh), compute_loss(reference, whole)
        found.loss.backward()
        expected.loss.backward()
        total = found.loss.detach().clone()
        dist.all_reduce(total)
        for one, other in zip((total, *found[1:]), expected, strict=True):
            torch.testing.assert_close(one, other.detach())
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        compared += close(model, reference, 1e-4)
    return compared


def trained(folder: Path) -> int:
    """Four steps of the Trainer in two processes end with the weights of one process with batches twice as large."""
    documents = corpus(32)
    model = tiny()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, save_strategy="no",
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = TiDARTrainer(model=model, args=arguments, data_collator=COLLATE, train_dataset=documents)
    seen: list[list[dict[str, Any]]] = []
    own = trainer.get_batch_samples

    def noted(*args: Any) -> Any:
        batches, counts = own(*args)
        seen.append(batches)
        return batches, counts

    trainer.get_batch_samples = noted  # type: ignore[method-assign]
    trainer.train()
    assert dist.get_world_size() == 2
    reference = tiny()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batches in seen[:4]:
        both: list[Any] = [None, None]
        dist.all_gather_object(both, batches)
        counts = torch.stack([count_labels(batch) for part in both for batch in part]).sum(0)
        for part in both:
            for batch in part:
                compute_loss(reference, batch, counts=counts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved, start = 0, tiny()
    for one, other, first in zip(model.parameters(), reference.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        moved += not torch.equal(one, first)
    return moved


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        how, folder = sys.argv[1], Path(sys.argv[2])
        if how == "trainer":
            print("compared", trained(folder))
        else:
            print("compared", context_parallel() if how == "cp" else gradients(how))
    finally:
        dist.destroy_process_group()
