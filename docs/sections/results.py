"""Tables and pictures of decoding and training, for README.md and docs/performance.md."""

from __future__ import annotations

from typing import Any

from benchmarks.reports import pictures
from sections import Section
from sections.measured import NO_CPU, NO_GPU, left_out, parts, where

FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3")


def decode_table() -> str:
    """Tokens a forward and speed of the shipped model, TiDAR against autoregression."""
    found = []
    for result in parts("decode", "cpu"):
        lines = [
            "| | rows a forward | tokens a forward | tokens/s | against AR | same tokens |",
            "| :--- | ---: | ---: | ---: | ---: | :---: |",
        ]
        rows = _decoded(result)
        lines += [
            f"| {_mode(row)} | {row['rows'] or ''} | {row['tokens_per_forward']:.2f} | {row['tokens_per_second']:.0f} "
            f"| {row['speedup']:.2f} x | {'yes' if row['identical'] else 'NO'} |"
            for row in rows
            if row["batch"] == 1
        ]
        first = rows[0]
        found.append(
            "\n".join(lines)
            + f"\n\nShipped 8 MB byte-level model, float32, greedy; {first['prompts']} held-out prompts of "
            f"{first['prompt_tokens']} bytes, {first['new_tokens'] // first['prompts']} new bytes each, one at a time; "
            f"prefill not counted. {where(result)}."
        )
    return "\n\n".join(found)


def _decoded(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["operator"] == "decode"]


def _mode(row: dict[str, Any]) -> str:
    if row["block_size"] == "auto":
        return 'TiDAR, block_size="auto"'
    return f"TiDAR, B = {row['block_size']}" if row["block_size"] else "autoregressive"


def decode_batch_table() -> str:
    """The same, several sequences at a time."""
    found = []
    for result in parts("decode", "cpu"):
        batches = sorted({row["batch"] for row in _decoded(result)})
        head = "".join(f" batch {batch}: tokens/s | against AR | of its floor, % |" for batch in batches)
        lines = [f"| |{head}", f"| :--- |{' ---: | ---: | ---: |' * len(batches)}"]
        for block in dict.fromkeys(row["block_size"] for row in _decoded(result)):
            rows = {row["batch"]: row for row in _decoded(result) if row["block_size"] == block}
            cells = "".join(
                f" {rows[b]['tokens_per_second']:.0f} | {rows[b]['speedup']:.2f} x | {_share(rows[b])} |"
                for b in batches
            )
            lines.append(f"| {_mode(rows[batches[0]])} |{cells}")
        note = "Tokens of all sequences together. Floor: weights and K/V read once at the measured copy bandwidth, or "
        note += "the multiplications at the measured rate."
        found.append("\n".join(lines) + f"\n\n{note} {where(result)}.")
    return "\n\n".join(found)


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['of_floor']:.0f}" if "of_floor" in row else "–"


BREAKDOWNS = {"Now": "breakdown", "Before": "breakdown_before"}
BREAKDOWN = ("attention", "append", "projections", "lm_head", "verify", "rest")


def breakdown_table() -> str:
    """Where the time of a step goes, now and at the commit where it was first measured."""
    found = []
    for title, result in [(t, r) for t, kind in BREAKDOWNS.items() for r in parts(kind, "cpu")]:
        lines = ["| | step, ms | " + " | ".join(BREAKDOWN) + " |", "| :--- |" + " ---: |" * (len(BREAKDOWN) + 1)]
        for row in result["rows"]:
            cells = " | ".join(f"{row[f'{part}_ms']:.2f}" for part in BREAKDOWN)
            lines.append(f"| {_mode(row)} | {row['step_ms']:.2f} | {cells} |")
        commit = result["rows"][0].get("commit")
        at = f" at commit {commit}" if commit else ""
        found.append(f"{title}:\n\n" + "\n".join(lines) + f"\n\nMilliseconds, batch 1{at}. {where(result)}.")
    return "\n\n".join(found)


def strategies_table() -> str:
    """Every way to decode, side by side."""
    found = []
    for result in parts("strategies", "cpu"):
        rows = [row for row in result["rows"] if row["operator"] == "strategy"]
        lines = [
            "| | rows a forward | tokens a forward | expected | tokens/s | against AR | must equal AR | does |",
            "| :--- | ---: | ---: | ---: | ---: | ---: | :---: | :---: |",
        ]
        for row in rows:
            expected = row["expected_tokens_per_forward"]
            answers = ["yes" if row[field] else "no" for field in ("exact", "identical")]
            lines.append(
                f"| {row['label']} | {row['rows'] or ''} | {row['tokens_per_forward']:.2f} "
                f"| {'' if expected is None else f'{expected:.2f}'} | {row['tokens_per_second']:.0f} "
                f"| {row['speedup']:.2f} x | {' | '.join(answers)} |"
            )
        first = rows[0]
        profile = next(row for row in result["rows"] if row["operator"] == "profile")
        shares = " ".join(f"{share:.2f}" for share in profile["acceptance"])
        steps = ", ".join(f"{ms:.1f} at {n}" for n, ms in zip(profile["rows"], profile["step_ms"], strict=True))
        found += [
            "![tokens a forward pass and speed of every strategy](images/strategies_cpu.png)",
            "\n".join(lines),
            f"Shipped model, float32, greedy; {first['prompts']} held-out prompts of {first['prompt_tokens']} bytes, "
            f"{first['new_tokens'] // first['prompts']} new bytes each, one at a time; prefill not counted. Expected: "
            f"for TiDAR from the profile below, measured on training text; for ISD and FLARE rows "
            f"`(2 + p + .. + p^(N-2)) / (2 - p^(N-1))` at the acceptance p of the run. {where(result)}.",
            f"The profile that *TiDAR, auto* chose by: of the drafts 1, 2, .. positions after the first whose "
            f"predecessors stayed, {shares} stay; a step takes, in ms, {steps} rows.",
        ]
    return "\n\n".join(found) or NO_CPU


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
    files = parts("training", "cpu")
    if not files:
        return "No figures of training attention are published yet: `make bench` measures them."
    found = []
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
            f"{pictures.LABELS[row['implementation']]}, {row['direction']}: {row['not_available']}"
            for row in result["rows"]
            if row["operator"] == "attention" and "not_available" in row
        }
        found += [
            "![time of training attention against the floor](images/training_cpu.png)",
            "\n".join(lines),
            f"TiDAR training at S = {row['seq_len']} ({row['rows']} rows), B = {row['block_size']}, head dim "
            f"{row['head_dim']}, batch {row['batch']}; milliseconds and, in brackets, times the floor: two causal SDPA "
            f"calls on S rows, K/V heads repeated beforehand. Implementations take turns; medians; the backward pass "
            f"alone. {where(result)}.",
            *(f"No figures for {note}" for note in sorted(notes)),
        ]
    return "\n\n".join(found)


def training_memory_table() -> str:
    """Peak memory of a forward and backward pass over sequence lengths."""
    found = []
    for result in parts("training", "cpu"):
        rows = [row for row in result["rows"] if row["operator"] == "attention_memory" and "peak_bytes" in row]
        lines = ["| | S | peak, MiB | bytes a clean token |", "| :--- | ---: | ---: | ---: |"]
        lines += [
            f"| {pictures.LABELS[row['implementation']]} | {row['seq_len']} | {row['peak_bytes'] / 2**20:.0f} "
            f"| {row['bytes_per_token']:,} |"
            for row in rows
        ]
        if rows:
            heads = f"{rows[0]['num_heads']} heads, head dim {rows[0]['head_dim']}, {rows[0]['dtype']}"
            found.append(
                "\n".join(lines) + f"\n\nGrowth of the peak resident memory in one forward and backward pass, operands "
                f"not counted, each in a fresh process; {heads}. {where(result)}."
            )
    return "\n\n".join(found) or NO_CPU


def training_gpu_table() -> str:
    """Training attention on CUDA, where somebody has run `make gpu`."""
    found = []
    peers = ("flex_attention", "sdpa_dense_mask", "causal_flash", "causal_cudnn", *FLASH_ATTENTION)
    for result in parts("training", "cuda"):
        lines = [
            "| d | query/kv heads | S | | `tk.attention` | "
            + " | ".join(pictures.LABELS[name] for name in peers)
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
        found.append(
            "\n".join(lines) + "\n\nTFLOP/s on live pairs, 4 d FLOPs a pair and query head forward, 10 d backward; "
            f"bfloat16. {where(result)}.{left_out(result)}"
        )
    return "\n\n".join(found) or NO_GPU


SECTIONS: dict[str, Section] = {
    "breakdown-table": breakdown_table,
    "decode-batch-table": decode_batch_table,
    "decode-table": decode_table,
    "strategies-table": strategies_table,
    "training-gpu-table": training_gpu_table,
    "training-memory-table": training_memory_table,
    "training-table": training_table,
}
