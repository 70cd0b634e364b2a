"""Rows of figures: an implementation on a workload, checked against the oracle, then timed."""

from __future__ import annotations

import math
import sys
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import rates, record, timing
from .operands import VERSION, Operands

OUT_OF_TIME = "the time for benchmarks is used up"
CPU_CACHE = 4 * 2**20  # bytes of cache whose contents are rotated away on a CPU: L2 of two cores
ROW = "python -m benchmarks.row"
Call = Callable[[], Any]
Timer = Callable[[Sequence[Call]], dict[str, float]]  # of calls that do the same on different memory


class DeviceLostError(RuntimeError):
    """The device answers nothing any more: this process can measure no further row."""


def reason(error: BaseException) -> str:
    """Why an implementation has no figures, on one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def failed(line: dict[str, Any]) -> bool:
    """Whether an implementation was tried and has no figures."""
    return "not_available" in line and not line["not_available"].endswith(OUT_OF_TIME)


def head(operator: str, implementation: str, device: str, dtype: torch.dtype, fields: dict[str, Any]) -> dict[str, Any]:
    """What a row begins with: what is measured, without results, and the command line that measures it again."""
    what = {"operator": operator, "implementation": implementation, "device": device}
    what["dtype"] = str(dtype).removeprefix("torch.")
    settings = [f"{field}={value}" for field, value in fields.items()]
    return {**what, **fields, "workloads": VERSION, "command": " ".join([ROW, *what.values(), *settings])}


def parse(cls: type[Any], words: Sequence[str]) -> Any:
    """A workload from `FIELD=VALUE` words.

    Raises:
        ValueError: a word that is none, an unknown field, or one that is missing.
    """
    types = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or name not in types:
            raise ValueError(f"{word}: expected FIELD=VALUE with a field of {', '.join(types)}")
        found[name] = value == str(True) if types[name] is bool else types[name](value)
    try:
        return cls(**found)
    except TypeError as error:
        raise ValueError(f"FIELD=VALUE: {error}") from None


def operands(cls: type[Operands], case: Any, device: str, dtype: torch.dtype) -> list[Operands]:
    """As many sets of random operands as it takes for each to be cold when its turn comes."""
    first = cls(case, device, dtype)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CPU_CACHE
    count = min(cls.sets, timing.copies(first.floor()["bytes"], cache))
    return [first] + [cls(case, device, dtype) for _ in range(count - 1)]


def plan(sets: Sequence[Operands], name: str) -> tuple[list[Call], dict[str, Any]]:
    """Prepare an implementation on every set of operands and check the first: its calls, and what its row says of them.

    Raises:
        WrongResultError: it computes something else. Anything else: it cannot run here.
    """
    prepared, error = [one.prepare(name) for one in sets], 0.0
    if sets[0].implementations[name].ceiling:
        prepared[0].run()
    else:
        error = sets[0].check(name, prepared[0])
    known = {**sets[0].floor(name), "relative_error": float(f"{error:.3g}"), "copies": len(sets)}
    return [one.run for one in prepared], known


def measure(
    cls: type[Operands],
    case: Any,
    rows: record.Rows,
    known: rates.Rates,
    dtype: torch.dtype,
    *,
    device: str = "cuda",
    names: Sequence[str] | None = None,
    timer: Timer | None = None,
    budget_s: float = 0.6,
    deadline: float = math.inf,
) -> bool:
    """Check and time implementations of one workload into `rows`, and tell of each; False if one of ours failed.

    On a CPU they take turns, about `budget_s` seconds each, so that load on the machine meets all alike; on CUDA, and
    with a `timer`, each is measured before the next is planned. Rows that are there already are left alone; absent
    peers have none. Past `deadline`, in seconds of `time.perf_counter`, nothing is started, and the row says so.
    Whatever fails is recorded with the reason, and the others are measured.

    Raises:
        DeviceLostError: a failure took the device with it.
    """
    wanted = [name for name in cls.offered(case, device) if names is None or name in names]
    heads = {name: head(cls.operator, name, device, dtype, vars(case)) for name in wanted}
    heads = {name: line for name, line in heads.items() if rows.get(line["command"]) is None}
    timer = timer or (None if device == "cpu" else timing.time_cuda if cls.graph else timing.time_stream)
    sets, waiting, passed = list[Operands](), dict[str, list[Call]](), True

    def enter(line: dict[str, Any]) -> None:
        if "p50_us" in line:
            # TFLOP/s and GB/s follow from the time and the floor.
            line["tflops"] = float(f"{line['flops'] / line['p50_us'] / 1e6:.4g}")
            line["gbytes_per_s"] = float(f"{line['bytes'] / line['p50_us'] / 1e3:.4g}")
            line |= record.clocks(device) | known.against(line)
            line |= sets[0].further(line, rows.rows)
        rows.put(line)
        print(describe(line), file=sys.stderr, flush=True)

    for name, line in heads.items():
        try:
            if time.perf_counter() > deadline:
                raise TimeoutError(OUT_OF_TIME)
            rows.begin(line)
            with torch.inference_mode(cls.inference):
                sets = sets or operands(cls, case, device, dtype)
                calls, found = plan(sets, name)
                line |= found
                if timer is None:
                    waiting[name] = calls
                else:
                    enter(line | timer(calls))
        except Exception as failure:  # compilers, backends and memory fail in their own ways
            line["not_available"] = reason(failure)
            enter(line)
            if failed(line):
                passed &= name not in cls.own
                _check_device(device)
        calls = []  # what it held is free for the next
        if device == "cuda":
            torch.cuda.empty_cache()
    with torch.inference_mode(cls.inference):
        turns = {name: timing.rotated(calls) for name, calls in waiting.items()}
        measured = timing.time_in_turn(turns, budget_s * len(turns))
    unit = measured.get(cls.yardstick or "")
    for name, times in measured.items():
        against = {"against_floor": round(times["p50_us"] / unit["p50_us"], 3)} if unit else {}
        enter(heads[name] | times | against)
    return passed


def _check_device(device: str) -> None:
    """Raise DeviceLostError if a failure left the CUDA context unusable."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(reason(error)) from None


def describe(line: dict[str, Any]) -> str:
    """A row as a line for the terminal."""
    text = line["command"].removeprefix(f"{ROW} ")
    if "not_available" in line:
        return f"{text}: not available: {line['not_available']}"
    text += f": {line['p50_us']:.1f} us {line['tflops']:.3g} TFLOP/s {line['gbytes_per_s']:.4g} GB/s"
    text += f" {100 * line['of_floor']:5.1f} % of the floor" if "of_floor" in line else ""
    for field, of in (("against_floor", "the causal floor"), ("of_autoregressive", "autoregressive")):
        text += f" {line[field]:5.2f} x {of}" if field in line else ""
    return text
