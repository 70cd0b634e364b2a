"""Results as data: one JSON file a machine and date, and in it one part a kind of measurement.

A file is `FOLDER/MACHINE-DATE.json`. It holds `schema` and `parts`; a part holds its date, versions, machine, the
clocks while it was measured, and its rows, one a line. Parts are written one by one, so that a part measured anew
replaces itself and leaves the others. Readers take each part from the newest file of each machine that has it.

Every row of figures has `command`: a command line that measures exactly this row again.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tidar_kernels

SCHEMA = 2
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit")


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tidar_kernels": tidar_kernels.__version__,
        "triton": version_of("triton") or "absent",
    }
    names = _cpuinfo("model name")
    cpu = f"{names[0]} x {len(names)}" if names else platform.processor()
    machine: dict[str, Any] = {"device": device, "cpu": cpu, "threads": torch.get_num_threads()}
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


def _cpuinfo(key: str) -> list[str]:
    """What Linux says of each core."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(key)]


def clocks(device: str) -> dict[str, float]:
    """Clocks (MHz), temperature (degrees C) and power (W) of the device now; empty where nothing can be read."""
    if device != "cuda":
        megahertz = [float(value) for value in _cpuinfo("cpu MHz")]
        return {"cpu_mhz": round(max(megahertz))} if megahertz else {}
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        values = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split(",")
    except (OSError, subprocess.SubprocessError):
        return {}
    # What the driver does not know is "[N/A]".
    known = ((name, value) for name, value in zip(CLOCKS, values, strict=False) if "N/A" not in value)
    return {name.replace(".", "_"): float(value) for name, value in known}


@functools.lru_cache(maxsize=2)
def _recent_clocks(device: str, moment: int) -> dict[str, float]:
    return clocks(device)


def today() -> str:
    """The date, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def content(kind: str, device: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of one kind of measurement."""
    now = _recent_clocks(device, int(time.monotonic() / 10))  # a part is written after every row
    return {"kind": kind, "date": today(), **environment(device), "clocks": now, "rows": rows}


def path_in(folder: Path, device: str) -> Path:
    """The file of this machine and day: `cpu-...` or `cuda-...`."""
    machine = environment(device)["machine"]
    name = re.sub(r"\(r\)|\(tm\)", "", (machine.get("gpu") or machine["cpu"]).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return folder / f"{device}-{name}-{today()}.json"


def add(folder: Path, kind: str, device: str, rows: list[dict[str, Any]]) -> None:
    """Write one part into the file of this machine and day, whole or not at all."""
    path = path_in(folder, device)
    held = load(path)["parts"] if path.is_file() else {}
    save(path, held | {kind: content(kind, device, rows)})


def save(path: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Write a file of parts, one row a line."""
    blocks = []
    for kind, part in sorted(parts.items()):
        head = json.dumps({name: value for name, value in part.items() if name != "rows"}, indent=1)
        rows = ",\n".join(f"  {json.dumps(row)}" for row in part["rows"])
        blocks.append(f'{json.dumps(kind)}: {head[:-2]},\n "rows": [\n{rows}\n ]\n}}')
    replace(path, f'{{\n"schema": {SCHEMA},\n"parts": {{\n' + ",\n".join(blocks) + "\n}\n}\n")


def write(path: Path, kind: str, device: str, rows: list[dict[str, Any]]) -> None:
    """Write one part as a file of its own, under any name, whole or not at all."""
    save(path, {kind: content(kind, device, rows)})


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is not one.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("parts"), dict):
        raise ValueError(f"{path}: expected a results file with parts, got none")
    return found


def newest(folder: Path, kind: str, device: str = "*") -> list[dict[str, Any]]:
    """One part of every machine that has it, each from the machine's newest file with that part."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{device}-*-????-??-??.json")):  # dates sort: the last one of a machine stays
        part = load(path)["parts"].get(kind)
        if part is not None:
            found[path.stem[: -len("-YYYY-MM-DD")]] = part
    return list(found.values())


class Rows:
    """The rows of a part while it is measured: on disk after every one, so that nothing is lost where a run ends.

    A row is entered before it is measured. One that takes its process down with it is then on file as having done so,
    and a second process that resumes does not try it again.
    """

    def __init__(self, folder: Path | None, kind: str, device: str, *, resume: bool = False) -> None:
        """`folder` None: kept in memory alone."""
        self.folder, self.kind, self.device = folder, kind, device
        self._by_command: dict[Any, dict[str, Any]] = {}
        if resume and folder is not None and path_in(folder, device).is_file():
            self._enter(*load(path_in(folder, device))["parts"].get(kind, {"rows": []})["rows"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._by_command.values())

    def get(self, command: str) -> dict[str, Any] | None:
        """The row of this command, with figures or without."""
        return self._by_command.get(command)

    def begin(self, row: dict[str, Any]) -> None:
        """Enter a row that is about to be measured."""
        self.put(row | {"not_available": "the process ended while this was measured"})

    def put(self, *rows: dict[str, Any]) -> None:
        """Enter rows, in place of those with the same command."""
        self._enter(*rows)
        if self.folder is not None:
            add(self.folder, self.kind, self.device, self.rows)

    def _enter(self, *rows: dict[str, Any]) -> None:
        self._by_command |= {row.get("command", object()): row for row in rows}  # without one, each is its own
