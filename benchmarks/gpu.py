"""What `make gpu` runs after parity: step attention, decoder steps and training attention on CUDA, as JSON.

python -m benchmarks.gpu --out DIR [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import decoder_step, record, step, timing, training

# Of the budget; what step attention leaves, decoder steps have, and then training attention.
STEP_SHARE, DECODER_SHARE = 0.35, 0.6
TRAINING_TOKENS = 16384  # clean tokens a call: shorter sequences come in larger batches
TRAINING_WIDTH = 2048  # num_heads * head_dim
TRAINING_LENGTHS = (2048, 4096, 8192, 16384, 32768)


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


def training_cases() -> list[training.Workload]:
    """TiDAR training at B = 16. One kind of heads over all lengths, then the others, the middle length first: the time
    may be used up before the end."""

    def case(seq_len: int, head_dim: int, group: int) -> training.Workload:
        heads = TRAINING_WIDTH // head_dim
        return training.Workload(seq_len, 16, heads, heads // group, head_dim, max(1, TRAINING_TOKENS // seq_len))

    kinds = [(128, 4), (64, 1), (128, 1), (64, 4)]
    middle = TRAINING_LENGTHS[2]
    first = [case(s, *kinds[0]) for s in TRAINING_LENGTHS] + [case(middle, *kind) for kind in kinds[1:]]
    return first + [case(s, *kind) for kind in kinds[1:] for s in TRAINING_LENGTHS if s != middle]


def run_step(path: Path, rates: list[dict[str, Any]], deadline: float) -> None:
    """Step attention until `deadline`, in seconds of `time.perf_counter`; the file is whole after every case."""
    cases = step.workloads(tuple(step.HEADS), (0, 4, 8, 16), (512, 4096, 8192, 32768))
    rows = list(rates)
    for index, case in enumerate(cases):
        if time.perf_counter() > deadline:
            print(f"step attention: stopped after {index} of {len(cases)} cases, the time is used up", file=sys.stderr)
            break
        rows += step.run_cuda(case)
        torch.cuda.empty_cache()
        for line in rows[-2:]:
            print(
                f"{line['model']:14} B={line['block_size']:<3} P={line['context_len']:<6} {line['implementation']:16}"
                f" {line['p50_us']:9.1f} us {line['tflops']:8.1f} TFLOP/s {line['gbytes_per_s']:8.1f} GB/s",
                flush=True,
            )
        record.write(path, "step_attention", "cuda", rows)


def run_training(
    path: Path,
    cases: list[training.Workload],
    deadline: float,
    device: str = "cuda",
    timer: Callable[[Callable[[], Any]], dict[str, float]] = timing.time_stream,
) -> bool:
    """Training attention until `deadline`; the file is whole after every case. True if ours never failed."""
    rows: list[dict[str, Any]] = []
    passed = True
    for index, case in enumerate(cases):
        if time.perf_counter() > deadline:
            print(f"attention: stopped after {index} of {len(cases)} cases, the time is used up", file=sys.stderr)
            break
        new = training.attempt(partial(training.run_on_device, case, device=device, timer=timer, deadline=deadline))
        if isinstance(new, str):  # no room for the operands, say
            print(f"attention {case}: {new}", file=sys.stderr)
            passed = False
            continue
        for line in new:
            print(training.describe(line), flush=True)
        rows += new
        record.write(path, "training", device, rows)
    return passed and not any(line["implementation"] == training.OURS and training.failed(line) for line in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results files")
    parser.add_argument("--budget", type=float, default=240.0, help="stop starting new cases after this many seconds")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: expected a CUDA GPU, got none", file=sys.stderr)
        return 1
    started = time.perf_counter()
    name = torch.cuda.get_device_name(0).replace(" ", "-").lower()
    rates = [copy_bandwidth(), matmul_rate()]
    per_second = rates[0]["gbytes_per_s"] * 1e9, rates[1]["tflops"] * 1e12
    ends = [started + share * options.budget for share in (STEP_SHARE, DECODER_SHARE, 1.0)]
    # Whatever becomes of one part, the others are measured.
    parts = {
        "step attention": partial(run_step, options.out / f"step-{name}.json", rates, ends[0]),
        "decoder step": partial(decoder_step.run, options.out / f"decoder-step-{name}.json", per_second, ends[1]),
    }
    passed = True
    for part, run in parts.items():
        failure = training.attempt(run)
        if failure is not None:
            print(f"{part}: {failure}", file=sys.stderr)
            passed = False
    passed &= run_training(options.out / f"training-{name}.json", training_cases(), ends[2])
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
