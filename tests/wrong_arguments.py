"""What the tables of `test_wrong_arguments.py` share: wrong values, what is public, and how a call is tried."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

import tidar_kernels

Call = tuple[Callable[..., Any], dict[str, Any]]
JUNK: dict[str, Any] = {
    "None": None, "text": "x", "bytes": b"q", "an object": object(), "a function": lambda *_: 3,
    "a dtype": torch.float32, "True": True, "-1": -1, "2**70": 2**70, "10**400": 10**400,
    "1.5": 1.5, "nan": float("nan"), "-0.0": -0.0,
    "[]": [], "[1]": [1], "[None]": [None], "[[1]]": [[1]], "['a', 2]": ["a", 2], "7 ints": (1, 2, 3, 4, 5, 6, 7),
    "{}": {}, "a float tensor": torch.tensor([1.5]), "an empty tensor": torch.zeros(0), "a scalar": torch.tensor(3),
    "five dimensions": torch.zeros(2, 2, 2, 2, 2), "a complex tensor": torch.zeros(3, dtype=torch.complex64),
    "a meta tensor": torch.empty(2, device="meta"),
}  # fmt: skip

# The table of a package, and of those below it that have none of their own.
TABLES = {
    "tidar_kernels": "tests.test_wrong_arguments",
    "tidar_kernels.distributed": "tests.distributed.test_wrong_arguments",
    "tidar_kernels.nn": "tests.nn.test_wrong_arguments",
    "tidar_kernels.models.training": "tests.models.test_wrong_arguments",
    "tidar_kernels.testing": "tests.testing.test_wrong_arguments",
    "tidar_kernels.integrations.transformers": "tests.integrations.transformers.test_wrong_arguments",
}


# Modules that the docs import from.
IMPORTED_BY_NAME = (
    "tidar_kernels.eager",
    "tidar_kernels.decoding.profile",
    "tidar_kernels.integrations.transformers.lossless",
)


def public_modules() -> list[str]:
    """Public is what users import: `__all__` of every package and of `IMPORTED_BY_NAME`; and where a package has no
    names of its own (`nn`, `integrations`, `models.training`), that of its modules."""
    found = ["tidar_kernels", *IMPORTED_BY_NAME]
    for module in pkgutil.walk_packages(tidar_kernels.__path__, "tidar_kernels."):
        parent = module.name.rpartition(".")[0]
        if "._" in module.name or module.name in found:
            continue
        if module.ispkg or not hasattr(importlib.import_module(parent), "__all__"):
            found.append(module.name)
    return found


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Names and objects of a module's public callables, and of the methods of its classes that take arguments."""
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        yield name, value
        for method, function in inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else ():
            if (
                function.__module__.startswith("tidar_kernels")  # not what a module inherits of PyTorch
                and not method.startswith("_")
                and len(inspect.signature(function).parameters) > 1
            ):
                yield f"{name}.{method}", function


@functools.lru_cache(maxsize=1)
def labelled() -> dict[str, dict[str, Any]]:
    """By public module, its callables by their names in a table. What several modules hand on is the first one's."""
    seen: set[int] = set()
    found: dict[str, dict[str, Any]] = {}
    for module in public_modules():
        short = module.removeprefix("tidar_kernels").removeprefix(".").replace("decoding.strategies", "strategies")
        try:
            callables = list(public(importlib.import_module(module)))
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("tidar_kernels"):
                raise
            continue  # a bridge to a library that is not installed
        found[module] = {
            f"{short}.{name}".removeprefix("."): value for name, value in callables if id(value) not in seen
        }
        seen |= {id(value) for _, value in callables}
    return found


def defaults(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """Every argument that has a default, with it, and what is given."""
    known = inspect.signature(function).parameters
    kinds = inspect.Parameter
    return {
        name: parameter.default
        for name, parameter in known.items()
        if parameter.default is not kinds.empty and parameter.kind is not kinds.VAR_KEYWORD
    } | given


def whole(name: str, calls: Mapping[str, Callable[[], Call]]) -> Call:
    """What a line says, with the arguments that it leaves out at their defaults."""
    function, arguments = calls[name]()
    label = name.partition(" (")[0]
    known = next((callables[label] for callables in labelled().values() if label in callables), function)
    if label == "patterns.check_int":  # called as it is by the checks
        known = function
    return function, defaults(known, **arguments)


def complaints(
    call: Callable[[], Call],
    also: tuple[str, ...] = (),
    junk: Mapping[str, Any] = JUNK,
    skipped: Callable[[str, str], bool] = lambda argument, what: False,
) -> list[str]:
    """Calls with one wrong argument that end in something else than a result, or an error that names the argument.

    Args:
        call: the function and arguments that it takes, made anew for each call: some change what they are given.
        also: names of what an argument becomes, which users know.
        skipped: of an argument and the name of a wrong value, which are not tried.
    """
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of it is taken with a warning
        _, names = call()
        for argument in names:
            for what, value in junk.items():
                function, arguments = call()
                if skipped(argument, what) or (
                    isinstance(arguments[argument], bool) and isinstance(value, torch.Tensor)
                ):
                    continue  # a flag may be anything that Python takes for one; which tensors it does not is PyTorch's
                try:
                    function(**(arguments | {argument: value}))
                except (TypeError, ValueError, KeyError, OSError) as error:
                    # Of two arguments that do not fit each other it may be either; a file is named by its path.
                    named = re.match(r"'?(\w+)[^:]*: expected", str(error))
                    by_path = isinstance(value, str) and re.match(rf"\S*{value}\S*: expected", str(error))
                    by_path = by_path or (isinstance(error, OSError) and error.filename is not None)
                    if (named is None or named[1] not in {*arguments, *also}) and not by_path:
                        wrong.append(f"{argument} = {what}: {type(error).__name__}: {error}")
                except Exception as error:
                    wrong.append(f"{argument} = {what}: {type(error).__name__}: {error}")
    return wrong
