"""The training operator against its eager twin, forward and backward: interpreted, on the CPU path, on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tidar_kernels as tk
from tests.paths import KERNELS, on_every_path
from tidar_kernels import eager, patterns
from tidar_kernels.models.transformer import Transformer, TransformerConfig
from tidar_kernels.ops.operands import Keys, Results, Rows, Scores
from tidar_kernels.testing import attention as testing

REPEATED = ("batch", "lse_grad", "irregular_fp16", "packed", "shared_heads")
EVERY_CASE = on_every_path("attention")


@pytest.mark.parametrize(("device", "case"), EVERY_CASE)
def test_parity(device: str, case: testing.AttentionCase) -> None:
    testing.check_attention(case, device)


@pytest.mark.parametrize(
    ("device", "case"), [x for x in EVERY_CASE if x.values[1].name in REPEATED or x.values[1].name.startswith("large")]
)
def test_two_runs_give_the_same_bits(device: str, case: testing.AttentionCase) -> None:
    testing.check_attention_repeats(case, device)


@pytest.mark.parametrize("device", KERNELS)
def test_the_order_of_the_loop_does_not_change_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores one tile ahead or not: the same products, in the same order."""
    kernel = import_module("tidar_kernels.ops.attention.triton_forward")
    case = testing.AttentionCase("order", patterns.tidar_training(150, 16), 1, 4, 2, 64, torch.float16)
    operands = testing.attention_operands(case, device)
    q, k, v = (guarded.tensor for guarded in (operands.q, operands.k, operands.v))
    configured, found = kernel.attention_config, []
    for ahead in (False, True):

        def chosen(*arguments: Any, ahead: bool = ahead) -> Any:
            return replace(configured(*arguments), SCORES_AHEAD=ahead)

        monkeypatch.setattr(kernel, "attention_config", chosen)
        found.append(tk.attention(q, k, v, case.pattern, return_lse=True))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def expanded(runs: list[list[int]]) -> list[int]:
    """The row tiles of runs, which are maximal and ascend."""
    assert all(first < end for first, end in runs)
    assert all(before[1] < after[0] for before, after in pairwise(runs))
    return [tile for first, end in runs for tile in range(first, end)]


@pytest.mark.parametrize("device", KERNELS)
def test_when_lse_and_delta_are_loaded_does_not_change_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the next row tile during this one's products, or of this one before them."""
    kernels = import_module("tidar_kernels.ops.attention.triton_backward")
    configs = import_module("tidar_kernels.ops._triton.configs")
    case = testing.AttentionCase("order", patterns.tidar_training(150, 16), 1, 4, 2, 64, torch.float16)
    operands = testing.attention_operands(case, device)
    leaves = [guarded.tensor.detach().requires_grad_() for guarded in (operands.q, operands.k, operands.v)]
    configured, found = kernels.attention_config, []
    for ahead in (False, True):

        def chosen(kernel: str, *rest: Any, ahead: bool = ahead) -> Any:
            config = configured(kernel, *rest)
            if kernel != "dkdv":
                return config
            sizes = {field.name: getattr(config, field.name) for field in fields(configs.TileConfig)}
            return configs.DkdvConfig(**sizes, ROWS_AHEAD=ahead)

        monkeypatch.setattr(kernels, "attention_config", chosen)
        out = tk.attention(*leaves, case.pattern)
        found.append(torch.autograd.grad(out, leaves, out.detach().sin()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def scattered(rows: int) -> patterns.Pattern:
    """Rows that see this and that: many runs of row tiles a key tile."""
    row = torch.arange(rows, dtype=torch.int32)
    end = torch.where(row // 64 % 3 == 1, row // 3, row)
    start = torch.maximum(end, torch.randint(0, rows, (rows,), dtype=torch.int32))
    lead, own = torch.stack([0 * row, end], 1), torch.stack([start, (start + 40).clamp(max=rows)], 1)
    return patterns.Pattern(lead, own, row, rows)


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize(("rows", "most"), [(300, None), (4500, None), (300, 1), (1500, 4)])
def test_runs_of_row_tiles(device: str, rows: int, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk of dK and dV: every tile with a visible pair, as a whole one only where every pair is visible.

    Where there are more runs than `most`, the last one covers the rest.
    """
    kernels = import_module("tidar_kernels.ops.attention.triton_backward")
    if most is not None:
        monkeypatch.setattr(kernels, "MOST_RUNS", most)
    pattern = scattered(rows)
    q = torch.randn(1, 1, rows, 16, device=device)
    on_device = pattern.rows_on(q.device)[:2]
    results = Results(q, torch.zeros(1, 1, rows, device=device), q)
    planned, *_ = kernels.plan_attention_backward(
        Rows(q, *on_device), Keys(q, q), Scores(1.0), results, kernels.chip_of(q.device)
    )
    _, _, note_bounds, list_runs, walk = planned
    note_bounds.run()
    list_runs.run()
    runs, counts = (tensor.cpu() for tensor in list_runs.args[1:3])
    block_m, block_n = walk.options["BLOCK_M"], walk.options["BLOCK_N"]
    padded = torch.zeros(-(-rows // block_m) * block_m, -(-rows // block_n) * block_n, dtype=torch.bool)
    padded[:rows, :rows] = pattern.dense()
    blocks = padded.view(-1, block_m, padded.shape[1] // block_n, block_n).transpose(1, 2)
    some, whole = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    seen = 0
    for key_tile, (num_full, num_partial) in enumerate(counts.tolist()):
        assert num_full + num_partial <= runs.shape[1]
        full = expanded(runs[key_tile, :num_full].tolist())
        partial_runs = runs[key_tile].flip(0)[:num_partial].tolist()
        merged = most is not None and num_full + num_partial == most
        partial = expanded(partial_runs[:-1]) + list(range(*partial_runs[-1])) if merged else expanded(partial_runs)
        assert len(partial) == len(set(partial))
        assert not set(full) & set(partial)
        assert set(some[:, key_tile].nonzero().flatten().tolist()) <= {*full, *partial}
        assert whole[full, key_tile].all()
        seen += len(full)
    if most is None:
        assert seen > 0.9 * whole.sum()  # but for those that two intervals together cover


@pytest.mark.thorough
@pytest.mark.parametrize("device", KERNELS)
def test_gradients_of_more_runs_than_are_listed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums, in another order but for the row tiles that are listed either way; the same bits in every run."""
    kernels = import_module("tidar_kernels.ops.attention.triton_backward")
    pattern = scattered(300)
    leaves = [torch.randn(2, heads, 300, 16, device=device, requires_grad=True) for heads in (4, 2, 2)]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(tk.attention(*leaves, pattern).sin().sum(), leaves)

    exact = gradients()
    monkeypatch.setattr(kernels, "MOST_RUNS", 2)
    found, again = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chip", [None, 80, 90, 100])
def test_the_plan_of_the_backward_pass_takes_memory_linear_in_the_rows(chip: int | None) -> None:
    """What it allocates besides results and a few numbers a row and head: at most 66 bytes a row, at any length."""
    pytest.importorskip("triton")
    kernels = import_module("tidar_kernels.ops.attention.triton_backward")
    for rows in (2**10, 2**16, 2**18, 2**19, 2**20):
        q = torch.empty(1, 1, rows, 128, device="meta", dtype=torch.float16)
        interval = torch.empty(rows, 2, device="meta", dtype=torch.int32)
        results = Results(q, torch.empty(1, 1, rows, device="meta"), q)
        planned, *_ = kernels.plan_attention_backward(
            Rows(q, interval, interval), Keys(q, q), Scores(1.0), results, chip
        )
        bounds, runs, counts = planned[3].args[:3]
        assert sum(x.numel() * x.element_size() for x in (bounds, runs, counts)) <= 66 * rows


@pytest.mark.parametrize("device", KERNELS)
def test_batches_larger_than_a_grid(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch x heads lie along a grid's second axis: what it has no room for goes into further launches."""
    pattern = patterns.tidar_training(20, 4)
    leaves = [torch.randn(5, heads, 40, 16, device=device, requires_grad=True) for heads in (4, 2, 2)]
    grid: list[tuple[int, ...]] = []

    def everything() -> tuple[Tensor, ...]:
        out, lse = tk.attention(*leaves, pattern, return_lse=True)
        return (out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves))

    whole = everything()
    launching = import_module("tidar_kernels.ops._triton.launch")
    run = launching.Launch.run
    monkeypatch.setattr(launching, "MOST_PROGRAMS_ACROSS", 9)  # two sequences of four heads

    def noted(launch: Any) -> None:
        grid.append(launch.grid)
        run(launch)

    monkeypatch.setattr(launching.Launch, "run", noted)
    assert all(torch.equal(a, b) for a, b in zip(everything(), whole, strict=True))
    expected = 3 * [8, 8, 4] + [4, 4, 2]  # forward, rows and dQ by heads; dK and dV by kv heads
    assert [one[1] for one in grid if len(one) == 2] == expected


def test_a_batch_of_more_than_65535_heads_fits() -> None:
    pytest.importorskip("triton")
    kernels = [import_module(f"tidar_kernels.ops.attention.triton_{name}") for name in ("forward", "backward")]
    q, interval = torch.empty(2048, 33, 16, 64, device="meta"), torch.empty(16, 2, device="meta", dtype=torch.int32)
    k, rows = q[:, :11], Rows(q, interval, interval)
    forward, out, lse = kernels[0].plan_attention(rows, Keys(k, k), Scores(1.0), 90)
    backward, *_ = kernels[1].plan_attention_backward(rows, Keys(k, k), Scores(1.0), Results(out, lse, out), 90)
    assert len(forward) == 2
    assert max(max(launch.grid[1:], default=0) for launch in (*forward, *backward)) <= 65_535


def test_tiles_that_pass_the_reach_of_32_bit_offsets_are_copied() -> None:
    """Columns of the widest head so far apart that its last one is just within reach, and just not."""
    pytest.importorskip("triton")
    short_strides = import_module("tidar_kernels.ops.attention.triton_backward")._short_strides
    near, far = (torch.empty_strided((1, 1, 1, 512), (1, 1, 1, 2**22 - less), device="meta") for less in (1, 0))
    assert short_strides(near) is near
    assert short_strides(far).stride(3) == 1


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("head_dim", [9, 72])
def test_head_dims_whose_rows_start_anywhere(device: str, head_dim: int) -> None:
    """Copied into aligned rows on the way in; results have the layout of the operands all the same."""
    case = testing.AttentionCase("odd", patterns.tidar_training(20, 4), 2, 3, 1, head_dim, torch.float32)
    testing.check_attention(case, device)
    rows = [torch.randn(2, 40, heads, head_dim, device=device) for heads in (3, 1, 1)]
    leaves = [x.transpose(1, 2).requires_grad_() for x in rows]
    out = tk.attention(*leaves, case.pattern)
    for x, like in zip((out, *torch.autograd.grad(out.sum(), leaves)), (leaves[0], *leaves), strict=True):
        assert x.stride() == like.stride()


MORE = {"softcap": 0.7, "sinks": torch.tensor([0.3, -0.5], dtype=torch.float64)}


def operands(pattern: patterns.Pattern, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two heads of one kv head, two sequences, as a projection gives them."""
    shapes = ((pattern.q_len, 2), (pattern.kv_len, 1), (pattern.kv_len, 1))
    return [torch.randn(2, rows, heads, 4, dtype=dtype).transpose(1, 2).requires_grad_() for rows, heads in shapes]


@pytest.mark.parametrize("attend", [eager.attention, tk.attention], ids=["eager", "operator"])
@pytest.mark.parametrize("pattern", [patterns.tidar_training(6, 4), patterns.idlm_training(5, 2)], ids=lambda p: p.name)
def test_gradcheck(attend: Any, pattern: patterns.Pattern) -> None:
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, pattern, 0.6, return_lse=True), operands(pattern))


@pytest.mark.parametrize("attend", [eager.attention, tk.attention], ids=["eager", "operator"])
def test_gradcheck_with_more(attend: Any) -> None:
    pattern = patterns.tidar_training(6, 4).windowed(3)
    leaves = [*operands(pattern), MORE["sinks"].clone().requires_grad_()]

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return attend(q, k, v, pattern, 0.6, softcap=0.7, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(run, leaves)


def test_sinks_without_a_gradient() -> None:
    pattern = patterns.tidar_training(6, 4)
    leaves = operands(pattern)
    found, exact = (
        torch.autograd.grad(attend(*leaves, pattern, **MORE).sin().sum(), leaves)
        for attend in (tk.attention, eager.attention)
    )
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("path", ["cpu", pytest.param("interpreter", marks=pytest.mark.interpret)])
def test_opcheck(path: str) -> None:
    pattern = patterns.tidar_training(5, 2)
    q, k, v = operands(pattern, torch.float32)
    lead, own, _ = pattern.on("cpu")
    torch.library.opcheck(torch.ops.tidar_kernels.attention.default, (q, k, v, lead, own, 0.5))
    sinks = torch.randn(2, requires_grad=True)
    torch.library.opcheck(torch.ops.tidar_kernels.attention.default, (q, k, v, lead, own, 0.5, 2.0, sinks))
    saved = [x.detach() for x in (q, k, v, *torch.ops.tidar_kernels.attention(q, k, v, lead, own, 0.5))]
    for grad_lse in (None, torch.randn_like(saved[4])):
        args = (torch.randn_like(saved[3]), grad_lse, *saved, lead, own, 0.5)
        for more in ((), (2.0,)):
            torch.library.opcheck(torch.ops.tidar_kernels.attention_backward.default, (*args, *more))


def test_second_derivatives_are_an_error() -> None:
    pattern = patterns.tidar_training(6, 4)
    q, k, v = operands(pattern)
    (grad,) = torch.autograd.grad(tk.attention(q, k, v, pattern).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^attention: expected at most first derivatives"):
        grad.sum().backward()


def test_a_loss_of_lse_alone() -> None:
    pattern = patterns.tidar_training(6, 4)
    leaves = operands(pattern)
    found, exact = (
        torch.autograd.grad(attend(*leaves, pattern, return_lse=True)[1].sin().sum(), leaves[:2])
        for attend in (tk.attention, eager.attention)
    )
    torch.testing.assert_close(found, exact)


def small_model() -> Transformer:
    config = TransformerConfig(64, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True)
    return Transformer(config)


def gradients(loss: Tensor, model: torch.nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_training_step_compiles_whole_and_once() -> None:
    """One graph forward and backward for every batch of a shape, and for another pattern of the same shape."""
    model, pattern, other = small_model(), patterns.tidar_training(24, 4), patterns.tidar_training(24, 8)
    for each in (pattern, other):
        each.on("cpu")  # its memo is Python state that a graph is guarded on: fill it before compiling

    def step(tokens: Tensor, pattern: patterns.Pattern) -> Tensor:
        doubled = torch.cat([tokens, torch.full_like(tokens, 63)], dim=1)
        return tk.tidar_loss(model(doubled, pattern), model.embed_tokens.weight, tokens, pattern).loss

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for each in (pattern, pattern, other):
        tokens = torch.randint(64, (3, 24))
        loss, expected = compiled(tokens, each), step(tokens, each)
        torch.testing.assert_close(loss, expected)
        for found, exact in zip(gradients(loss, model), gradients(expected, model), strict=True):
            torch.testing.assert_close(found, exact)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_more_compiles_whole() -> None:
    pattern = patterns.tidar_training(12, 4).windowed(5)
    leaves = [*operands(pattern), MORE["sinks"].clone().requires_grad_()]

    def step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return tk.attention(q, k, v, pattern, softcap=0.7, sinks=sinks).sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, exact = (torch.autograd.grad(run(*leaves), leaves) for run in (compiled, step))
    torch.testing.assert_close(found, exact)


def test_activation_checkpointing() -> None:
    model, pattern = small_model(), patterns.tidar_training(24, 4)
    tokens = torch.randint(64, (3, 48))
    plain = gradients(model(tokens, pattern).pow(2).mean(), model)
    hidden = checkpoint(model, tokens, pattern, use_reentrant=False)
    for found, exact in zip(gradients(hidden.pow(2).mean(), model), plain, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize(("block_size", "j"), [(4, 0), (4, 3), (4, 9), (5, 10), (1, 6), (16, 20)])
def test_no_label_leaks(block_size: int, j: int) -> None:
    """Through a whole model: clean token j reaches no mask row of block <= j // B and no clean row before j."""
    s, model = 24, small_model()
    pattern = patterns.tidar_training(s, block_size)
    embedded: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.embed_tokens.register_forward_hook(keep)
    row = torch.arange(2 * s)
    blind = torch.where(row < s, row < j, (row - s) // block_size <= j // block_size)
    for rows, reached in ((blind, False), (~blind, True)):
        hidden = model(torch.randint(64, (1, 2 * s)), pattern)
        (hidden[:, rows] * torch.randn(int(rows.sum()), hidden.shape[-1])).sum().backward()
        assert bool(embedded[-1].grad[0, j].any()) == reached


def test_the_twin_is_not_cast_under_autocast() -> None:
    """An oracle that is asked in float64 answers in float64."""
    q, weight, pattern = torch.randn(1, 2, 5, 16, dtype=torch.float64), torch.randn(8, 16).double(), patterns.causal(5)
    lora_a, lora_b, gate = torch.randn(2, 16).double(), torch.randn(8, 2).double(), torch.ones(5)
    calls: list[Callable[[], Tensor]] = [
        lambda: eager.attention(q, q, q, pattern),
        lambda: eager.row_invariant_linear(q, weight),
        lambda: eager.gated_lora(q, weight, lora_a, lora_b, gate),
    ]
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    pattern = patterns.tidar_training(20, 4)
    q, k, v = operands(pattern, torch.float32)
    with torch.autocast("cpu", dtype):
        out = tk.attention(q, k.to(dtype), v, pattern)
    assert out.dtype == dtype
    assert torch.equal(out, tk.attention(q.to(dtype), k.to(dtype), v.to(dtype), pattern))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    sinks = torch.randn(2, requires_grad=True)  # a parameter, which stays as it is
    with torch.autocast("cpu", dtype):
        tk.attention(q, k, v, pattern, sinks=sinks).sum().backward()
    assert sinks.grad is not None
    assert sinks.grad.dtype == torch.float32


PATTERN = patterns.tidar_training(3, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 6, 4)}, ValueError, r"^q: expected 4 dimensions, got shape \[1, 6, 4\]$"),
        (
            {"k": torch.zeros(1, 1, 6, 4).double()},
            TypeError,
            r"^k: expected dtype torch.float32 like the other operands",
        ),
        ({"q": torch.zeros(1, 3, 6, 4)}, ValueError, r"^q: expected a multiple of 2 kv_heads in dimension 1, got 3"),
        ({"v": torch.zeros(1, 2, 5, 4)}, ValueError, r"^v: expected shape \[1, 2, 6, 4\], got \[1, 2, 5, 4\]$"),
        ({"k": torch.zeros(1, 2, 6, 5)}, ValueError, r"^k: expected shape \[1, 2, 6, 4\], got \[1, 2, 6, 5\]$"),
        ({"q": torch.zeros(1, 2, 5, 4)}, ValueError, r"^q: expected 6 rows for tidar_training"),
        ({"pattern": torch.zeros(6, 6)}, TypeError, r"^pattern: expected a tidar_kernels.Pattern, got Tensor$"),
        ({"scale": -1.0}, ValueError, r"^scale: expected a positive finite number, got -1.0$"),
        ({"softcap": -1.0}, ValueError, r"^softcap: expected a positive finite number, got -1.0$"),
        ({"softcap": True}, TypeError, r"^softcap: expected a float or None, got bool$"),
        ({"sinks": torch.zeros(3)}, ValueError, r"^sinks: expected shape \[2\], got \[3\]$"),
        ({"backend": "triton"}, ValueError, r"^backend: expected CUDA tensors"),
        ({"backend": "sdpa"}, ValueError, r"^backend: expected None"),
        ({"v": None}, TypeError, r"^v: expected a torch.Tensor, got NoneType$"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {name: torch.zeros(1, 2, 6, 4) for name in "qkv"} | {"pattern": PATTERN} | change
    with pytest.raises(error, match=message):
        tk.attention(**arguments)


@pytest.mark.interpret
def test_kernels_refuse_float64() -> None:
    with pytest.raises(TypeError, match=r"^q: expected float32, float16 or bfloat16 for the Triton kernels"):
        tk.attention(*(torch.zeros(1, 1, 6, 4).double() for _ in "qkv"), PATTERN)
