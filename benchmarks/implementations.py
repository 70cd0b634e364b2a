"""What an implementation in a comparison is: one small function that plans once, and what it takes to have it here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

OURS = "tidar_kernels"


class WrongResultError(RuntimeError):
    """An implementation computes something else; no speed is reported for it."""


def as_it_is(result: Any) -> Any:
    return result


class Prepared(NamedTuple):
    """A planned call: `run()` is timed, and `result(run())` is what it computed, in the operator's own layout."""

    run: Callable[[], Any]
    result: Callable[[Any], Any] = as_it_is


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Args:
        label: its name in tables and pictures.
        prepare: plans on given operands: layouts, masks, plans and compilation, all that a user does once.
        ceiling: it does other, simpler work of the same size, as a yardstick; its result is not compared.
        module, package: the top-level module that must be there, and the distribution that holds it, for its version.
        install: how to get it.
        devices: where it runs.
    """

    label: str
    prepare: Callable[[Any], Prepared]
    ceiling: bool = False
    module: str = "torch"
    package: str = "torch"
    install: str = "with PyTorch"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def absent(self, device: str) -> str | None:
        """Why it cannot be measured here, or None. Nothing is imported."""
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)}"
        try:
            found = importlib.util.find_spec(self.module)
        except (ImportError, ValueError):  # a parent package is missing or broken
            found = None
        return None if found else f"no module {self.module}"

    @property
    def version(self) -> str | None:
        """The installed version; None if there is none."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def listing(operator: str, offered: dict[str, Implementation], device: str) -> list[dict[str, Any]]:
    """A row for each peer of an operator: its version, or that it is absent and how to install it."""
    rows = []
    for name, peer in offered.items():
        if name == OURS:
            continue
        reason = peer.absent(device)
        rows.append(
            {
                "operator": "peer",
                "of": operator,
                "implementation": name,
                "label": peer.label,
                "device": device,
                "version": None if reason else peer.version,
                "absent": reason,
                "install": peer.install,
            }
        )
    return rows
