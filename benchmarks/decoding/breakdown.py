"""Where the time of a decode step goes on the CPU: the shipped model, part by part.

    python -m benchmarks.decoding.breakdown --out DIR [--block-sizes 0 1 2 4 8 16]

The parts are timed by wrapping the functions that they are, in a pass of their own; the step as a whole is timed
without. What no part explains is Python, normalisation, rotary positions and the gathering of rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tidar_kernels import Decoder, ops
from tidar_kernels.cache import KVCache
from tidar_kernels.decoding import runner
from tidar_kernels.decoding.strategies import base
from tidar_kernels.models import shipped
from tidar_kernels.models.transformer import Transformer

from ..core import record
from .turns import prompts

PROGRAM = "python -m benchmarks.decoding.breakdown"
# What is wrapped: part -> (owner, attribute).
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "attention": ((ops, "step_attention"),),
    "append": ((KVCache, "rotary_append"),),
    "projections": ((torch.nn.Linear, "forward"),),
    "lm_head": ((Transformer, "logits"),),
    "verify": ((base, "verify"), (base, "sample"), (runner, "sample")),
}


@contextmanager
def timed_parts(seconds: dict[str, float]) -> Iterator[None]:
    """Add to `seconds[part]` what is spent in each part while the context is open."""

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[part] += time.perf_counter() - started

        return wrapped

    with ExitStack() as stack:
        for part, owner, name in ((part, *place) for part, places in PARTS.items() for place in places):
            stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield


def breakdown(decoder: Decoder, batch: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Milliseconds of a step, as a whole and by part; each the median over the prompts."""
    whole: list[float] = []
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for prompt in batch:
        result = decoder.generate(prompt, new_tokens)
        whole.append(result.seconds / result.forwards * 1e3)
        seconds = dict.fromkeys(PARTS, 0.0)
        stream = decoder.stream(prompt, new_tokens)
        next(stream)  # the prefill, and a first step
        before = stream.result.forwards
        with timed_parts(seconds):
            for _ in stream:
                pass
        for part, spent in seconds.items():
            parts[part].append(spent / (stream.result.forwards - before) * 1e3)
    medians, step = {part: statistics.median(values) for part, values in parts.items()}, statistics.median(whole)
    found = {"step": step, **medians, "rest": step - sum(medians.values())}
    return {f"{part}_ms": round(value, 4) for part, value in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16], help="0: autoregressive")
    options = parser.parse_args(arguments)
    model, _ = shipped.load_shipped()
    rows = []
    for block in options.block_sizes:
        decoder = Decoder(model, block) if block else Decoder(model, mode="autoregressive")
        decoder.generate(prompts()[0], 16)
        found = breakdown(decoder, prompts(), options.new_tokens)
        again = f"{PROGRAM} --out DIR --new-tokens {options.new_tokens} --block-sizes {block}"
        rows.append({"operator": "decode_step", "block_size": block, **found, "command": again})
        figures = "  ".join(f"{name[:-3]} {value:.2f}" for name, value in rows[-1].items() if name.endswith("_ms"))
        print(f"{f'B={block}' if block else 'AR':5} ms: {figures}", flush=True)
    record.add(options.out, "breakdown", "cpu", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
