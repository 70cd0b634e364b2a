"""The decoder and its loss with context parallelism: the gradients of one process, alone and under DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.distributed.processes import budgets, on_ranks
from tidar_kernels import KVCache
from tidar_kernels.distributed import ContextParallel
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.nn.loss import label_counts, tidar_loss
from tidar_kernels.patterns import Pattern, tidar_training
from tidar_kernels.testing import budget

SEQ_LEN, MASK = 37, 19
CONFIG = TransformerConfig(20, 32, 48, 2, 4, 2, 8, qk_norm=True, mask_token_id=MASK, block_size=4)
PATTERN = tidar_training(SEQ_LEN, 4, [19, 1, 17], [4, 0, 17])  # the last document predicts nothing
WAYS = ("plain", "ddp", "fsdp2", "fsdp2 bfloat16", "checkpointed")


class WithLoss(nn.Module):
    """What a trainer wraps. `cp` is a pattern, or one shared out; the tokens are those of the whole sequence."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.recompute = Transformer(CONFIG), recompute
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)

    def forward(self, tokens: Tensor, pattern: Pattern | ContextParallel, counts: Tensor | None) -> Any:
        whole = pattern.pattern if isinstance(pattern, ContextParallel) else pattern
        doubled = torch.cat([tokens, tokens.new_full((len(tokens), whole.q_len - SEQ_LEN), MASK)], dim=1)
        if isinstance(pattern, ContextParallel):
            doubled = pattern.shard(doubled, 1)
        if self.recompute:
            hidden = checkpoint(self.model, doubled, pattern, use_reentrant=False)
        else:
            hidden = self.model(doubled, pattern)
        loss = tidar_loss(hidden, self.model.embed_tokens.weight, tokens, pattern, counts=counts)
        return loss.loss, loss.autoregressive, loss.diffusion


def batch() -> Tensor:
    return torch.randint(0, MASK, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def reduced(module: nn.Module, loss: Tensor, how: str) -> dict[str, Tensor]:
    """Gradients of all ranks together, after a backward pass."""
    loss.backward()
    grads = {}
    for name, parameter in module.named_parameters():
        grad: Any = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        if how in ("plain", "checkpointed"):
            dist.all_reduce(grad)
        grads[name.removeprefix("module.")] = grad
    return grads


def wrapped(how: str) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    module = WithLoss(how == "checkpointed")
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(module)
    if how.startswith("fsdp2"):
        policy = MixedPrecisionPolicy()
        if how.endswith("bfloat16"):
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in module.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def gradients(ways: tuple[str, ...], data_parallel: int) -> dict[str, Any]:
    """Of each way, the gradients of all ranks and the two means; sequences are shared out over `data_parallel`."""
    world = dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (data_parallel, world // data_parallel), mesh_dim_names=("dp", "cp"))
    tokens, rank = batch(), mesh["dp"].get_local_rank()
    mine = tokens.chunk(data_parallel)[rank]
    counts = label_counts(tokens, PATTERN)
    found = {}
    for how in ways:
        module, cp = wrapped(how), ContextParallel(mesh["cp"], PATTERN, keep_gathered=how == "checkpointed")
        averaged = how not in ("plain", "checkpointed")
        given = None if data_parallel == 1 and not averaged else counts / (world if averaged else 1)
        loss, *means = module(mine, cp, given)
        found[how] = (reduced(module, loss, how), torch.stack(means).tolist())
    return found


def check(found: list[dict[str, Any]], means: bool) -> None:
    module = WithLoss()
    loss, *expected = module(batch(), PATTERN, None)
    loss.backward()
    plain = {name: parameter.grad for name, parameter in module.named_parameters()}
    exact_module = WithLoss().double()
    exact_loss, *exact_means = exact_module(batch(), PATTERN, None)
    exact_loss.backward()
    exact = {name: parameter.grad for name, parameter in exact_module.named_parameters()}
    half_module = WithLoss().bfloat16()
    half_module(batch(), PATTERN, None)[0].backward()
    half = {name: parameter.grad for name, parameter in half_module.named_parameters()}
    for ways in found:
        for how, (grads, both) in ways.items():
            budgets(grads, exact, half if how.endswith("bfloat16") else plain)
            if means and not how.endswith("bfloat16"):
                budget(torch.tensor(both), torch.stack(exact_means), torch.stack(expected), f"means of {how}")


def test_two_ranks_are_one_process() -> None:
    check(on_ranks(2, gradients, ("plain",), 1), means=True)


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "data_parallel"), [(2, 1), (4, 1), (4, 2)])
def test_every_way_of_training(world: int, data_parallel: int) -> None:
    check(on_ranks(world, gradients, WAYS, data_parallel), means=data_parallel == 1)


def errors() -> list[str]:
    cp = ContextParallel(dist.init_device_mesh("cpu", (1,)), PATTERN)
    model, cache = WithLoss().model, KVCache(num_layers=2, batch_size=1, num_kv_heads=2, head_dim=8, max_len=99)
    with pytest.raises(TypeError) as of_cache:
        model(torch.zeros(1, PATTERN.q_len, dtype=torch.int64), cp, cache)
    with pytest.raises(ValueError, match=r".") as of_hidden:
        tidar_loss(torch.zeros(1, 3, 32), torch.zeros(20, 32), batch()[:1], cp)
    return [str(of_cache.value), str(of_hidden.value)]


def test_errors() -> None:
    assert on_ranks(1, errors) == [
        [
            "pattern: expected a tidar_kernels.Pattern beside a cache, got ContextParallel",
            "hidden: expected shape [batch, 53, 32] for 53 of tidar_training(seq_len=37, block_size=4, 3 documents), "
            "got [1, 3, 32]",
        ]
    ]
