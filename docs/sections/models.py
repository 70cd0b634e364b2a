"""The table of every causal model type in docs/transformers.md, from what `make models` wrote."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

from sections import Section
from sections.measured import RESULTS


def every_model_table() -> str:
    """Counts, the types that are equal, and those that are refused, by reason."""
    path = max(RESULTS.glob("models-transformers-*.json"), key=lambda path: json.loads(path.read_text())["date"])
    part: dict[str, Any] = json.loads(path.read_text())
    by_verdict: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for row in part["rows"]:
        by_verdict[row["verdict"]].append(row)
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for row in by_verdict["refused"]:
        reasons[_reason(row)].append(row["kind"])
    built = len(part["rows"]) - len(by_verdict["not built"])
    equal, refused = len(by_verdict["equal"]), len(by_verdict["refused"])
    lines = [
        f"Of {len(part['rows'])} causal model types, {built} could be built and run as tiny random models: "
        f"{equal} equal `generate`, {refused} are refused by name, {built - equal - refused} are wrong.",
        "",
        "| | types | |",
        "| :--- | ---: | :--- |",
        f"| equal | {equal} | {_names(row['kind'] for row in by_verdict['equal'])} |",
        *(
            f"| refused: {reason} | {len(kinds)} | {_names(kinds)} |"
            for reason, kinds in sorted(reasons.items(), key=lambda item: -len(item[1]))
        ),
        f"| not built | {len(by_verdict['not built'])} | {_names(row['kind'] for row in by_verdict['not built'])} |",
        "",
        f"transformers {part['transformers']}, PyTorch {part['torch']}, {part['date']}.",
    ]
    return "\n".join(lines)


def _names(kinds: Any) -> str:
    return ", ".join(f"`{kind}`" for kind in kinds)


# What an error says of a model, as what the model has.
_REASONS = (
    ("attention interface", "attention outside of transformers' interface"),
    ("layers of full or sliding attention", "other layers than full or sliding attention"),
    ("one call of attention", "several calls of attention in a layer"),
    ("does not$", "layers that drop `tidar_pattern`"),
    ("after cached tokens", "positions or state that the model keeps to itself"),
    ("expected logits", "more than an lm_head after the decoder"),
    ("vocab_size", "other tokens than the vocabulary"),
    ("attention_mask: expected None", "masks of the model's own"),
    ("sliding_window", "windows that its layers do not know"),
)


def _reason(row: dict[str, str]) -> str:
    return next((short for pattern, short in _REASONS if re.search(pattern, row["reason"])), "another forward pass")


SECTIONS: dict[str, Section] = {"transformers-every-model": every_model_table}
