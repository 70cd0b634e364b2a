"""Operands of every operator's cases: random, checked against the oracle, with the bytes and FLOPs no one can avoid.

Each class makes the operands of one case, knows the implementations that are compared on them, checks what one computed
before it is timed, and counts the case's floor. FLOPs of attention come from the pattern's live pairs, 4 * head_dim a
pair and query head; bytes are every operand and result once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import tidar_kernels as tk
from tidar_kernels import ops as linear
from tidar_kernels.nn.rotary import RotaryEmbedding, apply_rotary
from tidar_kernels.ops import rotary_append
from tidar_kernels.ops.linear import reference as eager_linear
from tidar_kernels.ops.verify import sampling_tensors
from tidar_kernels.testing import relative_error

from . import peers, workloads
from .implementations import OURS, Implementation, Prepared, WrongResultError

PEER_SLACK = 8.0  # of the error budget: a peer may be less precise than ours must be, not compute another mask


def _within(what: str, value: Tensor, exact: Tensor, plain: Tensor, slack: float) -> float:
    """Relative error of `value`.

    Raises:
        WrongResultError: it exceeds `slack` times the budget: twice eager PyTorch's own error and 1e-5.
    """
    error, budget = relative_error(value, exact), slack * (2 * relative_error(plain, exact) + 1e-5)
    if value.shape != exact.shape or not error <= budget:
        raise WrongResultError(f"{what}: expected a relative error <= {budget:.3g} before timing, got {error:.3g}")
    return error


class Operands:
    """What the classes below share: one case on one device in one dtype."""

    operator: ClassVar[str]
    implementations: ClassVar[dict[str, Implementation]]

    def __init__(self, case: Any, device: str, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.make()

    def make(self) -> None:
        """Draw the operands."""
        raise NotImplementedError

    def check(self, name: str, prepared: Prepared) -> float:
        """Relative error of an implementation's result; 0 where equality is asked for.

        Raises:
            WrongResultError: it computes something else.
        """
        raise NotImplementedError

    def floor(self) -> dict[str, float]:
        """`rows`, `bytes` and `flops` of the case."""
        raise NotImplementedError

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def slack(self, name: str) -> float:
        return 1.0 if name == OURS else PEER_SLACK


class StepAttention(Operands):
    operator = "step_attention"
    implementations = peers.STEP
    case: workloads.Step

    def make(self) -> None:
        case, self.pattern = self.case, self.case.pattern
        rows, max_len = self.pattern.q_len, case.context_len + max(case.block_size, 1)
        kv = (case.batch, case.num_kv_heads)
        self.q = self.random(case.batch, case.num_heads, rows, case.head_dim)
        self.k, self.v = (self.random(*kv, rows, case.head_dim) for _ in "kv")
        self.k_cache, self.v_cache = (self.random(*kv, max_len, case.head_dim) for _ in "kv")
        self.lengths = torch.full((case.batch,), case.context_len, dtype=torch.int32, device=self.device)

    def joined(self, *, context_first: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of context and in-flight rows in one buffer each."""
        pairs = (
            (cache[:, :, : self.case.context_len], new)
            for cache, new in ((self.k_cache, self.k), (self.v_cache, self.v))
        )
        keys, values = (torch.cat(pair if context_first else pair[::-1], dim=2) for pair in pairs)
        return keys, values

    def head_major(self, out: Tensor) -> Tensor:
        """`[batch * rows, heads, head_dim]` -> `[batch, heads, rows, head_dim]`."""
        return out.reshape(self.case.batch, -1, self.case.num_heads, self.case.head_dim).transpose(1, 2)

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """The first sequence by the eager twin: in float64, and in the operands' own dtype."""
        first = [x[:1] for x in (self.q, self.k, self.v, self.k_cache, self.v_cache)]
        twin: Callable[..., Tensor] = tk.eager.step_attention
        exact = twin(*(x.double() for x in first), self.lengths[:1], self.pattern)
        return exact, twin(*first, self.lengths[:1], self.pattern)

    def check(self, name: str, prepared: Prepared) -> float:
        found = prepared.result(prepared.run())[:1]
        return _within(f"{name} of {self.case}", found, *self.expected, self.slack(name))

    def floor(self) -> dict[str, float]:
        case, rows = self.case, self.pattern.q_len
        intervals = (self.pattern.lead[:, 1] - self.pattern.lead[:, 0]).sum()
        intervals += (self.pattern.own[:, 1] - self.pattern.own[:, 0]).sum()
        pairs = rows * case.context_len + int(intervals)
        elements = 2 * case.num_kv_heads * (case.context_len + rows) + 2 * case.num_heads * rows
        return {
            "rows": rows,
            "bytes": float(elements * case.head_dim * case.batch * self.dtype.itemsize),
            "flops": 4.0 * pairs * case.head_dim * case.num_heads * case.batch,
        }


def _append_ours(o: AppendKV) -> Prepared:
    return Prepared(lambda: tk.append_kv(o.k_cache, o.v_cache, o.k, o.v, o.lengths))


def _append_copy(o: AppendKV) -> Prepared:
    """What moves as many bytes without looking where: the bandwidth to reach."""
    new, target = torch.stack([o.k, o.v]), torch.empty_like(torch.stack([o.k, o.v]))
    return Prepared(lambda: target.copy_(new))


def _append_index(o: AppendKV) -> Prepared:
    """The usual way: indexed assignment at every sequence's length."""
    batch, _, n, _ = o.k.shape
    sequence = torch.arange(batch, device=o.device)[:, None]
    slot = o.lengths.long()[:, None] + torch.arange(n, device=o.device)

    def run() -> None:
        for cache, new in ((o.k_cache, o.k), (o.v_cache, o.v)):
            cache.transpose(1, 2)[sequence, slot] = new.transpose(1, 2)

    return Prepared(run)


class AppendKV(Operands):
    operator = "append_kv"
    implementations: ClassVar = {
        OURS: Implementation("tidar_kernels", _append_ours),
        "indexed": Implementation("indexed assignment", _append_index),
        "copy": Implementation("copy_ of as many bytes", _append_copy, ceiling=True),
    }
    case: workloads.Append

    def make(self) -> None:
        case = self.case
        shape = (case.batch, case.num_kv_heads)
        self.k, self.v = (self.random(*shape, case.new_tokens, case.head_dim) for _ in "kv")
        max_len = case.context_len + case.new_tokens
        self.k_cache, self.v_cache = (self.random(*shape, max_len, case.head_dim) for _ in "kv")
        # Ragged, as in a batch of requests.
        lengths = torch.randint(max(1, case.context_len // 2), case.context_len + 1, (case.batch,))
        self.lengths = lengths.to(self.device, torch.int32)

    def check(self, name: str, prepared: Prepared) -> float:
        before = self.k_cache.clone(), self.v_cache.clone()
        tk.eager.append_kv(*before, self.k, self.v, self.lengths)
        prepared.run()
        if not (torch.equal(self.k_cache, before[0]) and torch.equal(self.v_cache, before[1])):
            raise WrongResultError(f"{name} of {self.case}: expected the bits of the twin, got others")
        return 0.0

    def floor(self) -> dict[str, float]:
        return {"rows": self.case.new_tokens, "bytes": 4.0 * self.k.nbytes, "flops": 0.0}  # K and V, read and written


def _rotary_ours(o: RotaryAppend) -> Prepared:
    return Prepared(lambda: rotary_append(o.q, o.k, o.v, o.rotary, o.k_cache, o.v_cache, o.lengths, o.keep))


def _rotary_unfused(o: RotaryAppend) -> Prepared:
    """The rotation in PyTorch, then the append."""

    def run() -> tuple[Tensor, Tensor]:
        q, k = (apply_rotary(x.transpose(1, 2), o.rotary).transpose(1, 2) for x in (o.q, o.k))
        tk.append_kv(o.k_cache, o.v_cache, k[:, :, : o.keep], o.v[:, :, : o.keep], o.lengths)
        return q, k

    return Prepared(run)


class RotaryAppend(Operands):
    operator = "rotary_append"
    implementations: ClassVar = {
        OURS: Implementation("tidar_kernels", _rotary_ours),
        "unfused": Implementation("rotation in PyTorch, then append_kv", _rotary_unfused),
    }
    case: workloads.RotaryAppend

    def make(self) -> None:
        case, pattern = self.case, tk.patterns.tidar_step(self.case.block_size)
        self.keep = case.block_size
        self.q = self.random(case.batch, case.num_heads, pattern.q_len, case.head_dim)
        self.k, self.v = (self.random(case.batch, case.num_kv_heads, pattern.q_len, case.head_dim) for _ in "kv")
        shape = (case.batch, case.num_kv_heads, case.context_len + self.keep, case.head_dim)
        self.k_cache, self.v_cache = self.random(*shape), self.random(*shape)
        self.lengths = torch.full((case.batch,), case.context_len, dtype=torch.int32, device=self.device)
        positions = (pattern.positions + case.context_len).expand(case.batch, -1).to(self.device)
        self.rotary = RotaryEmbedding(case.head_dim).to(self.device)(positions, self.dtype)

    def check(self, name: str, prepared: Prepared) -> float:
        q, k = prepared.run()
        plain = [apply_rotary(x.transpose(1, 2), self.rotary).transpose(1, 2) for x in (self.q, self.k)]
        wide = [x.double() for x in self.rotary]
        exact = [apply_rotary(x.double().transpose(1, 2), (wide[0], wide[1])).transpose(1, 2) for x in (self.q, self.k)]
        error = max(
            _within(f"{name} of {self.case}", *three, self.slack(name))
            for three in zip((q, k), exact, plain, strict=True)
        )
        kept = (self.k_cache[:, :, -self.keep :], k), (self.v_cache[:, :, -self.keep :], self.v)
        if not all(torch.equal(cache, new[:, :, : self.keep]) for cache, new in kept):
            raise WrongResultError(f"{name} of {self.case}: expected the appended bits of k and v, got others")
        return error

    def floor(self) -> dict[str, float]:
        """q and k read and written, cos and sin read, the drafts' v read and their k and v written."""
        drafts = self.k[:, :, : self.keep].numel()
        elements = 2 * self.q.numel() + 2 * self.k.numel() + 3 * drafts + 2 * self.rotary[0].numel()
        return {"rows": self.q.shape[2], "bytes": float(elements * self.dtype.itemsize), "flops": 0.0}


def _verify(o: Verify) -> Prepared:
    # Unchecked, as in a step: nothing is read back.
    return Prepared(lambda: tk.verify(o.logits, o.drafts, o.positions, o.params, check=False))


def _argmax(o: Verify) -> Prepared:
    """The least that looks at every logit."""
    return Prepared(lambda: o.logits.argmax(-1))


class Verify(Operands):
    operator = "verify"
    implementations: ClassVar = {
        OURS: Implementation("tidar_kernels", _verify),
        "argmax": Implementation("argmax of the same logits", _argmax, ceiling=True),
    }
    case: workloads.Verify

    def make(self) -> None:
        case = self.case
        self.logits = self.random(case.batch, case.block_size, case.vocab_size) * 3
        self.positions = torch.ones(case.batch, dtype=torch.int64, device=self.device)
        asked = [tk.SamplingParams(case.temperature, seed=b) for b in range(case.batch)]
        self.params = sampling_tensors(asked, self.device)
        picks = tk.sample(self.logits, self.positions, self.params, backend="eager")
        self.drafts = torch.cat([picks[:, :1], picks[:, :-1]], dim=1)
        # Sequence b rejects its draft number b, the first one, which none can, excepted.
        wrong = torch.arange(case.batch, device=self.device) % case.block_size
        rejects = wrong > 0
        self.drafts[rejects, wrong[rejects]] += 1
        self.drafts %= case.vocab_size

    def check(self, name: str, prepared: Prepared) -> float:
        expected = tk.verify(self.logits, self.drafts, self.positions, self.params, backend="eager")
        if not all(torch.equal(a, b) for a, b in zip(prepared.run(), expected, strict=True)):
            raise WrongResultError(f"{name} of {self.case}: expected the decisions of the twin, got others")
        return 0.0

    def floor(self) -> dict[str, float]:
        return {"rows": self.case.block_size, "bytes": float(self.logits.nbytes), "flops": 0.0}


def _plain(o: Projection) -> Prepared:
    return Prepared(lambda: linear.row_invariant_linear(o.x, o.weight))


def _adapted(o: Projection) -> Prepared:
    return Prepared(lambda: linear.gated_lora(o.x, o.weight, o.lora_a, o.lora_b, o.gate))


def _library(o: Projection) -> Prepared:
    return Prepared(lambda: F.linear(o.x, o.weight))


class Projection(Operands):
    operator = "projection"
    implementations: ClassVar = {
        OURS: Implementation("row_invariant_linear", _plain),
        "gated_lora": Implementation("gated_lora", _adapted),
        "library": Implementation("F.linear", _library),
    }
    case: workloads.Projection

    def make(self) -> None:
        case = self.case
        self.x = self.random(case.num_rows, case.in_features)
        self.weight = self.random(case.out_features, case.in_features) * case.in_features**-0.5
        self.lora_a = self.random(case.rank, case.in_features) * case.in_features**-0.5
        self.lora_b = self.random(case.out_features, case.rank) * case.rank**-0.5
        self.gate = torch.arange(case.num_rows, device=self.device) >= case.num_rows // 8

    def check(self, name: str, prepared: Prepared) -> float:
        parts = self.x, self.weight, self.lora_a, self.lora_b
        gate = self.gate if name == "gated_lora" else torch.zeros_like(self.gate)
        wide = [x.double() for x in parts]
        exact = eager_linear.gated_lora(wide[0], wide[1], wide[2], wide[3], gate)
        slack = PEER_SLACK if name == "library" else 1.0
        return _within(f"{name} of {self.case}", prepared.run(), exact, eager_linear.gated_lora(*parts, gate), slack)

    def floor(self) -> dict[str, float]:
        """Of the projection alone; the adapter's part is small beside it."""
        case = self.case
        elements = case.in_features * case.out_features + case.num_rows * (case.in_features + case.out_features)
        flops = 2.0 * case.num_rows * case.in_features * case.out_features
        return {"rows": case.num_rows, "bytes": float(elements * self.dtype.itemsize), "flops": flops}
