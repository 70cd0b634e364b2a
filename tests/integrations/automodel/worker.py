"""One of the processes of test_automodel.py: `python worker.py FOLDER`, in the environment of `make automodel`.

Automodel's recipe without its `setup`, which needs a GPU: its strategies, its step (`_run_train_optim_step`), its
meshes and models are the real ones; this file only hands it the model, the batches and the optimiser.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nemo_automodel.components.datasets.dllm.collate import DLLMCollator
from nemo_automodel.components.distributed.mesh import ParallelismSizes
from nemo_automodel.components.distributed.mesh_utils import _create_fsdp2_device_mesh, get_flat_mesh
from nemo_automodel.components.models.qwen3.model import Qwen3ForCausalLM
from nemo_automodel.recipes.dllm.strategy import get_dllm_strategy
from nemo_automodel.recipes.dllm.train_ft import DiffusionLMSFTRecipe
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from tidar_kernels.integrations.automodel import register
from tidar_kernels.integrations.transformers import TiDARCollator
from tidar_kernels.integrations.transformers.collator import batch_pattern
from tidar_kernels.patterns import Role

MASK, BATCHES, BATCH = 39, 2, 2
SETTINGS = {"block_size": 4, "block_length": 3, "ar_loss_alpha": 0.7, "clean_loss_weight": 0.3}
Found = dict[str, Tensor]


def tiny(kind: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attn_implementation": attention,
    }  # fmt: skip
    # Automodel's own class, and transformers'.
    model: Any = (
        Qwen3ForCausalLM(Qwen3Config(**shape, dtype=torch.float32))
        if kind == "qwen3"
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def examples() -> list[dict[str, list[int]]]:
    """Lengths that differ, so that most are padded; a prompt, an answer, and an unsupervised turn in between."""
    draw, made = random.Random(0), []
    for _ in range(2 * BATCHES * BATCH):
        n = draw.randrange(7, 20)
        loss = [0, 0] + [1] * (n - 2)
        loss[n // 2] = 0
        made.append(
            {"input_ids": [draw.randrange(3, 39) for _ in range(n)], "loss_mask": loss, "attention_mask": [1] * n}
        )
    return made


def recipe_of(mode: str, model: Any, mesh: Any) -> Any:
    recipe: Any = object.__new__(DiffusionLMSFTRecipe)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    vars(recipe).update(
        dllm_mode=mode, dllm_strategy=get_dllm_strategy(mode), dllm_eps=1e-3, dllm_block_size=None,
        dllm_half_life_ratio=None, mask_token_id=MASK, cfg={}, device_mesh=mesh, moe_mesh=None, model_parts=[model],
        pp_enabled=False, optimizer=[optimiser], lr_scheduler=None, te_fp8=None, timestamp=time.perf_counter(),
        step_scheduler=SimpleNamespace(step=0, epoch=0, grad_acc_steps=BATCHES),
        checkpointer=SimpleNamespace(maybe_wait_for_staging=lambda: None),
        distributed_config=SimpleNamespace(cp_size=mesh["cp"].size() if mesh else 1),
        dist_env=SimpleNamespace(device=torch.device("cpu"), world_size=mesh.size() if mesh else 1),
        _dllm_loss_buffer=[], _dflash_correct_per_pos_buffer=[], _dflash_count_per_pos_buffer=[],
    )  # fmt: skip
    recipe.dllm_loss_fn = recipe.dllm_strategy.create_loss_fn(SETTINGS)
    recipe.dllm_strategy.setup_extra(recipe)
    return recipe


def step(mode: str, model: Any, mesh: Any = None) -> Found:
    """The losses and gradients of one step of the recipe, over every example."""
    sharded = mesh is not None
    if sharded:
        for layer in model.model.layers:
            fully_shard(layer, mesh=get_flat_mesh(mesh, "dp_shard_cp"))
        fully_shard(model, mesh=get_flat_mesh(mesh, "dp_shard_cp"))
    recipe = recipe_of(mode, model, mesh)
    found: Found = {}

    def keep(optimiser: Any, *_: Any) -> None:
        for name, parameter in model.named_parameters():
            grad: Any = parameter.grad
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()

    recipe.optimizer[0].register_step_pre_hook(keep)
    groups, rank = (mesh["dp_shard"].size(), mesh["dp_shard"].get_local_rank()) if sharded else (1, 0)
    mine, collate = examples()[rank::groups], DLLMCollator()
    size = len(mine) // BATCHES
    batches = [collate(copy.deepcopy(mine[i * size : (i + 1) * size])) for i in range(BATCHES)]
    metrics = recipe._run_train_optim_step(batches, None).metrics
    return {
        **found,
        "loss": torch.tensor(metrics["loss"], dtype=torch.float64),
        "dllm_loss": torch.tensor(metrics["dllm_loss"], dtype=torch.float64),
    }


def dense(model: Any) -> Found:
    """What mode `tidar` is to compute, with a dense mask and whole logits, of all examples at once."""
    collator = TiDARCollator(SETTINGS["block_size"], MASK)
    collated = collator(
        [
            {
                "input_ids": one["input_ids"],
                "labels": [t if s else -100 for t, s in zip(one["input_ids"], one["loss_mask"], strict=True)],
            }
            for one in examples()
        ]
    )
    pattern = batch_pattern(collated)
    mask = torch.zeros(pattern.q_len, pattern.kv_len, dtype=model.dtype).masked_fill(~pattern.dense(), -torch.inf)
    out = model(
        input_ids=collated["input_ids"], position_ids=collated["position_ids"], attention_mask=mask[None, None],
        use_cache=False,
    )  # fmt: skip
    index = pattern.predicts.long()
    labels = torch.where(index >= 0, collated["labels"][0, index.clamp(min=0)], -100)
    losses = F.cross_entropy(out.logits[0], labels, reduction="none")
    masked = pattern.roles == int(Role.MASK)
    means = [losses[rows & (labels >= 0)].mean() for rows in (~masked, masked)]
    alpha = SETTINGS["ar_loss_alpha"]
    loss = (alpha * means[0] + means[1]) / (1 + alpha)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**found, "loss": loss.detach(), "dllm_loss": means[1].detach()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    register()
    dist.init_process_group("gloo")
    world, found = dist.get_world_size(), {}
    if world == 1:
        for kind in ("qwen3", "llama"):
            for mode in ("idlm", "tidar_idlm", "tidar"):
                found[kind, mode] = step(mode, tiny(kind))
            # By plain arithmetic: PyTorch's fused kernels read Automodel's float32 mask wrongly beside float64.
            found[kind, "idlm", "float64"] = step("idlm", tiny(kind, "eager").double())
            found[kind, "dense", "float32"] = dense(tiny(kind, "eager"))
            found[kind, "dense", "float64"] = dense(tiny(kind, "eager").double())
    else:
        for kind in ("qwen3", "llama"):
            for name, sizes in (("data", {}), ("context", {"cp_size": world})):
                mesh, _ = _create_fsdp2_device_mesh(ParallelismSizes(**sizes), world_size=world)
                for mode in ("tidar_idlm", "tidar"):
                    found[kind, mode, name] = step(mode, tiny(kind), mesh)
                if name == "data":
                    found[kind, "idlm", name] = step("idlm", tiny(kind), mesh)
    torch.save(found, folder / f"{world}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
