"""What a results file holds beside its rows: the machine, the versions, the date; and how it is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import tidar_kernels

SCHEMA = 1


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tidar_kernels": tidar_kernels.__version__,
    }
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = "absent"
    machine: dict[str, Any] = {"device": device, "cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return {"versions": versions, "machine": machine}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def write(path: Path, kind: str, device: str, rows: list[dict[str, Any]]) -> None:
    """Write one results file, whole or not at all."""
    content = {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        **environment(device),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
