"""Old names that still work for a release, with a warning: modules and classes that have moved, renamed keywords."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any, ParamSpec, TypeVar

__all__ = ["MOVED", "moved_name", "renamed_keyword", "spec_of"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Old name -> new name, both within the package.
MOVED = {
    "drawing": "patterns.drawing",
    "exact": "decoding.exact",
    "families": "patterns",
    "layers": "nn.attention",
    "linear": "ops.linear",
    "lora": "nn.adapters",
    "loss": "nn.loss",
    "models.adapter": "models.training.adapter",
    "models.data": "models.training.data",
    "models.evaluate": "models.training.evaluate",
    "models.publish": "models.training.publish",
    "models.train": "models.training.trainer",
    "models.train_config": "models.training.config",
    "models.train_progress": "models.training.progress",
    "models.train_report": "models.training.report",
    "noise": "ops.verify.noise",
    "patching": "integrations.patch",
    "pattern": "patterns.pattern",
    "profiling": "decoding.profile",
    "rotary": "nn.rotary",
    "sampling": "ops.verify",
    "session": "decoding.session",
    "step_patterns": "patterns",
    "strategies": "decoding.strategies",
}


class _Moved:
    """Loader of an old name: it imports the new module, which takes the old one's place."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own module, which `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(_new_name(module.__name__))

    def get_code(self, fullname: str) -> CodeType:
        """What `python -m` runs for an old name: the new module."""
        new = _new_name(fullname)
        return compile(
            f"import runpy; runpy.run_module({new!r}, run_name='__main__', alter_sys=True)", fullname, "exec"
        )


def _new_name(old: str) -> str:
    new = f"{__package__}.{MOVED[old.partition('.')[2]]}"
    warnings.warn(f"{old} has moved to {new}; its old name goes in the next release", FutureWarning, stacklevel=3)
    return new


def spec_of(fullname: str) -> ModuleSpec | None:
    """How to import an old name of a module; None for a name that never was. The package's last finder asks it."""
    package, _, name = fullname.partition(".")
    loader: Any = _Moved()
    return ModuleSpec(fullname, loader) if package == __package__ and name in MOVED else None


def moved_name(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module from which these names have gone to the modules they are mapped to."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = f"{__package__}.{names[name]}"
        text = f"{module}.{name} has moved to {new}; its old name goes in the next release"
        warnings.warn(text, FutureWarning, stacklevel=2)
        return getattr(import_module(new), name)

    return get


def renamed_keyword(old: str, new: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A function that also takes the keyword `old`, and passes it on as `new`."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def renaming(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if old in kwargs:
                text = f"{old}: the keyword is now {new}; its old name goes in the next release"
                warnings.warn(text, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)  # `dataclasses.replace` passes the field's own value beside it
            return function(*args, **kwargs)

        return renaming

    return decorate
