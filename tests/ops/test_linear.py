"""Projections whose rows keep to themselves, and LoRA on some rows: parity by the budget rule, and promised bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.paths import DEVICES, HERE, on_every_path
from tidar_kernels import testing
from tidar_kernels.ops import gated_lora, row_invariant_linear
from tidar_kernels.ops.linear import cpu
from tidar_kernels.ops.linear import reference as eager_linear
from tidar_kernels.testing import bits, poisoned_allocations
from tidar_kernels.testing.linear import matrix, random_gate

# NumPy's view of products with NaN and inf in the interpreter.
NOT_FINITE = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
BASES = pytest.mark.parametrize("row_invariant", [True, False], ids=["row_invariant", "library"])


Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def operands(rows: int, inner: int, outer: int, rank: int, dtype: torch.dtype = torch.float32) -> Operands:
    """x, weight, lora_a, lora_b, gate, bias."""
    x, weight = torch.randn(rows, inner).to(dtype), (torch.randn(outer, inner) * inner**-0.5).to(dtype)
    lora_a, lora_b = (torch.randn(rank, inner) * inner**-0.5).to(dtype), torch.randn(outer, rank).to(dtype)
    return x, weight, lora_a, lora_b, random_gate(rows), torch.randn(outer).to(dtype)


@pytest.mark.parametrize(("device", "case"), on_every_path("gated_lora"))
def test_parity(device: str, case: testing.LinearCase) -> None:
    testing.check_gated_lora(case, device)


@pytest.mark.parametrize(("device", "case"), on_every_path("row_invariant_linear"))
def test_projection_parity(device: str, case: testing.LinearCase) -> None:
    testing.check_row_invariant_linear(case, device)


def check_rows(call: Callable[[Tensor, Tensor], Tensor], rows: Tensor, gate: Tensor) -> None:
    """Each row alone, against itself in every slot of batches of many sizes, beside random, NaN and huge neighbours."""
    alone = torch.cat([call(rows[i : i + 1], gate[i : i + 1]) for i in range(len(rows))])
    assert bool(alone[2:].isfinite().all())
    for size in (1, 2, 7, 8, 9, 20, 72):
        order = torch.randint(len(rows), (size,), device=rows.device)
        differs = bits(call(rows[order], gate[order])) != bits(alone[order])
        assert not bool(differs.any()), (size, differs.any(1).nonzero().flatten().tolist())


@NOT_FINITE
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 40), (200, 3)], ids=str)
def test_the_bits_of_a_row_are_its_own(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    if device == "cuda":
        shape = {70: (1536, 8960), 200: (4096, 4096)}[shape[0]]
    x, weight, lora_a, lora_b, gate, bias = (
        None if t is None else t.to(device) for t in operands(24, *shape, 8, dtype)
    )
    x[0], x[1], x[2], gate[0] = torch.nan, torch.inf, 1000.0 * x[2], 1.0
    check_rows(lambda rows, _: row_invariant_linear(rows, weight, bias), x, gate)
    check_rows(lambda rows, m: gated_lora(rows, weight, lora_a, lora_b, m, 0.5, bias), x, gate)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(33, 3), (709, 34), (1095, 35), (1536, 64), (1000, 258), (771, 17)], ids=str)
def test_the_bits_of_a_row_are_its_own_on_any_number_of_threads(shape: tuple[int, int], threads: int) -> None:
    """Shapes at which MKL's float32 products give odd rows other bits than even ones, and some at which they do not."""
    x, weight, *_ = operands(24, *shape, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_rows(lambda rows, _: row_invariant_linear(rows, weight), x, x[:, 0])
    finally:
        torch.set_num_threads(before)


def products_of(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]) -> list[int]:
    """Rows of each product of the CPU path from here on; `spoil` is done to its results.

    The library is one whose rows are always those of 8, whatever this machine's does.
    """
    seen: list[int] = []
    plain = F.linear

    def counted(x: Tensor, *others: Any) -> Tensor:
        seen.append(len(x))
        return spoil(torch.cat([plain(part, *others) for part in x.split(cpu.CHUNK)]))

    monkeypatch.setattr(cpu.F, "linear", counted)
    monkeypatch.setattr(cpu, "_tried", {})
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_few_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, *_ = operands(150, 64, 48, 1, dtype)
    expected = torch.cat([row_invariant_linear(row[None], weight) for row in x])
    seen = products_of(monkeypatch, lambda y: y)
    assert torch.equal(row_invariant_linear(x, weight), expected)
    assert sorted(seen) == sorted([24] + 3 * [8] + [64] + 8 * [8] + [64, 64, 24])  # trials first
    seen.clear()
    assert torch.equal(row_invariant_linear(x, weight), expected)
    assert seen == [64, 64, 24]


def test_products_that_round_by_their_rows_come_in_eights(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, *_ = operands(20, 64, 48, 1)
    seen = products_of(monkeypatch, lambda y: y * (1.0 + 1e-6 * (len(y) > 8)))
    rows = row_invariant_linear(x, weight)
    assert seen[-3:] == [8, 8, 8]
    assert torch.equal(rows, torch.cat([row_invariant_linear(row[None], weight) for row in x]))


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_change_a_row(device: str) -> None:
    x, weight = torch.randn(9, 70, device=device), torch.randn(40, 70, device=device)
    expected = row_invariant_linear(x, weight)
    for layout in ("gaps", "bhdn"):
        assert torch.equal(row_invariant_linear(matrix(x, layout).tensor, weight), expected)
    folded = row_invariant_linear(x.view(3, 3, 70).transpose(0, 1), weight)
    assert torch.equal(folded, expected.view(3, 3, 40).transpose(0, 1))


@NOT_FINITE
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [1.0, torch.nan, torch.inf], ids=str)
@BASES
def test_rows_without_adapter_have_the_bits_of_the_base(
    dtype: torch.dtype, adapter: float, row_invariant: bool, device: str
) -> None:
    """Whatever the adapter holds, and down to the sign of zero."""
    x, weight, lora_a, lora_b, gate, _ = (None if t is None else t.to(device) for t in operands(53, 70, 50, 8, dtype))
    x[17:20] *= 1e-30 if dtype != torch.float16 else 1e-7  # results that are negative zeros, or barely not
    weight[:9] *= 1e-30 if dtype != torch.float16 else 1e-4
    lora_a, lora_b = lora_a * adapter, lora_b * adapter
    off = gate == 0
    x.requires_grad_()
    with poisoned_allocations():
        out = gated_lora(x, weight, lora_a, lora_b, gate, 0.5, row_invariant=row_invariant)
        base = (row_invariant_linear if row_invariant else F.linear)(x, weight)
        grad = torch.randn_like(out)
        (grad_x,) = torch.autograd.grad(out, x, grad)
    assert bool((base[off] == 0).any()), "no zero to lose the sign of"
    assert torch.equal(bits(out[off]), bits(base[off]))
    assert torch.equal(bits(grad_x[off]), bits((grad @ weight)[off]))
    assert not bool((out[~off] == base[~off]).all(1).any())
    if adapter == 1.0:
        assert bool(out.isfinite().all())


@NOT_FINITE
@pytest.mark.parametrize("device", DEVICES)
@BASES
def test_gradients_of_the_adapter_read_gated_rows_alone(row_invariant: bool, device: str) -> None:
    x, weight, lora_a, lora_b, gate, _ = (None if t is None else t.to(device) for t in operands(53, 70, 50, 8))
    grad, on = torch.randn(53, 50, device=device), gate != 0

    def gradients(x: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        a, b = lora_a.clone().requires_grad_(), lora_b.clone().requires_grad_()
        out = gated_lora(x, weight, a, b, gate, 0.5, row_invariant=row_invariant)
        return torch.autograd.grad(out, (a, b), grad)

    plain = gradients(x, gate, grad)
    for again, first in zip(gradients(x, gate, grad), plain, strict=True):
        assert torch.equal(again, first)
    x[~on], grad[~on] = torch.nan, torch.inf
    for found, expected in zip(gradients(x, gate, grad), plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@BASES
def test_nothing_to_do(row_invariant: bool, device: str) -> None:
    """No rows, or no row with an adapter."""
    x, weight, lora_a, lora_b, gate, bias = (None if t is None else t.to(device) for t in operands(20, 33, 18, 3))
    lora_a.requires_grad_()
    lora_b.requires_grad_()
    for rows in (0, 20):
        out = gated_lora(x[:rows], weight, lora_a, lora_b, gate[:rows] * 0, 1.0, bias, row_invariant=row_invariant)
        assert out.shape == (rows, 18)
        grads = torch.autograd.grad(out, (lora_a, lora_b), torch.randn_like(out))
        assert not any(bool(g.any()) for g in grads)
    assert row_invariant_linear(x[:0], weight).shape == (0, 18)
    assert torch.equal(row_invariant_linear(x[:, :0], weight[:, :0], bias), bias.expand(20, 18))


@pytest.mark.parametrize("device", DEVICES)
@BASES
def test_inputs_of_the_adapter_are_zero_elsewhere(row_invariant: bool, device: str) -> None:
    """The operator's second result, which the backward pass reads."""
    x, weight, lora_a, lora_b, gate, bias = (None if t is None else t.to(device) for t in operands(53, 70, 50, 8))
    with poisoned_allocations():
        _, h = torch.ops.tidar_kernels.gated_lora(x, weight, bias, lora_a, lora_b, gate, 0.5, row_invariant)
    torch.testing.assert_close(h, gate.unsqueeze(1) * (x @ lora_a.t()))
    assert not bool(h[gate == 0].any())


@pytest.mark.parametrize("path", HERE)
def test_a_gate_is_broadcast(path: str) -> None:
    x, weight, lora_a, lora_b, gate, bias = operands(20, 33, 18, 3)
    folded, gate = x.view(4, 5, 33), gate != 0
    expected = gated_lora(x, weight, lora_a, lora_b, gate[:5].repeat(4), bias=bias)
    for given in (gate[:5], gate[:5].expand(4, 5), gate[None, :5].float(), gate[:5].half()):
        assert torch.equal(gated_lora(folded, weight, lora_a, lora_b, given, bias=bias).view(20, 18), expected)
    alone = gated_lora(x[3], weight, lora_a, lora_b, torch.tensor(True), bias=bias)
    assert torch.equal(alone, gated_lora(x, weight, lora_a, lora_b, torch.tensor(1.0), bias=bias)[3])


def test_gradcheck() -> None:
    leaves = [t.double().requires_grad_() for t in operands(9, 7, 5, 3)[:4]]
    gate, bias = torch.tensor([0.0, 1.0, -0.5] * 3), torch.randn(5, dtype=torch.float64, requires_grad=True)
    for row_invariant in (True, False):

        def lora(*given: Tensor, row_invariant: bool = row_invariant) -> Tensor:
            return gated_lora(*given[:4], gate, 0.7, given[4], row_invariant=row_invariant)

        assert torch.autograd.gradcheck(lora, (*leaves, bias))
    assert torch.autograd.gradcheck(row_invariant_linear, (*leaves[:2], bias))


@pytest.mark.parametrize("path", HERE)
@BASES
def test_opcheck(row_invariant: bool, path: str) -> None:
    x, weight, lora_a, lora_b, gate, bias = operands(9, 33, 18, 3)
    library = torch.ops.tidar_kernels
    torch.library.opcheck(library.row_invariant_linear.default, (x, weight.requires_grad_(), bias))
    given = (x, weight, bias, lora_a.requires_grad_(), lora_b.requires_grad_(), gate, 0.5, row_invariant)
    torch.library.opcheck(library.gated_lora.default, given)
    plain = [t.detach() for t in (torch.randn(9, 18), x, weight, lora_a, lora_b, gate, torch.randn(9, 3))]
    torch.library.opcheck(library.gated_lora_backward.default, (*plain, 0.5))
    plain[2] = None  # type: ignore[call-overload]
    torch.library.opcheck(library.gated_lora_backward.default, (*plain, 0.5))


@pytest.mark.parametrize("path", HERE)
def test_compiles_without_a_graph_break(path: str) -> None:
    x, weight, lora_a, lora_b, gate, bias = operands(9, 33, 18, 3)

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return row_invariant_linear(gated_lora(2.0 * x, weight, a, b, gate, 0.5, bias).relu(), weight.t())

    found = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, lora_a, lora_b)]
        out = call(*leaves)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for compiled, plain in zip(*found, strict=True):
        assert torch.equal(compiled, plain)


@pytest.mark.parametrize("path", HERE)
def test_autocast(path: str) -> None:
    x, weight, lora_a, lora_b, gate, bias = operands(9, 33, 18, 3)
    lora_a.requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        out = gated_lora(x, weight, lora_a, lora_b, gate, 0.5, bias)
    half = [t.half() for t in (x, weight, lora_a, lora_b)]
    assert torch.equal(out, gated_lora(*half, gate, 0.5, bias.half()))
    (grad,) = torch.autograd.grad(out.float().sum(), lora_a)
    assert grad.dtype == torch.float32


def test_no_second_derivative() -> None:
    x, weight, lora_a, lora_b, gate, _ = operands(9, 33, 18, 3)
    out = gated_lora(x.requires_grad_(), weight, lora_a.requires_grad_(), lora_b, gate)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^gated_lora: expected at most first derivatives"):
        grad.sum().backward()


@pytest.mark.interpret
def test_kernels_refuse_float64() -> None:
    x, weight, *_ = (t.double() for t in operands(2, 16, 16, 1)[:4])
    with pytest.raises(TypeError, match=r"^x: expected float32, float16 or bfloat16 for the Triton kernels"):
        row_invariant_linear(x, weight)


BAD = [
    ({"x": [1.0]}, TypeError, r"^x: expected a torch.Tensor, got list$"),
    ({"x": torch.zeros(2, 3, 5)}, ValueError, r"^x: expected shape \[\.\.\., 6\] for this weight, got \[2, 3, 5\]$"),
    ({"x": torch.zeros(2, 3, 6).long()}, TypeError, r"^dtype: expected float32, .*, got torch.int64$"),
    ({"weight": torch.zeros(6)}, ValueError, r"^weight: expected 2 dimensions, got shape \[6\]$"),
    ({"weight": torch.zeros(4, 6).half()}, TypeError, r"^weight: expected dtype torch.float32"),
    ({"bias": torch.zeros(6)}, ValueError, r"^bias: expected shape \[4\], got \[6\]$"),
    ({"lora_a": torch.zeros(0, 6)}, ValueError, r"^lora_a: expected a rank of at least 1, got shape \[0, 6\]$"),
    ({"lora_a": torch.zeros(2, 5)}, ValueError, r"^lora_a: expected shape \[2, 6\], got \[2, 5\]$"),
    ({"lora_b": torch.zeros(4, 3)}, ValueError, r"^lora_b: expected shape \[4, 2\], got \[4, 3\]$"),
    ({"lora_b": torch.zeros(4, 2, device="meta")}, ValueError, r"^lora_b: expected device cpu .*, got meta$"),
    ({"gate": True}, TypeError, r"^gate: expected a torch.Tensor, got bool$"),
    ({"gate": torch.ones(3).int()}, TypeError, r"^gate: expected dtype bool or a float, got torch.int32$"),
    ({"gate": torch.ones(2)}, ValueError, r"^gate: expected a shape that broadcasts to \[2, 3\], got \[2\]$"),
    ({"gate": torch.ones(1, 2, 3)}, ValueError, r"^gate: expected .* broadcasts to \[2, 3\], got \[1, 2, 3\]$"),
    ({"gate": torch.ones(3, device="meta")}, ValueError, r"^gate: expected device cpu"),
    ({"gate": torch.ones(3, requires_grad=True)}, ValueError, r"^gate: expected a tensor without gradient"),
    ({"scale": "1"}, TypeError, r"^scale: expected a number, got str$"),
    ({"scale": float("nan")}, ValueError, r"^scale: expected a finite number, got nan$"),
    ({"backend": "triton"}, ValueError, r"^backend: expected CUDA tensors"),
    ({"backend": "cuda"}, ValueError, r'^backend: expected None, "triton" or "eager"'),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "x": torch.zeros(2, 3, 6),
        "weight": torch.zeros(4, 6),
        "bias": torch.zeros(4),
        "lora_a": torch.zeros(2, 6),
        "lora_b": torch.zeros(4, 2),
        "gate": torch.ones(3),
    }
    gated_lora(**given)
    with pytest.raises(error, match=message):
        gated_lora(**(given | change))


@pytest.mark.parametrize("backend", [None, "eager"])
def test_backends_agree(backend: Any) -> None:
    x, weight, lora_a, lora_b, gate, bias = operands(20, 33, 18, 3)
    expected = eager_linear.gated_lora(x, weight, lora_a, lora_b, gate, 0.5, bias)
    found = gated_lora(x.view(4, 5, 33), weight, lora_a, lora_b, gate.view(4, 5), 0.5, bias, backend=backend)
    torch.testing.assert_close(found.view(20, 18), expected)
    torch.testing.assert_close(row_invariant_linear(x, weight, bias, backend=backend), F.linear(x, weight, bias))
