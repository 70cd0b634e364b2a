"""The table of transformers models in docs/transformers.md, from what `python -m benchmarks.compatibility` recorded."""

from __future__ import annotations

from sections import Section
from sections.measured import parts


def models_table() -> str:
    """A line for each model: what about its attention is special, the two errors, and the two equalities."""
    found = []
    for result in parts("compatibility", "cpu"):
        lines = [
            "| model | attention | logits | gradients | `generate` | TiDAR decoding |",
            "| :--- | :--- | ---: | ---: | :---: | :---: |",
        ]
        lines += [
            f"| {row['model']} | {row['special'] or 'causal'} | {_error(row, 'forward')} | {_error(row, 'backward')} "
            f"| {'equal' if row['generate_equal'] else 'NO'}{'' if row['baseline'] == 'sdpa' else ' (eager)'} "
            f"| {'equal' if row['decode_equal'] else 'NO'}, {row['tokens_per_forward']:.2f} a forward |"
            for row in result["rows"]
        ]
        versions = result["versions"]
        software = f"transformers {result['rows'][0]['transformers']}, PyTorch {versions['torch']}"
        found.append("\n".join(lines) + f"\n\n{software}, {result['date']}, {result['machine']['device']}.")
    return "\n\n".join(found)


def _error(row: dict[str, object], which: str) -> str:
    return f"{row[f'{which}_error']:.0e}" if row[f"{which}_parity"] else "NO"


SECTIONS: dict[str, Section] = {"transformers-models": models_table}
