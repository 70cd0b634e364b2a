"""Dataclass fields that know their range: a configuration that is made is one that makes sense. No PyTorch here."""

from __future__ import annotations

import math
import sys
from dataclasses import MISSING, Field, field, fields
from typing import Any

__all__ = ["MODEL_SIZES", "check_settings", "setting"]

# The largest of each that a model may have: past any that exists, and small enough that no product of a few overflows.
MODEL_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_layers": 2**12,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**12,
}


def setting(
    default: Any = MISSING,
    text: str = "",
    low: float = 0,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    kind: type | None = None,
) -> Any:
    """A field with its help text and the values that it takes.

    Args:
        default: without one, the field is required.
        low, high: bounds of a number, or of each number of a tuple, both included.
        choices: of a string.
        kind: int, float, bool, str or tuple (of ints); by default that of `default`. A default of None allows None.
    """
    metadata = {"help": text, "low": low, "high": high, "choices": choices, "kind": kind or type(default)}
    return field(default=default, metadata=metadata)


def check_settings(config: Any) -> None:
    """Replace every field of a dataclass by its value in the field's own type: an int as float, a list as tuple.

    Raises:
        TypeError, ValueError: a value is of another type or out of range; True is not a number here.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        if value is not None or entry.default is not None:
            object.__setattr__(config, entry.name, _checked(entry, value))


def _checked(entry: Field[Any], value: Any) -> Any:
    low, high, kind = (entry.metadata[name] for name in ("low", "high", "kind"))
    if kind is bool:
        if type(value) is not bool:
            raise TypeError(f"{entry.name}: expected True or False, got {value!r}")
        return value
    if kind is str:
        if value not in entry.metadata["choices"]:
            raise ValueError(f"{entry.name}: expected one of {', '.join(entry.metadata['choices'])}, got {value!r}")
        return value
    if kind is tuple:
        if not isinstance(value, (list, tuple)) or not value or any(type(one) is not int for one in value):
            raise TypeError(f"{entry.name}: expected a list of one or more whole numbers, got {value!r}")
        value = numbers = tuple(value)
    else:
        # The comparison is false for NaN, infinities and integers that no float holds.
        if type(value) not in (int, kind) or not abs(value) <= sys.float_info.max:
            raise TypeError(f"{entry.name}: expected a {'whole ' * (kind is int)}number, got {value!r}")
        value = kind(value)
        numbers = (value,)
    each = "each " * (kind is tuple)
    if any(number < low for number in numbers):
        raise ValueError(f"{entry.name}: expected {each}>= {low:g}, got {value!r}")
    if any(number > high for number in numbers):
        raise ValueError(f"{entry.name}: expected {each}<= {high if kind is float else int(high)}, got {value!r}")
    return value
