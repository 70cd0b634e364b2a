"""Tables drawn from the results files of benchmarks/results/, for README.md and docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sections import Section

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def _load(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def _where(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    name = machine.get("gpu") or f"{machine['cpu']} cores, {machine['threads']} threads"
    software = f"PyTorch {versions['torch']}, Triton {versions['triton']}, Python {versions['python']}"
    return f"{name}; {software}; {result['date']}"


def decode_table() -> str:
    """Tokens a forward and speed of the shipped model, TiDAR against autoregression."""
    parts = []
    for result in _load("decode-*.json"):
        lines = [
            "| | rows a forward | tokens a forward | tokens/s | against AR | same tokens |",
            "| :--- | ---: | ---: | ---: | ---: | :---: |",
        ]
        for row in result["rows"]:
            name = f"TiDAR, B = {row['block_size']}" if row["block_size"] else "autoregressive"
            lines.append(
                f"| {name} | {row['rows']} | {row['tokens_per_forward']:.2f} | {row['tokens_per_second']:.0f} "
                f"| {row['speedup']:.2f} x | {'yes' if row['identical'] else 'NO'} |"
            )
        first = result["rows"][0]
        parts.append(
            "\n".join(lines)
            + f"\n\nShipped 8 MB byte-level model, float32, greedy; {first['prompts']} held-out prompts of "
            f"{first['prompt_tokens']} bytes, {first['new_tokens'] // first['prompts']} new bytes each, one at a time; "
            f"prefill not counted. {_where(result)}."
        )
    return "\n\n".join(parts)


def gpu_table() -> str:
    """Step attention on CUDA, where somebody has run `make gpu`."""
    files = _load("step-*.json")
    if not files:
        return (
            "No GPU figures are published yet: `make gpu` measures them and writes the file this table is drawn from."
        )
    parts = []
    for result in files:
        lines = [
            "| heads of | B | context | microseconds | TFLOP/s | GB/s | SDPA, dense mask | times faster |",
            "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        rows = [row for row in result["rows"] if row["operator"] == "step_attention"]
        peers = {
            (row["model"], row["block_size"], row["context_len"]): row["p50_us"]
            for row in rows
            if row["implementation"] == "sdpa_dense_mask"
        }
        for row in (row for row in rows if row["implementation"] == "tidar_kernels"):
            peer = peers.get((row["model"], row["block_size"], row["context_len"]))
            lines.append(
                f"| {row['model']} | {row['block_size'] or 'AR'} | {row['context_len']} | {row['p50_us']:.1f} "
                f"| {row['tflops']:.0f} | {row['gbytes_per_s']:.0f} "
                + (f"| {peer:.1f} | {peer / row['p50_us']:.1f} |" if peer else "| | |")
            )
        parts.append("\n".join(lines) + f"\n\nbfloat16, batch 1, cold L2, CUDA graph. {_where(result)}.")
    return "\n\n".join(parts)


def operators_table() -> str:
    """Micro-benchmarks of the operators on the CPU."""
    parts = []
    for result in _load("operators-*.json"):
        rows = result["rows"]
        steps = [row for row in rows if row["operator"] == "step_attention"]
        dense = {
            (row["block_size"], row["context_len"]): row["p50_us"]
            for row in steps
            if row["implementation"] == "dense_sdpa"
        }
        lines = [
            "| B | context | `step_attention`, ms | SDPA with the dense mask, ms | times faster |",
            "| ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in (row for row in steps if row["implementation"] == "ours"):
            peer = dense[row["block_size"], row["context_len"]]
            lines.append(
                f"| {row['block_size'] or 'AR'} | {row['context_len']} | {row['p50_us'] / 1e3:.2f} | {peer / 1e3:.2f} "
                f"| {peer / row['p50_us']:.1f} |"
            )
        parts.append(
            "\n".join(lines)
            + f"\n\nfloat32, heads of {steps[0]['model']} ({steps[0]['num_heads']} query, {steps[0]['num_kv_heads']} "
            f"key/value, head dim {steps[0]['head_dim']}), batch 1. {_where(result)}."
        )
    return "\n\n".join(parts)


SECTIONS: dict[str, Section] = {
    "decode-table": decode_table,
    "gpu-table": gpu_table,
    "operators-table": operators_table,
}
