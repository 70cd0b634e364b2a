"""What every benchmark is made of: a workload, operands made from it, implementations as functions of the operands.

    workload         names and sizes, a frozen dataclass: the fields of a row, and the words of its command line
    Operands         random tensors for one workload; what the oracle makes of them; counts of bytes and FLOPs
    Implementation   plans once, as a user would, and returns the call to time

`measure.measure` runs them; `benchmarks.registry` lists every subclass of `Operands`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tidar_kernels import Pattern
from tidar_kernels.testing import relative_error

from .record import version_of

OURS = "tidar_kernels"
VERSION = 1  # of the workloads: raised when one changes its meaning; every row carries it
PEER_SLACK = 8.0  # of the error budget: a peer may be less precise than ours must be, not compute another mask


def live_pairs(pattern: Pattern) -> int:
    """Pairs of a row and a key in flight that it sees."""
    return int((pattern.lead[:, 1] - pattern.lead[:, 0] + pattern.own[:, 1] - pattern.own[:, 0]).sum())


def workload(name: str, **fields: type | float) -> type[Any]:
    """A class of workloads, `name` in messages: a type is that of a field, a number the default of one."""
    required = [(key, given) for key, given in fields.items() if isinstance(given, type)]
    chosen = [(key, type(given), field(default=given)) for key, given in fields.items() if not isinstance(given, type)]
    return make_dataclass(name, [*required, *chosen], frozen=True)


class WrongResultError(RuntimeError):
    """An implementation computes something else; no speed is reported for it."""


class Prepared(NamedTuple):
    """A planned call: `run()` is timed, and `result(run())` is what it computed, in the operator's own layout."""

    run: Callable[[], Any]
    result: Callable[[Any], Any] = lambda found: found


class Expected(NamedTuple):
    """A result of the oracle: in float64, and in the operands' own dtype; None asks for the very bits of `exact`."""

    exact: Tensor
    plain: Tensor | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Args:
        label: its name in tables and pictures.
        prepare: plans on given operands, all that a user does once: layouts, masks, plans and compilation. It returns
            the call to time, or a `Prepared`.
        ceiling: it does other, simpler work of the same size, as a yardstick; its result is not compared.
        compiles: planning takes seconds for every workload, so it is measured last.
        module, package: the top-level module that must be there, and the distribution that holds it, for its version.
        install: how to get it.
        devices: where it runs.
    """

    label: str
    prepare: Callable[[Any], Any]
    ceiling: bool = False
    compiles: bool = False
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


class Operands:
    """Operands of one workload on one device in one dtype. A subclass is an operator:

    operator: its name in rows.
    workload: the class of its workloads.
    implementations: by name. A failure of one of `own` fails the run; those in `precise` have no slack.
    cpu, cuda, tiny: the workloads measured on each device and in a dry run, what matters most first: a time limit cuts
        from the end.
    compiled: the only workloads for implementations with `compiles`; None for all of them.
    sets: of operands to rotate over, at most, so that each is cold in L2 when its turn comes.
    inference: whether gradients are off while it is measured.
    graph: on CUDA, whether calls are timed in a CUDA graph, or as a stream: those of a millisecond and more.
    yardstick: the implementation whose time is the unit of `against_floor`.
    """

    operator: ClassVar[str]
    workload: ClassVar[type[Any]]
    implementations: ClassVar[dict[str, Implementation]]
    own: ClassVar[tuple[str, ...]] = (OURS,)
    precise: ClassVar[tuple[str, ...]] = (OURS,)
    cpu: ClassVar[Sequence[Any]] = ()
    cuda: ClassVar[Sequence[Any]] = ()
    tiny: ClassVar[Sequence[Any]] = ()
    compiled: ClassVar[Sequence[Any] | None] = None
    sets: ClassVar[int] = 16
    inference: ClassVar[bool] = True
    graph: ClassVar[bool] = True
    yardstick: ClassVar[str | None] = None

    def __init__(self, case: Any, device: str, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.make()

    @classmethod
    def offered(cls, case: Any, device: str) -> list[str]:
        """The implementations that `case` can be measured with on `device`."""
        compiles = cls.compiled is None or case in cls.compiled
        known = cls.implementations.items()
        return [name for name, one in known if not one.absent(device) and (compiles or not one.compiles)]

    @classmethod
    def before(cls, case: Any) -> Sequence[Any]:
        """The workloads whose rows the row of `case` refers to."""
        return ()

    def make(self) -> None:
        """Draw the operands."""
        raise NotImplementedError

    def prepare(self, name: str) -> Prepared:
        """Plan an implementation."""
        planned = self.implementations[name].prepare(self)
        return planned if isinstance(planned, Prepared) else Prepared(planned)

    def expected(self, name: str) -> Sequence[Expected]:
        """What `results` must be; asked for before the call, which may write into what the oracle reads."""
        raise NotImplementedError

    def results(self, prepared: Prepared) -> Sequence[Tensor]:
        """What a call computes, as far as it is compared."""
        found = prepared.result(prepared.run())
        return (found,) if isinstance(found, Tensor) else found

    def check(self, name: str, prepared: Prepared) -> float:
        """Relative error of an implementation's result; 0 where its bits are compared.

        Raises:
            WrongResultError: it exceeds the budget, which is twice eager PyTorch's own error and 1e-5; or bits differ.
        """
        expected, errors = self.expected(name), [0.0]
        for value, (exact, plain) in zip(self.results(prepared), expected, strict=True):
            if plain is None:
                if not torch.equal(value, exact):
                    raise self.wrong(name, "the bits of the twin, got others")
                continue
            slack = 1.0 if name in self.precise else PEER_SLACK
            error, budget = relative_error(value, exact), slack * (2 * relative_error(plain, exact) + 1e-5)
            if value.shape != exact.shape or not error <= budget:
                raise self.wrong(name, f"a relative error <= {budget:.3g}, got {error:.3g}")
            errors.append(error)
        return max(errors)

    def floor(self, name: str = OURS) -> dict[str, float]:
        """`rows`, `bytes` and `flops`: every operand and result once, and every product that nobody can avoid."""
        raise NotImplementedError

    def further(self, line: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What else the row `line` says, beside the `rows` measured before it."""
        return {}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def wrong(self, name: str, expected: str) -> WrongResultError:
        return WrongResultError(f"{name} of {self.case}: expected {expected}")


def listing(cls: type[Operands], device: str) -> list[dict[str, Any]]:
    """A row for each peer of an operator: its version, or that it is absent and how to install it."""
    return [
        {
            "operator": "peer",
            "of": cls.operator,
            "implementation": name,
            "label": peer.label,
            "device": device,
            "version": None if peer.absent(device) else version_of(peer.package),
            "absent": peer.absent(device),
            "install": peer.install,
        }
        for name, peer in cls.implementations.items()
        if name != OURS
    ]
