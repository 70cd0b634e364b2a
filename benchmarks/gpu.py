"""What `make gpu` runs after parity: step attention on CUDA against its floors and a peer, as JSON.

python -m benchmarks.gpu --out DIR [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import record, step, timing


def copy_bandwidth() -> dict[str, Any]:
    """Bytes read and written per second by `copy_` of 1 GiB."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    measured = timing.time_cuda([lambda: target.copy_(source)])
    return {"operator": "copy", **measured, "gbytes_per_s": round(2 * 2**30 / measured["p50_us"] / 1e3, 1)}


def matmul_rate() -> dict[str, Any]:
    """bfloat16 FLOPs per second of an 8192^3 matrix product of random operands."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    measured = timing.time_cuda([lambda: a @ b])
    return {"operator": "matmul", **measured, "tflops": round(2 * 8192**3 / measured["p50_us"] / 1e6, 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results file")
    parser.add_argument("--budget", type=float, default=240.0, help="stop starting new cases after this many seconds")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: expected a CUDA GPU, got none", file=sys.stderr)
        return 1
    started = time.perf_counter()
    cases = step.workloads(tuple(step.HEADS), (0, 4, 8, 16), (512, 4096, 8192, 32768))
    rows, name = [copy_bandwidth(), matmul_rate()], torch.cuda.get_device_name(0).replace(" ", "-").lower()
    for index, case in enumerate(cases):
        if time.perf_counter() - started > options.budget:
            print(f"stopped after {index} of {len(cases)} cases: {options.budget:.0f} s are used up", file=sys.stderr)
            break
        rows += step.run_cuda(case)
        torch.cuda.empty_cache()
        for line in rows[-2:]:
            print(
                f"{line['model']:14} B={line['block_size']:<3} P={line['context_len']:<6} {line['implementation']:16}"
                f" {line['p50_us']:9.1f} us {line['tflops']:8.1f} TFLOP/s {line['gbytes_per_s']:8.1f} GB/s",
                flush=True,
            )
        # After every case: a run that is cut short still leaves what it measured.
        record.write(options.out / f"step-{name}.json", "step_attention", "cuda", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
