"""Peak memory of training attention, forward and backward, over sequence lengths: each in a fresh process, on Linux.

    python -m benchmarks.operators.memory IMPLEMENTATION SEQ_LEN

prints the bytes by which one pass of an implementation of `attention` lifts the peak.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..core.measure import reason
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
        line = {"operator": "attention_memory", "implementation": name, "dtype": "float32", **vars(_case(seq_len))}
        line |= {"workloads": VERSION, "command": f"python -m benchmarks.operators.memory {name} {seq_len}"}
        del line["direction"]  # both
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                growth = pool.submit(peak_growth, name, seq_len).result()
            line |= {"peak_bytes": growth, "bytes_per_token": round(growth / seq_len)}
        except Exception as error:  # as memory and implementations fail
            line["not_available"] = reason(error)
        print(line, file=sys.stderr, flush=True)
        found.append(line)
    return found


if __name__ == "__main__":
    print(peak_growth(sys.argv[1], int(sys.argv[2])))
