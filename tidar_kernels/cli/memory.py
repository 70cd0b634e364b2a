"""What fits into memory, asked before anything is allocated: an operating system may hand out more than it has, and
then kill whoever uses it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .common import UserError

if TYPE_CHECKING:
    import torch

    from ..models import TransformerConfig

_GIB = 2**30


def step_bytes(config: TransformerConfig, rows: int, weight: torch.Tensor) -> int:
    """About what a decode step of so many rows allocates beside the cache, in a model with weights like this one."""
    heads = config.num_heads * config.head_dim
    size = rows * (6 * config.hidden_size + 3 * config.intermediate_size + 4 * heads) * weight.element_size()
    if weight.device.type == "cpu":  # where its mask is dense: booleans, and floats for every query head of a group
        size += rows**2 * (4 + 6 * config.num_heads // config.num_kv_heads)
    return size


def training_bytes(config: TransformerConfig, rows: int, workers: int) -> int:
    """About what training allocates at least: weights, gradients, moments; a worker's activations of so many rows."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    activations = rows * config.num_layers * (6 * config.hidden_size + 4 * config.intermediate_size + heads)
    return 4 * config.num_parameters * (4 + workers) + 4 * workers * activations


def check_memory(needed: int, device: torch.device, message: str) -> None:
    """Raise a UserError that begins with `message`, if `needed` bytes are more than the device has left."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(f"{message} ({needed / _GIB:,.1f} GiB needed, {free / _GIB:,.1f} GiB free)")


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on the device; None where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    limits = [limit for limit in (_of_the_machine(), _of_the_group(Path("/sys/fs/cgroup"))) if limit is not None]
    return min(limits, default=None)


def _of_the_machine() -> int | None:
    """Memory that is free or can be freed: Linux says so itself, elsewhere all there is must do."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _of_the_group(folder: Path) -> int | None:
    """What the limit of a container leaves (cgroup v2); None without one."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = re.search(r"^anon (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(limit) - int(used[1]) if limit.isdigit() and used else None
