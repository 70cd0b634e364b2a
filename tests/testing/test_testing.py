"""The harness itself: it must see what is wrong. Every rule meets a wrong result here and says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tidar_kernels import ops, patterns, testing
from tidar_kernels.testing import ParityError

CASE = testing.StepCase("small", patterns.tidar_step(2), (3, 9), 4, 2, 16, max_len=12)


def test_budget_is_twice_the_error_of_eager() -> None:
    reference = torch.randn(40, 8, dtype=torch.float64)
    noise = torch.randn(40, 8, dtype=torch.float64)
    eager = reference + 1e-3 * noise
    measure = testing.budget(reference + 1.9e-3 * noise, reference, eager)
    assert measure.budget == pytest.approx(2.0 * measure.eager_error + 1e-5)
    assert measure.error == pytest.approx(1.9 * measure.eager_error)
    with pytest.raises(ParityError, match=r"^lse: expected a relative error of at most .*, got"):
        testing.budget(reference + 2.1e-3 * noise, reference, eager, "lse")


def test_budget_allows_1e_5_where_eager_is_exact() -> None:
    reference = torch.randn(40, 8, dtype=torch.float64)
    testing.budget(reference * (1.0 + 0.9e-5), reference, reference)
    with pytest.raises(ParityError):
        testing.budget(reference * (1.0 + 1.1e-5), reference, reference)


def test_budget_by_row_sees_one_wrong_row() -> None:
    reference = torch.randn(10_000, 8, dtype=torch.float64)
    eager = reference + 4e-3 * torch.randn(10_000, 8, dtype=torch.float64)
    out = reference.clone()
    out[77] *= 1.5
    testing.budget(out, reference, eager)
    with pytest.raises(ParityError, match="expected a relative error"):
        testing.budget(out, reference, eager, by_row=True)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_budget_wants_finite_values(wrong: float) -> None:
    reference = torch.randn(5, 4, dtype=torch.float64)
    out = reference.clone()
    out[2, 3] = wrong
    with pytest.raises(ParityError, match=rf"at \[2, 3\], got {wrong} \(1 of 20 entries"):
        testing.budget(out, reference, reference)


def test_budget_wants_the_same_infinities() -> None:
    reference = torch.tensor([0.5, -torch.inf], dtype=torch.float64)
    testing.budget(reference, reference, reference)
    for wrong in (torch.inf, torch.nan, -1e38):
        with pytest.raises(ParityError, match=r"expected -inf at \[1\]"):
            testing.budget(torch.tensor([0.5, wrong]), reference, reference)
    with pytest.raises(ParityError, match=r"expected shape \[2\], got \[1\]"):
        testing.budget(reference[:1], reference, reference)


def test_check_equal_forgives_nothing() -> None:
    x = torch.randn(3, 4)
    testing.check_equal(x.clone(), x, "x")
    for wrong in (x.nextafter(torch.tensor(9.0)), x[:2], x * torch.nan):
        with pytest.raises(ParityError, match=r"^x: expected"):
            testing.check_equal(wrong, x, "x")


def test_uninitialised_memory_is_nan_inside_and_only_there() -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory
    with testing.poisoned_allocations():
        for x in (torch.empty(100), torch.empty_like(torch.ones(5).half()), torch.ones(3).new_empty(7)):
            assert bool(x.isnan().all())
        assert bool((torch.empty(9, dtype=torch.int32) == 2**31 - 1).all())
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is before
    assert torch.empty.__name__ == "empty"


@pytest.mark.parametrize("offset", [-1, -900, 12, 900])
def test_writes_beside_an_output_are_found(offset: int) -> None:
    def stray() -> None:
        with testing.poisoned_allocations():
            out = torch.empty(3, 4)
            out.fill_(1.0)
            out.as_strided((1,), (1,), out.storage_offset() + offset).fill_(0.0)

    with pytest.raises(ParityError, match=f"guard band of an output: .*the first {offset} elements"):
        stray()


def test_writes_into_an_output_are_fine() -> None:
    with testing.poisoned_allocations():
        out = torch.empty_strided((3, 4), (8, 2))
        out.fill_(1.0)
    assert bool((out == 1.0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_guarded_operands(layout: str, dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 5, 7).to(dtype)
    memory = testing.guarded(values, layout)
    expected = values[:, :1].expand(values.shape) if layout == "shared_heads" else values
    assert torch.equal(memory.tensor, expected)
    assert memory.tensor.stride() == testing.LAYOUTS[layout](2, 3, 5, 7)
    # What is not the tensor is canary, so a stray read shows as NaN.
    assert int(memory.buffer.isfinite().sum()) == memory.tensor[:, :1].numel() * (1 if layout == "shared_heads" else 3)
    memory.check("x")
    for at in (0, memory.tensor.storage_offset() - 1, memory.buffer.numel() - 1):
        memory.buffer[at] = 0.0
        with pytest.raises(ParityError, match=r"^x: expected no write here, got 1 changed elements"):
            memory.check("x")
        memory.buffer[at] = torch.nan
    memory.check("x")
    memory.tensor[1, 2, 3, 4] += 1.0
    memory.check("x", written=True)
    with pytest.raises(ParityError):
        memory.check("x")


def test_an_unknown_layout() -> None:
    with pytest.raises(ValueError, match=r"^layout: expected one of bhnd, .*, got 'nope'$"):
        testing.guarded(torch.zeros(1, 1, 1, 1), "nope")


def test_pairwise_covers_every_pair() -> None:
    axes = {"a": (1, 2, 3, 4, 5), "b": ("x", "y", "z"), "c": (True, False), "d": (0.1, 0.2, 0.3, 0.4)}
    rows = list(testing.pairwise(**axes))
    for one, other in itertools.combinations(axes, 2):
        seen = {(row[one], row[other]) for row in rows}
        assert seen == set(itertools.product(axes[one], axes[other]))
    assert len(rows) < 2 * 5 * 4
    assert rows == list(testing.pairwise(**axes))


def test_the_table_covers_what_it_must() -> None:
    cases = testing.STEP_CASES
    assert len({case.id for case in cases}) == len(cases)
    ratios = {case.num_heads // case.num_kv_heads for case in cases}
    assert ratios >= {1, 4, 6, 7}
    assert {case.head_dim for case in cases} >= {16, 64, 80, 96, 128, 256, 512}
    steps = {patterns.tidar_step(block).name for block in (1, 2, 4, 8, 16)}
    for dtype in (torch.float32, torch.float16):
        assert {case.pattern.name for case in cases if case.dtype == dtype} >= steps
        for ratio, head_dim in itertools.product((1, 4, 6, 7), (16, 64, 80, 128)):
            assert any(c.head_dim == head_dim and c.num_heads == ratio * c.num_kv_heads for c in cases)
    assert {length for case in cases for length in case.lengths} >= {0, 1, 13, 15, 16, 17, 63, 64, 65, 127, 128}
    assert {case.lengths_dtype for case in cases} == {torch.int32, torch.int64}
    assert {case.layout for case in cases} == {case.cache_layout for case in cases} == set(testing.LAYOUTS)
    wholly = [case for case in cases if case.window and case.softcap and case.sinks]
    assert {case.head_dim for case in wholly} >= {64, 80, 256}
    assert {case.window for case in cases} >= {None, 1, 20, 65}
    assert any(case.window and case.softcap and case.sinks for case in testing.BITS_CASES)
    for blocks in (2, 8, 16):
        bits = [case for case in testing.BITS_CASES if case.pattern.name == patterns.tidar_step(blocks).name]
        assert {length % 16 for case in bits for length in case.lengths} >= {15, 0, 1}
        assert {case.dtype for case in bits} == {torch.float32, torch.float16}


def wrongly(change: Callable[[Tensor, Tensor], None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`step_attention` with its results changed in place by `change(out, lse)`."""
    right = ops.step_attention

    def step_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(*args, **kwargs)
        change(out, lse)
        return out, lse

    return step_attention


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (lambda out, lse: out[1, 3, 5].mul_(1.001), "out"),
        (lambda out, lse: lse[0, 0].add_(1e-3), "lse"),
        (lambda out, lse: out[0, 0, 0, 0].fill_(torch.nan), "out"),
        (lambda out, lse: out.copy_(out.roll(1, 2)), "out"),
    ],
)
def test_wrong_results_fail(change: Any, quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    testing.check_step_attention(CASE)
    monkeypatch.setattr(ops, "step_attention", wrongly(change))
    with pytest.raises(ParityError, match=f"^step_attention, case small-float32 on cpu: {quantity}: expected"):
        testing.check_step_attention(CASE)


def test_a_written_operand_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.step_attention

    def step_attention(q: Tensor, *args: Any, **kwargs: Any) -> object:
        q[0, 0, 0, 0] = 0.0
        return right(q, *args, **kwargs)

    monkeypatch.setattr(ops, "step_attention", step_attention)
    with pytest.raises(ParityError, match="q: expected no write here"):
        testing.check_step_attention(CASE)


@pytest.mark.parametrize(("rows", "keys"), [(slice(0, 3), slice(1, 4)), (slice(0, 4), slice(1, None))])
def test_a_misplaced_append_fails(rows: slice, keys: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    case = testing.AppendCase("small", (0, 5), 4, 2, 16, max_len=12)
    testing.check_append_kv(case)

    def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **options: Any) -> None:
        for b, length in enumerate(lengths.tolist()):
            for cache, new in ((k_cache, k), (v_cache, v)):
                cache[b, :, length : length + 4][:, rows] = new[b, :, keys][:, :3].repeat(1, 2, 1)[:, : rows.stop]

    monkeypatch.setattr(ops, "append_kv", append_kv)
    with pytest.raises(ParityError, match=r"^append_kv, case small-float32 on cpu: memory of the cache: expected"):
        testing.check_append_kv(case)


def test_a_case_below_the_checks_has_no_backend() -> None:
    case = testing.AppendCase("over", (11,), 4, max_len=12)
    with pytest.raises(ValueError, match=r"^backend: expected None for a case that does not fit, got 'eager'$"):
        testing.check_append_kv(case, backend="eager")


def test_paths() -> None:
    assert testing.path_of("cpu") == "cpu"
    assert testing.path_of("cuda:1") == "triton"


@pytest.mark.interpret
def test_path_of_the_interpreter() -> None:
    assert testing.path_of("cpu") == "interpreter"


def test_cases_differ_by_path() -> None:
    for suite in testing.SUITES:
        assert suite.quick <= {case.name for case in suite.cases}
        assert (suite.cases_on("cpu") == []) == suite.kernels_only
        assert len(suite.cases_on("triton")) == len(suite.cases) + len(suite.large)
        half = [case for case in suite.cases if case.dtype == torch.float16]
        interpreted = suite.cases_on("interpreter")
        assert [case.name for case in interpreted] == [case.name for case in suite.cases]
        changed = [new for new, case in zip(interpreted, suite.cases, strict=True) if new != case]
        assert changed == [replace(case, dtype=torch.bfloat16) for case in half[::2]]
    (suite,) = (suite for suite in testing.SUITES if suite.operator == "step_attention")
    assert torch.float16 not in {case.dtype for case in suite.cases_on("triton", quick=True)}
    assert torch.float64 in {case.dtype for case in suite.cases_on("cpu")}


def check_quick_run() -> None:
    results = testing.run_parity("cpu")
    assert [result.failure for result in results if not result.passed] == []
    expected = [
        (suite.operator, case.id)
        for suite in testing.SUITES
        for case in suite.cases_on(testing.path_of("cpu"), quick=True)
    ]
    assert [(result.operator, result.case) for result in results] == expected
    measured = [measure for result in results for measure in result.measures]
    assert measured
    assert all(measure.error <= measure.budget for measure in measured)


def test_quick_run_on_the_cpu_path() -> None:
    check_quick_run()


@pytest.mark.interpret
def test_quick_run_of_the_interpreter() -> None:
    check_quick_run()


def test_a_run_reports_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "step_attention", wrongly(lambda out, lse: out.mul_(1.1)))
    results = testing.run_parity("cpu", operators=["step_attention"])
    assert results
    assert not any(result.passed for result in results)
    assert all("expected a relative error" in result.failure for result in results if "no_keys" not in result.case)


def test_a_run_of_an_unknown_operator() -> None:
    with pytest.raises(ValueError, match=r"^operators: expected names among .*, got \['attend'\]$"):
        testing.run_parity("cpu", operators=["attend"])


def test_cases_draw_their_own_numbers() -> None:
    one, same = (testing.step_operands(CASE).tensors[0] for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(testing.step_operands(replace(CASE, name="other")).tensors[0], one)
