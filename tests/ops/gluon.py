"""Gluon without a GPU: the functions that `gluon_forward.py` calls, on PyTorch, with groups of warps as threads.

The kernel's own file runs on it, line by line; layouts mean nothing here. Barriers have phases, pending arrivals and
bytes as mbarriers have. Threads are delayed at random at each of them, and copies arrive at random times and in random
order. A buffer is NaN until its copy has arrived, from the moment on that the copy was asked for. So a wait that is
missing, comes too early or names the wrong phase gives NaN, another result or a deadlock.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tidar_kernels.ops._triton.launch import Launch, Strided

PATIENCE_S = 20.0


class Pointer:
    """A pointer, or a tensor of them, into the memory that a tensor has."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


class Barrier:
    """An mbarrier: it completes when all arrivals and bytes that it expects are there, and then starts anew."""

    def __init__(self, chip: Chip) -> None:
        self.chip, self.count, self.pending, self.bytes, self.rounds = chip, 0, 0, 0, 0

    def arrive(self, arrivals: int = 1, expected: int = 0) -> None:
        self.chip.pause()
        with self.chip.changed:
            assert self.pending >= arrivals
            self.pending -= arrivals
            self.bytes += expected
            if self.pending == 0 and self.bytes == 0:
                self.pending, self.rounds = self.count, self.rounds + 1
            self.chip.changed.notify_all()

    def wait(self, phase: Any) -> None:
        """Until the round of this parity is over: the round before the present one has it."""
        self.chip.pause()
        with self.chip.changed:
            done = self.chip.changed.wait_for(lambda: self.chip.failed or self.rounds & 1 != int(phase), PATIENCE_S)
        if self.chip.failed or not done:
            raise TimeoutError("a wait that does not end")


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, at: Any) -> Shared:
        return Shared(self.data[int(at)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, start, length))


class Descriptor:
    """A TMA descriptor."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout: Any) -> None:
        assert base.data_ptr() % 16 == 0
        assert strides[-1] == 1
        assert all(stride > 0 and stride * base.element_size() % 16 == 0 for stride in strides[:-1])
        assert min(shape) > 0
        self.tensor, self.block, self.layout, self.dtype = base.as_strided(shape, strides), block, layout, base.dtype
        self.block_type = SimpleNamespace(nbytes=torch.Size(block).numel() * base.element_size())

    def tile(self, at: Sequence[Any]) -> Tensor:
        """The block at these coordinates, 0 where it leaves the tensor."""
        found = torch.zeros(self.block, dtype=self.dtype)
        part = self.tensor[
            tuple(slice(int(start), int(start) + size) for start, size in zip(at, self.block, strict=True))
        ]
        found[tuple(slice(0, size) for size in part.shape)] = part
        return found


class Chip:
    """One multiprocessor: a program at a time, its groups of warps, its copies under way."""

    def __init__(self, seed: int) -> None:
        self.random, self.changed = random.Random(seed), threading.Condition()
        self.failed, self.program, self.grid = False, (0, 0), (0, 0)
        self.copies: list[tuple[Descriptor, Sequence[Any], Barrier, Shared]] = []
        self.barriers: list[Barrier] = []

    def pause(self) -> None:
        """Let the others go first, now and then, and some copies arrive."""
        if self.random.random() < 0.3:
            time.sleep(self.random.random() * 1e-3)
        while self.copies and self.random.random() < 0.5:
            self.deliver()

    def deliver(self) -> None:
        """Any one of the copies under way."""
        with self.changed:
            if not self.copies:
                return
            source, at, barrier, target = self.copies.pop(self.random.randrange(len(self.copies)))
        target.data.copy_(source.tile(at))
        barrier.arrive(0, -source.block_type.nbytes)

    def copy(self, source: Descriptor, at: Sequence[Any], barrier: Barrier, target: Shared) -> None:
        target.data.fill_(torch.nan)
        with self.changed:
            self.copies.append((source, at, barrier, target))

    def specialise(self, groups: Sequence[tuple[Callable[..., None], Sequence[Any]]], *rest: Any) -> None:
        """Run all groups at the same time, and one that does nothing but deliver copies."""
        errors: list[BaseException] = []
        running = [len(groups)]

        def run(function: Callable[..., None], arguments: Sequence[Any]) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self.failed = True
                errors.append(error)
            with self.changed:
                running[0] -= 1
                self.changed.notify_all()

        def deliver() -> None:
            while running[0] and not self.failed:
                time.sleep(2e-4)
                self.deliver()

        threads = [threading.Thread(target=run, args=group) for group in groups]
        threads.append(threading.Thread(target=deliver))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if layout != "barriers":
            return Shared(torch.full(tuple(shape), torch.nan, dtype=dtype))
        made = [Barrier(self) for _ in range(shape[0])]
        self.barriers += made
        return SimpleNamespace(index=lambda at: made[int(at)]) if len(shape) == 2 else made[0]

    def run(self, launch: Launch) -> None:
        """All programs of a launch, one after the other."""

        def operand(value: Any) -> Any:
            if isinstance(value, Strided):
                return Strided(operand(value.ptr), value.stride)
            if isinstance(value, Tensor):
                size = value.untyped_storage().nbytes() // value.element_size()
                whole = value.as_strided((size,), (1,), 0)
                return Pointer(whole, value.storage_offset())
            return value

        self.grid = launch.grid
        options = {name: value for name, value in launch.options.items() if name != "num_warps"}
        for self.program in [(x, y) for x in range(launch.grid[0]) for y in range(launch.grid[1])]:
            self.barriers = []
            launch.kernel(*map(operand, launch.args), **options)
            assert not self.copies
            assert all(one.pending == one.count and one.bytes == 0 for one in self.barriers)


def _load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    at = torch.where(mask, pointer.offset, 0)
    return torch.where(mask, pointer.memory[at], other)


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    assert value.dtype == pointer.memory.dtype
    at, mask, value = torch.broadcast_tensors(pointer.offset, mask, value)
    pointer.memory[at[mask]] = value[mask]


def _where(condition: Any, one: Any, other: Any) -> Tensor:
    return torch.where(torch.as_tensor(condition), one, other)


def _multiplied(a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Callable[[], Tensor]:
    """What is multiplied is read where the product is waited for: the latest that wgmma may."""

    def wait() -> Tensor:
        left = a.data if isinstance(a, Shared) else a
        product = left.float() @ b.data.float()
        return acc + product if use_acc else product

    assert is_async
    return wait


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def modules(chip: Chip) -> dict[str, ModuleType]:
    """What stands in for Gluon's modules, by their names."""

    def module(**names: Any) -> ModuleType:
        made = ModuleType("gluon without a GPU")
        vars(made).update(names)
        return made

    def layout(*arguments: Any, **named: Any) -> None:
        return None

    language = module(
        constexpr=lambda value: value, float32=torch.float32, int64=torch.int64, static_range=range,
        program_id=lambda axis: torch.tensor(chip.program[axis]),
        num_programs=lambda axis: torch.tensor(chip.grid[axis]),
        load=_load, store=_store, where=_where, exp2=torch.exp2, log2=torch.log2,
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(*shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(tuple(shape), value, dtype=dtype),
        max=torch.amax, min=torch.amin, sum=torch.sum, cdiv=lambda a, b: -(-a // b),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        convert_layout=lambda value, layout: value, warp_specialize=chip.specialise,
        allocate_shared_memory=chip.allocate, SliceLayout=layout, BlockedLayout=layout, DotOperandLayout=layout,
        NVMMADistributedLayout=layout, NVMMASharedLayout=layout,
    )  # fmt: skip
    hopper = module(
        fence_async_shared=lambda: None,
        mbarrier=SimpleNamespace(
            MBarrierLayout=lambda: "barriers", init=_init, wait=Barrier.wait, arrive=Barrier.arrive,
            expect=lambda barrier, size: barrier.arrive(1, size),
        ),
        tma=SimpleNamespace(async_copy_global_to_shared=chip.copy),
        warpgroup_mma=_multiplied,
        warpgroup_mma_wait=lambda outstanding, deps: deps[0](),
    )  # fmt: skip
    gluon = module(jit=lambda function: function, language=language)
    name = "triton.experimental"
    return {
        name: module(gluon=gluon), f"{name}.gluon": gluon, f"{name}.gluon.language": language,
        f"{name}.gluon.language.nvidia": module(hopper=hopper), f"{name}.gluon.language.nvidia.hopper": hopper,
        f"{name}.gluon.nvidia": module(), f"{name}.gluon.nvidia.hopper": module(TensorDescriptor=Descriptor),
    }  # fmt: skip


def imported(path: Path, name: str, chip: Chip) -> Any:
    """The module at `path`, as `name`, with the stand-ins in place of Gluon."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules(chip)):
        spec.loader.exec_module(made)
    return made
