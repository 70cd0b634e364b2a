"""Which checks run over which cases on which path: the table of `run_parity` and `tidar-kernels doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .. import ops
from ..patterns.arguments import check_device, check_strings
from .append_kv import APPEND_CASES, APPEND_CASES_LARGE, check_append_kv
from .attention import ATTENTION_CASES, ATTENTION_CASES_LARGE, check_attention
from .compact_kv import COMPACT_CASES, COMPACT_CASES_LARGE, check_compact_kv
from .harness import ParityError, ParityResult, result_of
from .linear import LINEAR_CASES, LINEAR_CASES_LARGE, check_gated_lora, check_row_invariant_linear
from .rotary_append import ROTARY_CASES, ROTARY_CASES_LARGE, check_rotary_append
from .step_attention import check_launch_bits, check_row_bits, check_step_attention
from .step_cases import BITS_CASES, BITS_CASES_LARGE, LAUNCH_CASES, STEP_CASES, STEP_CASES_LARGE
from .verify import VERIFY_CASES, VERIFY_CASES_LARGE, check_verify

__all__ = ["SUITES", "Suite", "path_of", "run_parity"]

Path = Literal["triton", "interpreter", "cpu"]


def path_of(device: torch.device | str) -> Path:
    """What the operators run on this device: compiled kernels, interpreted kernels, or the CPU path.

    Raises:
        TypeError, ValueError: it is no device.
    """
    if check_device("device", device).type == "cuda":
        return "triton"
    return "interpreter" if ops.interpreting() else "cpu"


@dataclass(frozen=True)
class Suite:
    """One property of one operator: the check, and the tables it runs over.

    Args:
        operator: the name in results.
        check: `check(case, device) -> ParityResult`.
        cases: run in the interpreter, on the CPU path and on CUDA.
        large: run on CUDA as well.
        quick: names of the cases for a self-check of a few seconds.
        kernels_only: a promise that the CPU path does not make.
    """

    operator: str
    check: Callable[[Any, torch.device | str], ParityResult]
    cases: tuple[Any, ...]
    large: tuple[Any, ...] = ()
    quick: frozenset[str] = frozenset()
    kernels_only: bool = False

    def cases_on(self, path: Path, *, quick: bool = False) -> list[Any]:
        """The cases for a path of execution: dtypes are those that the path is for.

        Tables hold float32 and float16. A GPU takes bfloat16 in place of float16, the interpreter in place of every
        other one, and the CPU path takes float64 in place of the odd float32.
        """
        cases = [case for case in self.cases if not quick or case.name in self.quick]
        if path == "cpu":
            if self.kernels_only:
                return []
            return [
                replace(case, dtype=torch.float64) if case.dtype == torch.float32 and index % 3 == 0 else case
                for index, case in enumerate(cases)
            ]
        if path == "triton":
            cases = [replace(case, dtype=torch.bfloat16) if case.dtype == torch.float16 else case for case in cases] + [
                case for case in self.large if not quick
            ]
        if path == "interpreter":
            odd = [case for case in cases if case.dtype == torch.float16][::2]
            cases = [replace(case, dtype=torch.bfloat16) if case in odd else case for case in cases]
        return cases


SUITES: tuple[Suite, ...] = (
    Suite("append_kv", check_append_kv, APPEND_CASES, APPEND_CASES_LARGE, frozenset({"append", "gaps", "overflow"})),
    Suite("compact_kv", check_compact_kv, COMPACT_CASES, COMPACT_CASES_LARGE, frozenset({"compact", "gaps"})),
    Suite("rotary_append", check_rotary_append, ROTARY_CASES, ROTARY_CASES_LARGE, frozenset({"step_B4", "keeps_none"})),
    Suite(
        "step_attention",
        check_step_attention,
        STEP_CASES,
        STEP_CASES_LARGE,
        frozenset({"head_dim_96", "bfloat16", "prefill", "decode", "irregular", "empty_rows"}),
    ),
    Suite("row_bits", check_row_bits, BITS_CASES, BITS_CASES_LARGE, frozenset({"B2_single_split"}), kernels_only=True),
    Suite("launch_bits", check_launch_bits, LAUNCH_CASES, (), frozenset({"step_B4_single_split"}), kernels_only=True),
    Suite(
        "attention",
        check_attention,
        ATTENTION_CASES,
        ATTENTION_CASES_LARGE,
        frozenset({"batch", "lse_grad", "step", "softcap_50"}),
    ),
    Suite("verify", check_verify, VERIFY_CASES, VERIFY_CASES_LARGE, frozenset({"V50_all"}), kernels_only=True),
    Suite("gated_lora", check_gated_lora, LINEAR_CASES, LINEAR_CASES_LARGE, frozenset({"batch", "batch_library"})),
    Suite(
        "row_invariant_linear",
        check_row_invariant_linear,
        tuple(case for case in LINEAR_CASES if case.row_invariant),
        tuple(case for case in LINEAR_CASES_LARGE if case.row_invariant),
        frozenset({"batch"}),
    ),
)


def run_parity(
    device: torch.device | str = "cpu", quick: bool = True, operators: Iterable[str] | None = None
) -> list[ParityResult]:
    """Run the tables on this machine: what `tidar-kernels doctor --parity` does.

    Args:
        device: whose path is checked; on the CPU that is the interpreter under `TRITON_INTERPRET=1`.
        quick: a few cases of every suite, or all of them.
        operators: names of suites; None for all.

    Returns:
        One result a case. A failed case has its message in `failure`; nothing is raised for it.

    Raises:
        TypeError, ValueError: an operator is not in `SUITES`, or an argument of another type.
    """
    known = {suite.operator for suite in SUITES}
    wanted = known if operators is None else set(check_strings("operators", operators))
    if not wanted <= known:
        raise ValueError(f"operators: expected names among {sorted(known)}, got {sorted(wanted - known)}")
    path = path_of(device)
    return [
        _outcome(suite, case, device)
        for suite in SUITES
        if suite.operator in wanted
        for case in suite.cases_on(path, quick=quick)
    ]


def _outcome(suite: Suite, case: Any, device: torch.device | str) -> ParityResult:
    try:
        return suite.check(case, device)
    except ParityError as error:
        return replace(result_of(suite.operator, case, device), failure=str(error))
