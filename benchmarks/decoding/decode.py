"""Decoding with the shipped model on held-out prompts: TiDAR at several block lengths against autoregression.

    python -m benchmarks.decoding.decode --out DIR [--new-tokens N] [--block-sizes 1 2 .. auto] [--batch-sizes 1 4 16]

Every TiDAR output is compared with the autoregressive one, token for token, before its speed is reported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from tidar_kernels import Decoder, patterns
from tidar_kernels.models import shipped

from ..core import rates, record
from ..core.operands import VERSION
from .models import floor_of
from .turns import PROMPT_BYTES, described, prompts, take_turns

PROGRAM = "python -m benchmarks.decoding.decode"
BlockSize = int | Literal["auto"]


def _block_size(text: str) -> BlockSize:
    """An argparse type."""
    return "auto" if text == "auto" else int(text)


def run(new_tokens: int, block_sizes: list[BlockSize], batch_size: int, limits: rates.Rates) -> list[dict[str, Any]]:
    """One row a block length, the autoregressive baseline (block_size 0) first; prompts are decoded `batch_size` at a
    time."""
    model, _ = shipped.load_shipped()
    decoders: dict[BlockSize, Decoder] = {0: Decoder(model, mode="autoregressive")}
    decoders |= {block: Decoder(model, block) for block in block_sizes}
    known = prompts()
    count = -(-len(known) // batch_size) * batch_size
    everything = [known[i % len(known)] for i in range(count)]
    groups = [everything[start : start + batch_size] for start in range(0, count, batch_size)]
    turns = take_turns(decoders, groups, new_tokens, repeats=2 if batch_size == 1 else 1)
    rows = []
    for block, turn in turns.items():
        tokens = new_tokens * count
        step_us = sum(turn.seconds) / turn.forwards * 1e6
        row = {
            "operator": "decode",
            "mode": "tidar" if block else "autoregressive",
            "block_size": block,
            "rows": None,
            "batch": batch_size,
            "prompts": count,
            "prompt_tokens": PROMPT_BYTES,
            **turn.figures(tokens, turns[0]),
            "tokens_per_forward": round(tokens / sum(map(len, turn.accepted)), 4),
            "step_ms": round(step_us / 1e3, 4),
            "workloads": VERSION,
            "command": f"{PROGRAM} --out DIR --new-tokens {new_tokens} --batch-sizes {batch_size} --block-sizes"
            + (f" {block}" if block else ""),
        }
        if block != "auto":  # whose steps have now so many rows, now so many
            pattern = patterns.tidar_step(block) if block else patterns.causal(1)
            # At the middle of the generations; the lm_head on the drafts, and on the chosen block but its first row.
            least = floor_of(
                model.config, pattern, PROMPT_BYTES + new_tokens // 2, torch.float32, batch=batch_size,
                logits_rows=batch_size * (2 * max(block, 1) - 1),
            )  # fmt: skip
            row |= {"rows": pattern.q_len, "bytes": least["bytes"], "flops": least["flops"]}
            row |= limits.against({**least, "p50_us": step_us, "dtype": "float32"})
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--block-sizes", type=_block_size, nargs="*", default=[1, 2, 4, 8, 16, "auto"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args(arguments)
    limits, rows = rates.measure("cpu", (torch.float32,)), []
    for batch_size in options.batch_sizes:
        rows += run(options.new_tokens, options.block_sizes, batch_size, rates.of(limits))
    for line in rows:
        print(f"batch {line['batch']:<3} B={line['block_size']:<4} {described(line)}", flush=True)
    record.add(options.out, "decode", "cpu", [*limits, *rows])
    return 0 if all(line["identical"] for line in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
