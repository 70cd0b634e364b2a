"""Attention of local rows over everybody's keys: context parallelism for any pattern.

The rows of a pattern carry their own intervals, so any row can live on any rank, and what a rank computes is a pattern
too: its rows, over all keys. Only keys and values travel. They are gathered in the forward pass, and again in the
backward one rather than kept, for kept they would grow with the whole sequence on every rank; the gradients of keys
and values are summed into the shards.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import ops
from ..ops import Backend
from ..ops.attention import api
from ..ops.operands import Keys, Results, Rows, Scores
from ..patterns import Pattern
from ..patterns.arguments import check_instance, check_int
from .collectives import Gather, Shards
from .sharding import deal, live_pairs

__all__ = ["ContextParallel", "check_mesh", "shared_out"]

Of = Literal["rows", "keys"]


class ContextParallel:
    """A pattern whose rows are shared out over the ranks of a mesh; every rank makes its own, from the same pattern.

    Ranks have the same number of rows, and the same number of live pairs (keys seen by a row), as nearly as runs of
    rows can be dealt: `live_pairs` of two ranks differ by less than 10 % but in patterns of a few rows. Results and
    gradients are the same bits in every run on a mesh of this size.

    Models made for it take it in a pattern's place, beside this rank's rows (`models.Transformer`, `TiDARAttention`,
    `tidar_loss`); all that is not attention sees rows alone.

    Args:
        mesh: a mesh of one dimension, `init_device_mesh("cuda", (n,))` or `mesh["cp"]`.
        pattern: of the whole sequence; with as many keys as rows, or with keys of their own.
        keep_gathered: keep the gathered K and V for the backward pass instead of gathering them again: a third less
            traffic, and right where a layer's activations are recomputed anyway (activation checkpointing).

    Attributes:
        rows: int64, this rank's rows, ascending, on the device of the mesh.
        keys: int64, this rank's keys: its rows, where there are as many keys as rows, else a run of equal length.
        local: the pattern of this rank's rows, over all keys.

    Raises:
        TypeError: `mesh` is not a DeviceMesh or `pattern` not a Pattern.
        ValueError: the mesh has more than one dimension, the pattern a tree mask or fewer rows or keys than ranks.
    """

    def __init__(self, mesh: DeviceMesh, pattern: Pattern, *, keep_gathered: bool = False) -> None:
        check_mesh(mesh)
        if not isinstance(pattern, Pattern):
            raise TypeError(f"pattern: expected a tidar_kernels.Pattern, got {type(pattern).__name__}")
        if pattern.tree_mask is not None:
            raise ValueError(f"pattern: expected one without tree mask, got {pattern.name}")
        ranks, rank, group = mesh.size(), mesh.get_local_rank(), mesh.get_group().group_name
        if pattern.kv_len < ranks:
            raise ValueError(f"pattern: expected at least a key a rank, {ranks}, got {pattern.kv_len}")
        device = torch.empty(0, device=mesh.device_type).device
        self.mesh, self.pattern, self.keep_gathered, self.group = mesh, pattern, keep_gathered, group
        with torch.inference_mode(False):  # made while decoding, it must still serve training
            rows = deal(live_pairs(pattern), ranks)
            self._rows = Shards(rows, rank, group, device)
            self._keys = self._rows
            if pattern.kv_len != pattern.q_len:
                keys = list(torch.arange(pattern.kv_len, device="cpu").tensor_split(ranks))
                self._keys = Shards(keys, rank, group, device)
            self._take(pattern.subset(rows[rank]))

    def _take(self, local: Pattern) -> None:
        self.local = local
        self._intervals = local.on(self.rows.device)[:2]
        self._windowed: dict[int, ContextParallel] = {}

    @property
    def rows(self) -> Tensor:
        return self._rows.own

    @property
    def keys(self) -> Tensor:
        return self._keys.own

    def windowed(self, window: int) -> ContextParallel:
        """The same rows with a sliding window, kept: `Pattern.windowed`. Who has which rows stays as it is.

        Raises:
            TypeError, ValueError: `window` is not an int >= 1.
        """
        check_int("window", window, 1)
        if window not in self._windowed:
            narrow = object.__new__(ContextParallel)
            vars(narrow).update(vars(self))
            narrow.pattern = self.pattern.windowed(window)
            narrow._take(self.local.windowed(window))
            self._windowed[window] = narrow
        return self._windowed[window]

    def shard(self, x: Tensor, dim: int, of: Of = "rows") -> Tensor:
        """This rank's part of `x`, of which every rank has all: along `dim` its rows (or keys) of the pattern's.

        The gradient that comes back is this rank's share; the sum over the ranks is that of `x`.

        Raises:
            TypeError, ValueError: `x` has another number of elements in `dim` than the pattern has rows (keys), or an
                argument is of another type.
        """
        shards = self._shards(of)
        _check_size(x, dim, {"rows": self.pattern.q_len, "keys": self.pattern.kv_len}[of], of)
        return x.index_select(dim, shards.own)

    def gather(self, x: Tensor, dim: int, of: Of = "rows") -> Tensor:
        """All of what is sharded, in the order of the pattern: the inverse of `shard`, a collective, differentiable.

        Raises:
            TypeError, ValueError: `x` has another number of elements in `dim` than this rank has rows (keys), or an
                argument is of another type.
        """
        shards = self._shards(of)
        _check_size(x, dim, len(shards.own), of)
        whole: Tensor = Gather.apply(x.movedim(dim, 0), shards)
        return whole.movedim(0, dim)

    def _shards(self, of: Of) -> Shards:
        if not isinstance(of, str) or of not in ("rows", "keys"):
            raise ValueError(f'of: expected "rows" or "keys", got {of!r}')
        return self._rows if of == "rows" else self._keys

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        backend: Backend | None = None,
    ) -> Tensor | Any:
        """`tidar_kernels.attention` of this rank's rows, over the keys of all ranks; a collective, differentiable.

        All ranks call it in the same order, and all of them or none run the backward pass.

        Args:
            q: `[batch, heads, len(rows), head_dim]`.
            k, v: `[batch, kv_heads, len(keys), head_dim]`, this rank's.
            scale, softcap, sinks, return_lse, backend: as in `attention`; the gradient of sinks is this rank's share.

        Returns:
            What `attention` returns, of this rank's rows.

        Raises:
            TypeError, ValueError: as `attention` does.
        """
        q, k, v, scores = api.checked(q, k, v, self.local, scale, softcap, sinks, backend, len(self.keys))
        if q.device != self.rows.device:
            raise ValueError(f"q: expected device {self.rows.device} like the mesh, got {q.device}")
        if backend == "eager":
            k, v = (Gather.apply(x.movedim(2, 0), self._keys).movedim(0, 2) for x in (k, v))
            return ops.attention(
                *(q, k, v, self.local, scale), softcap=softcap, sinks=sinks, return_lse=return_lse, backend=backend
            )
        out, lse = _Attention.apply(q, k, v, scores.sinks, *self._intervals, self, scores.scale, scores.softcap)
        return (out, lse) if return_lse else out

    def gathered(self, k: Tensor, v: Tensor) -> Keys:
        """The keys and values of all ranks, `[batch, kv_heads, kv_len, head_dim]`, from this rank's."""
        return Keys(*(x.movedim(0, 2) for x in self._keys.gather(k.movedim(2, 0), v.movedim(2, 0))))

    def summed(self, dk: Tensor, dv: Tensor) -> Keys:
        """The gradients of this rank's keys and values, from every rank's share of all.

        One after the other: what is exchanged is as large as the sequence.
        """
        return Keys(*(self._keys.sum(x.movedim(2, 0)).movedim(0, 2) for x in (dk, dv)))


def shared_out(mesh: DeviceMesh, pattern: Pattern) -> ContextParallel:
    """`ContextParallel(mesh, pattern)`, made once while it is in use: batch after batch may have one pattern.

    Raises:
        TypeError, ValueError: as `ContextParallel`.
    """
    return _shared_out(check_mesh(mesh), check_instance("pattern", pattern, Pattern))


_shared_out = functools.lru_cache(maxsize=8)(ContextParallel)


def check_mesh(mesh: Any) -> DeviceMesh:
    """`mesh`, if it is one of one dimension."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a torch.distributed DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim} (mesh['name'] is one of them)")
    return mesh


def _check_size(x: Any, dim: Any, expected: int, of: str) -> None:
    check_int("dim", dim, -check_instance("x", x, Tensor).ndim, x.ndim)
    if x.shape[dim] != expected:
        raise ValueError(f"x: expected {expected} {of} in dimension {dim}, got shape {list(x.shape)}")


class _Attention(torch.autograd.Function):
    """The operator `attention` between a gathering of K and V and, backward, a sum of dK and dV."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        lead: Tensor,
        own: Tensor,
        cp: ContextParallel,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        keys = cp.gathered(k, v)
        out, lse = api.operator(Rows(q, lead, own), keys, Scores(scale, softcap, sinks))
        ctx.save_for_backward(q, *(keys if cp.keep_gathered else (k, v)), sinks, lead, own, out, lse)
        ctx.cp, ctx.scores = cp, Scores(scale, softcap)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, lead, own, out, lse = ctx.saved_tensors
        keys = Keys(k, v) if ctx.cp.keep_gathered else ctx.cp.gathered(k, v)
        results = Results(out, lse, torch.zeros_like(out) if grad_out is None else grad_out, grad_lse)
        dq, dk, dv = api.backward(Rows(q, lead, own), keys, ctx.scores, results)
        del keys, k, v  # as large as what follows
        dk, dv = ctx.cp.summed(dk, dv)
        of_sinks = api.sinks_backward(results, sinks) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, of_sinks, None, None, None, None, None
