"""Decoding with the shipped model on held-out prompts: TiDAR at several block lengths against autoregression.

    python -m benchmarks.decode --out DIR [--new-tokens N] [--block-sizes 1 2 4 8 16] [--batch-sizes 1 4 16]

Every TiDAR output is compared with the autoregressive one, token for token, before its speed is reported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from tidar_kernels import Decoder, patterns
from tidar_kernels.models import shipped
from tidar_kernels.models.training import data

from . import rates, record, workloads
from .decoder_step import model_floor

PROMPT_BYTES = 256


def prompts() -> list[list[int]]:
    """One prompt a held-out module: 256 bytes from the end of its first quarter, where the code is."""
    texts = data.held_out_texts().values()
    return [list(text[len(text) // 4 :][:PROMPT_BYTES]) for text in texts]


def run(
    new_tokens: int,
    block_sizes: list[int],
    batch_size: int = 1,
    repeats: int = 2,
    limits: rates.Rates | None = None,
) -> list[dict[str, Any]]:
    """One row a block length, the autoregressive baseline (block_size 0) first.

    Prompts are decoded `batch_size` at a time, `repeats` times, the modes taking turns so that a drift of the machine
    meets all of them; the faster of the repeats counts.

    Raises:
        RuntimeError: an output differs from the autoregressive one.
    """
    model, _ = shipped.load_shipped()
    decoders = {0: Decoder(model, mode="autoregressive")} | {b: Decoder(model, b) for b in block_sizes}
    seconds: dict[int, list[float]] = {b: [] for b in decoders}
    forwards, steps = dict.fromkeys(decoders, 0), dict.fromkeys(decoders, 0)
    identical = dict.fromkeys(decoders, True)
    known = prompts()
    count = -(-len(known) // batch_size) * batch_size
    everything = [known[i % len(known)] for i in range(count)]
    groups = [everything[start : start + batch_size] for start in range(0, count, batch_size)]
    for decoder in decoders.values():
        decoder.generate(groups[0], 16)
    for prompt in groups:
        best = dict.fromkeys(decoders, float("inf"))
        for repeat in range(repeats):
            reference: list[list[int]] = []
            for block, decoder in decoders.items():
                result = decoder.generate(prompt, new_tokens)
                reference = reference or result.tokens
                identical[block] &= result.tokens == reference
                best[block] = min(best[block], result.seconds)
                if repeat == 0:
                    forwards[block] += result.forwards
                    steps[block] += sum(map(len, result.accepted))
        for block in decoders:
            seconds[block].append(best[block])
    rows = []
    for block in decoders:
        tokens = new_tokens * count
        pattern = patterns.tidar_step(block) if block else patterns.causal(1)
        # At the middle of the generations; the lm_head on the drafts, and on the chosen block without its first row.
        least = model_floor(
            model.config, pattern, PROMPT_BYTES + new_tokens // 2, torch.float32, batch=batch_size,
            logits_rows=batch_size * (2 * max(block, 1) - 1),
        )  # fmt: skip
        step_us = sum(seconds[block]) / forwards[block] * 1e6
        limit = limits.floor_us(least["bytes"], least["flops"], "float32") if limits else 0.0
        speedups = [a / b for a, b in zip(seconds[0], seconds[block], strict=True)]
        rows.append(
            {
                "operator": "decode",
                "mode": "tidar" if block else "autoregressive",
                "block_size": block,
                "rows": block * (block + 1) or 1,
                "batch": batch_size,
                "prompts": count,
                "prompt_tokens": PROMPT_BYTES,
                "new_tokens": tokens,
                "forwards": forwards[block],
                "tokens_per_forward": round(tokens / steps[block], 4),
                "tokens_per_second": round(tokens / sum(seconds[block]), 2),
                "step_ms": round(step_us / 1e3, 4),
                "speedup": round(sum(seconds[0]) / sum(seconds[block]), 4),
                "speedup_median": round(statistics.median(speedups), 4),
                "identical": identical[block],
                "bytes": least["bytes"],
                "flops": least["flops"],
                **({"floor_us": round(limit, 3), "of_floor": round(limit / step_us, 4)} if limit else {}),
                "workloads": workloads.VERSION,
                "command": f"python -m benchmarks.decode --out DIR --new-tokens {new_tokens} --batch-sizes {batch_size}"
                + (f" --block-sizes {block}" if block else " --block-sizes"),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--block-sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, help="CPU threads; default PyTorch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    limits = rates.measure("cpu", (torch.float32,))
    known = rates.of(limits)
    rows = []
    for batch_size in options.batch_sizes:
        rows += run(options.new_tokens, options.block_sizes, batch_size, 2 if batch_size == 1 else 1, known)
    for line in rows:
        print(
            f"batch {line['batch']:<3} {line['mode']:15} B={line['block_size']:<3}"
            f" {line['tokens_per_forward']:6.2f} tokens/forward {line['tokens_per_second']:8.1f} tokens/s"
            f"  {line['speedup']:5.2f} x  identical: {line['identical']}",
            flush=True,
        )
    record.add(options.out, "decode", "cpu", [*limits, *rows])
    return 0 if all(line["identical"] for line in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
