"""One of two processes of test_distributed.py: `python distributed_worker.py HOW FOLDER`."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, TrainingArguments

from tidar_kernels.integrations.transformers import TiDARCollator, TiDARTrainer, compute_loss, count_labels
from tidar_kernels.testing import budget

MASK, RANK = 39, int(os.environ["RANK"])
COLLATE = TiDARCollator(4, MASK)


def tiny(kind: str = "Qwen3", **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="tidar",
        **more,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
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


def of_one_process(batch: dict[str, Any], dtype: torch.dtype, *made: Any, **more: Any) -> dict[str, Tensor]:
    """The gradients of `tiny(*made, **more)` in a dtype, for the whole batch."""
    model = tiny(*made, **more).to(dtype)
    compute_loss(model, batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def close(model: nn.Module, batch: dict[str, Any], *made: Any, dtype: torch.dtype = torch.float32, **more: Any) -> int:
    """How many gradients were compared: their errors are at most twice those of one process in that dtype."""
    plain, exact = (of_one_process(batch, one, *made, **more) for one in (dtype, torch.float64))
    compared = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad: Any = parameter.grad
        got = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        name = name.removeprefix("module.")
        budget(got, exact[name], plain[name], name)
        compared += 1
    assert compared == len(exact)
    return compared


def gradients(how: str) -> int:
    """Two steps, by the loss of an accumulated batch: gradients are averaged over processes, hence `* 2`."""
    own, whole, counts = shares()
    model: nn.Module = tiny()
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
        (compute_loss(model, own, counts=counts).loss * 2).backward()
        compared += close(model, whole, dtype=torch.bfloat16 if how == "fsdp_bf16" else torch.float32)
    return compared


def context_parallel() -> int:
    """Both processes have the whole batch and share out its rows; one layer of two has a window, or none has."""
    mesh, (_, whole, _), compared = dist.init_device_mesh("cpu", (2,)), shares(), 0
    for more in ({}, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}):
        model, reference = tiny(**more), tiny(**more)
        found, expected = compute_loss(model, whole, cp=mesh), compute_loss(reference, whole)
        found.loss.backward()
        total = found.loss.detach().clone()
        dist.all_reduce(total)
        for one, other in zip((total, *found[1:]), expected, strict=True):
            torch.testing.assert_close(one, other.detach())
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        compared += close(model, whole, **more)
    return compared


def tensor_parallel(folder: Path) -> int:
    """Models sharded by the plan that transformers has for them, loaded by every process from one checkpoint."""
    from transformers.distributed import DistributedConfig

    compared = 0
    for kind in ("Qwen3", "Llama", "Qwen2", "Mistral"):
        there = folder / kind
        tiny(kind).save_pretrained(there)  # the first process does
        dist.barrier()
        model: Any = AutoModelForCausalLM.from_pretrained(
            there, attn_implementation="tidar", distributed_config=DistributedConfig(tp_size=2)
        )
        assert model.model.layers[0].self_attn.k_proj.weight.to_local().shape[0] == 8  # one head of two
        reference, (_, whole, _) = tiny(kind), shares()
        found, expected = compute_loss(model, whole), compute_loss(reference, whole)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.detach(), other.detach())
        found.loss.backward()
        compared += close(model, whole, kind)
    return compared


class Stream(IterableDataset[dict[str, Any]]):
    def __init__(self, documents: list[dict[str, Any]]) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.documents)


def a_trainer(folder: Path, model: nn.Module, documents: Any, context: int = 1, **more: Any) -> TiDARTrainer:
    arguments: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 1, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TiDARTrainer(
        model=model, args=TrainingArguments(output_dir=str(folder), **arguments | more), data_collator=COLLATE,
        train_dataset=documents, eval_dataset=corpus(6), context_parallel=context,
    )  # fmt: skip


def trained(
    folder: Path,
    context: int = 1,
    *,
    documents: Any = None,
    before: Callable[[TiDARTrainer], Any] = lambda trainer: None,
    **more: Any,
) -> int:
    """Steps of the Trainer, in which `context` processes share each batch, end with the weights of one process."""
    model = tiny()
    trainer = a_trainer(folder, model, corpus(32) if documents is None else documents, context, **more)
    before(trainer)
    seen: list[list[dict[str, Any]]] = []
    own = trainer.get_batch_samples

    def noted(*args: Any) -> Any:
        batches, counts = own(*args)
        seen.append(batches)
        return batches, counts

    trainer.get_batch_samples = noted  # type: ignore[method-assign]
    trainer.train()
    steps = trainer.state.global_step
    assert steps > 3
    references = [tiny(), tiny().double()]
    optimizers = [torch.optim.SGD(reference.parameters(), lr=0.1) for reference in references]
    for batches, log in zip(seen[:steps], [log for log in trainer.state.log_history if "loss" in log], strict=True):
        everybodys: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybodys, batches)
        own_batches = everybodys[::context]
        for rank, part in enumerate(everybodys):
            shared = own_batches[rank // context]
            assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(part, shared, strict=True))
        assert not any(torch.equal(own_batches[0][0]["input_ids"], one[0]["input_ids"]) for one in own_batches[1:])
        counts = torch.stack([count_labels(batch) for part in own_batches for batch in part]).sum(0)
        for reference, optimizer in zip(references, optimizers, strict=True):
            total = 0.0
            for batch in itertools.chain(*own_batches):
                loss = compute_loss(reference, batch, counts=counts).loss
                loss.backward()
                total += float(loss.detach())
            assert abs(log["loss"] - total) < 2e-4  # what is logged is rounded
            optimizer.step()
            optimizer.zero_grad()
    moved = 0
    everyone = (model, tiny(), *references)
    for one, first, plain, exact in zip(*(one.parameters() for one in everyone), strict=True):
        # Of what training changed, for the weights themselves hide it.
        budget(*(end.detach().double() - first.detach() for end in (one, exact, plain)))
        moved += not torch.equal(one, first)
    if context == dist.get_world_size():
        expected = compute_loss(model, COLLATE(corpus(6))).loss.detach()
        torch.testing.assert_close(torch.tensor(trainer.evaluate()["eval_loss"]), expected)
    return moved


def evaluated(folder: Path) -> int:
    """Whatever was evaluated before, by whom and how often, all processes train together."""

    def before(trainer: TiDARTrainer) -> None:
        a_trainer(folder, trainer.model, corpus(8)).evaluate()
        trainer.evaluate()
        trainer.predict(corpus(6))

    compared = trained(folder, before=before)
    best = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    for more in ({"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}, best):
        trainer = a_trainer(folder, tiny(), corpus(32), max_steps=1, eval_strategy="steps", eval_steps=1, **more)
        for _ in range(3):
            trainer.evaluate()
            trainer.train()
            together(trainer.model)
        compared += 1
    trainer = a_trainer(folder, torch.compile(tiny(), backend="eager"), corpus(32), max_steps=1)  # type: ignore[arg-type]
    trainer.evaluate()
    trainer.train()
    together(trainer.model)
    return compared


def together(model: nn.Module) -> None:
    """All processes have the same weights."""
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    firsts = weights.clone()
    dist.broadcast(firsts, 0)
    assert torch.equal(weights, firsts)


def refused(folder: Path) -> int:
    """Processes that would train each for itself, or wait for each other, are refused before the first step."""
    trainer = a_trainer(folder, tiny(), corpus(32))
    trainer._wrap_model = _marked  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"^model: expected one whose gradients are averaged over 2 processes, got"):
        trainer.train()
    for option, value in (("dispatch_batches", True), ("even_batches", False)):
        with pytest.raises(ValueError, match=rf"^args.accelerator_config: expected {option} = .*, got {value}$"):
            a_trainer(folder, tiny(), corpus(32), accelerator_config={option: value})
    return 100


def _marked(model: nn.Module, *args: Any) -> nn.Module:
    model._is_accelerate_prepared = True  # type: ignore[assignment]
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        how, folder = sys.argv[1], Path(sys.argv[2])
        run = {
            "cp": context_parallel,
            "tp": lambda: tensor_parallel(folder),
            "trainer": lambda: trained(folder),
            "trainer_cp": lambda: trained(folder, context=2),
            "trainer_uneven": lambda: trained(
                folder, documents=corpus(29), max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=3
            ),
            "trainer_stream": lambda: trained(folder, documents=Stream(corpus(33))),
            "trainer_stream_cp": lambda: trained(folder, context=2, documents=Stream(corpus(33))),
            "trainer_evaluated": lambda: evaluated(folder),
            "trainer_refused": lambda: refused(folder),
        }.get(how, lambda: gradients(how))
        print("compared", run())
    finally:
        dist.destroy_process_group()
