"""Context parallelism on gloo against one process with a dense mask: results, gradients, balance, compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tidar_kernels as tk
from tests.distributed.processes import budgets, on_ranks
from tidar_kernels import Pattern, patterns
from tidar_kernels.distributed import ContextParallel, collectives
from tidar_kernels.distributed.sharding import deal, live_pairs
from tidar_kernels.testing import irregular_pattern

Results = dict[str, Tensor]

# Lengths that nothing divides.
PATTERNS: dict[str, Callable[[], Pattern]] = {
    "tidar": lambda: patterns.tidar_training(101, 8),
    "documents": lambda: patterns.tidar_training(103, 4, [50, 11, 1, 41], [0, 7, 0, 41]),
    "idlm": lambda: patterns.idlm_training(67, 5),
    "block_diffusion": lambda: patterns.block_diffusion_training(61, 16),
    "set_block": lambda: patterns.set_block_training(59, 3),
    "dflash": lambda: patterns.dflash_training(53, [0, 17, 29, 53], 7),
    "jacobi": lambda: patterns.jacobi_forcing_training(13, 43),
    "causal": lambda: patterns.causal(41),
    "packed": lambda: patterns.packed([patterns.tidar_training(s, 4) for s in (9, 1, 30)]),
    "window": lambda: patterns.tidar_training(71, 8).windowed(9),
    "irregular": lambda: irregular_pattern(43, 37),
    "fewer rows than keys": lambda: irregular_pattern(11, 47, seed=3),
}


@dataclass(frozen=True)
class Case:
    """Attention over a pattern; `numbers` are keyword arguments of it."""

    pattern: str
    heads: tuple[int, int] = (4, 2)
    batch: int = 2
    dtype: torch.dtype = torch.float32
    lse_grad: bool = False
    sinks: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)

    def operands(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v, gradients of out and lse, and sinks if any: values of `self.dtype`, as `dtype`."""
        draw, pattern = torch.Generator().manual_seed(len(self.pattern)), PATTERNS[self.pattern]()
        (heads, kv_heads), q_len, kv_len = self.heads, pattern.q_len, pattern.kv_len
        shapes = [(heads, q_len, 8), (kv_heads, kv_len, 8), (kv_heads, kv_len, 8), (heads, q_len, 8), (heads, q_len)]
        drawn = [torch.randn(self.batch, *shape, generator=draw).to(self.dtype).to(dtype) for shape in shapes]
        drawn[4] *= pattern.dense().any(1)
        return [*drawn, torch.randn(heads, generator=draw).to(dtype)] if self.sinks else drawn

    def run(self, operands: list[Tensor], attend: Callable[..., Any]) -> Results:
        q, k, v, grad_out, grad_lse, *sinks = operands
        leaves = [x.detach().requires_grad_() for x in (q, k, v, *sinks)]
        more = {"sinks": leaves[3]} if sinks else {}
        out, lse = attend(*leaves[:3], return_lse=True, **more, **self.numbers)
        outputs, grads = ([out, lse], [grad_out, grad_lse.to(lse.dtype)]) if self.lse_grad else ([out], [grad_out])
        found = torch.autograd.grad(outputs, leaves, grads)
        return dict(zip(("out", "lse", "dq", "dk", "dv", "dsinks"), (out.detach(), lse.detach(), *found), strict=False))


CASES = {
    **{name: Case(name) for name in PATTERNS},
    "group of 7": Case("tidar", heads=(7, 1), batch=1),
    "bfloat16": Case("documents", dtype=torch.bfloat16, heads=(4, 4)),
    "lse": Case("tidar", lse_grad=True),
    "more": Case("documents", lse_grad=True, sinks=True, numbers={"softcap": 1.5, "scale": 0.7}),
    "eager": Case("idlm", lse_grad=True, numbers={"backend": "eager"}),
}


def mesh() -> Any:
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


def everything() -> dict[str, Any]:
    """Of each case this rank's rows and keys, and its results: twice, and with the gathered keys kept; and what
    `functions` says."""
    found: dict[str, Any] = {"functions": functions()}
    for name, case in CASES.items():
        operands = case.operands(case.dtype)
        runs = []
        for keep in (False, False, True):
            cp = ContextParallel(mesh(), PATTERNS[case.pattern](), keep_gathered=keep)
            mine = [x[:, :, cp.keys if i in (1, 2) else cp.rows] for i, x in enumerate(operands[:5])] + operands[5:]
            runs.append(case.run(mine, cp.attention))
        found[name] = (cp.rows, cp.keys, runs)
    return found


def functions() -> dict[str, Any]:
    """Sharding and gathering, windows, errors, and a compiled graph, each as far as a rank can say."""
    said: dict[str, Any] = {}
    pattern = PATTERNS["tidar"]()
    cp = ContextParallel(mesh(), pattern)
    x = torch.randn(2, pattern.q_len, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    said["inverse"] = torch.equal(cp.gather(cp.shard(x, 1), 1), x) and torch.equal(
        cp.gather(cp.shard(x.transpose(1, 2), -1), -1), x.transpose(1, 2)
    )
    apart = ContextParallel(mesh(), PATTERNS["dflash"]())
    y = torch.randn(2, apart.pattern.kv_len)
    dist.broadcast(y, 0)
    said["inverse of keys"] = torch.equal(apart.gather(apart.shard(y, 1, "keys"), 1, "keys"), y)
    part = cp.shard(x, 1).requires_grad_()
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    weights = torch.randint(-9, 10, x.shape, generator=draw).double()  # integers: the same sum in any order
    (cp.gather(part, 1) * weights).sum().backward()
    dist.all_reduce(weights)
    said["gradient of gather"] = torch.equal(part.grad, cp.shard(weights, 1))
    said["window"] = torch.equal(cp.windowed(5).local.dense(), pattern.windowed(5).dense()[cp.rows])
    said["window is kept"] = cp.windowed(5) is cp.windowed(5) and cp.windowed(5).rows is cp.rows
    said["errors"] = [
        _error(lambda: ContextParallel("cpu", pattern)),
        _error(lambda: ContextParallel(mesh(), "tidar")),
        _error(lambda: ContextParallel(mesh(), patterns.tree([-1, 0, 0, 1, 1]))),
        _error(lambda: ContextParallel(mesh(), patterns.causal(1))),
        _error(lambda: cp.shard(x, 0)),
        _error(lambda: cp.gather(x, 1)),
        _error(lambda: cp.gather(x, 1, "values")),
        _error(lambda: cp.attention(*[x.transpose(1, 2)[..., None]] * 3)),
        _error(lambda: cp.attention(*[torch.zeros(1, 1, len(cp.rows), 8)] * 3, backend="triton")),
    ]
    return said


def compiled() -> tuple[bool, int]:
    """Whether graphs give what eager code gives, and how many collectives the forward and the backward one hold."""
    case = CASES["documents"]
    cp = ContextParallel(mesh(), PATTERNS["documents"]())
    mine = [x[:, :, cp.rows] for x in case.operands(torch.float32)[:4]]
    held = []

    def keep(graph: Any, inputs: Any) -> Any:
        held.extend(node.target for node in graph.graph.nodes)
        return graph

    def run(attend: Callable[..., Any]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in mine[:3]]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, mine[3])]

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    # It compiles both graphs.
    backend = aot_autograd(fw_compiler=lambda g, i: make_boxed_func(keep(g, i)))
    torch._dynamo.reset()
    graph = torch.compile(lambda q, k, v: cp.attention(q, k, v), fullgraph=True, backend=backend)
    same = all(torch.equal(a, b) for a, b in zip(run(graph), run(cp.attention), strict=True))
    return same, sum("_c10d_functional" in str(target) and "wait" not in str(target) for target in held)


def _error(function: Callable[[], Any]) -> str:
    try:
        function()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.distributed)])
def ranks(request: pytest.FixtureRequest) -> list[Any]:
    """What every rank found."""
    return on_ranks(request.param, everything)


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(ranks: list[Any], name: str) -> None:
    case, pattern = CASES[name], PATTERNS[CASES[name].pattern]()
    parts = [part[name] for part in ranks]
    assert torch.equal(torch.cat([rows for rows, _, _ in parts]).sort().values, torch.arange(pattern.q_len))
    assert torch.equal(torch.cat([keys for _, keys, _ in parts]).sort().values, torch.arange(pattern.kv_len))
    numbers = {key: value for key, value in case.numbers.items() if key != "backend"}
    exact, plain = (
        Case(**{**vars(case), "numbers": numbers}).run(
            case.operands(dtype), lambda *args, **more: tk.eager.attention(*args[:3], pattern, **more)
        )
        for dtype in (torch.float64, case.dtype)
    )
    found = {key: torch.full_like(value, torch.nan) for key, value in plain.items()}
    for rows, keys, (first, *_) in parts:
        for key, value in first.items():
            if key == "dsinks":
                found[key] = found[key].nan_to_num(0.0) + value
            else:
                found[key][:, :, keys if key in ("dk", "dv") else rows] = value
    budgets(found, exact, plain)


@pytest.mark.parametrize("name", CASES)
def test_runs_give_the_same_bits(ranks: list[Any], name: str) -> None:
    for part in ranks:
        first, *others = part[name][2]
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first)


def test_functions(ranks: list[Any]) -> None:
    for said in (part["functions"] for part in ranks):
        errors = said.pop("errors")
        assert all(said.values()), said
        expected = [
            "TypeError: mesh: expected a torch.distributed DeviceMesh, got str",
            "TypeError: pattern: expected a tidar_kernels.Pattern, got str",
            "ValueError: pattern: expected one without tree mask",
            "ValueError: pattern: expected at least a key a rank",
            "ValueError: x: expected 202 rows in dimension 0",
            "ValueError: x: expected ",
            'ValueError: of: expected "rows" or "keys"',
            "ValueError: q: expected ",
            "ValueError: backend: expected CUDA tensors",
        ]
        for error, start in zip(errors, expected, strict=True):
            assert error.startswith(start), error


def test_on_cpus_one_gathering_follows_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once on gloo corrupt the heap: one process in a few thousand steps aborts."""
    under_way: list[Tensor] = []

    class Collective:
        def all_gather_into_tensor(self, x: Tensor, ranks: int, group: str) -> Tensor:
            assert not under_way
            under_way.append(x)
            return x.repeat(ranks, 1)

        def wait_tensor(self, x: Tensor) -> Tensor:
            under_way.clear()
            return x

    monkeypatch.setattr(collectives, "_collective", Collective())
    shards = collectives.Shards(list(torch.arange(5).tensor_split(2)), 0, "none", torch.device("cpu"))
    x = torch.randn(3, 2)
    for whole in shards.gather(x, x, x):
        assert torch.equal(whole, torch.cat([x, x[:2]]))


@pytest.mark.parametrize("world", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("seq_len", [1021, pytest.param(4099, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("family", ["tidar", "documents", "idlm", "block_diffusion", "jacobi", "causal", "window"])
def test_work_is_balanced(family: str, seq_len: int, world: int) -> None:
    s = seq_len
    pattern = {
        "tidar": lambda: patterns.tidar_training(s, 16),
        "documents": lambda: patterns.tidar_training(s, 8, [s // 2, s // 3, s - s // 2 - s // 3], [0, s // 5, 3]),
        "idlm": lambda: patterns.idlm_training(s, 4),
        "block_diffusion": lambda: patterns.block_diffusion_training(s, 32),
        "jacobi": lambda: patterns.jacobi_forcing_training(s // 4, s),
        "causal": lambda: patterns.causal(s),
        "window": lambda: patterns.tidar_training(s, 16).windowed(300),
    }[family]()
    shards = deal(live_pairs(pattern), world)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(pattern.q_len))
    seen = pattern.dense().sum(1)
    assert torch.equal(seen, live_pairs(pattern))
    pairs, rows = [int(seen[shard].sum()) for shard in shards], [len(shard) for shard in shards]
    assert max(pairs) <= 1.1 * min(pairs), pairs
    assert max(rows) <= 1.1 * pattern.q_len / world, rows


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.distributed
def test_compiles_whole() -> None:
    """K and V gathered in the forward graph; gathered again, and their gradients exchanged, in the backward one."""
    for same, exchanges in on_ranks(2, compiled):
        assert same
        assert exchanges == 6
