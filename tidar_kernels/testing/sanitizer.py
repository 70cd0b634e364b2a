"""A sanitizer for Triton kernels that needs no GPU: which lane of which load or store touches what it must not.

    from tidar_kernels import testing                  # in a process with TRITON_INTERPRET=1

    with testing.sanitize():
        my_kernel[(4,)](x, out, n, BLOCK=128)          # anybody's kernel

or for a whole test suite `TRITON_INTERPRET=1 pytest -p tidar_kernels.testing.pytest_sanitizer`. Triton's interpreter
runs programs one after the other in Python, so every address of every load, store and atomic can be looked at. A launch
raises `SanitizerError` at its end if an unmasked lane

- is **out of bounds**: not at an element of the tensor that its pointer was made from. A view is exactly its elements:
  what lies between its rows or after its last element is not its own, even if it is in the same storage;
- is **misaligned**: not at a multiple of its size, which a GPU refuses;
- is part of a **race**: one program writes what another one reads or writes in the same launch. Atomics do not race
  with each other, and neither do programs of which one acquires, by an atomic, what the other released at the same
  address;
- reads what was **never written**: an element of `torch.empty` and its family, or of a tensor given to
  `mark_unwritten`, into which neither a kernel nor PyTorch has written since.

A lane out of bounds does not reach memory, so that a fault ends neither the process nor the launch. A pointer carries
its operand in its upper 16 bits, which no address of the host uses: so an overrun is found even if it lands in another
operand. A pointer that a kernel loads from memory carries none, and may point into any operand of the launch.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

__all__ = ["Fault", "SanitizerError", "mark_unwritten", "sanitize"]

Program = tuple[int, int, int]
_TAG_AT = np.uint64(48)
_ADDRESS = np.uint64(2**48 - 1)
_NOBODY = -1
_POISON = -11  # 0xfff5: NaN in float16 and bfloat16, and twice or four times in float32 and float64
_active: list[_Sanitizer] = []


@dataclass(frozen=True)
class Fault:
    """One kind of fault at one line of a kernel, and the first lane that has it.

    Args:
        kind: "out of bounds", "misaligned", "race" or "never written".
        access: "load", "store" or "atomic".
        kernel: the launched function's name.
        where: "file:line" of the access, which may be in a function that the kernel calls.
        operand: the argument that the address belongs to; "x.ptr" or "x[0]" within a tuple.
        index: of the element in the operand, None where the address is none of its elements.
        offset: elements from the operand's first one to the address.
        shape: of the operand.
        program: of the access, `(x, y, z)` in the grid.
        other: the other program of a race.
        lanes: how many lanes of the access have it.
    """

    kind: str
    access: str
    kernel: str
    where: str
    operand: str
    index: tuple[int, ...] | None
    offset: int
    shape: tuple[int, ...]
    program: Program
    other: Program | None
    lanes: int

    def __str__(self) -> str:
        at = f" {self.offset} elements from its start" if self.index is None else str(list(self.index))
        race = "" if self.other is None else f" and {self.other}"
        return (
            f"{self.kind}: {self.access} of {self.operand}{at}, shape {list(self.shape)}, by {self.lanes} lanes of "
            f"program {self.program}{race}; {self.kernel}, {self.where}"
        )


class SanitizerError(AssertionError):
    """A launch has faults: `faults` holds them, the message a line each."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


@contextmanager
def sanitize() -> Iterator[None]:
    """Within it every launch of an interpreted Triton kernel in this process is checked, several times slower.

    Memory of `torch.empty` and its family is kept until the end, so that its addresses mean one tensor.

    Raises:
        RuntimeError: kernels are not interpreted in this process.
        SanitizerError: at the end of a launch that has faults.
        MemoryError: the operands of a launch are too large: every byte of their storages needs 17 more.
    """
    if os.environ.get("TRITON_INTERPRET", "") != "1":
        raise RuntimeError("TRITON_INTERPRET: expected 1 for the sanitizer, got unset")
    sanitizer = _Sanitizer()
    with ExitStack() as stack:
        for owner, name, replacement in sanitizer.replacements():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        _active.append(sanitizer)
        stack.callback(_active.remove, sanitizer)
        yield


def mark_unwritten(tensor: Tensor) -> None:
    """Within `sanitize`, take the elements of a CPU tensor, as they are now, for ones that nothing has written.

    Their values may be a poison, NaN for instance. Elsewhere it does nothing.
    """
    if _active and _is_memory(tensor):
        _active[-1].mark(tensor)


def _is_memory(tensor: Tensor) -> bool:
    """True for a tensor that has memory of this machine."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.numel() > 0


class _Unwritten:
    """What nothing has written of a storage: a boolean for each of its bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.storage, self.size = tensor, tensor.untyped_storage(), tensor.element_size()
        self.before, self.version = self._content(), self._version()
        self.bytes = np.zeros(len(self.before), dtype=bool)
        start, extent = tensor.storage_offset() * self.size, _extent(tensor) * self.size
        self.bytes[start : start + extent] = np.repeat(_elements(tensor), self.size)

    def _content(self) -> Any:
        content = torch.tensor([], dtype=torch.uint8, device="cpu").set_(self.storage)
        return content.numpy().copy()

    def _version(self) -> int | None:
        return None if self.tensor.is_inference() else self.tensor._version

    def renew(self) -> Any:
        """The booleans, after what PyTorch wrote meanwhile: elements whose bytes changed, all if they have one byte."""
        if self.version is None or self.version != self._version():
            self.version = self._version()
            changed = np.flatnonzero(self._content() != self.before) // self.size
            self.bytes[(changed[:, None] * self.size + np.arange(self.size)).ravel()] = False
            if self.size == 1:
                self.bytes[:] = False
        return self.bytes


def _extent(tensor: Tensor) -> int:
    """Elements of memory from the first to the last of a tensor, both included."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in pairs) + 1 if tensor.numel() else 0


def _elements(tensor: Tensor) -> Any:
    """A boolean for each element of memory in the extent of a tensor: is it one of the tensor's?"""
    own = np.zeros(_extent(tensor), dtype=bool)
    if len(own):
        np.lib.stride_tricks.as_strided(own, tensor.shape, tensor.stride())[...] = True
    return own


class _Operand:
    """A tensor that a launch was given, and where its storage lies on the line of all storages of the launch."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor, self.size = name, tensor, tensor.element_size()
        self.address, self.elements = tensor.data_ptr(), _elements(tensor)
        self.storage = tensor.untyped_storage().data_ptr()
        self.line = 0

    def holds(self, addresses: Any, size: int) -> Any:
        """A boolean for each address, int64: do accesses of `size` bytes lie within elements of the tensor?"""
        first, last = ((addresses + more - self.address) // self.size for more in (0, size - 1))
        held = (first >= 0) & (last < len(self.elements))
        held[held] = self.elements[first[held]] & self.elements[last[held]]
        return held

    def index(self, offset: int) -> tuple[int, ...] | None:
        """Of the element at an offset; None if there is none."""
        found = [0] * self.tensor.ndim
        shape, strides = self.tensor.shape, self.tensor.stride()
        for dim in sorted(range(len(shape)), key=strides.__getitem__, reverse=True):
            if strides[dim] > 0:
                found[dim] = min(offset // strides[dim], shape[dim] - 1)
                offset -= found[dim] * strides[dim]
        return tuple(found) if offset == 0 else None


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors among the arguments of a kernel, with their names: in tuples and descriptors too."""
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        for i, part in enumerate(value):
            yield from _named_tensors(f"{name}.{fields[i]}" if fields else f"{name}[{i}]", part)
    elif hasattr(value, "data_ptr"):
        yield name, value
    elif isinstance(getattr(value, "base", None), Tensor):  # a tensor descriptor
        yield f"{name}.base", value.base


class _Launch:
    """What the programs of a launch did to every byte of its operands' storages, and what was wrong with it."""

    def __init__(self, kernel: str) -> None:
        self.kernel, self.grid = kernel, (1, 1, 1)
        self.operands: dict[int, _Operand] = {}  # by the tag of their pointers
        self.tags: dict[int, int] = {}  # by the identity of an argument
        self.faults: dict[tuple[str, ...], Fault] = {}
        self.marks: list[tuple[int, Any]] = []  # where unwritten memory lies on the line, and what of it is unwritten
        self.program = _NOBODY
        # Programs whose accesses come before those of this program; by address, those that an acquire there orders so.
        self.ordered: set[int] = set()
        self.released: defaultdict[int, set[int]] = defaultdict(set)

    def take(self, arguments: dict[str, Any], unwritten: dict[int, _Unwritten]) -> None:
        """Tag the tensors among the arguments and lay their storages on one line."""
        length, lines = 0, {}
        for name, value in (pair for item in arguments.items() for pair in _named_tensors(*item)):
            operand = _Operand(name, value if isinstance(value, Tensor) else value.base)
            self.tags[id(value)] = len(self.tags) + 1
            self.operands[self.tags[id(value)]] = operand
            if operand.storage not in lines:
                lines[operand.storage] = length
                length += operand.tensor.untyped_storage().nbytes()
            operand.line = lines[operand.storage]
        try:
            self.writer, self.reader, self.reader_before, self.updater = np.full((4, length), _NOBODY, dtype=np.int32)
            self.unwritten = np.zeros(length, dtype=bool)
        except MemoryError:
            raise MemoryError(
                f"sanitize: expected storages of which 17 times the size fits into memory, got {length:,} bytes in a "
                f"launch of {self.kernel}"
            ) from None
        self.marks = [(lines[s], one.renew()) for s, one in unwritten.items() if s in lines]
        for line, mark in self.marks:
            self.unwritten[line : line + len(mark)] = mark

    def finish(self) -> list[Fault]:
        """Keep what is now written; the faults."""
        for line, mark in self.marks:
            mark[:] = self.unwritten[line : line + len(mark)]
        return list(self.faults.values())

    def start(self, program: Program, grid: Program) -> None:
        """The accesses from now on are those of `program`."""
        self.grid, self.ordered = grid, set()
        self.program = program[0] + grid[0] * (program[1] + grid[1] * program[2])

    def _place(self, program: int) -> Program:
        return program % self.grid[0], program // self.grid[0] % self.grid[1], program // self.grid[0] // self.grid[1]

    def access(
        self, kind: str, pointers: Any, mask: Any, size: int, acquires: bool = False, releases: bool = False
    ) -> Any:
        """Look at one load, store or atomic: the mask of the lanes that may reach memory."""
        allowed = np.array(np.broadcast_to(mask, pointers.shape), dtype=bool, order="C").ravel()
        lanes = np.flatnonzero(allowed)
        addresses = (pointers.ravel()[lanes] & _ADDRESS).astype(np.int64)
        tags = self._tags(pointers.ravel()[lanes] >> _TAG_AT, addresses, size)
        for tag in np.unique(tags):
            chosen, operand = tags == tag, self.operands[int(tag)]
            held = operand.holds(addresses[chosen], size)
            aligned = addresses[chosen] % size == 0
            for wrong, name in ((~held, "out of bounds"), (held & ~aligned, "misaligned")):
                self._report(name, kind, operand, addresses[chosen], wrong)
            allowed[lanes[chosen]] = held & aligned
            if bool((held & aligned).any()):
                self._follow(kind, operand, addresses[chosen][held & aligned], size, acquires, releases)
        return allowed.reshape(pointers.shape)

    def _tags(self, tags: Any, addresses: Any, size: int) -> Any:
        """The tags, and for pointers from memory that of an operand that holds the address, or of the nearest one."""
        if bool(tags.all()) or not self.operands:
            return tags
        for tag, operand in self.operands.items():
            free = np.flatnonzero(tags == 0)
            tags[free[operand.holds(addresses[free], size)]] = tag
        starts = np.array([operand.address for operand in self.operands.values()])
        free = np.flatnonzero(tags == 0)
        tags[free] = np.array(list(self.operands))[np.abs(addresses[free, None] - starts).argmin(1)]
        return tags

    def _follow(self, kind: str, operand: _Operand, addresses: Any, size: int, acquires: bool, releases: bool) -> None:
        """Races and reads of what was never written; then remember this access."""
        at = (addresses - operand.storage + operand.line)[:, None] + np.arange(size)
        if acquires:
            self.ordered.update(*(self.released[int(address)] for address in addresses))
        others = [self.writer] if kind == "load" else [self.writer, self.reader, self.reader_before]
        for last in others if kind == "atomic" else [*others, self.updater]:
            other = last[at].max(1)
            racing = (other != _NOBODY) & (other != self.program)
            if self.ordered:
                racing &= ~np.isin(other, list(self.ordered))
            self._report("race", kind, operand, addresses, racing, other)
        if kind != "store":
            self._report("never written", kind, operand, addresses, self.unwritten[at].any(1))
        if kind == "load":
            self.reader_before[at] = np.where(self.reader[at] != self.program, self.reader[at], self.reader_before[at])
            self.reader[at] = self.program
        else:
            (self.updater if kind == "atomic" else self.writer)[at] = self.program
            self.unwritten[at] = False
        if releases:
            for address in addresses:
                self.released[int(address)] |= {self.program, *self.ordered}

    def _report(self, name: str, kind: str, operand: _Operand, addresses: Any, wrong: Any, other: Any = None) -> None:
        if not wrong.any():
            return
        where, first = _where(), int(np.flatnonzero(wrong)[0])
        offset = (int(addresses[first]) - operand.address) // operand.size
        index = None if name == "out of bounds" else operand.index(offset)
        rival = None if other is None else self._place(int(other[first]))
        fault = Fault(
            *(name, kind, self.kernel, where, operand.name, index, offset, tuple(operand.tensor.shape)),
            *(self._place(self.program), rival, int(wrong.sum())),
        )
        self.faults.setdefault((name, kind, where, operand.name), fault)


def _where() -> str:
    """File and line of the innermost code that is neither this file nor Triton's: the kernel's, or its function's."""
    import triton

    strangers = (os.path.dirname(triton.__file__) + os.sep, __file__, mock.__file__)
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(strangers):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class _Sanitizer:
    """The methods of Triton's interpreter, and PyTorch's allocations, with checks around them."""

    def __init__(self) -> None:
        self.unwritten: dict[int, _Unwritten] = {}  # by the address of a storage
        self.launch: _Launch | None = None

    def mark(self, tensor: Tensor) -> None:
        """Nothing has written the elements of this tensor."""
        storage = tensor.untyped_storage().data_ptr()
        earlier = self.unwritten.get(storage)
        self.unwritten[storage] = _Unwritten(tensor)
        if earlier is not None:
            self.unwritten[storage].bytes |= earlier.renew()

    def replacements(self) -> Iterator[tuple[Any, str, Any]]:
        """`(owner, name, replacement)` of all that is replaced."""
        from triton.runtime import interpreter

        executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
        yield executor, "__call__", self._launching(executor.__call__)
        yield executor, "_init_args_hst", self._taking(executor._init_args_hst)
        yield interpreter, "_implicit_cvt", self._tagging(interpreter._implicit_cvt)
        yield builder, "set_grid_idx", self._starting(builder.set_grid_idx)
        yield builder, "create_masked_load", self._loading(builder.create_masked_load)
        yield builder, "create_masked_store", self._storing(builder.create_masked_store)
        yield builder, "create_atomic_rmw", self._updating(builder.create_atomic_rmw)
        yield builder, "create_atomic_cas", self._exchanging(builder.create_atomic_cas)
        for owner in (torch, Tensor):
            for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
                if hasattr(owner, name):
                    yield owner, name, _allocating(getattr(owner, name))

    def _launching(self, original: Any) -> Any:
        def run(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.launch = _Launch(executor.fn.__name__)
            try:
                original(executor, *args, **kwargs)
            finally:
                faults = self.launch.finish()
                if faults:  # also where a kernel stopped, perhaps by what the faults made of its values
                    raise SanitizerError(faults)

        return run

    def _taking(self, original: Any) -> Any:
        def take(executor: Any, *arguments: Any) -> Any:
            args, kwargs = original(executor, *arguments)
            self._now.take({**dict(zip(executor.arg_names, args, strict=False)), **kwargs}, self.unwritten)
            return args, kwargs

        return take

    def _tagging(self, original: Any) -> Any:
        def convert(argument: Any) -> Any:
            converted, tag = original(argument), self._now.tags.get(id(argument))
            if tag is not None:
                converted.handle.data = converted.handle.data | (np.uint64(tag) << _TAG_AT)
            return converted

        return convert

    def _starting(self, original: Any) -> Any:
        def start(builder: Any, *program: int) -> None:
            original(builder, *program)
            self._now.start(program, builder.grid_dim)  # type: ignore[arg-type]

        return start

    def _loading(self, original: Any) -> Any:
        def load(builder: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            return original(builder, *self._checked("load", pointers, mask), *rest, **options)

        return load

    def _storing(self, original: Any) -> Any:
        def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            pointers, mask = self._checked("store", pointers, mask)
            return original(builder, pointers, value, mask, *rest)

        return store

    def _updating(self, original: Any) -> Any:
        def update(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, order: Any, scope: Any) -> Any:
            pointers, mask = self._checked("atomic", pointers, mask, order)
            return original(builder, operation, pointers, value, mask, order, scope)

        return update

    def _exchanging(self, original: Any) -> Any:
        def exchange(builder: Any, pointers: Any, expected: Any, value: Any, order: Any, scope: Any) -> Any:
            pointers, mask = self._checked("atomic", pointers, np.ones(1, dtype=bool), order)
            # There is no mask to leave lanes out with.
            return original(builder, pointers, expected, value, order, scope) if mask.data.all() else expected

        return exchange

    @property
    def _now(self) -> _Launch:
        if self.launch is None:
            raise RuntimeError("kernel: expected one that is launched, got a device function called alone")
        return self.launch

    def _checked(self, kind: str, pointers: Any, mask: Any, order: Any = None) -> tuple[Any, Any]:
        """Look at an access: its pointers without their tags, and the mask of the lanes that may reach memory."""
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        size, name = max(1, pointers.get_element_ty().primitive_bitwidth // 8), str(order).lower()
        allowed = self._now.access(
            *(kind, pointers.data, mask.data if isinstance(mask, TensorHandle) else mask, size),
            *("acquire" in name, "release" in name),
        )
        return TensorHandle(pointers.data & _ADDRESS, pointers.dtype), TensorHandle(allowed, tl.int1)


def _allocating(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_unwritten(*args: Any, **kwargs: Any) -> Tensor:
        made = allocate(*args, **kwargs)
        if not torch.compiler.is_compiling() and _is_memory(made):
            if made.element_size() > 1:  # what is written then differs: NaN of a payload that no computation gives
                torch.tensor([], dtype=torch.int16, device="cpu").set_(made.untyped_storage()).fill_(_POISON)
            mark_unwritten(made)
        return made

    return allocate_unwritten
