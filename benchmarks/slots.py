"""Free token slots: what a forward pass takes with more and more tokens in flight, at several prefixes.

    python -m benchmarks.slots --out DIR

As long as a pass is bound by reading weights and K/V, further tokens cost nothing: these slots are what drafts are put
in (TiDAR, arXiv 2511.08923, figure 1). Measured is the forward pass of a model with its cache, causal rows behind the
prefix, and the lm_head on the last row alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidar_kernels import KVCache, patterns
from tidar_kernels.models import Transformer, load_shipped

from . import decoder_step, rates, record, row, timing
from .implementations import OURS

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CPU_CONTEXTS = (128, 1024, 4096)
CUDA_CONTEXTS = (512, 4096, 32768)
SHIPPED = "shipped"


@dataclass(frozen=True)
class Asked:
    """What tells one row from the others."""

    model: str
    tokens: int
    context_len: int


def measure(
    model: Transformer,
    asked: Asked,
    known: rates.Rates,
    timer: Callable[[Callable[[], Any]], dict[str, float]],
) -> dict[str, Any]:
    """The figures of a forward pass of `asked.tokens` rows behind `asked.context_len` committed tokens."""
    weight, config = model.embed_tokens.weight, model.config
    pattern = patterns.causal(asked.tokens)
    cache = KVCache(
        num_layers=config.num_layers,
        batch_size=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_len=asked.context_len + asked.tokens,
        dtype=weight.dtype,
        device=weight.device,
    )
    cache.k.normal_()
    cache.v.normal_()
    cache.lengths.fill_(asked.context_len)
    cache.lengths_known([asked.context_len])
    tokens = torch.randint(config.vocab_size, (1, asked.tokens), device=weight.device)

    def run() -> torch.Tensor:
        return model.logits(model(tokens, pattern, cache)[:, -1:])

    device = weight.device.type
    least = decoder_step.model_floor(config, pattern, asked.context_len, weight.dtype, logits_rows=1)
    with torch.inference_mode():
        if not bool(run().isfinite().all()):
            raise RuntimeError(f"{asked}: expected finite logits, got others")
        measured = timer(run)
    line = {**least, **row.figures(measured, least), **record.clocks(device)}
    return line | known.against({"dtype": str(weight.dtype).removeprefix("torch."), **line})


def run(
    name: str,
    model: Transformer,
    rows: record.Rows,
    known: rates.Rates,
    *,
    contexts: Sequence[int],
    tokens: Sequence[int] = TOKENS,
    timer: Callable[[Callable[[], Any]], dict[str, float]],
    deadline: float = math.inf,
) -> bool:
    """All lengths and tokens until `deadline`, in seconds of `time.perf_counter`; False if a pass failed."""
    weight, passed = model.embed_tokens.weight, True
    for asked in (Asked(name, count, context) for context in contexts for count in tokens):
        line = row.head("token_slots", OURS, weight.device.type, weight.dtype, vars(asked))
        if rows.has(line["command"]):
            continue
        if time.perf_counter() > deadline:
            break
        rows.begin(line)
        try:
            line |= measure(model, asked, known, timer)
        except Exception as failure:
            line["not_available"] = row.reason(failure)
            passed = False
        rows.put(line)
        print(row.describe(line), flush=True)
        if "not_available" in line:
            row.check_device(weight.device.type)
    return passed


def named(name: str, device: str, dtype: torch.dtype) -> Transformer:
    """The shipped model, or one of random weights in a known shape.

    Raises:
        ValueError: no such model.
    """
    if name == SHIPPED:
        return load_shipped()[0].to(device, dtype)
    shapes = {shape.name: shape.config for shape in decoder_step.SHAPES}
    if name not in shapes:
        raise ValueError(f"model: expected one of {', '.join([SHIPPED, *shapes])}, got {name}")
    return decoder_step.random_model(shapes[name], device, dtype)


def in_graph(call: Callable[[], Any]) -> dict[str, float]:
    return timing.time_cuda([call])


def one(
    implementation: str, device: str, dtype: torch.dtype, fields: Sequence[str], known: rates.Rates
) -> list[dict[str, Any]]:
    """The row of a command line: `model= tokens= context_len=`."""
    asked, held = row.parse(Asked, fields), row.Held()
    timer = in_graph if device == "cuda" else timing.time_cpu
    options: dict[str, Any] = {"contexts": [asked.context_len], "tokens": [asked.tokens], "timer": timer}
    run(asked.model, named(asked.model, device, dtype), held, known, **options)
    return held.rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slots", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    options = parser.parse_args(arguments)
    rows = record.Rows(options.out, "token_slots", "cpu")
    rows.put(*rates.measure("cpu", (torch.float32,)))
    model = named(SHIPPED, "cpu", torch.float32)
    passed = run(SHIPPED, model, rows, rates.of(rows.rows), contexts=CPU_CONTEXTS, timer=timing.time_cpu)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
