"""Every causal model type of transformers equals `generate`, or is refused by an error that names it.

A few types here; all of them, which takes minutes, with `make models`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers

from tests.integrations.transformers import every_model
from tests.integrations.transformers.every_model import KINDS, Row, judged

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # configurations of no checkpoint: transformers warns of some
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# One of each kind: what it shows, and the verdict (a part of the reason, where it is refused).
FEW = {
    "afmoe": "equal",  # calls `.view` on what attention returns
    "deepseek_v3": "equal",  # keys wider than values
    "gemma4_text": "equal",  # heads and widths by layer, layers that share K and V
    "gpt2": "equal",  # learned positions
    "jetmoe": "equal",  # experts in the projections of attention
    "llama": "equal",
    "mimo_v2_flash": "equal",  # windows, sinks, and other heads by layer
    "bart": "after cached tokens",  # finds positions by itself
    "bert": "expected logits",  # more than an lm_head
    "bloom": "attention interface",
    "diffllama": "layer 0 makes 2",  # attention called twice
    "doge": "attention_mask: expected None beside tidar_pattern",  # a mask of its own
    "mamba": "linear_attention",
    "stablelm": "layer 0 does not",  # drops what it is given
}


@pytest.mark.parametrize("kind", FEW)
def test_one_of_each_kind(kind: str) -> None:
    if kind not in KINDS:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    row = judged(kind)
    assert row.verdict == ("equal" if FEW[kind] == "equal" else "refused"), row.reason
    assert FEW[kind] == "equal" or (FEW[kind] in row.reason and row.model in row.reason)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return []


@pytest.mark.models
@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind: str, rows: list[Row]) -> None:
    row = judged(kind)
    rows.append(row)
    assert row.verdict in ("equal", "refused", "not built"), f"{row.verdict}: {row.reason}"


@pytest.mark.models
def test_the_table_is_of_all_types(rows: list[Row], tmp_path: Path) -> None:
    """Runs last; `MODELS_OUT` is the folder that the table is written to."""
    assert {row.kind for row in rows} == set(KINDS)
    assert sum(row.verdict == "equal" for row in rows) > len(KINDS) / 3
    every_model.write(Path(os.environ.get("MODELS_OUT", tmp_path)), rows)
