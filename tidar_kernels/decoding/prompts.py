"""Token ids as users have them (lists, NumPy arrays, tensors), checked and made lists of ints."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_prompt", "as_prompts", "as_stop_tokens"]


def as_prompts(name: str, value: Any, vocab_size: int) -> list[list[int]]:
    """Prompts of any lengths >= 1.

    Args:
        name: of the argument, for errors.
        value: one prompt or several: ints, an integer tensor or NumPy array of 1 or 2 dimensions, or a list of such of
            1 dimension.
        vocab_size: tokens must be in [0, vocab_size).

    Raises:
        TypeError, ValueError: it is something else, or there is no prompt or an empty one.
    """
    values = _listed(name, value, dims=(1, 2))
    if not values:
        raise ValueError(f"{name}: expected at least one prompt, got none")
    return _checked(name, values, vocab_size)


def as_prompt(name: str, value: Any, vocab_size: int) -> list[int]:
    """One prompt, as `as_prompts`; `[1, n]` is one too."""
    values = _listed(name, value, dims=(1, 2))
    if not values:
        raise ValueError(f"{name}: expected at least one token, got none")
    prompts = _checked(name, values, vocab_size)
    if len(prompts) != 1:
        raise ValueError(f"{name}: expected one prompt, got {len(prompts)}")
    return prompts[0]


def _checked(name: str, values: list[Any], vocab_size: int) -> list[list[int]]:
    """Each of the prompts as ints of the vocabulary, or the one prompt that `values` are."""
    is_batch = _is_nested(values[0])
    prompts = []
    for index, prompt in enumerate(values if is_batch else [values]):
        where = f" in prompt {index}" if is_batch else ""
        tokens = [_token(name, token, where) for token in _listed(name, prompt, (1,), where)]
        if not tokens:
            raise ValueError(f"{name}: expected at least one token in every prompt, got none{where}")
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name}: expected tokens in [0, {vocab_size}), got {token}{where}")
        prompts.append(tokens)
    return prompts


def as_stop_tokens(value: Any, vocab_size: int) -> frozenset[int]:
    """Raises TypeError or ValueError for anything but token ids of the vocabulary."""
    tokens = set()
    for item in value if isinstance(value, Set) else _listed("stop_tokens", value, dims=(1,)):
        try:
            token = _token("stop_tokens", item, "")
        except TypeError:
            token = -1
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_tokens: expected token ids in [0, {vocab_size}), got {item!r}")
        tokens.add(token)
    return frozenset(tokens)


def _is_nested(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _listed(name: str, value: Any, dims: tuple[int, ...], where: str = "") -> list[Any]:
    """A list of its items."""
    if isinstance(value, (Tensor, np.ndarray)):
        is_integer = (
            value.dtype.kind in "iu"
            if isinstance(value, np.ndarray)
            else not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        )
        if not is_integer:
            raise TypeError(f"{name}: expected ints, got {value.dtype}{where}")
        if value.ndim not in dims:
            expected = " or ".join(map(str, dims))
            raise ValueError(f"{name}: expected {expected} dimensions, got shape {list(value.shape)}{where}")
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"{name}: expected token ids, got a tensor without values, on meta{where}")
        return list(value.tolist())
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, Set)):
        what = "ints" if where else "token ids (ints in a list, an array or a tensor)"
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}{where}")
    return list(value)


def _token(name: str, value: Any, where: str) -> int:
    kind = value.dtype if isinstance(value, (Tensor, np.generic, np.ndarray)) else type(value).__name__
    if isinstance(value, (bool, np.bool_)) or kind == torch.bool:
        raise TypeError(f"{name}: expected ints, got {kind}{where}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected ints, got {kind}{where}") from None
