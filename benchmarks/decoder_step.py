"""Whole decoder steps at the shapes of known models, random weights: latency does not depend on them.

    python -m benchmarks.decoder_step --out DIR [--budget SECONDS]

Every step is one CUDA graph, the autoregressive one too. Beside it stands its floor: the weights and the K/V read once
at the measured bandwidth, or the multiplications at the measured rate, whichever takes longer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidar_kernels import strategies
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.session import Session, Step

from . import record, timing

BLOCK_SIZES = (0, 4, 8, 16)  # 0: autoregressive
CONTEXTS = (512, 4096, 32768)


@dataclass(frozen=True)
class Shape:
    """A model's shape, and the tokens a forward pass that TiDAR (arXiv 2511.08923) publishes for it, by block size."""

    name: str
    config: TransformerConfig
    published: dict[int, float]


def _shape(name: str, sizes: tuple[int, int, int, int, int], published: dict[int, float]) -> Shape:
    hidden, intermediate, layers, heads, kv_heads = sizes
    return Shape(name, TransformerConfig(151936, hidden, intermediate, layers, heads, kv_heads, 128), published)


SHAPES = (
    _shape("Qwen2.5-1.5B", (1536, 8960, 28, 12, 2), {8: 5.69, 16: 7.35}),
    _shape("Qwen3-8B", (4096, 12288, 36, 32, 8), {16: 8.36}),
)


def floor(session: Session, context: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes and FLOPs that no step of this batch can avoid."""
    config, strategy = session.model.config, session.step_config.strategy
    pattern = strategy.pattern  # type: ignore[attr-defined]  # only steps of one pass are measured
    weights = sum(p.numel() for p in session.model.parameters())
    head = config.vocab_size * config.hidden_size
    batch = len(session._slots)
    pairs = batch * (pattern.q_len * context + int(pattern.dense().sum()))
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (context + pattern.q_len) * batch
    logits_rows = batch * (2 * strategy.drafts - 1)  # of the drafts, and of the chosen block without its first
    flops = 2.0 * (weights - head) * pattern.q_len * batch + 2.0 * head * logits_rows
    flops += 4.0 * pairs * config.head_dim * config.num_heads * config.num_layers
    return {"rows": pattern.q_len * batch, "bytes": float((weights + kv) * dtype.itemsize), "flops": flops}


def steps(
    shape: Shape,
    block_sizes: tuple[int, ...],
    contexts: tuple[int, ...],
    rates: tuple[float, float],
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    timer: Callable[[Callable[[], Any]], dict[str, float]] = timing.time_stream,
    deadline: float = float("inf"),
) -> Iterator[dict[str, Any]]:
    """One row a block size and context, the autoregressive step of each context first. `rates`: bytes/s and FLOP/s."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Transformer(shape.config).requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)
    mask = shape.config.vocab_size - 1
    for context in contexts:
        baseline = 0.0
        for block in block_sizes:
            if time.perf_counter() > deadline:
                return
            strategy = strategies.tidar(block) if block else strategies.autoregressive()
            session = Session(model, Step(strategy, mask), 1, context + max(block, 1))
            # No request runs: the step is the same, and commits nothing, so that every repetition is alike.
            session.cache.k.normal_()
            session.cache.v.normal_()
            session.cache.lengths.fill_(context)
            session.cache.lengths_known([context])
            with torch.inference_mode():
                measured = timer(session.replayed())
            seconds = measured["p50_us"] / 1e6
            baseline = baseline or seconds
            least = floor(session, context, dtype)
            limit = max(least["bytes"] / rates[0], least["flops"] / rates[1])
            published = shape.published.get(block)
            yield {
                "operator": "decoder_step",
                "model": shape.name,
                "block_size": block,
                "context_len": context,
                "dtype": str(dtype).removeprefix("torch."),
                **least,
                **measured,
                "floor_us": round(limit * 1e6, 2),
                "of_floor": round(seconds / limit, 4),
                "of_autoregressive": round(seconds / baseline, 4),
                **({"projected_speedup": round(published * baseline / seconds, 3)} if published else {}),
            }
            del session


def describe(row: dict[str, Any]) -> str:
    """A row as a line."""
    speedup = f"  projected {row['projected_speedup']:.2f} x" if "projected_speedup" in row else ""
    return (
        f"{row['model']:14} B={row['block_size']:<3} P={row['context_len']:<6} {row['p50_us']:9.1f} us"
        f"  {row['of_floor']:5.2f} x floor  {row['of_autoregressive']:5.2f} x autoregressive{speedup}"
    )


def run(path: Path, rates: tuple[float, float], deadline: float) -> None:
    """All shapes until `deadline`, in seconds of `time.perf_counter`; the file is whole after every row."""
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for row in steps(shape, BLOCK_SIZES, CONTEXTS, rates, deadline=deadline):
            print(describe(row), flush=True)
            rows.append(row)
            record.write(path, "decoder_step", "cuda", rows)
        torch.cuda.empty_cache()
    expected = len(SHAPES) * len(BLOCK_SIZES) * len(CONTEXTS)
    if len(rows) < expected:
        print(f"decoder step: stopped after {len(rows)} of {expected} cases, the time is used up", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    from .gpu import copy_bandwidth, matmul_rate

    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder_step", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results file")
    parser.add_argument("--budget", type=float, default=120.0, help="stop starting new cases after this many seconds")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.decoder_step: expected a CUDA GPU, got none", file=sys.stderr)
        return 1
    started = time.perf_counter()
    rates = copy_bandwidth()["gbytes_per_s"] * 1e9, matmul_rate()["tflops"] * 1e12
    name = torch.cuda.get_device_name(0).replace(" ", "-").lower()
    run(options.out / f"decoder-step-{name}.json", rates, started + options.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
