"""Tables and pictures drawn from the results files of benchmarks/results/, for README.md and docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import plots
from sections import Picture, Section

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
        lines += [
            f"| {_mode(row)} | {row['rows']} | {row['tokens_per_forward']:.2f} | {row['tokens_per_second']:.0f} "
            f"| {row['speedup']:.2f} x | {'yes' if row['identical'] else 'NO'} |"
            for row in result["rows"]
            if row["batch"] == 1
        ]
        first = result["rows"][0]
        parts.append(
            "\n".join(lines)
            + f"\n\nShipped 8 MB byte-level model, float32, greedy; {first['prompts']} held-out prompts of "
            f"{first['prompt_tokens']} bytes, {first['new_tokens'] // first['prompts']} new bytes each, one at a time; "
            f"prefill not counted. {_where(result)}."
        )
    return "\n\n".join(parts)


def _mode(row: dict[str, Any]) -> str:
    return f"TiDAR, B = {row['block_size']}" if row["block_size"] else "autoregressive"


def decode_batch_table() -> str:
    """The same, several sequences at a time."""
    parts = []
    for result in _load("decode-*.json"):
        batches = sorted({row["batch"] for row in result["rows"]})
        head = "".join(f" batch {batch}: tokens/s | against AR |" for batch in batches)
        lines = [f"| |{head}", f"| :--- |{' ---: | ---: |' * len(batches)}"]
        for block in sorted({row["block_size"] for row in result["rows"]}):
            rows = {row["batch"]: row for row in result["rows"] if row["block_size"] == block}
            cells = "".join(f" {rows[b]['tokens_per_second']:.0f} | {rows[b]['speedup']:.2f} x |" for b in batches)
            lines.append(f"| {_mode(rows[batches[0]])} |{cells}")
        parts.append("\n".join(lines) + f"\n\nTokens of all sequences together. {_where(result)}.")
    return "\n\n".join(parts)


BREAKDOWN = ("attention", "append", "projections", "lm_head", "verify", "rest")


def breakdown_table() -> str:
    """Where the time of a step goes."""
    parts = []
    for result in _load("breakdown-*.json"):
        lines = ["| | step, ms | " + " | ".join(BREAKDOWN) + " |", "| :--- |" + " ---: |" * (len(BREAKDOWN) + 1)]
        for row in result["rows"]:
            cells = " | ".join(f"{row[f'{part}_ms']:.2f}" for part in BREAKDOWN)
            lines.append(f"| {_mode(row)} | {row['step_ms']:.2f} | {cells} |")
        parts.append("\n".join(lines) + f"\n\nMilliseconds, batch 1. {_where(result)}.")
    return "\n\n".join(parts)


def strategies_table() -> str:
    """Every way to decode, side by side."""
    parts = []
    for result in _load("strategies-*.json"):
        rows = [row for row in result["rows"] if row["operator"] == "strategy"]
        lines = [
            "| | rows a forward | tokens a forward | expected | tokens/s | against AR | must equal AR | does |",
            "| :--- | ---: | ---: | ---: | ---: | ---: | :---: | :---: |",
        ]
        for row in rows:
            expected = row["expected_tokens_per_forward"]
            answers = ["yes" if row[field] else "no" for field in ("exact", "identical")]
            lines.append(
                f"| {row['label']} | {row['rows']} | {row['tokens_per_forward']:.2f} "
                f"| {'' if expected is None else f'{expected:.2f}'} | {row['tokens_per_second']:.0f} "
                f"| {row['speedup']:.2f} x | {' | '.join(answers)} |"
            )
        first = rows[0]
        profile = next(row for row in result["rows"] if row["operator"] == "profile")
        shares = " ".join(f"{share:.2f}" for share in profile["acceptance"])
        steps = ", ".join(f"{ms:.1f} at {n}" for n, ms in zip(profile["rows"], profile["step_ms"], strict=True))
        parts += [
            "![tokens a forward pass and speed of every strategy](images/strategies_cpu.png)",
            "\n".join(lines),
            f"Shipped model, float32, greedy; {first['prompts']} held-out prompts of {first['prompt_tokens']} bytes, "
            f"{first['new_tokens'] // first['prompts']} new bytes each, one at a time; prefill not counted. Expected: "
            f"from the profile below, measured on training text. {_where(result)}.",
            f"The profile that *auto* chose by: of the drafts 1, 2, .. positions behind the first whose predecessors "
            f"stayed, {shares} stay; a step takes, in ms, {steps} rows.",
        ]
    return "\n\n".join(parts) or "No figures are published yet: `make bench` measures them."


def decoder_step_table() -> str:
    """Whole decoder steps on CUDA, where somebody has run `make gpu`."""
    files = _load("decoder-step-*.json")
    if not files:
        return (
            "No GPU figures are published yet: `make gpu` measures them and writes the file this table is drawn from."
        )
    parts = []
    for result in files:
        lines = [
            "| shape of | B | rows | context | step, ms | times its floor | times AR | projected speed-up |",
            "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in result["rows"]:
            speedup = f"{row['projected_speedup']:.2f} x" if "projected_speedup" in row else ""
            lines.append(
                f"| {row['model']} | {row['block_size'] or 'AR'} | {row['rows']} | {row['context_len']} "
                f"| {row['p50_us'] / 1e3:.3f} | {row['of_floor']:.2f} | {row['of_autoregressive']:.2f} | {speedup} |"
            )
        parts.append(
            "\n".join(lines) + "\n\nbfloat16, batch 1, random weights, one CUDA graph a step, verification and the "
            "lm_head within. Floor: weights and K/V read once at the measured bandwidth, or the multiplications at the "
            "measured rate. Projected: the tokens a forward pass that TiDAR publishes for the model, over the step's "
            f"time in autoregressive steps. {_where(result)}."
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


def _milliseconds(row: dict[str, Any] | None) -> str:
    """Time and, in brackets, time against the floor; a dash without figures."""
    if row is None or "p50_us" not in row:
        return "–"
    return f"{row['p50_us'] / 1e3:.1f} ({row['against_floor']:.2f} x)"


def _by_case(result: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """(operands, direction) -> implementation -> row, of training attention, in the file's order."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["operator"] == "attention":
            names = ("dtype", "head_dim", "num_heads", "num_kv_heads", "seq_len", "direction")
            cases.setdefault(tuple(row[name] for name in names), {})[row["implementation"]] = row
    return cases


def training_table() -> str:
    """Training attention on the CPU: the peers side by side, and the picture of it."""
    files = _load("training-cpu.json")
    if not files:
        return "No figures of training attention are published yet: `make bench` measures them."
    parts = []
    for result in files:
        cases = _by_case(result)
        names = ("causal_sdpa", "tidar_kernels", "flex_attention", "sdpa_dense_mask")
        lines = [
            "| | query/kv heads | | floor, ms | `tk.attention` | FlexAttention, compiled | SDPA, dense mask |",
            "| :--- | ---: | :--- | ---: | ---: | ---: | ---: |",
        ]
        for (dtype, _, heads, kv_heads, _, direction), rows in cases.items():
            floor, *others = (rows.get(name) for name in names)
            first = f"{floor['p50_us'] / 1e3:.1f}" if floor else "–"
            figures = " | ".join(_milliseconds(row) for row in others)
            lines.append(f"| {dtype} | {heads}/{kv_heads} | {direction} | {first} | {figures} |")
        row = next(row for row in result["rows"] if row["operator"] == "attention")
        notes = {
            f"{plots.LABELS[row['implementation']]}, {row['direction']}: {row['not_available']}"
            for row in result["rows"]
            if row["operator"] == "attention" and "not_available" in row
        }
        parts += [
            "![time of training attention against the floor](images/training_cpu.png)",
            "\n".join(lines),
            f"TiDAR training at S = {row['seq_len']} ({row['rows']} rows), B = {row['block_size']}, head dim "
            f"{row['head_dim']}, batch {row['batch']}; milliseconds and, in brackets, times the floor: two causal SDPA "
            f"calls on S rows, K/V heads repeated beforehand. Implementations take turns; medians; the backward pass "
            f"alone. {_where(result)}.",
            *(f"No figures for {note}" for note in sorted(notes)),
        ]
    return "\n\n".join(parts)


def training_memory_table() -> str:
    """Peak memory of a forward and backward pass over sequence lengths."""
    parts = []
    for result in _load("training-cpu.json"):
        rows = [row for row in result["rows"] if row["operator"] == "attention_memory" and "peak_bytes" in row]
        lines = ["| | S | peak, MiB | bytes a clean token |", "| :--- | ---: | ---: | ---: |"]
        lines += [
            f"| {plots.LABELS[row['implementation']]} | {row['seq_len']} | {row['peak_bytes'] / 2**20:.0f} "
            f"| {row['bytes_per_token']:,} |"
            for row in rows
        ]
        if rows:
            heads = f"{rows[0]['num_heads']} heads, head dim {rows[0]['head_dim']}, {rows[0]['dtype']}"
            parts.append(
                "\n".join(lines) + f"\n\nGrowth of the peak resident memory in one forward and backward pass, operands "
                f"not counted, each in a fresh process; {heads}. {_where(result)}."
            )
    return "\n\n".join(parts) or "No figures are published yet: `make bench` measures them."


def training_gpu_table() -> str:
    """Training attention on CUDA, where somebody has run `make gpu`."""
    files = [result for result in _load("training-*.json") if result["machine"]["device"] == "cuda"]
    if not files:
        return (
            "No GPU figures are published yet: `make gpu` measures them and writes the file this table is drawn from."
        )
    parts = []
    peers = ("flex_attention", "sdpa_dense_mask", "causal_flash", "causal_cudnn")
    for result in files:
        lines = [
            "| d | query/kv heads | S | | `tk.attention` | "
            + " | ".join(plots.LABELS[name] for name in peers)
            + " | of FlexAttention | of the best causal |",
            "| ---: | ---: | ---: | :--- |" + " ---: |" * (len(peers) + 3),
        ]
        for (_, head_dim, heads, kv_heads, seq_len, direction), rows in _by_case(result).items():
            rate = {name: row["tflops"] for name, row in rows.items() if "tflops" in row}
            ours = rate.get("tidar_kernels")
            best = max((rate[name] for name in peers[2:] if name in rate), default=None)
            cells = [f"{rate[name]:.0f}" if name in rate else "–" for name in ("tidar_kernels", *peers)]
            cells += [f"{ours / x:.2f} x" if ours and x else "–" for x in (rate.get("flex_attention"), best)]
            lines.append(f"| {head_dim} | {heads}/{kv_heads} | {seq_len} | {direction} | {' | '.join(cells)} |")
        parts.append(
            "\n".join(lines) + "\n\nTFLOP/s on live pairs, 4 d FLOPs a pair and query head forward, 10 d backward; "
            f"bfloat16. {_where(result)}."
        )
    return "\n\n".join(parts)


def _training_result() -> dict[str, Any]:
    return _load("training-cpu.json")[0]


SECTIONS: dict[str, Section] = {
    "breakdown-table": breakdown_table,
    "decode-batch-table": decode_batch_table,
    "decode-table": decode_table,
    "decoder-step-table": decoder_step_table,
    "gpu-table": gpu_table,
    "operators-table": operators_table,
    "strategies-table": strategies_table,
    "training-gpu-table": training_gpu_table,
    "training-memory-table": training_memory_table,
    "training-table": training_table,
}

# The picture exists where its results do.
PICTURES: dict[str, Picture] = {}
if (RESULTS / "training-cpu.json").is_file():
    PICTURES["images/training_cpu.png"] = Picture(
        lambda path: plots.save_training(_training_result(), path),
        lambda: plots.training_description(_training_result()),
    )
if (RESULTS / "strategies-cpu.json").is_file():
    PICTURES["images/strategies_cpu.png"] = Picture(
        lambda path: plots.save_strategies(_load("strategies-cpu.json")[0], path),
        lambda: plots.strategies_description(_load("strategies-cpu.json")[0]),
    )
