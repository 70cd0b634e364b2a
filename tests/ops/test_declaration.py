"""One declaration an operator: bundles and operands are matched by name, and the list of operands is not repeated."""

from __future__ import annotations

import ast
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tidar_kernels as tk
from tests.paths import REPOSITORY
from tidar_kernels.ops import declaration
from tidar_kernels.ops.declaration import Operator
from tidar_kernels.ops.kv.api import append_operator
from tidar_kernels.ops.operands import Cached, Keys, Rows, Scores
from tidar_kernels.ops.step_attention import operator as step_operator
from tidar_kernels.ops.step_attention.api import into_operator

# Where the operands of `step_attention` are listed, and why.
LISTED = {
    "ops/step_attention/api.py:step_attention": "what users call",
    "ops/step_attention/api.py:schema": "what PyTorch registers",
    "ops/step_attention/reference.py:step_attention": "the twin is read alone",
    "ops/step_attention/triton_kernels.py:step_attention_kernel": "the arguments of a Triton kernel",
}
OPERANDS = {"q", "k", "v", "k_cache", "v_cache", "lengths"}


def lists_of_operands() -> set[str]:
    """`file:name` of every function or schema of the package that spells all of q, k, v, the caches and lengths."""
    found = set()
    package = REPOSITORY / "tidar_kernels"
    for path in package.rglob("*.py"):
        file = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = node.args
                names = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
                if names >= OPERANDS and "keep" not in names:  # `rotary_append` is another operator
                    found.add(f"{file}:{node.name}")
            elif isinstance(node, ast.Constant) and str(node.value).startswith("step_attention(Tensor"):
                found.add(f"{file}:schema")
    return found


def test_the_operands_of_a_step_are_listed_where_they_must_be() -> None:
    assert lists_of_operands() == set(LISTED)


def test_every_operand_is_in_one_bundle() -> None:
    fields = [name for bundle in (Rows, Keys, Cached, Scores) for name in bundle._fields]
    assert sorted(fields) == sorted(into_operator.operands) == sorted(("into", *step_operator.operands))


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Other(NamedTuple):
    y: Tensor
    z: Tensor | None = None


def test_bundles_that_do_not_fit_are_refused() -> None:
    def declare(name: str, *bundles: type) -> Operator:
        return Operator(f"{name}(Tensor x, Tensor y) -> Tensor", *bundles, cpu=print, kernel=print, fake=print)

    with pytest.raises(TypeError, match=r"^test_twice: expected y in one bundle, got it in Other too$"):
        declare("test_twice", Pair, Other)
    with pytest.raises(TypeError, match=r"^test_unknown: expected a default for Rows\.q, no operand of it$"):
        declare("test_unknown", Rows)


def test_operands_reach_their_fields_however_they_are_given() -> None:
    """By position, by keyword, with defaults left out: what a mode over calls sees is what the operator was given."""
    q, cache, lengths, lead = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 4, 8), torch.tensor([2]), torch.zeros(1, 2)
    sinks = torch.ones(2)
    first = (q, cache, cache, cache, cache, lengths, lead, lead, 0.5, 4)

    def taken(rows: Rows, keys: Keys, cached: Cached, scores: Scores) -> tuple[object, ...]:
        return rows.q, keys.v, cached.max_context, rows.reach, scores.scale, scores.softcap, scores.sinks

    expected = (q, cache, 4, None, 0.5, None, sinks)
    assert step_operator.with_bundles(taken, (*first, None, None, sinks), {}) == expected
    assert step_operator.with_bundles(taken, first, {"sinks": sinks}) == expected
    assert step_operator.with_bundles(taken, first[:9], {"max_context": 4, "sinks": sinks}) == expected


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by PyTorch's own forward mode
@pytest.mark.parametrize("name", ["attention", "step_attention"])
def test_forward_mode_is_refused(name: str) -> None:
    """PyTorch would drop the tangent; the twin has it."""
    pattern = tk.patterns.tidar_step(2)
    q, tangent, keys = (torch.randn(1, 2, pattern.q_len, 16) for _ in range(3))
    cache, lengths = torch.randn(1, 2, 8, 16), torch.tensor([5], dtype=torch.int32)

    def run(q: Tensor, backend: str | None = None) -> Tensor:
        if name == "attention":
            return tk.attention(q, keys, keys, pattern, backend=backend)
        return tk.step_attention(q, keys, keys, cache, cache, lengths, pattern, backend=backend)

    with pytest.raises(RuntimeError, match=rf"^{name}: expected no forward-mode derivative"):
        torch.func.jvp(run, (q,), (tangent,))
    assert torch.func.jvp(lambda q: run(q, "eager"), (q,), (tangent,))[1].any()
    with torch.autograd.forward_ad.dual_level():  # without a tangent nothing is lost
        assert torch.equal(run(q), run(q.clone()))


def test_tensors_that_are_not_strided_are_refused() -> None:
    pattern, dense = tk.patterns.causal(6), torch.randn(1, 2, 6, 16)
    jagged = torch.nested.nested_tensor([torch.randn(2, 6, 16)], layout=torch.jagged)
    for other in (jagged, dense.to_sparse()):
        with pytest.raises(TypeError, match=r"^k: expected a strided tensor, got "):
            tk.attention(dense, other, dense, pattern)


class Seen(TorchDispatchMode):
    """What PyTorch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(function.name())
        return function(*args, **kwargs or {})


class Subclass(Tensor):
    pass


def step_operands(requires_grad: bool = False) -> dict[str, Any]:
    pattern = tk.patterns.tidar_step(2)
    q = torch.randn(1, 2, pattern.q_len, 16, requires_grad=requires_grad)
    k, v = (torch.randn(1, 1, pattern.q_len, 16) for _ in "kv")
    k_cache, v_cache = (torch.randn(1, 1, 12, 16) for _ in "kv")
    lengths = torch.tensor([4], dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "lengths": lengths, "pattern": pattern}


class TestCallsPastTheDispatcher:
    """A call that the dispatcher has nothing to do for goes to the implementation, with the same results."""

    @pytest.fixture
    def dispatched(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """A number for each call that went to the dispatcher."""
        calls: list[int] = []
        overload = step_operator._overload

        def call(*args: Any) -> Any:
            calls.append(len(args))
            return overload(*args)

        monkeypatch.setattr(step_operator, "_overload", call)
        return calls

    def test_plain_calls_have_its_results(self, dispatched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        operands = step_operands()
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                found = tk.step_attention(**operands)
        assert not dispatched
        monkeypatch.setattr(declaration, "_is_plain", lambda values: False)
        assert torch.equal(found, tk.step_attention(**operands))
        assert dispatched

    def test_gradients(self, dispatched: list[int]) -> None:
        operands = step_operands(requires_grad=True)
        out = tk.step_attention(**operands)
        assert dispatched
        with pytest.raises(RuntimeError, match=r"^step_attention: expected no backward pass"):
            out.sum().backward()
        dispatched.clear()
        with torch.no_grad():
            assert not tk.step_attention(**operands).requires_grad
        assert not dispatched

    def test_modes_see_the_call(self) -> None:
        with Seen() as seen:
            tk.step_attention(**step_operands())
        assert seen.calls.count("tidar_kernels::step_attention") == 1

    def test_a_profiler_sees_the_call(self) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            tk.step_attention(**step_operands())
        assert "tidar_kernels::step_attention" in {event.name for event in profile.events()}

    @pytest.mark.parametrize("way", ["subclass", "default device", "functorch", "trace"])
    def test_the_dispatcher_has_what_is_not_plain(self, way: str, dispatched: list[int]) -> None:
        operands = step_operands()
        expected = tk.step_attention(**operands)
        if way == "subclass":
            found = tk.step_attention(**operands | {"q": operands["q"].as_subclass(Subclass)}).as_subclass(Tensor)
        elif way == "default device":
            with torch.device("cpu"):
                found = tk.step_attention(**operands)
        elif way == "functorch":
            found = torch.func.vjp(lambda x: x + tk.step_attention(**operands), torch.zeros(()))[0]
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is deprecated, and says so
                traced = torch.jit.trace(lambda q: tk.step_attention(**operands | {"q": q}), operands["q"])
            found = traced(operands["q"])
        assert dispatched
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_what_is_written_has_another_version(self, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that autograd notices that what it had saved is gone. A kernel's writes are none of PyTorch's."""
        monkeypatch.setattr(append_operator, "cpu", lambda *bundles: None)
        operands = step_operands()
        caches = [operands[name] for name in ("k_cache", "v_cache")]
        before = [cache._version for cache in caches]
        with mode():
            tk.append_kv(*caches, operands["k"], operands["v"], operands["lengths"])
        assert all(cache._version > version for cache, version in zip(caches, before, strict=True))
