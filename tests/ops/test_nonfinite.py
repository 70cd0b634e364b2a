"""Whatever a row in flight holds, rows that do not see it keep their bits: NaN, infinities, values that overflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tidar_kernels as tk
from tests.paths import DEVICES, KERNELS
from tidar_kernels import eager, patterns, testing
from tidar_kernels.patterns import Pattern

# What broken rows hold, and from which column on. A lone infinity makes scores of +inf and -inf, several make NaN too.
FILLS = ((torch.nan, 0), (torch.inf, 0), (-torch.inf, 15), (torch.inf, 15), (1e20, 0))
STEPS: dict[str, Callable[[], Pattern]] = {
    "tidar_step": lambda: patterns.tidar_step(4),
    "levels": lambda: patterns.tidar_step(4, levels=(1, 3)),
    "isd_step": lambda: patterns.isd_step(4),
    "flare": lambda: patterns.isd_step(4, bidirectional=True),
    "prefill": lambda: patterns.tidar_prefill(11, 4),
    "tree": lambda: testing.random_tree(20),
    "window": lambda: patterns.tidar_step(4).windowed(9),
    "window_within_drafts": lambda: patterns.isd_step(8).windowed(3),
}
TRAINING: dict[str, Callable[[], Pattern]] = {
    "documents": lambda: patterns.tidar_training(19, 4, [7, 4, 8]),
    "idlm": lambda: patterns.idlm_training(11, 3),
    "block_diffusion": lambda: patterns.block_diffusion_training(13, 4),
    "windowed": lambda: patterns.tidar_training(15, 4).windowed(6),
}
# Long enough for the pieces that the CPU path cuts, and too long for the interpreter.
LONG = patterns.packed([patterns.causal(300), patterns.tidar_training(70, 8)])
KINDS = [
    pytest.param(torch.float32, (4, 1), "", id="float32-group_4"),
    pytest.param(torch.float16, (2, 2), "softcap", id="float16-group_1-softcap"),
    pytest.param(torch.float16, (2, 1), "sinks", id="float16-group_2-sinks"),
]
# NumPy, which the interpreter computes with, warns of what is the point here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PATHS = [*DEVICES, pytest.param("eager", id="eager")]


def options_of(more: str, device: str) -> dict[str, Any]:
    values = {"softcap": 1.5, "sinks": torch.tensor([0.3, -0.5], device=device)}
    return {more: values[more]} if more else {}


def hidden_from(pattern: Pattern, row: int) -> Tensor:
    """The rows in flight that `row` does not see, bool `[q_len]`; a row's key has its index."""
    hidden = ~pattern.dense()[row]
    hidden[row] = False
    return hidden


def unconnected(pattern: Pattern, broken: Tensor) -> Tensor:
    """The rows that are not broken and see no broken key, bool `[q_len]`."""
    return ~broken & ~(pattern.dense() & broken).any(1)


def broken_rows(pattern: Pattern) -> list[Tensor]:
    """Rows to break, each time with others left that see none of them."""
    found = [hidden_from(pattern, row) for row in (0, pattern.q_len - 1)]
    return [broken for broken in found if bool(broken.any())]


def filled(x: Tensor, rows: Tensor, turn: int) -> Tensor:
    """A copy of `x [.., rows, d]` whose `rows` hold FILLS in turn, at most the largest that the dtype has."""
    copy, largest = x.clone(), torch.finfo(x.dtype).max
    for i, row in enumerate(rows.nonzero().flatten().tolist()):
        value, column = FILLS[(i + turn) % len(FILLS)]
        copy[:, :, row, column:] = max(min(value, largest), -largest) if math.isfinite(value) else value
    return copy


@pytest.mark.parametrize(("dtype", "heads", "more"), KINDS)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("device", PATHS)
def test_a_step(device: str, name: str, dtype: torch.dtype, heads: tuple[int, int], more: str) -> None:
    attend: Any
    attend, device = (eager.step_attention, "cpu") if device == "eager" else (tk.step_attention, device)
    pattern, options = STEPS[name](), options_of(more, device)
    q, k, v = (torch.randn(2, h, pattern.q_len, 16, device=device).to(dtype) for h in (heads[0], heads[1], heads[1]))
    caches = [torch.randn(2, heads[1], 40, 16, device=device).to(dtype) for _ in range(2)]
    lengths = torch.tensor([37, 5], dtype=torch.int32, device=device)
    for cache in caches:  # slots past the length are never read
        cache[1, :, 5:], cache[0, :, 37:] = torch.nan, torch.nan
    expected, expected_lse = attend(q, k, v, *caches, lengths, pattern, return_lse=True, **options)
    assert bool(expected.isfinite().all())
    for broken in broken_rows(pattern):
        clean = unconnected(pattern, broken).to(device)
        assert bool(clean.any())
        for turn in range(2):
            operands = (filled(x, broken, turn) for x in (q, k, v))
            out, lse = attend(*operands, *caches, lengths, pattern, return_lse=True, **options)
            assert torch.equal(out[:, :, clean], expected[:, :, clean]), turn
            assert torch.equal(lse[:, :, clean], expected_lse[:, :, clean]), turn


@pytest.mark.parametrize("name", ["tidar_step", "tree", "flare"])
@pytest.mark.parametrize("device", PATHS)
def test_rows_that_see_a_broken_key_are_not_finite(device: str, name: str) -> None:
    attend: Any
    attend, device = (eager.step_attention, "cpu") if device == "eager" else (tk.step_attention, device)
    pattern = STEPS[name]()
    q, k, v, k_cache, v_cache = torch.randn(5, 1, 2, pattern.q_len, 16, device=device)
    broken = hidden_from(pattern, 0)
    sees = (pattern.dense() & broken).any(1).to(device)
    lengths = torch.tensor([7], device=device)
    for which in range(2):
        keys = [k, v]
        keys[which] = keys[which].masked_fill(broken[:, None].to(device), torch.nan)
        out = attend(q, *keys, k_cache, v_cache, lengths, pattern)
        assert not bool(out.isfinite().all(-1)[:, :, sees].any())
        assert bool(out[:, :, ~sees].isfinite().all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("device", PATHS)
def test_one_token_whose_own_key_is_broken_is_not_finite(device: str, which: str, value: float) -> None:
    attend: Any
    attend, device = (eager.step_attention, "cpu") if device == "eager" else (tk.step_attention, device)
    q, k, v = torch.randn(3, 2, 2, 1, 16, device=device)
    caches = torch.randn(2, 2, 2, 40, 16, device=device)
    lengths = torch.tensor([33, 33], dtype=torch.int32, device=device)
    expected = attend(q, k, v, *caches, lengths, patterns.causal(1))
    (k if which == "k" else v)[1, :, :, 3:] = value
    q[1] = q[1].abs()  # a score of +inf; the softmax of one of -inf is that of the other keys
    out = attend(q, k, v, *caches, lengths, patterns.causal(1))
    assert not bool(out[1].isfinite().all(-1).any())
    assert torch.equal(out[0], expected[0])


@pytest.mark.parametrize(("dtype", "heads", "more"), KINDS)
@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("device", ["cpu", "eager"])
def test_training(device: str, name: str, dtype: torch.dtype, heads: tuple[int, int], more: str) -> None:
    """Outputs, and gradients where the broken rows have some that are not finite too.

    The training kernels take operands to be finite: checking them cost the overlap of softmax and MMAs.
    """
    check_training(device, TRAINING[name](), dtype, heads, more)


@pytest.mark.parametrize(("dtype", "heads", "more"), KINDS)
@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("device", KERNELS)
def test_training_kernels(
    monkeypatch: pytest.MonkeyPatch, device: str, name: str, dtype: torch.dtype, heads: tuple[int, int], more: str
) -> None:
    """What the kernels promise: an unseen key leaves nothing as long as its products stay within float32."""
    monkeypatch.setitem(globals(), "FILLS", ((1e18, 0), (-1e18, 0), (1e18, 15)))
    check_training(device, TRAINING[name](), dtype, heads, more)


@pytest.mark.parametrize(("dtype", "heads", "more"), KINDS)
@pytest.mark.parametrize("device", ["cpu", "eager"])
def test_long_training(device: str, dtype: torch.dtype, heads: tuple[int, int], more: str) -> None:
    check_training(device, LONG, dtype, heads, more)


def check_training(device: str, pattern: Pattern, dtype: torch.dtype, heads: tuple[int, int], more: str) -> None:
    attend: Any
    attend, device = (eager.attention, "cpu") if device == "eager" else (tk.attention, device)
    options = options_of(more, device)
    q, k, v, grad = (
        torch.randn(1, h, pattern.q_len, 16, device=device).to(dtype) for h in (heads[0], heads[1], heads[1], heads[0])
    )

    def run(*operands: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in operands[:3]]
        out, lse = attend(*leaves, pattern, return_lse=True, **options)
        grads = torch.autograd.grad([out, lse], leaves, [operands[3], operands[3][..., 0].to(lse.dtype)])
        return [out.detach(), lse.detach(), *grads]

    expected = run(*(x.clone() for x in (q, k, v, grad)))
    for broken in broken_rows(pattern):
        rows = unconnected(pattern, broken)
        assert bool(rows.any())
        # A key's gradient comes from the rows that see it: none may be broken, or see what is.
        keys = (~broken & ~(pattern.dense() & ~rows[:, None]).any(0)).to(device)
        rows = rows.to(device)
        for turn in range(2):
            found = run(*(filled(x, broken, turn) for x in (q, k, v, grad)))
            compared = zip(
                ("out", "lse", "dq", "dk", "dv"), found, expected, (rows, rows, rows, keys, keys), strict=True
            )
            for what, got, exact, clean in compared:
                assert torch.equal(got[:, :, clean], exact[:, :, clean]), (what, turn)
