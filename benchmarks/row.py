"""One row of figures: an implementation on a case, checked against the oracle, then timed; and the command for it.

    python -m benchmarks.row OPERATOR IMPLEMENTATION DEVICE DTYPE FIELD=VALUE ...

Every row of a results file has such a line under `command`. It measures the machine's rates too, prints the row as
JSON, and ends with 1 where the row has no figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import cases, rates, record, registry, timing, workloads
from .implementations import OURS

OUT_OF_TIME = "the time for benchmarks is used up"
CPU_CACHE = 4 * 2**20  # bytes of cache whose contents are rotated away on a CPU: L2 of two cores
# Of a case, for the terminal.
SHOWN = (
    "model", "batch", "block_size", "new_tokens", "nodes", "context_len", "tokens", "temperature", "num_rows",
    "vocab_size",
)  # fmt: skip
Timer = Callable[[Sequence[Callable[[], Any]]], dict[str, float]]


class DeviceLostError(RuntimeError):
    """The device answers nothing any more: this process can measure no further row."""


def reason(error: BaseException) -> str:
    """Why an implementation has no figures, on one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def failed(line: dict[str, Any]) -> bool:
    """Whether an implementation was tried and has no figures."""
    return "not_available" in line and not line["not_available"].endswith(OUT_OF_TIME)


def command(operator: str, implementation: str, device: str, dtype: str, fields: dict[str, Any]) -> str:
    """The command line that measures a row again."""
    settings = " ".join(f"{name}={value}" for name, value in fields.items())
    return f"python -m benchmarks.row {operator} {implementation} {device} {dtype} {settings}"


def head(operator: str, implementation: str, device: str, dtype: torch.dtype, fields: dict[str, Any]) -> dict[str, Any]:
    """What a row begins with: what is measured, without results."""
    name = str(dtype).removeprefix("torch.")
    return {
        "operator": operator,
        "implementation": implementation,
        "device": device,
        "dtype": name,
        **fields,
        "workloads": workloads.VERSION,
        "command": command(operator, implementation, device, name, fields),
    }


def figures(measured: dict[str, float], floor: dict[str, float]) -> dict[str, float]:
    """What follows from a time: TFLOP/s and GB/s on the case's floor."""
    return {
        **measured,
        "tflops": float(f"{floor['flops'] / measured['p50_us'] / 1e6:.4g}"),
        "gbytes_per_s": float(f"{floor['bytes'] / measured['p50_us'] / 1e3:.4g}"),
    }


def check_device(device: str) -> None:
    """Raise DeviceLostError if an earlier failure left the CUDA context unusable."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(reason(error)) from None


def cuda_timer(calls: Sequence[Callable[[], Any]]) -> dict[str, float]:
    return timing.time_cuda(calls)


def cpu_timer(calls: Sequence[Callable[[], Any]]) -> dict[str, float]:
    return timing.time_cpu(timing.rotated(calls))


TIMERS: dict[str, Timer] = {"cuda": cuda_timer, "cpu": cpu_timer}


def operands(operator: str, case: Any, device: str, dtype: torch.dtype) -> list[cases.Operands]:
    """As many sets of random operands as it takes for each to be cold when its turn comes."""
    make = registry.OPERATORS[operator]
    first = make(case, device, dtype)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CPU_CACHE
    return [first] + [make(case, device, dtype) for _ in range(timing.copies(first.floor()["bytes"], cache) - 1)]


def plan(operands: Sequence[cases.Operands], name: str) -> tuple[list[Callable[[], Any]], float]:
    """Prepare an implementation on every set of operands and check the first; `(calls, relative error)`.

    Raises:
        WrongResultError: it computes something else. Anything else: it cannot run here.
    """
    implementation = operands[0].implementations[name]
    prepared = [implementation.prepare(one) for one in operands]
    error = 0.0 if implementation.ceiling else operands[0].check(name, prepared[0])
    return [one.run for one in prepared], error


def measure(
    case: Any,
    operator: str,
    rows: record.Rows,
    measured_rates: rates.Rates,
    dtype: torch.dtype,
    *,
    device: str = "cuda",
    names: Sequence[str] | None = None,
    timer: Timer | None = None,
    deadline: float = math.inf,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> bool:
    """Check and time implementations of one case, one after the other, into `rows`; False if one of ours failed.

    Rows that are there already are left alone; absent peers have none. Past `deadline`, in seconds of
    `time.perf_counter`, nothing is started. Whatever fails is recorded with the reason, and the others are measured.

    Raises:
        DeviceLostError: a failure took the device with it.
    """
    offered = registry.OPERATORS[operator].implementations
    wanted = [name for name in (offered if names is None else names) if not offered[name].absent(device)]
    heads = {name: head(operator, name, device, dtype, vars(case)) for name in wanted}
    heads = {name: line for name, line in heads.items() if not rows.has(line["command"])}
    made: list[cases.Operands] = []
    passed = True
    for name, line in heads.items():
        if time.perf_counter() > deadline:
            break
        rows.begin(line)
        try:
            with torch.inference_mode():
                made = made or operands(operator, case, device, dtype)
                calls, error = plan(made, name)
                floor = made[0].floor()
                result = figures((timer or TIMERS[device])(calls), floor)
            line |= {
                **floor,
                **result,
                "relative_error": float(f"{error:.3g}"),
                "copies": len(made),
                **record.clocks(device),
            }
            line |= measured_rates.against(line)
        except Exception as failure:
            line["not_available"] = reason(failure)
            passed &= name != OURS
        rows.put(line)
        report(line)
        if "not_available" in line:
            check_device(device)
    return passed


def describe(line: dict[str, Any]) -> str:
    """A row as a line for the terminal."""
    what = " ".join(f"{name}={line[name]}" for name in SHOWN if name in line)
    text = f"{line['operator']:15} {line['implementation']:18} {what}"
    if "not_available" in line:
        return f"{text}: not available: {line['not_available']}"
    share = f" {100 * line['of_floor']:5.1f} % of the floor" if "of_floor" in line else ""
    return f"{text}: {line['p50_us']:.1f} us {line['tflops']:.3g} TFLOP/s {line['gbytes_per_s']:.4g} GB/s{share}"


def parse(cls: type[Any], fields: Sequence[str]) -> Any:
    """A case from `FIELD=VALUE` words.

    Raises:
        ValueError: a word that is none, an unknown field, or one that is missing.
    """
    types = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for word in fields:
        name, sign, value = word.partition("=")
        if not sign or name not in types:
            raise ValueError(f"{word}: expected FIELD=VALUE with a field of {', '.join(types)}")
        found[name] = types[name](value)
    try:
        return cls(**found)
    except TypeError as error:
        raise ValueError(f"FIELD=VALUE: {error}") from None


def one(
    operator: str, implementation: str, device: str, dtype: torch.dtype, fields: Sequence[str]
) -> list[dict[str, Any]]:
    """The row of a command line.

    Raises:
        ValueError: an argument does not fit.
    """
    from . import decoder_step, slots, training

    others = {"attention": training.one, "decoder_step": decoder_step.one, "token_slots": slots.one}
    if operator not in {**registry.OPERATORS, **others}:
        raise ValueError(f"OPERATOR: expected one of {', '.join([*registry.OPERATORS, *others])}, got {operator}")
    known = rates.of(rates.measure(device, (dtype,)))
    if operator in others:
        return others[operator](implementation, device, dtype, fields, known)
    offered = registry.OPERATORS[operator].implementations
    if implementation not in offered:
        raise ValueError(f"IMPLEMENTATION: expected one of {', '.join(offered)}, got {implementation}")
    absent = offered[implementation].absent(device)
    if absent:
        raise ValueError(f"{implementation}: {absent}; {offered[implementation].install}")
    held = Held()
    measure(
        parse(registry.CASES[operator], fields), operator, held, known, dtype, device=device, names=(implementation,)
    )
    return held.rows


class Held(record.Rows):
    """Rows that are kept in memory alone."""

    def __init__(self) -> None:
        self.rows = []

    def begin(self, row: dict[str, Any]) -> None:
        """Nothing is entered beforehand."""

    def put(self, *rows: dict[str, Any]) -> None:
        self.rows += rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row", description=__doc__.splitlines()[0])
    parser.add_argument("operator")
    parser.add_argument("implementation")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("fields", nargs="*", metavar="FIELD=VALUE")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.row: error: expected a CUDA GPU, got none", file=sys.stderr)
        return 2
    try:
        rows = one(
            options.operator, options.implementation, options.device, getattr(torch, options.dtype), options.fields
        )
    except ValueError as error:
        print(f"benchmarks.row: error: {error}", file=sys.stderr)
        return 2
    for line in rows:
        print(json.dumps(line))
    return 0 if rows and not any("not_available" in line for line in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
