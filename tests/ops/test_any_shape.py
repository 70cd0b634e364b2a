"""Operators at any shape from 0 to 3 in every dimension, any strides and dtypes: the twin's result, or a refusal.

A refusal is a TypeError or a ValueError, and leaves every operand as it was. Nothing else may be raised, and no signal:
a kernel or a fused CPU routine that reads past a tensor ends the process. Examples are the same in every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tidar_kernels as tk
from tidar_kernels import Pattern, patterns, testing
from tidar_kernels.ops.verify import RULES
from tidar_kernels.testing import bits

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
# Both processes collect the same tests: which path they take is the process's. NumPy, which the interpreter computes
# with, warns of lanes out of bounds too (0 * -inf), of which nothing is kept.
pytestmark = [pytest.mark.interpret] if INTERPRETED else []
pytestmark += [pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
SIZES = st.sampled_from((1, 2, 3, 1, 2, 3, 0))
Draw = Callable[[st.SearchStrategy[Any]], Any]


def any_shape(cases: int) -> Callable[..., Any]:
    """Draw `cases` examples, an eighth as many in the interpreter, the same in every run."""
    return settings(
        max_examples=cases // 8 if INTERPRETED else cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def strided(values: Tensor, layout: str) -> Tensor:
    """`values` with other strides: in another order, with gaps, or with equal values at one address."""
    if layout == "reversed":
        backward = list(range(values.ndim))[::-1]
        return values.permute(backward).contiguous().permute(backward)
    if layout == "gaps" and values.ndim:
        wide = torch.zeros([2 * size + 1 for size in values.shape], dtype=values.dtype)
        view = wide[tuple(slice(1, 2 * size + 1, 2) for size in values.shape)]
        return view.copy_(values)
    if layout == "expanded" and values.ndim and values.shape[0]:
        return values[:1].expand(values.shape)
    return values


class Operands:
    """Draws of one example. Most operands fit each other; about one in ten has a shape or a dtype of its own."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.dtype = draw, draw(st.sampled_from(FLOATS))
        self.random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def often(self) -> bool:
        return self.draw(st.integers(0, 31)) not in (11, 23)  # not at the ends, which are drawn more often

    def size(self) -> int:
        return int(self.draw(SIZES))

    def shape(self, *wanted: int) -> list[int]:
        shape = list(wanted)
        if not self.often():
            changed = self.draw(st.integers(0, len(shape)))
            if changed == len(shape):
                shape = self.draw(st.lists(SIZES, max_size=5))
            else:
                shape[changed] = self.size()
        return shape

    def floats(self, *wanted: int, written: bool = False) -> Tensor:
        dtype = self.dtype if self.often() else self.draw(st.sampled_from(FLOATS + OTHERS))
        values = torch.randn(self.shape(*wanted), generator=self.random).to(dtype)
        layouts = ("contiguous", "reversed", "gaps") if written else ("contiguous", "reversed", "gaps", "expanded")
        return strided(values, self.draw(st.sampled_from(layouts)))

    def integers(self, low: int, high: int, *wanted: int, dtypes: Sequence[torch.dtype] = ()) -> Tensor:
        dtypes = dtypes or (torch.int32, torch.int64)
        dtype = self.draw(st.sampled_from(dtypes)) if self.often() else self.draw(st.sampled_from(FLOATS + OTHERS))
        values = torch.randint(low, max(high, low) + 1, self.shape(*wanted), generator=self.random)
        return strided(values.to(dtype), self.draw(st.sampled_from(("contiguous", "gaps"))))

    def heads(self) -> tuple[int, int]:
        """Query heads and kv heads; the latter mostly divide the former."""
        kv_heads = self.size()
        return (kv_heads * self.draw(st.integers(1, 2)) if self.often() else self.size()), kv_heads

    def pattern(self) -> Pattern:
        made = self.draw(
            st.sampled_from(
                (
                    lambda n: patterns.causal(n),
                    lambda n: patterns.tidar_step(n),
                    lambda n: patterns.tidar_training(n, 2),
                    lambda n: patterns.tidar_prefill(n, 2),
                    lambda n: testing.random_tree(n),
                    lambda n: testing.irregular_pattern(n - 1, n, n),
                    lambda n: testing.irregular_pattern(n, n - 1, n, with_tree_mask=True),
                )
            )
        )(self.draw(st.integers(1, 3)))
        window = self.draw(st.sampled_from((None, None, 1, 3)))
        return made if window is None or made.key_positions is None else made.windowed(window)

    def scores(self, heads: int) -> dict[str, Any]:
        """Optional operands of attention."""
        return {
            "scale": self.draw(st.sampled_from((None, 0.5, 2) if self.often() else (0.0, -1.0, float("nan"), "1"))),
            "softcap": self.draw(st.sampled_from((None, 1.5) if self.often() else (0.0, float("inf"), True))),
            "sinks": None if self.draw(st.booleans()) else self.floats(heads),
            "return_lse": self.draw(st.booleans()),
        }


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    return (
        [x for value in values for x in tensors_of(value)]
        if isinstance(values, (list, tuple, type({}.values())))
        else []
    )


def copied(values: Any) -> Any:
    """The arguments with copies of their tensors, strides included."""
    if isinstance(values, Tensor):
        base = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype)
        _ = base.copy_(values) if 0 not in values.stride() else base[:1].copy_(values[:1])
        return base
    if isinstance(values, dict):
        return {name: copied(value) for name, value in values.items()}
    return type(values)(map(copied, values)) if type(values) in (list, tuple) else values


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits(one.contiguous()), bits(other.contiguous())) if one.dtype != torch.complex64 else True


def check(call: Callable[..., Any], *args: Any, gradients: bool = False, **options: Any) -> str:
    """Call the operator and its twin with the same operands; "refused" or "equal"."""
    mine, twins = copied((args, options)), copied((args, options))
    if gradients:
        for x in tensors_of((mine, twins)):
            if x.dtype in FLOATS and 0 not in x.stride():
                x.requires_grad_()
    try:
        found = call(*mine[0], **mine[1])
    except (TypeError, ValueError) as error:
        if ": expected " not in str(error):
            raise
        for before, after in zip(tensors_of((args, options)), tensors_of(mine), strict=True):
            assert same_bits(before, after.detach())
        return "refused"
    expected = call(*twins[0], **twins[1], backend="eager")
    results = [[x for x in tensors_of([value]) if x is not None] for value in (found, expected)]
    pairs = list(zip(*results, strict=True)) + list(zip(tensors_of(mine), tensors_of(twins), strict=True))
    if gradients:
        pairs += _gradients(results, tensors_of(mine), tensors_of(twins))
    for value, twin in pairs:
        assert (value.dtype, value.shape) == (twin.dtype, twin.shape)
        exact = not value.dtype.is_floating_point or value.dtype not in TOLERANCE
        allowed = 0.0 if exact else max(TOLERANCE[x.dtype] for x in results[0] + [value] if x.dtype in TOLERANCE)
        torch.testing.assert_close(value.detach(), twin.detach(), rtol=allowed, atol=allowed, equal_nan=True)
    return "equal"


def _gradients(results: list[list[Tensor]], *operands: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What a loss of the first result gives the operands, of the operator and of its twin."""
    found = []
    for (first, *_), leaves in zip(results, operands, strict=True):
        wanted = [x for x in leaves if x.requires_grad]
        if not first.requires_grad or not wanted:
            return []
        loss = (first * torch.linspace(-1, 1, first.numel()).reshape(first.shape).to(first.dtype)).sum()
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)])
    return list(zip(*found, strict=True))


# How often each operator was refused and equal: a property that is never tried proves nothing.
COUNTS: dict[str, list[str]] = {}


@pytest.fixture(autouse=True, scope="module")
def both_outcomes() -> Any:
    yield
    for name, outcomes in COUNTS.items():
        assert outcomes.count("equal") > len(outcomes) // 8, (name, outcomes.count("equal"), len(outcomes))
        assert "refused" in outcomes, name


def count(name: str, outcome: str) -> None:
    COUNTS.setdefault(name, []).append(outcome)


@any_shape(160)
@given(st.data())
def test_attention(data: st.DataObject) -> None:
    o = Operands(data.draw)
    (heads, kv_heads), pattern, batch, dim = o.heads(), o.pattern(), o.size(), o.size()
    q = o.floats(batch, heads, pattern.q_len, dim)
    k, v = (o.floats(batch, kv_heads, pattern.kv_len, dim) for _ in range(2))
    gradients = data.draw(st.booleans())
    count("attention", check(tk.attention, q, k, v, pattern, gradients=gradients, **o.scores(heads)))


@any_shape(160)
@given(st.data())
def test_step_attention(data: st.DataObject) -> None:
    o = Operands(data.draw)
    (heads, kv_heads), pattern, batch, dim, slots = o.heads(), o.pattern(), o.size(), o.size(), o.size()
    q = o.floats(batch, heads, pattern.q_len, dim)
    k, v = (o.floats(batch, kv_heads, pattern.kv_len, dim) for _ in range(2))
    k_cache, v_cache = (o.floats(batch, kv_heads, slots, dim) for _ in range(2))
    lengths = o.integers(0 if o.often() else -1, slots if o.often() else 4, batch)
    bound = data.draw(st.sampled_from((None, slots) if o.often() else (-1, 2, 2.5, "2")))
    scores = o.scores(heads)
    count(
        "step_attention",
        check(tk.step_attention, q, k, v, k_cache, v_cache, lengths, pattern, max_context=bound, **scores),
    )


@any_shape(120)
@given(st.data())
def test_append_kv(data: st.DataObject) -> None:
    o = Operands(data.draw)
    batch, kv_heads, dim, rows, slots = (o.size() for _ in range(5))
    caches = [o.floats(batch, kv_heads, slots, dim, written=True) for _ in range(2)]
    k, v = (o.floats(batch, kv_heads, min(rows, slots) if o.often() else rows, dim) for _ in range(2))
    lengths = o.integers(0, max(slots - rows, 0) if o.often() else 3, batch)
    count("append_kv", check(tk.append_kv, *caches, k, v, lengths))


@any_shape(120)
@given(st.data())
def test_compact_kv(data: st.DataObject) -> None:
    o = Operands(data.draw)
    batch, kv_heads, dim, slots, width = (o.size() for _ in range(5))
    caches = [o.floats(batch, kv_heads, slots, dim, written=True) for _ in range(2)]
    path = o.integers(-1, 2, batch, width)
    if o.often() and path.ndim == 2 and path.dtype in (torch.int32, torch.int64):  # nodes that ascend, then -1
        column = torch.arange(path.shape[1])
        path = torch.where(column <= path[:, :1].to(torch.int64), column, -1).to(path.dtype)
    lengths = o.integers(0, max(slots - width, 0), batch)
    count("compact_kv", check(tk.compact_kv, *caches, lengths, path))


@any_shape(120)
@given(st.data())
def test_rotary_append(data: st.DataObject) -> None:
    o = Operands(data.draw)
    (heads, kv_heads), batch, rows, slots = o.heads(), o.size(), o.size(), data.draw(st.integers(0, 4))
    dim = 2 * data.draw(st.integers(1, 2)) if o.often() else o.size()
    q, (k, v) = o.floats(batch, heads, rows, dim), (o.floats(batch, kv_heads, rows, dim) for _ in range(2))
    leading = (batch,) if data.draw(st.booleans()) else ()
    rotary = tuple(o.floats(*leading, rows, 1, dim) for _ in range(2))
    caches = [o.floats(batch, kv_heads, slots, dim, written=True) for _ in range(2)]
    keep = data.draw(st.integers(0, max(min(rows, slots), 0))) if o.often() else data.draw(st.integers(-1, 4))
    lengths = o.integers(0, max(slots - keep, 0), batch)
    count("rotary_append", check(tk.rotary_append, q, k, v, rotary, *caches, lengths, keep))


@any_shape(120)
@given(st.data())
def test_row_invariant_linear(data: st.DataObject) -> None:
    o = Operands(data.draw)
    inner, outer, leading = o.size(), o.size(), data.draw(st.lists(SIZES, max_size=3))
    bias = o.floats(outer) if data.draw(st.booleans()) else None
    gradients = data.draw(st.booleans())
    x, weight = o.floats(*leading, inner), o.floats(outer, inner)
    count("row_invariant_linear", check(tk.row_invariant_linear, x, weight, bias, gradients=gradients))


@any_shape(120)
@given(st.data())
def test_gated_lora(data: st.DataObject) -> None:
    o = Operands(data.draw)
    inner, outer, rank, leading = o.size(), o.size(), o.size(), data.draw(st.lists(SIZES, max_size=3))
    x, weight = o.floats(*leading, inner), o.floats(outer, inner)
    lora_a, lora_b = o.floats(rank, inner), o.floats(outer, rank)
    gate = o.integers(0, 1, *leading[data.draw(st.integers(0, len(leading))) :], dtypes=(torch.bool, torch.float32))
    scale = data.draw(st.sampled_from((1.0, 0.5, -2, 0.0) if o.often() else (float("inf"), "1", True)))
    bias = o.floats(outer) if data.draw(st.booleans()) else None
    chosen = {"row_invariant": data.draw(st.booleans())}
    count("gated_lora", check(tk.gated_lora, x, weight, lora_a, lora_b, gate, scale, bias, **chosen))


def sampling(o: Operands) -> Any:
    """Parameters of a request in range; the dataclass refuses the others."""
    return tk.SamplingParams(
        temperature=o.draw(st.sampled_from((0.0, 0.7, 3.0))),
        top_k=o.draw(st.integers(0, 4)),
        top_p=o.draw(st.sampled_from((1.0, 0.5))),
        min_p=o.draw(st.sampled_from((0.0, 0.3, 1.0))),
        repetition_penalty=o.draw(st.sampled_from((1.0, 2.0))),
        seed=o.draw(st.integers(0, 9)),
    )


@any_shape(120)
@given(st.data())
def test_sample(data: st.DataObject) -> None:
    o = Operands(data.draw)
    batch, rows, vocab = (o.size() for _ in range(3))
    params = sampling(o) if data.draw(st.booleans()) else [sampling(o) for _ in range(batch)]
    seen = o.integers(0, 1, batch, vocab, dtypes=(torch.bool,)) if data.draw(st.booleans()) else None
    count("sample", check(tk.sample, o.floats(batch, rows, vocab), o.integers(0, 9, batch), params, seen=seen))


@any_shape(120)
@given(st.data())
def test_verify(data: st.DataObject) -> None:
    o = Operands(data.draw)
    batch, rows, vocab = (o.size() for _ in range(3))
    params = sampling(o) if data.draw(st.booleans()) else [sampling(o) for _ in range(batch)]
    rule, mixed = data.draw(st.sampled_from(RULES)), data.draw(st.booleans())
    betas = (1.0, 0.5, 0) if mixed else (1.0,)
    options = {
        "rule": rule if o.often() else "other",
        "draft_logits": o.floats(batch, rows, vocab) if (rule == "rejection") == o.often() else None,
        "mix": o.floats(batch, rows, vocab) if mixed else None,
        "beta": data.draw(st.sampled_from(betas if o.often() else (2.0, -1, float("nan")))),
        "seen": o.integers(0, 1, batch, vocab, dtypes=(torch.bool,)) if data.draw(st.booleans()) else None,
        "check": data.draw(st.booleans()),
    }
    drafts = o.integers(0 if o.often() else -1, vocab - 1 if o.often() else vocab, batch, rows, dtypes=(torch.int64,))
    logits, positions = o.floats(batch, rows, vocab), o.integers(0, 9, batch)
    count("verify", check(tk.verify, logits, drafts, positions, params, **options))


@pytest.mark.parametrize("name", ["step_attention", "append_kv", "compact_kv", "rotary_append", "verify", "sample"])
def test_integers_of_sequences_have_any_stride(name: str) -> None:
    """Lengths and positions that are a column of a table."""
    table = torch.tensor([[2, 9, 9], [0, 9, 9], [1, 9, 9]])
    x, cache, pattern = torch.randn(3, 2, 3, 4), torch.randn(2, 3, 2, 6, 4), patterns.causal(3)
    logits, drafts = torch.randn(3, 3, 5), torch.randint(5, (3, 3))
    params = tk.SamplingParams(temperature=1.0)
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "step_attention": lambda n, caches: tk.step_attention(x, x, x, *caches, n, pattern),
        "append_kv": lambda n, caches: tk.append_kv(*caches, x, x, n),
        "compact_kv": lambda n, caches: tk.compact_kv(*caches, n, torch.tensor([[0, 2]] * 3)),
        "rotary_append": lambda n, caches: tk.rotary_append(x, x, x, (x[:, 0, :, None],) * 2, *caches, n, 2),
        "verify": lambda n, caches: tk.verify(logits, drafts, n, params),
        "sample": lambda n, caches: tk.sample(logits, n, params),
    }
    outcomes = []
    for integers in (table[:, 0], table[:, 0].contiguous()):
        caches = cache.clone()
        outcomes.append([*tensors_of([calls[name](integers, caches)]), caches])
    for strided_one, contiguous in zip(*outcomes, strict=True):
        assert torch.equal(strided_one, contiguous)
