"""Tensor parallelism of the `Transformer`: heads and the MLP's middle shared out over ranks.

Projections are split by column up to the heads (or the middle) and by row after them, so that a layer exchanges two
sums a pass. Norms, embedding and lm_head are whole on every rank.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from ..distributed.context_parallel import check_mesh
from .transformer import Transformer

__all__ = ["tensor_parallel"]


def tensor_parallel(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """`model` itself, with the weights of its layers sharded over a mesh of one dimension, as DTensors.

    Its ranks have the same weights before, and the same tokens ever after. The forward pass takes and returns plain
    tensors, alike on every rank; each calls attention with its heads. FSDP2 goes around it, over another dimension of
    the mesh: `fully_shard(layer, mesh=mesh["dp"])`.

    Raises:
        TypeError: `model` is not a Transformer or `mesh` not a DeviceMesh.
        ValueError: the mesh has more than one dimension, or its size does not divide the kv heads or the middle.
    """
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    if not isinstance(model, Transformer):
        raise TypeError(f"model: expected a tidar_kernels.models.Transformer, got {type(model).__name__}")
    check_mesh(mesh)
    for name in ("num_kv_heads", "intermediate_size"):
        size = getattr(model.config, name)
        if size % mesh.size():
            raise ValueError(f"mesh: expected a divisor of {name} = {size}, got {mesh.size()} ranks")
    plan: dict[str, ParallelStyle] = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"layers.*.{name}"] = RowwiseParallel()
    if model.config.qk_norm:
        # A weight for heads of all ranks: dimension 2 of what is normed are the heads, and gradients are summed.
        plan |= {
            f"layers.*.self_attn.{name}": SequenceParallel(sequence_dim=2, use_local_output=True)
            for name in ("q_norm", "k_norm")
        }
    parallelize_module(model, mesh, plan)
    return model
