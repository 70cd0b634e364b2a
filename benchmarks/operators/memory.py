"""Peak memory of training attention, forward and backward, over sequence lengths: each in a fresh process, on Linux.

    python -m benchmarks.operators.memory IMPLEMENTATION SEQ_LEN

prints the bytes by which one pass of an implementation of `attention` lifts the peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..core.operands import VERSION
from .attention import Attention, Calls, Training

LENGTHS = {"tidar_kernels": (2048, 4096, 8192), "sdpa_dense_mask": (2048, 4096)}


def _case(seq_len: int) -> Training:
    return Training("backward", seq_len, 16, 8, 8, 64)


def peak_growth(name: str, seq_len: int) -> int:
    """Bytes by which one forward and backward pass lifts the peak of this process's resident memory.

    Call it in a process of its own, on Linux. The peak is read as VmHWM, not as ru_maxrss: that of a new process starts
    at the size of its parent.
    """
    growth = 0
    for length in (64, seq_len):  # the first one loads libraries and starts threads
        operands = Attention(_case(length), "cpu", torch.float32)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes what is resident now
        before = _peak_rss()
        calls: Calls = Attention.implementations[name].prepare(operands)
        (out,) = calls.forward("backward")
        torch.autograd.grad(out, calls.leaves, operands.grad_out)
        growth = _peak_rss() - before
    return growth


def _peak_rss() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def rows(lengths: dict[str, tuple[int, ...]] | None = None) -> list[dict[str, Any]]:
    """Peak memory of forward and backward over sequence lengths, each in a fresh process."""
    found = []
    for name, seq_len in ((name, n) for name, each in (lengths or LENGTHS).items() for n in each):
        command = ["-m", "benchmarks.operators.memory", name, str(seq_len)]
        done = subprocess.run([sys.executable, *command], cwd=Path(__file__).parents[2], capture_output=True, text=True)
        line = {"operator": "attention_memory", "implementation": name, "dtype": "float32", **vars(_case(seq_len))}
        line |= {"workloads": VERSION, "command": " ".join(["python", *command])}
        del line["direction"]  # both
        if done.returncode == 0:
            growth = json.loads(done.stdout)
            line |= {"peak_bytes": growth, "bytes_per_token": round(growth / seq_len)}
        else:
            line["not_available"] = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
        found.append(line)
    return found


def describe(line: dict[str, Any]) -> str:
    """A row of figures for the terminal."""
    text = f"{line['implementation']:16} S={line['seq_len']:<6} {line['dtype']:9} forward + backward"
    if "not_available" in line:
        return f"{text} not available: {line['not_available']}"
    return f"{text} {line['peak_bytes'] / 2**20:8.1f} MiB {line['bytes_per_token']:8} bytes a token"


if __name__ == "__main__":
    print(json.dumps(peak_growth(sys.argv[1], int(sys.argv[2]))))
