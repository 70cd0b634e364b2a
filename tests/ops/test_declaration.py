"""One declaration an operator: bundles and operands are matched by name, and the list of operands is not repeated."""

from __future__ import annotations

import ast
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import tidar_kernels as tk
from tests.paths import REPOSITORY
from tidar_kernels.ops.declaration import Operator
from tidar_kernels.ops.operands import Cached, Keys, Rows, Scores
from tidar_kernels.ops.step_attention import operator as step_operator

# Where the operands of `step_attention` are listed, and why.
LISTED = {
    "ops/step_attention/api.py:step_attention": "what users call",
    "ops/step_attention/api.py:schema": "what PyTorch registers",
    "ops/step_attention/reference.py:step_attention": "the twin is read alone",
    "ops/step_attention/triton.py:step_attention_kernel": "the arguments of a Triton kernel",
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
    assert sorted(fields) == sorted(step_operator.operands)


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
