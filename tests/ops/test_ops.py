"""The operators as `torch.library` sees them, and every way of calling them wrongly."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tidar_kernels as tk
from tidar_kernels import patterns, testing
from tidar_kernels.testing.caches import CacheKind

MAX_LEN = 20
STEP = patterns.tidar_step(2)


# The same tests in both processes: the CPU path, and the kernels interpreted.
@pytest.fixture(params=[pytest.param("cpu"), pytest.param("interpreter", marks=pytest.mark.interpret)])
def path(request: pytest.FixtureRequest) -> str:
    """What runs the operators in this process: `conftest.py` lets a process collect one of the two."""
    return request.param


both_paths = pytest.mark.usefixtures("path")


TABLE = torch.tensor([[0], [1]], dtype=torch.int32)
FLOAT8 = dict.fromkeys(("k_cache", "v_cache"), torch.zeros(2, 2, MAX_LEN, 16, dtype=torch.float8_e4m3fn))
SCALES = {"k_scale": torch.ones(2, 2), "v_scale": torch.ones(2)}


def operands(**changes: Any) -> dict[str, Any]:
    """Valid arguments of `step_attention`, and of `append_kv` without q; with changes."""
    normal = {"q": torch.randn(2, 4, STEP.q_len, 16)}
    normal |= {name: torch.randn(2, 2, STEP.kv_len, 16) for name in ("k", "v")}
    normal |= {name: torch.randn(2, 2, MAX_LEN, 16) for name in ("k_cache", "v_cache")}
    return normal | {"lengths": torch.tensor([3, 14], dtype=torch.int32)} | changes


def step(arguments: dict[str, Any], **options: Any) -> Any:
    names = ("q", "k", "v", "k_cache", "v_cache", "lengths")
    return tk.step_attention(*(arguments[name] for name in names), **({"pattern": STEP} | options))


def append(arguments: dict[str, Any], **options: Any) -> None:
    tk.append_kv(*(arguments[name] for name in ("k_cache", "v_cache", "k", "v", "lengths")), **options)


@both_paths
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "gaps", "bhdn"])
@pytest.mark.parametrize("lengths", [(0, 0), (3, 14)])
@pytest.mark.parametrize("num_heads", [2, 4])
def test_opcheck_step_attention(layout: str, lengths: tuple[int, int], num_heads: int) -> None:
    case = testing.StepCase(
        "opcheck", STEP, lengths, num_heads, 2, 16, max_len=MAX_LEN, layout=layout, cache_layout=layout
    )
    tensors = testing.step_operands(case).tensors
    lead, own, _ = STEP.on("cpu")
    torch.library.opcheck(torch.ops.tidar_kernels.step_attention.default, (*tensors, lead, own, 0.25, MAX_LEN))


@both_paths
def test_opcheck_step_attention_with_more() -> None:
    case = testing.StepCase("opcheck", STEP, (3, 14), 4, 2, 16, max_len=MAX_LEN, window=4, sinks=True)
    operands, pattern = testing.step_operands(case), STEP.windowed(4)
    lead, own, _ = pattern.on("cpu")
    more = (pattern.rows_on("cpu")[2], 2.0, operands.options["sinks"])
    step = torch.ops.tidar_kernels.step_attention.default
    torch.library.opcheck(step, (*operands.tensors, lead, own, 0.25, MAX_LEN, *more))


@both_paths
def test_opcheck_and_compiled_with_out() -> None:
    case = testing.StepCase("opcheck", STEP, (3, 14), 4, 2, 16, max_len=MAX_LEN)
    tensors, (lead, own, _) = testing.step_operands(case).tensors, STEP.on("cpu")
    into = torch.ops.tidar_kernels.step_attention_into.default
    torch.library.opcheck(into, (torch.empty_like(tensors[0]), *tensors, lead, own, 0.25, MAX_LEN))

    def layer(out: Tensor, *tensors: Tensor) -> Tensor:
        return 2.0 * tk.step_attention(*tensors, STEP, out=out)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outs = torch.full_like(tensors[0], torch.nan), torch.full_like(tensors[0], torch.nan)
    assert torch.equal(compiled(outs[0], *tensors), layer(outs[1], *tensors))
    assert torch.equal(*outs)


@both_paths
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "gaps", "bhdn"])
def test_opcheck_append_kv(layout: str) -> None:
    memory = {name: testing.guarded(x, layout).tensor if x.ndim == 4 else x for name, x in operands().items()}
    arguments = [memory[name] for name in ("k_cache", "v_cache", "k", "v", "lengths")]
    torch.library.opcheck(torch.ops.tidar_kernels.append_kv.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fake_tensors_have_the_shapes_of_real_ones(dtype: torch.dtype) -> None:
    real = {name: x.to(dtype) if x.is_floating_point() else x for name, x in operands().items()}
    out, lse = step(real, return_lse=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) for name, x in real.items()}
        fake_out, fake_lse = step(fake, return_lse=True)
        append(fake)
    for got, expected in ((fake_out, out), (fake_lse, lse)):
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


@both_paths
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("more", [False, True])
def test_compiles_without_a_graph_break(backend: str, more: bool) -> None:
    options = {"softcap": 2.0, "sinks": torch.randn(4)} if more else {}
    if more:
        STEP.windowed(5).on("cpu")  # memos are filled outside of graphs

    def layer(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Any:
        keep = STEP.causal_len
        tk.append_kv(k_cache, v_cache, k[:, :, :keep], v[:, :, :keep], lengths)
        pattern = STEP.windowed(5) if more else STEP
        return tk.step_attention(2.0 * q, k, v, k_cache, v_cache, lengths, pattern, **options, return_lse=True)

    given = operands()
    plain, compiled = [[x.clone() for x in given.values()] for _ in range(2)]
    expected = layer(*plain)
    got = torch.compile(layer, fullgraph=True, backend=backend)(*compiled)
    for a, b in zip((*got, *compiled), (*expected, *plain), strict=True):
        assert torch.equal(a, b)


def test_no_gradient_is_made_up() -> None:
    """A decode step has no backward: asking for one says so."""
    arguments = operands(q=torch.randn(2, 4, STEP.q_len, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="step_attention: expected no backward pass"):
        step(arguments).sum().backward()


@both_paths
def test_sizes_of_nothing() -> None:
    """No sequences, or no rows: nothing to compute, nothing to trip over."""
    empty = {name: x[:0] for name, x in operands().items()}
    out, lse = step(empty, return_lse=True)
    assert out.shape == (0, 4, STEP.q_len, 16)
    assert lse.shape == (0, 4, STEP.q_len)
    append(empty)
    no_rows = testing.irregular_pattern(0, STEP.kv_len)
    assert step(operands(q=torch.randn(2, 4, 0, 16)), pattern=no_rows).shape == (2, 4, 0, 16)


Bad = tuple[dict[str, Any], dict[str, Any], type[Exception], str, str, str]

BAD_OPERANDS: list[Bad] = [
    ({"k": [1.0]}, {}, TypeError, "k", "a torch.Tensor", "list"),
    ({"v": None}, {}, TypeError, "v", "a torch.Tensor", "NoneType"),
    ({"k_cache": torch.randn(2, MAX_LEN, 16)}, {}, ValueError, "k_cache", "4 dimensions", "shape [2, 20, 16]"),
    ({"v": torch.randn(2, 2, 6, 16).half()}, {}, TypeError, "v", "dtype torch.float32", "torch.float16"),
    ({"v_cache": torch.randn(2, 2, MAX_LEN, 16).double()}, {}, TypeError, "v_cache", "dtype torch.float32", "float64"),
    ({"k": torch.randn(2, 2, 6, 16, device="meta")}, {}, ValueError, "k", "device cpu", "meta"),
    ({"k": torch.randn(2, 2, 6, 8)}, {}, ValueError, "k", "shape [2, 2, 6, 16]", "[2, 2, 6, 8]"),
    ({"k": torch.randn(1, 2, 6, 16)}, {}, ValueError, "k", "shape [2, 2, 6, 16]", "[1, 2, 6, 16]"),
    ({"v": torch.randn(2, 2, 5, 16)}, {}, ValueError, "v", "shape [2, 2, 6, 16]", "[2, 2, 5, 16]"),
    ({"v_cache": torch.randn(2, 2, 19, 16)}, {}, ValueError, "v_cache", "shape [2, 2, 20, 16]", "[2, 2, 19, 16]"),
    ({"lengths": [3, 14]}, {}, TypeError, "lengths", "a torch.Tensor", "list"),
    ({"lengths": torch.tensor([[3, 14]])}, {}, ValueError, "lengths", "1 dimensions", "shape [1, 2]"),
    ({"lengths": torch.tensor([3.0, 14.0])}, {}, TypeError, "lengths", "dtype int32 or int64", "torch.float32"),
    ({"lengths": torch.tensor([3, 14, 0])}, {}, ValueError, "lengths", "shape [2]", "[3]"),
    ({"lengths": torch.tensor([3, 4], device="meta")}, {}, ValueError, "lengths", "device cpu", "meta"),
    ({"lengths": torch.tensor([3, -1])}, {}, ValueError, "lengths", "0 <= length", "-1 in sequence 1"),
    ({"lengths": torch.tensor([21, 0])}, {}, ValueError, "lengths", "0 <= length", "21 in sequence 0"),
    ({}, {"backend": "cuda"}, ValueError, "backend", 'None, "triton" or "eager"', "'cuda'"),
]
BAD_STEPS: list[Bad] = [
    *BAD_OPERANDS,
    ({"q": 1.0}, {}, TypeError, "q", "a torch.Tensor", "float"),
    ({"q": torch.randn(4, 6, 16)}, {}, ValueError, "q", "4 dimensions", "shape [4, 6, 16]"),
    ({"q": torch.randn(2, 3, 6, 16)}, {}, ValueError, "q", "a multiple of 2 kv_heads", "3 heads"),
    ({"q": torch.randn(2, 4, 5, 16)}, {}, ValueError, "q", "6 rows for tidar_step(block_size=2)", "5"),
    ({"q": torch.randn(2, 4, 6, 16).int()}, {}, TypeError, "dtype", "float32, float16, bfloat16", "torch.int32"),
    ({"k_cache": torch.randn(2, 1, 20, 16)}, {}, ValueError, "k_cache", "shape [2, 2, 20, 16]", "[2, 1, 20, 16]"),
    ({}, {"pattern": None}, TypeError, "pattern", "a tidar_kernels.Pattern", "NoneType"),
    ({}, {"pattern": STEP.dense()}, TypeError, "pattern", "a tidar_kernels.Pattern", "Tensor"),
    ({}, {"pattern": testing.irregular_pattern(6, 4)}, ValueError, "k", "4 in-flight keys for irregular(6, 4)", "6"),
    ({}, {"scale": "1"}, TypeError, "scale", "a float", "str"),
    ({}, {"scale": 0.0}, ValueError, "scale", "a positive finite number", "0.0"),
    ({}, {"scale": float("nan")}, ValueError, "scale", "a positive finite number", "nan"),
    ({}, {"softcap": "50"}, TypeError, "softcap", "a float or None", "str"),
    ({}, {"softcap": 0.0}, ValueError, "softcap", "a positive finite number", "0.0"),
    ({}, {"softcap": float("inf")}, ValueError, "softcap", "a positive finite number", "inf"),
    ({}, {"scale": 10**400}, ValueError, "scale", "a number in [1e-30, 1e30]", "1"),
    ({}, {"scale": 1e39}, ValueError, "scale", "a number in [1e-30, 1e30]", "1e+39"),  # inf in float32
    ({}, {"softcap": 1e39}, ValueError, "softcap", "a number in [1e-30, 1e30]", "1e+39"),
    ({}, {"softcap": 1e-46}, ValueError, "softcap", "a number in [1e-30, 1e30]", "1e-46"),  # 0 in float32
    ({}, {"sinks": [0.0] * 4}, TypeError, "sinks", "a torch.Tensor", "list"),
    ({}, {"sinks": torch.zeros(1, 4)}, ValueError, "sinks", "1 dimensions", "shape [1, 4]"),
    ({}, {"sinks": torch.zeros(2)}, ValueError, "sinks", "shape [4]", "[2]"),
    ({}, {"sinks": torch.zeros(4).int()}, TypeError, "sinks", "dtype float32", "torch.int32"),
    ({}, {"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks", "device cpu", "meta"),
    ({}, {"max_context": 21}, ValueError, "max_context", "0 <= max_context <= max_len = 20", "21"),
    ({}, {"max_context": -1}, ValueError, "max_context", "0 <= max_context <= max_len = 20", "-1"),
    ({}, {"max_context": 13}, ValueError, "lengths", "0 <= length <= max_context = 13", "14 in sequence 1"),
    ({}, {"block_table": [[0], [1]]}, TypeError, "block_table", "a torch.Tensor", "list"),
    ({}, {"block_table": TABLE.long()}, TypeError, "block_table", "dtype int32", "torch.int64"),
    ({}, {"block_table": TABLE[0]}, ValueError, "block_table", "2 dimensions", "shape [1]"),
    ({}, {"block_table": TABLE[:1]}, ValueError, "block_table", "shape [2, 1]", "[1, 1]"),
    ({}, {"block_table": TABLE.to("meta")}, ValueError, "block_table", "device cpu", "meta"),
    ({}, {"block_table": TABLE[:, :0]}, ValueError, "lengths", "0 <= length <= max_context = 0", "3 in sequence 0"),
    ({}, {"block_table": TABLE + 1}, ValueError, "block_table", "0 <= page < 2", "2 in entry 0 of sequence 1"),
    (
        dict.fromkeys(("k_cache", "v_cache"), torch.randn(2, 2, 0, 16)),
        {"block_table": TABLE},
        *(ValueError, "k_cache", "a page size of at least 1", "shape [2, 2, 0, 16]"),
    ),
    (
        dict.fromkeys(("k_cache", "v_cache"), torch.randn(1, 2, 10, 16)),
        {"block_table": torch.zeros(2, 1, dtype=torch.int32)},
        *(ValueError, "lengths", "0 <= length <= max_context = 10", "14 in sequence 1"),
    ),
    (FLOAT8, {}, TypeError, "k_scale", "a torch.Tensor with a k_cache of torch.float8_e4m3fn", "NoneType"),
    (FLOAT8, SCALES | {"v_scale": torch.ones(3)}, ValueError, "v_scale", "broadcastable to [2, 2]", "[3]"),
    (FLOAT8, SCALES | {"k_scale": torch.ones(2).half()}, TypeError, "k_scale", "dtype float32", "torch.float16"),
    (FLOAT8 | {"v_cache": torch.randn(2, 2, 20, 16)}, SCALES, TypeError, "v_cache", "torch.float8_e4m3fn", "float32"),
    ({}, SCALES, TypeError, "k_cache", "dtype float8_e4m3fn or float8_e5m2 with k_scale", "torch.float32"),
    ({"v": torch.randn(2, 2, 6, 24)}, {}, ValueError, "v_cache", "shape [2, 2, 20, 24]", "[2, 2, 20, 16]"),
]
WIDE = torch.zeros(2, 4, STEP.q_len, 16)
BAD_STEPS += [
    ({}, {"out": WIDE[:, :2]}, ValueError, "out", "shape [2, 4, 6, 16]", "[2, 2, 6, 16]"),
    ({}, {"out": WIDE.half()}, TypeError, "out", "dtype torch.float32 like q", "torch.float16"),
    ({}, {"out": WIDE.to("meta")}, ValueError, "out", "device cpu", "meta"),
    ({}, {"out": WIDE[:, :1].expand_as(WIDE)}, ValueError, "out", "elements with a place each", "[384, 0, 16, 1]"),
    ({}, {"out": WIDE.clone().requires_grad_()}, ValueError, "out", "no gradient through a write", "a tensor"),
    ({"q": WIDE.clone().requires_grad_()}, {"out": WIDE}, ValueError, "out", "no gradient through a write", "a tensor"),
]
OVERLAPPING = torch.zeros(2, 2, 20 * 16).unfold(2, 16, 15)[:, :, :20]  # the last element of a slot is the next one's
BAD_APPENDS: list[Bad] = [
    *BAD_OPERANDS,
    ({"v_cache": OVERLAPPING}, {}, ValueError, "v_cache", "elements with a place each", "strides [640, 320, 15, 1]"),
    ({"lengths": torch.tensor([3, 15])}, {}, ValueError, "lengths", "max_len - 6 new tokens = 14", "15 in sequence 1"),
    ({"k": torch.randn(2, 2, 21, 16), "v": torch.randn(2, 2, 21, 16)}, {}, ValueError, "lengths", "= -1", "3"),
]


def check_refused(call: Any, bad: Bad) -> None:
    """The call raises as promised, naming argument, expected and got, and writes nothing."""
    changes, options, kind, name, expected, got = bad
    arguments = operands(**changes)
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, Tensor)}
    message = f"^{name}: expected .*{re.escape(expected)}.*, got .*{re.escape(got)}"
    with pytest.raises(kind, match=message) as raised:
        call(arguments, **options)
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)
    for key, x in before.items():
        assert x.is_meta or torch.equal(arguments[key], x)


@both_paths
@pytest.mark.parametrize(
    "kind", [CacheKind(8, "packed_nhd"), CacheKind(8, "hnd", torch.float8_e4m3fn, "slot")], ids=str
)
def test_opcheck_and_compiled_with_pages_and_scales(kind: CacheKind) -> None:
    case = testing.StepCase("opcheck", STEP, (3, 14), 4, 2, 16, max_len=MAX_LEN, cache=kind)
    memory, (lead, own, _) = testing.step_operands(case), STEP.on("cpu")
    options, operator = memory.options, torch.ops.tidar_kernels.step_attention.default
    named = options | {"kept_len": 2 if kind.dtype else 0}
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += [] if kind.dtype else ["test_schema"]  # which compares operands, and torch cannot compare float8
    torch.library.opcheck(operator, (*memory.tensors, lead, own, 0.25, 24), named, test_utils=checks)

    def layer(q: Tensor, *others: Tensor) -> Tensor:
        return 2.0 * tk.step_attention(q, *others, STEP, **options)

    expected = layer(*memory.tensors)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(*memory.tensors), expected)


@both_paths
@pytest.mark.parametrize("bad", BAD_STEPS, ids=lambda bad: f"{bad[3]}-{bad[5]}")
def test_step_attention_refuses(bad: Bad) -> None:
    check_refused(step, bad)


@both_paths
@pytest.mark.parametrize("bad", BAD_APPENDS, ids=lambda bad: f"{bad[3]}-{bad[5]}")
def test_append_kv_refuses(bad: Bad) -> None:
    check_refused(append, bad)


@pytest.mark.parametrize("call", [step, append])
def test_a_kernel_asked_for_by_name_never_falls_back(call: Any) -> None:
    message = re.escape('backend: expected CUDA tensors (or TRITON_INTERPRET=1) for "triton", got tensors on cpu')
    arguments = operands()
    before = arguments["k_cache"].clone()
    with pytest.raises(ValueError, match=message):
        call(arguments, backend="triton")
    assert torch.equal(arguments["k_cache"], before)


@pytest.mark.interpret
def test_kernels_refuse_float64() -> None:
    arguments = {name: x.double() if x.is_floating_point() else x for name, x in operands().items()}
    with pytest.raises(TypeError, match=r"^q: expected float32, float16 or bfloat16 .*, got torch.float64$"):
        step(arguments, backend="triton")


@both_paths
def test_backends_agree() -> None:
    """By name and by default: the oracle and what runs here, on the same inputs."""
    arguments = operands()
    out, lse = step(arguments, return_lse=True)
    twin, twin_lse = step(arguments, return_lse=True, backend="eager")
    reference = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    exact, exact_lse = step(reference, return_lse=True, backend="eager")
    testing.budget(out, exact, twin)
    testing.budget(lse, exact_lse, twin_lse, "lse")
    assert torch.equal(step(arguments), out)


@both_paths
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(0, 1, 16), (0, 0, 16), (2, 0, 16), (2, 1, 0)])
def test_sizes_of_nothing_that_cannot_be(heads: int, kv_heads: int, head_dim: int) -> None:
    """No heads, or heads without a dimension: an error by name, where ATen would end the process."""
    q, k = torch.zeros(1, heads, 3, head_dim), torch.zeros(1, kv_heads, 3, head_dim)
    cache, pattern = torch.zeros(1, kv_heads, 8, head_dim), tk.patterns.causal(3)
    expected = r"^q: expected a (multiple of \d kv_heads in dimension 1|head_dim of at least 1)"
    for backend in (None, "eager"):
        with pytest.raises(ValueError, match=expected):
            tk.attention(q, k, k, pattern, backend=backend)
        with pytest.raises(ValueError, match=expected):
            tk.step_attention(q, k, k, cache, cache, torch.tensor([2]), pattern, backend=backend)
    rotary = (torch.zeros(1, 3, 1, head_dim),) * 2
    with pytest.raises(ValueError, match=expected):
        tk.rotary_append(q, k, k, rotary, cache, cache.clone(), torch.tensor([2]), 1)


@pytest.mark.interpret
@pytest.mark.parametrize("head_dim", [513, 1024])
def test_kernels_name_the_widest_head(head_dim: int) -> None:
    q, pattern = torch.zeros(1, 1, 3, head_dim), tk.patterns.causal(3)
    expected = f"^q: expected a head_dim of at most 512 for the Triton kernels, got {head_dim}$"
    with pytest.raises(ValueError, match=expected):
        tk.attention(q, q, q, pattern)
    with pytest.raises(ValueError, match=expected):
        tk.step_attention(q, q, q, q, q, torch.tensor([2]), pattern)
