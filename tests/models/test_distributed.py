"""The decoder and its loss over two processes: DDP and FSDP2, whose gradients are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.nn.loss import label_counts, tidar_loss
from tidar_kernels.patterns import Pattern, tidar_training
from tidar_kernels.testing import budget

pytestmark = pytest.mark.slow

WORLD, SEQ_LEN, MASK = 2, 12, 19
CONFIG = TransformerConfig(20, 32, 48, 2, 4, 2, 8, qk_norm=True, mask_token_id=MASK, block_size=4)
KINDS = ("ddp", "fsdp2", "fsdp2 in bfloat16")


class WithLoss(nn.Module):
    """What a trainer wraps: the model takes a `Pattern` among its arguments, the loss is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Transformer(CONFIG)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)

    def forward(self, tokens: Tensor, pattern: Pattern, counts: Tensor) -> Tensor:
        hidden = self.model(torch.cat([tokens, torch.full_like(tokens, MASK)], dim=1), pattern)
        return tidar_loss(hidden, self.model.embed_tokens.weight, tokens, pattern, counts=counts).loss


def batch() -> tuple[Tensor, Pattern, Tensor]:
    """Tokens of all processes, some of them without a label, and what each process divides by."""
    tokens = torch.randint(0, MASK, (2 * WORLD, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    pattern = tidar_training(SEQ_LEN, 4, [5, 7])
    return tokens, pattern, label_counts(tokens, pattern)


def gradients(module: nn.Module, share: slice = slice(None), world: int = 1) -> dict[str, Tensor]:
    """Gradients of the whole batch's loss: processes average theirs, so each divides by its share of the counts."""
    tokens, pattern, counts = batch()
    module(tokens[share], pattern, counts / world).backward()
    grads = {}
    for name, parameter in module.named_parameters():
        grad: Any = parameter.grad
        grads[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return grads


def wrapped(kind: str) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    module = WithLoss()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(module)
    policy = MixedPrecisionPolicy()
    if kind == "fsdp2 in bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    share = slice(2 * rank, 2 * rank + 2)
    found = {kind: gradients(wrapped(kind), share, WORLD) for kind in KINDS}
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Gradients of every kind, from one pair of processes."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=WORLD)
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("kind", KINDS[:2])
def test_gradients_are_those_of_one_process(found: dict[str, dict[str, Tensor]], kind: str) -> None:
    expected = gradients(WithLoss())
    assert found[kind].keys() == expected.keys()
    for name, grad in found[kind].items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_gradients_are_as_good_as_those_of_one_process(found: dict[str, dict[str, Tensor]]) -> None:
    exact, plain = gradients(WithLoss().double()), gradients(WithLoss().bfloat16())
    for name, grad in found["fsdp2 in bfloat16"].items():
        assert grad.dtype == torch.float32
        budget(grad, exact[name], plain[name])
