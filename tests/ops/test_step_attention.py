"""Step attention against its eager twin, and the bits that it promises: interpreted, on the CPU path, on CUDA."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.paths import DEVICES, KERNELS, on_every_path
from tidar_kernels import eager, ops, patterns, testing
from tidar_kernels.ops import paging
from tidar_kernels.ops.kv import cpu as kv_cpu
from tidar_kernels.ops.kv.operands import Turned
from tidar_kernels.ops.operands import Cached, Keys, Scores
from tidar_kernels.ops.step_attention import cpu as step_cpu
from tidar_kernels.ops.step_attention.api import rows_of
from tidar_kernels.testing.caches import CacheKind


@pytest.mark.parametrize(("device", "case"), on_every_path("step_attention"))
def test_parity(device: str, case: testing.StepCase) -> None:
    testing.check_step_attention(case, device)


@pytest.mark.parametrize(("device", "case"), on_every_path("row_bits"))
def test_draft_row_is_single_token_decoding(device: str, case: testing.StepCase) -> None:
    """Row m of a step at length P has the bits of `causal(1)` at length P + m."""
    testing.check_row_bits(case, device)


@pytest.mark.parametrize(("device", "case"), on_every_path("launch_bits"))
def test_bits_do_not_depend_on_the_launch(device: str, case: testing.StepCase) -> None:
    testing.check_launch_bits(case, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        testing.StepCase("group_4", patterns.causal(1), (70,)),
        testing.StepCase("two_of_one_length", patterns.causal(1), (33, 33), 4, 2, 16, layout="bhnd"),
        testing.StepCase("scale_and_sinks", patterns.causal(1), (5, 5), 2, 2, 32, scale=0.7, sinks=True),
        testing.StepCase("no_context", patterns.causal(1), (0, 0), 4, 2, 16),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("device", DEVICES)
def test_one_token_of_sequences_of_one_length(device: str, case: testing.StepCase, dtype: torch.dtype) -> None:
    testing.check_step_attention(replace(case, dtype=dtype), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(0, 7, 33, 7, 60), (33, 33, 33)])
@pytest.mark.parametrize("sinks", [False, True])
def test_bits_of_one_token_do_not_depend_on_other_sequences(
    dtype: torch.dtype, lengths: tuple[int, ...], sinks: bool
) -> None:
    """On the CPU, in all ways that it has for one token. For several rows that is what `exact=True` is for."""
    batch, pattern = len(lengths), patterns.causal(1)
    q, k, v = (torch.randn(batch, heads, 1, 32).to(dtype) for heads in (4, 2, 2))
    k_cache, v_cache = torch.randn(2, batch, 2, 64, 32).to(dtype)
    context, more = torch.tensor(lengths, dtype=torch.int32), {"sinks": torch.randn(4)} if sinks else {}
    out = ops.step_attention(q, k, v, k_cache, v_cache, context, pattern, **more)
    for b in range(batch):
        alone = [x[b : b + 1] for x in (q, k, v, k_cache, v_cache, context)]
        assert torch.equal(ops.step_attention(*alone, pattern, **more), out[b : b + 1])


class Calls(TorchDispatchMode):
    """The calls of PyTorch inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_one_token_on_the_cpu_takes_few_calls() -> None:
    """What a call of PyTorch costs is what a step of one token takes over a short context."""
    q, k, v = torch.randn(1, 4, 1, 16), *torch.randn(2, 1, 2, 1, 16)
    cached = Cached(*torch.randn(2, 1, 2, 40, 16), torch.tensor([30], dtype=torch.int32))
    rows = rows_of(q, patterns.causal(1))
    with Calls() as calls:
        step_cpu.step_attention(rows, Keys(k, v), cached, Scores(0.25))
    assert sum("flash_attention" in name for name in calls.names) == 1
    assert len(calls.names) <= 16
    turned = Turned(q, *torch.randn(2, 1, 1, 16))
    with Calls() as calls:
        kv_cpu.rotary_append(turned, Keys(k, v), cached, 1)
    assert len(calls.names) <= 14


@pytest.mark.parametrize("device", DEVICES)
def test_the_rows_of_a_canvas_share_a_window(device: str) -> None:
    canvas = patterns.block_step(6, shared_window=True)
    testing.check_step_attention(
        testing.StepCase("canvas", canvas, (0, 3, 90), 4, 2, 16, max_len=100, window=5), device
    )


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("ragged", [False, True], ids=["one pattern", "ragged"])
@pytest.mark.parametrize("device", DEVICES)
def test_out_has_the_bits_of_new_results(device: str, ragged: bool, backend: Any) -> None:
    """In memory of any strides, and nothing beside it is written; partial results and none."""
    case = testing.StepCase("out", patterns.tidar_step(2), (3, 150), 4, 2, 16, max_len=160)
    operands = testing.step_operands(case, device)
    q, k, v, k_cache, v_cache, lengths = operands.tensors
    pattern: Any = case.pattern
    if ragged:
        pattern = patterns.batch([case.pattern] * 2).to(device)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    arguments = q, k, v, k_cache, v_cache, lengths, pattern
    expected = ops.step_attention(*arguments, return_lse=True, backend=backend)
    room = torch.full((*expected[0].shape[:-1], 40), 7.0, device=device).transpose(0, 1).contiguous().transpose(0, 1)
    out = room[..., 3:35:2]
    found = ops.step_attention(*arguments, return_lse=True, backend=backend, out=out)
    assert found[0] is out
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ops.step_attention(*arguments, backend=backend, out=out) is out
    around = torch.ones(40, dtype=torch.bool, device=device)
    around[3:35:2] = False
    assert (room[..., around] == 7.0).all()


@pytest.mark.parametrize("device", KERNELS)
def test_lengths_outside_the_cache_are_clamped(device: str) -> None:
    """On a GPU nobody reads `lengths` before the kernel does, so the kernel itself stays inside the cache."""
    lengths = (-1, -(2**31), 2**31 - 1, 31, 30)
    case = testing.StepCase("clamped", patterns.tidar_step(2), (0, 0, 30, 30, 30), 2, 1, 16, max_len=30)
    operands = testing.step_operands(case, device)
    lead, own, _ = case.pattern.on(device)

    def run(values: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        at = torch.tensor(values, dtype=torch.int32, device=device)
        return torch.ops.tidar_kernels.step_attention(*operands.tensors[:5], at, lead, own, 0.25, case.cache_len)

    with testing.poisoned_allocations():
        out, lse = run(lengths)
    expected, expected_lse = run(case.lengths)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("device", DEVICES)
def test_slots_behind_every_window_are_not_read(device: str) -> None:
    """NaN in all tiles of context that no row reaches, splits too: what is computed in vain would show."""
    window, length, tile = (300, 2000, 64) if device == "cuda" else (30, 200, 16)
    case = testing.StepCase("behind", patterns.tidar_step(4), (length, length - 5), 4, 2, 16, window=window, sinks=True)
    operands = testing.step_operands(case, device)
    k_cache, v_cache = operands.tensors[3:5]
    pattern = case.windowed(case.pattern)

    def run() -> Tensor:
        return ops.step_attention(*operands.tensors, pattern, **operands.options)

    expected = run()
    behind = (length - 5 - window) // tile * tile
    k_cache[:, :, :behind], v_cache[:, :, :behind] = torch.nan, torch.nan
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sink_of_minus_infinity_is_none(device: str) -> None:
    case = testing.StepCase("none", testing.irregular_pattern(9, 7), (0, 70), 4, 2, 16, sinks=True)
    operands = testing.step_operands(case, device)
    expected, found = (
        ops.step_attention(*operands.tensors, case.pattern, sinks=sinks, return_lse=True)
        for sinks in (None, torch.full_like(operands.options["sinks"], -torch.inf))
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_sinks_have_a_dtype_of_their_own(device: str) -> None:
    case = testing.StepCase("dtype", patterns.tidar_step(2), (9,), 4, 2, 16, torch.float16, sinks=True)
    operands = testing.step_operands(case, device)
    sinks = operands.options["sinks"]
    found, expected = (ops.step_attention(*operands.tensors, case.pattern, sinks=x) for x in (sinks.float(), sinks))
    assert torch.equal(found, expected)


def far_apart(device: str, folder: Path, rows: int, head_dim: int, stride: int) -> Tensor:
    """A cache `[1, 1, rows, head_dim]` of float16 whose rows lie `stride` elements apart.

    On the CPU it is a sparse file: only the pages that are touched exist.
    """
    numel = (rows - 1) * stride + head_dim
    if device == "cpu":
        path = folder / f"{len(list(folder.iterdir()))}.bin"
        memory = torch.from_file(str(path), shared=True, size=numel, dtype=torch.float16)
    else:
        memory = torch.empty(numel, dtype=torch.float16, device=device)
    return memory.as_strided((1, 1, rows, head_dim), (numel, numel, stride, 1))


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_past_2_31_elements(device: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Slots on both sides of the 2^31st element, in whole tiles of context and in the tile where the drafts begin."""
    if pytestconfig.pluginmanager.hasplugin("tidar_kernels.testing.pytest_sanitizer"):
        pytest.skip("the sanitizer notes 17 bytes for every byte of these storages, and most of theirs exist nowhere")
    whole_tile = 64 if device == "cuda" else 16
    rows, head_dim = 2 * whole_tile + 6, 16
    k_cache, v_cache = (far_apart(device, tmp_path, rows, head_dim, 2**31 // whole_tile) for _ in "kv")
    assert k_cache.stride(2) * (rows - 1) > 2**32
    pattern, committed = patterns.tidar_step(2), 2 * whole_tile + 3
    new = torch.randn(2, 1, 1, committed, head_dim).half().to(device)
    nothing, lengths = (torch.tensor([n], dtype=torch.int32, device=device) for n in (0, committed))
    ops.append_kv(k_cache, v_cache, *new, nothing)
    assert torch.equal(k_cache[:, :, :committed], new[0])
    assert torch.equal(v_cache[:, :, :committed], new[1])
    q, k, v = torch.randn(3, 1, 1, pattern.q_len, head_dim).half().to(device).unbind(0)
    out = ops.step_attention(q, k, v, k_cache, v_cache, lengths, pattern)
    near = (q, k, v, *new)
    reference = eager.step_attention(*(x.double() for x in near), lengths, pattern)
    testing.budget(out, reference, eager.step_attention(*near, lengths, pattern))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 16, 64, 70, 256])
def test_where_keys_lie_changes_no_bit(device: str, page_size: int) -> None:
    """Pages in any order; entries that no key needs name none, and slots that none needs hold NaN."""
    case = testing.StepCase("pages", patterns.tidar_step(4), (64, 0, 131), 4, 2, 16, max_len=280)
    q, k, v, *caches, lengths = testing.step_operands(case, device).tensors
    columns = -(-280 // page_size)
    table = torch.full((3, columns), -(2**31), dtype=torch.int32)
    pages = torch.full((2, 3 * columns, 2, page_size, 16), torch.nan)
    order = iter(torch.randperm(3 * columns).tolist())
    for b, length in enumerate(case.lengths):
        for column in range(-(-length // page_size)):
            table[b, column] = page = next(order)
            slots = slice(column * page_size, min((column + 1) * page_size, length))
            for to, cache in zip(pages, caches, strict=True):
                to[page, :, : slots.stop - slots.start] = cache[b, :, slots]
    expected = ops.step_attention(q, k, v, *caches, lengths, case.pattern, return_lse=True)
    found = ops.step_attention(
        *(q, k, v, *pages.to(device), lengths, case.pattern), block_table=table.to(device), return_lse=True
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_stay_are_seen_as_a_float8_cache_will_hold_them(device: str) -> None:
    """Drafts with their rounding, masks as they were computed."""
    case = testing.StepCase("kept", patterns.tidar_step(3), (0, 20), 2, 1, 16)
    kind = CacheKind(0, "bhnd", torch.float8_e4m3fn, "head")
    memory = testing.step_operands(replace(case, cache=kind), device)
    q, k, v, k_cache, v_cache, lengths = memory.tensors
    scales = {name: x for name, x in memory.options.items() if name != "sinks"}
    expected = ops.step_attention(q, k, v, k_cache, v_cache, lengths, case.pattern, **scales)

    def rounded(x: Tensor, name: str) -> Tensor:
        scale = scales[f"{name}_scale"]
        assert scale is not None
        stored, of_rows = paging.quantise(x, scale[:, :, None].expand(x.shape[:3]), torch.float8_e4m3fn)
        return paging.dequantise(stored, of_rows, x.dtype)

    drafts = [torch.cat([rounded(x[:, :, :3], n), x[:, :, 3:]], 2) for x, n in ((k, "k"), (v, "v"))]
    everything = [rounded(x, n) for x, n in ((k, "k"), (v, "v"))]
    again = ops.step_attention(q, *drafts, k_cache, v_cache, lengths, case.pattern, **scales)
    assert torch.equal(again, expected)
    masks_too = ops.step_attention(q, *everything, k_cache, v_cache, lengths, case.pattern, **scales)
    assert torch.equal(masks_too[:, :, :3], expected[:, :, :3])
    assert not torch.equal(masks_too[:, :, 3:], expected[:, :, 3:])


def test_a_grid_that_no_chip_launches_is_refused() -> None:
    launch = import_module("tidar_kernels.ops._triton.launch")
    kernel = SimpleNamespace(__name__="some_kernel")
    for grid in ((1, 65_536), (2**31,), (1, 1, 70_000)):
        with pytest.raises(ValueError, match=r"^some_kernel: expected a grid of at most .*, got \["):
            launch.Launch(kernel, grid, (), {}).run()


@pytest.mark.parametrize("device", KERNELS)
def test_the_order_of_the_loop_does_not_change_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores one tile ahead or not: the same products, in the same order."""
    kernel = import_module("tidar_kernels.ops.step_attention.triton")
    case = testing.StepCase("order", patterns.tidar_step(4), (131, 0, 16, 48), 4, 2, 64, torch.float16, max_len=400)
    tensors = testing.step_operands(case, device).tensors
    configured, found = kernel.step_config, []
    for ahead in (False, True):

        def chosen(*arguments: Any, ahead: bool = ahead) -> Any:
            return replace(configured(*arguments), SCORES_AHEAD=ahead)

        monkeypatch.setattr(kernel, "step_config", chosen)
        found.append(ops.step_attention(*tensors, case.pattern, return_lse=True))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("name", ["step", "window", "tree", "pages"])
def test_who_has_which_splits_does_not_change_bits(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for each split, fewer that take several, or one that folds all and leaves nothing to merge."""
    kernel = import_module("tidar_kernels.ops.step_attention.triton")
    split = kernel.split_size(kernel.chip_of(torch.device(device)), 2000)
    lengths = {
        "step": (3 * split + 10,),
        "window": (0, 5 * split + 1),
        "tree": (3 * split,),
        "pages": (2 * split + 20,),
    }
    more: dict[str, dict[str, Any]] = {
        "step": {"head_dim": 64, "dtype": torch.float16},
        "window": {"window": split + 6, "sinks": True},
        "tree": {"pattern": testing.random_tree(40), "max_len": 3 * split + 70},
        "pages": {"pattern": patterns.tidar_prefill(split - 20, 4), "cache": CacheKind(5, "nhd")},
    }
    case = replace(testing.StepCase(name, patterns.tidar_step(4), lengths[name], 2, 1, 16), **more[name])
    memory, found, launched = testing.step_operands(case, device), [], set()
    for wanted in (99, 1, 2, 3, 4):

        def programs(*arguments: Any, wanted: int = wanted) -> int:
            launched.add(arguments[-1])
            return min(wanted, arguments[-1])

        monkeypatch.setattr(kernel, "programs_of_a_tile", programs)
        with testing.poisoned_allocations():
            pattern = case.windowed(case.pattern)
            found.append(ops.step_attention(*memory.tensors, pattern, return_lse=True, **memory.options))
    assert min(launched) > 3
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.cuda
def test_repeats_have_the_same_bits() -> None:
    """A race shows as a rare difference."""
    case = testing.StepCase("race", patterns.tidar_step(8), (2000, 511, 0), 16, 4, 128, torch.bfloat16, max_len=2048)
    tensors = testing.step_operands(case, "cuda").tensors
    first, first_lse = ops.step_attention(*tensors, case.pattern, return_lse=True)
    for _ in range(250):
        out, lse = ops.step_attention(*tensors, case.pattern, return_lse=True)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.cuda
def test_one_cuda_graph_serves_every_length() -> None:
    """Lengths are read on the device: a step captured once is replayed at other lengths."""
    case = testing.StepCase("graph", patterns.tidar_step(4), (700, 700), 8, 2, 64, torch.bfloat16, max_len=1024)
    tensors = testing.step_operands(case, "cuda").tensors
    lengths = tensors[5]
    ops.step_attention(*tensors, case.pattern)  # compiles, which a capture cannot do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.step_attention(*tensors, case.pattern)
    for values in ([0, 1], [64, 513], [700, 699]):
        lengths.copy_(torch.tensor(values))
        graph.replay()
        assert torch.equal(out, ops.step_attention(*tensors, case.pattern))


def test_a_backward_pass_is_an_error_by_name() -> None:
    """Without a gradient of its own PyTorch only warns, and what comes back is wrong."""
    pattern = patterns.tidar_step(2)
    q, cache = torch.randn(1, 2, pattern.q_len, 16, requires_grad=True), torch.randn(1, 1, 8, 16)
    k = torch.randn(1, 1, pattern.kv_len, 16, requires_grad=True)
    operands = (q, k, k, cache, cache, torch.tensor([3]))
    out = ops.step_attention(*operands, pattern)
    with pytest.raises(RuntimeError, match=r"^step_attention: expected no backward pass .* tk\.attention"):
        out.sum().backward()
    assert q.grad is None
    ops.step_attention(*operands, pattern, backend="eager").sum().backward()
    assert q.grad is not None
    assert bool(q.grad.any())
