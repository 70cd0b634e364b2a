"""Cases and check of `verify` and `sample`: every decision of the kernels is that of their eager twins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import Backend
from ..ops.verify import RULES, Rule, SamplingParams, sample, sampling_tensors, verify
from ..ops.verify.noise import Stream
from .harness import ParityError, ParityResult, check_case, generator_of, naming, result_of

__all__ = ["VERIFY_CASES", "VERIFY_CASES_LARGE", "VerifyCase", "check_verify"]


@dataclass(frozen=True)
class VerifyCase:
    """One call of `verify` and one of `sample`, for a sampled and a greedy sequence.

    Args:
        name: for messages; `id` adds the rule and the dtype.
        vocab_size, rows, dtype: of the logits.
        rule: how drafts are judged.
        shaping: options of `SamplingParams` for the sampled sequence.
        extras: which of the optional operands "mix" (with beta 0.6) and "seen" there are.
    """

    name: str
    vocab_size: int
    rows: int
    rule: Rule = "coupled"
    shaping: dict[str, Any] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def id(self) -> str:
        """Name, rule and dtype."""
        return f"{self.name}-{self.rule}-{str(self.dtype).removeprefix('torch.')}"


_ALL = ("mix", "seen")
_KNOBS = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
# The interpreter takes seconds for a vocabulary of a model's size.
_CASES = (
    VerifyCase("V50", 50, 4, shaping=_KNOBS),
    VerifyCase("V50_all", 50, 4, shaping=_KNOBS, extras=_ALL),
    VerifyCase("V50_one_row", 50, 1, shaping={"temperature": 1.0}, extras=_ALL),
    VerifyCase(
        "V50_min_p",
        50,
        8,
        shaping={"temperature": 1.5, "min_p": 0.05, "repetition_penalty": 1.3},
        extras=("seen",),
        dtype=torch.float16,
    ),
    VerifyCase("V1", 1, 2, shaping={"temperature": 1.0}, extras=_ALL),
    VerifyCase("V32000_top_p", 32_000, 3, shaping={"temperature": 0.8, "top_p": 0.8}, extras=_ALL),
    VerifyCase(
        "V32000_top_k",
        32_000,
        2,
        shaping={"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.1},
        extras=_ALL,
        dtype=torch.float16,
    ),
)
_HUGE = VerifyCase(
    "V151936", 151_936, 2, shaping={"temperature": 1.0, "top_k": 50, "top_p": 0.95}, extras=_ALL, dtype=torch.float32
)
VERIFY_CASES: tuple[VerifyCase, ...] = (
    *(replace(case, rule=rule) for case in _CASES for rule in RULES),
    replace(_HUGE, rule="rejection"),
    replace(_HUGE, name="V151936_plain", shaping={"temperature": 0.6}, dtype=torch.float16),
)
VERIFY_CASES_LARGE: tuple[VerifyCase, ...] = tuple(
    replace(_HUGE, name=name, vocab_size=vocab_size, rows=16, rule=rule, dtype=dtype)
    for name, vocab_size, dtype in (("large", 151_936, torch.bfloat16), ("V262144", 262_144, torch.float32))
    for rule in RULES
)


def check_verify(case: VerifyCase, device: torch.device | str = "cpu", backend: Backend | None = None) -> ParityResult:
    """Accepted counts, next tokens, bad rows and samples, all equal to the eager twins'.

    The logits lie with a stride of 2 among NaN. A promise of the kernels: on the CPU the twins themselves run.

    Raises:
        ParityError: a decision differs.
    """
    check_case(case, VerifyCase, device)
    draw, vocab_size = generator_of(case), case.vocab_size

    def normal(scale: float) -> Tensor:
        return torch.randn(2, case.rows, vocab_size, generator=draw, device="cpu") * scale

    logits = normal(3.0)
    wide = torch.full((2, case.rows, 2 * vocab_size), torch.nan, dtype=case.dtype, device=device)[..., ::2]
    wide.copy_(logits)
    draft_logits, mix = (x.to(device, case.dtype) for x in (logits + normal(0.7), logits + normal(1.0)))
    given = {"mix": mix, "seen": (torch.rand(2, vocab_size, generator=draw, device="cpu") < 0.2).to(device)}
    params = [SamplingParams(**case.shaping, seed=2**64 - 1), SamplingParams(seed=1)]
    state = sampling_tensors(params, device)
    positions = torch.tensor([3, 2**31 - 40], device=device)
    stream = Stream.TOKEN if case.rule == "coupled" else Stream.DRAFT
    drafts = sample(draft_logits, positions - 1, state, seen=given["seen"], stream=stream, backend="eager")
    options: dict[str, Any] = {name: given[name] for name in case.extras} | {"rule": case.rule}
    options |= {"beta": 0.6} if "mix" in case.extras else {}
    options |= {"draft_logits": draft_logits} if case.rule == "rejection" else {}

    with naming("verify", case, device):
        found = verify(wide, drafts, positions, state, backend=backend, **options)
        expected = verify(wide, drafts, positions, state, backend="eager", **options)
        for name, mine, twin in zip(found._fields, found, expected, strict=True):
            _same(name, mine, twin)
        _same(
            "sample",
            sample(wide, positions, state, seen=given["seen"], backend=backend),
            sample(wide, positions, state, seen=given["seen"], backend="eager"),
        )
    return result_of("verify", case, device)


def _same(name: str, found: Tensor, expected: Tensor) -> None:
    if found.tolist() != expected.tolist():
        raise ParityError(f"{name}: expected {expected.tolist()}, got {found.tolist()}")
