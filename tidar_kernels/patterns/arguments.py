"""Checks of plain arguments, for every room: each error reads `argument: expected ..., got ...`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "FLOAT_DTYPES",
    "check_bool",
    "check_device",
    "check_dtype",
    "check_instance",
    "check_instances",
    "check_int",
    "check_ints",
    "check_number",
    "check_numbers",
    "check_path",
    "check_sequence",
    "check_strings",
]

T = TypeVar("T")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # that operators compute in


def check_int(name: str, value: Any, at_least: int, below: int = 2**63) -> int:
    """`value`, if it is an int in `[at_least, below)`; else the TypeError or ValueError that says what came instead.

    `below`: 2**63 is where PyTorch's own integers end.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name}: expected >= {at_least}, got {value}")
    if value >= below:
        power = below.bit_length() - 1
        raise ValueError(f"{name}: expected < {f'2**{power}' if below == 2**power else below}, got {value}")
    return value


def check_ints(name: str, values: Any, at_least: int, below: int = 2**63) -> list[int]:
    """`values` as a list, if it has ints of this range and nothing else."""
    return [check_int(name, value, at_least, below) for value in check_sequence(name, values, "ints")]


def check_strings(name: str, values: Any) -> list[str]:
    """`values` as a list, if it has non-empty strings and nothing else."""
    found = check_sequence(name, values, "strings")
    for value in found:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected strings, got {type(value).__name__}")
        if not value:
            raise ValueError(f"{name}: expected non-empty strings, got {value!r}")
    return found


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float, if it is a finite number in `[low, high]`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if not low <= number <= high:
        within = f">= {low:g}" if math.isinf(high) else f"a number in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected {within}, got {value}")
    return number


def check_numbers(name: str, values: Any, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """`values` as a list of floats, if it has finite numbers in `[low, high]` and nothing else."""
    return [check_number(name, value, low, high) for value in check_sequence(name, values, "numbers")]


def check_instance(name: str, value: Any, of: type[T]) -> T:
    """`value`, if it is an object of this class."""
    if not isinstance(value, of):
        room = of.__module__.partition(".")[0]
        raise TypeError(f"{name}: expected a {room}.{of.__name__}, got {type(value).__name__}")
    return value


def check_bool(name: str, value: Any) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def check_sequence(name: str, values: Any, what: str) -> list[Any]:
    """What a sequence holds. Text, bytes, mappings and tensors are none: iterating them gives something else."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict, Tensor)):
        raise TypeError(f"{name}: expected a sequence of {what}, got {type(values).__name__}")
    return list(values)


def check_instances(name: str, values: Any, of: type[T]) -> list[T]:
    """`values` as a list, if it has objects of this class, at least one, and nothing else."""
    found = check_sequence(name, values, f"tidar_kernels.{of.__name__}")
    if not found:
        raise ValueError(f"{name}: expected at least one, got none")
    for index, value in enumerate(found):
        if not isinstance(value, of):
            raise TypeError(f"{name}: expected tidar_kernels.{of.__name__}, got {type(value).__name__} at {index}")
    return found


def check_dtype(name: str, value: Any) -> torch.dtype | None:
    """`value`, if it is None or a float dtype that computes."""
    if value is not None and value not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected None or a float dtype that computes, got {value!r}")
    return value


def check_path(name: str, value: Any) -> Path:
    """`value` as a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {type(value).__name__}")
    path = os.fspath(value)
    if not isinstance(path, str) or "\0" in path:
        raise ValueError(f"{name}: expected a path as text without NUL, got {path!r}")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected a path that this system can name, got {path!r}") from error
    return Path(path)


def check_device(name: str, value: Any) -> torch.device:
    """`value` as a device, if it is one or names one. Whether the machine has it is left to PyTorch."""
    if isinstance(value, torch.device):
        return value
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a torch.device or its name, got {type(value).__name__}")
    try:
        return torch.device(value)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f'{name}: expected a device as in "cuda:0", got {value!r}') from error
