"""Sharded operands and sharded weights on gloo against one process: DTensors, tensor parallelism, FSDP2 around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tidar_kernels as tk
from tests.distributed import test_model as one
from tests.distributed.processes import budgets, on_ranks
from tidar_kernels.distributed import ContextParallel
from tidar_kernels.models import tensor_parallel
from tidar_kernels.nn.loss import label_counts
from tidar_kernels.patterns import tidar_training

PATTERN = tidar_training(29, 4, [17, 1, 11], [3, 0, 5])
# Batch, heads and kv heads; where each dimension of the mesh has q, k and v, a letter each: whole (r), by sequence (b),
# by head (h), or terms of a sum (p); and where the result is, where it is cheapest.
SHARDED: dict[str, tuple[tuple[int, int, int], tuple[str, ...], str]] = {
    "sequences x heads": ((2, 4, 2), ("bbb", "hhh"), "bh"),
    "heads x sequences": ((2, 4, 2), ("hhh", "bbb"), "hb"),
    "heads over all": ((1, 8, 4), ("hhh", "hhh"), "hh"),
    "sequences over all": ((4, 3, 1), ("bbb", "bbb"), "bb"),
    "heads alone": ((1, 6, 2), ("rrr", "hhh"), "rh"),
    "whole": ((1, 3, 1), ("rrr", "rrr"), "rr"),
    "keys whole": ((2, 4, 2), ("brr", "hrr"), "bh"),
    "one kv head for two ranks": ((1, 4, 1), ("rrr", "hrr"), "rr"),
    "three kv heads on two ranks": ((1, 6, 3), ("rrr", "hhh"), "rr"),
    "three sequences on two ranks": ((3, 4, 2), ("bbb", "hhh"), "rh"),
    "sums": ((2, 4, 2), ("ppp", "hhh"), "bh"),
}


# Ways of training on 2 x 2 processes, tensor parallelism in one dimension: the dtypes of weights, of sums and of the
# whole module's output under FSDP2 in the other, and whether activations are computed again.
WEIGHTS_AND_SUMS: dict[str, tuple[Any, Any, Any, bool]] = {
    "float32": (None, None, None, False),
    "float32, checkpointed": (None, None, None, True),
    "bfloat16 weights": (torch.bfloat16, None, None, False),
    "bfloat16 weights, float32 sums": (torch.bfloat16, torch.float32, None, False),
    "bfloat16 weights, float32 sums and output, checkpointed": (torch.bfloat16, torch.float32, torch.float32, True),
    "float16 weights, float32 sums": (torch.float16, torch.float32, None, False),
}


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, sinks and the gradients of out and lse."""
    batch, heads, kv_heads = shape
    draw = torch.Generator().manual_seed(heads)
    shapes: list[tuple[int, ...]] = [(batch, h, PATTERN.q_len, 8) for h in (heads, kv_heads, kv_heads)]
    shapes += [(heads,), (batch, heads, PATTERN.q_len, 8), (batch, heads, PATTERN.q_len)]
    return [torch.randn(one, generator=draw).to(dtype) for one in shapes]


def results(leaves: list[Any], grads: list[Any], attend: Any) -> dict[str, Any]:
    q, k, v, sinks = leaves
    out, lse = attend(q, k, v, PATTERN, softcap=3.0, sinks=sinks, return_lse=True)
    found = torch.autograd.grad([out, lse], leaves, [grads[0], grads[1].to(lse.dtype)])
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    return dict(zip(names, (out.detach(), lse.detach(), *found), strict=True))


def sharded() -> dict[str, Any]:
    """Of each case: the whole results, and where `out` is."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2, 2))
    letters = {"r": Replicate(), "b": Shard(0), "h": Shard(1)}
    found: dict[str, Any] = {}
    for name, (shape, placed, _) in SHARDED.items():
        leaves: list[Any] = []
        for i, x in enumerate(operands(shape, torch.float32)):
            at = [letters["r" if kind[i] == "p" else kind[i]] if i < 3 else Replicate() for kind in placed]
            leaf: Any = distribute_tensor(x, mesh, at)
            if i < 3 and any(kind[i] == "p" for kind in placed):
                terms = [Partial() if kind[i] == "p" else one for kind, one in zip(placed, at, strict=True)]
                leaf = DTensor.from_local(leaf.to_local() / 2, mesh, terms, shape=x.shape, stride=x.stride())
            leaves.append(leaf)
        ways = results([x.requires_grad_() for x in leaves[:4]], leaves[4:], tk.attention)
        where = "".join({Replicate(): "r", Shard(0): "b", Shard(1): "h"}[p] for p in ways["out"].placements)
        found[name] = (where, {key: value.full_tensor() for key, value in ways.items()})
    q, k, v, sinks = operands((2, 4, 2), torch.float32)[:4]
    line = dist.init_device_mesh("cpu", (4,))
    there, keys, values = (distribute_tensor(x, mesh) for x in (q, k, v))
    elsewhere = distribute_tensor(k, line)
    found["errors"] = [
        _error(lambda: tk.attention(there, k, v, PATTERN)),
        _error(lambda: tk.attention(q, keys, values, PATTERN)),
        _error(lambda: tk.attention(there, keys, values, PATTERN, sinks=sinks)),
        _error(lambda: tk.attention(there, elsewhere, values, PATTERN)),
        _error(lambda: tensor_parallel(one.WithLoss().model, line)),
        _error(lambda: tensor_parallel(one.WithLoss().model, mesh)),
        _error(lambda: tensor_parallel(one.WithLoss(), line)),  # type: ignore[arg-type]
    ]
    return found


def _error(function: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as raised:
        function()
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.thorough
def test_sharded_operands_are_one_process() -> None:
    expected = [
        "TypeError: k: expected a DTensor like the other operands, got Tensor",
        "TypeError: q: expected a DTensor like the other operands, got Tensor",
        "TypeError: sinks: expected a DTensor like the other operands, got Tensor",
        "ValueError: k: expected the mesh of q, ",
        "ValueError: mesh: expected a divisor of num_kv_heads = 2, got 4 ranks",
        "ValueError: mesh: expected one dimension, got 2 (mesh['name'] is one of them)",
        "TypeError: model: expected a tidar_kernels.models.Transformer, got WithLoss",
    ]
    for found in on_ranks(4, sharded):
        for error, start in zip(found["errors"], expected, strict=True):
            assert error.startswith(start), error
        for name, (shape, _, where) in SHARDED.items():
            at, results_of_ranks = found[name]
            assert at == where, name
            exact, plain = (
                results([x.requires_grad_() for x in operands(shape, dtype)[:4]], operands(shape, dtype)[4:], attend)
                for dtype, attend in ((torch.float64, tk.eager.attention), (torch.float32, tk.eager.attention))
            )
            budgets(results_of_ranks, exact, plain)


def gradients(ways: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Of each way, the whole gradients: sequences over one dimension of the mesh and heads over the other; and of
    rows in the place of sequences (context parallelism), with plain sums."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    tokens, counts = one.batch(), label_counts(one.batch(), one.PATTERN)
    found: dict[str, dict[str, Tensor]] = {}
    for how in ways:
        weights, sums, output, recompute = WEIGHTS_AND_SUMS[how]
        module = one.WithLoss(recompute)
        tensor_parallel(module.model, mesh["heads"])
        for layer in module.model.layers:
            fully_shard(layer, mesh=mesh["data"], mp_policy=MixedPrecisionPolicy(weights, sums))
        fully_shard(module, mesh=mesh["data"], mp_policy=MixedPrecisionPolicy(weights, sums, output))
        loss, *_ = module(tokens.chunk(2)[mesh.get_local_rank("data")], one.PATTERN, counts / 2)
        loss.backward()
        found[how] = {name: whole(parameter.grad) for name, parameter in module.named_parameters()}
    module = one.WithLoss()
    tensor_parallel(module.model, mesh["heads"])
    module(tokens, ContextParallel(mesh["data"], one.PATTERN), None)[0].backward()
    found["context"] = {name: whole(parameter.grad) for name, parameter in module.named_parameters()}
    for grad in found["context"].values():
        dist.all_reduce(grad, group=mesh.get_group("data"))
    return found


def whole(grad: Any) -> Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def of_one_process(dtype: torch.dtype) -> dict[str, Tensor]:
    module = one.WithLoss().to(dtype)
    module(one.batch(), one.PATTERN, None)[0].backward()
    return {name: whole(parameter.grad) for name, parameter in module.named_parameters()}


def check_training(world: int, ways: tuple[str, ...]) -> None:
    exact = of_one_process(torch.float64)
    for found in on_ranks(world, gradients, ways):
        assert found.keys() == {*ways, "context"}
        for how, grads in found.items():
            budgets(grads, exact, of_one_process(WEIGHTS_AND_SUMS.get(how, (None,))[0] or torch.float32))


@pytest.mark.distributed
def test_every_way_of_training_on_two_by_two() -> None:
    check_training(4, tuple(WEIGHTS_AND_SUMS))
