"""The table of docs/checkpoints.md: for each system what works, and the test that shows it.

`tests/docs/test_checkpoints_table.py` holds every cell to an existing test, and the rows to the systems of the package.
"""

from __future__ import annotations

from typing import NamedTuple

from sections import Section

_HERE = "tests/integrations/transformers/test_checkpoints.py"
_DFLASH = "tests/integrations/transformers/test_dflash.py"
_FAMILIES = "tests/patterns/test_families.py"

COLUMNS = ("masks equal", "positions equal", "loader", "decode", "train")


class Cell(NamedTuple):
    """What a table says, and the test that shows it; without one it says why not."""

    said: str
    test: str = ""


class Row(NamedTuple):
    """A system or a way to decode it, by the name of its loader in the package ("" for none)."""

    title: str
    name: str
    cells: tuple[Cell, ...]


def _row(title: str, name: str, decode: str, train: Cell, positions: str = "", loader: str = "") -> Row:
    """A row whose masks, positions and loader are shown by the test that compares what is decoded, if by no other."""
    tests = [f"{_HERE}::{test}" for test in (decode, positions or decode, loader or decode, decode)]
    return Row(title, name, (*(Cell("yes", test) for test in tests), train))


_SET_BLOCK = Cell("mask", f"{_FAMILIES}::test_set_block_is_tidar_with_the_halves_swapped")
_BLOCKS = Cell("mask", f"{_FAMILIES}::test_block_diffusion")
_TRAINER = Cell(
    "yes", "tests/integrations/transformers/test_trainer.py::test_fifty_steps_a_checkpoint_and_a_resumed_run"
)
_DISTILLED = "tests/integrations/transformers/test_distillation.py::test_drafts_are_kept_more_often_and_the_text_stays"
_NEMOTRON = "nemotron-labs-diffusion"
_SCALED = "test_positions_of_nemotron_scale_its_queries"

ROWS = (
    _row(
        "Nemotron-Labs-Diffusion, linear self-speculation",
        _NEMOTRON,
        "test_nemotron_linear_self_speculation_with_its_adapter",
        _SET_BLOCK,
        _SCALED,
    ),
    _row(
        "Nemotron-Labs-Diffusion, quadratic self-speculation",
        _NEMOTRON,
        "test_nemotron_quadratic_self_speculation",
        _SET_BLOCK,
        _SCALED,
    ),
    _row("Nemotron-Labs-Diffusion, diffusion", _NEMOTRON, "test_nemotron_diffusion", _SET_BLOCK, _SCALED),
    _row("TiDAR-LM", "tidar-lm", "test_tidar_lm", _TRAINER),
    _row("I-DLM", "i-dlm", "test_idlm", Cell("mask", f"{_FAMILIES}::test_idlm")),
    _row("R-ISD adapters", "", "test_risd_adapter_on_an_ordinary_model", Cell("yes", _DISTILLED)),
    _row("SDAR", "sdar", "test_sdar", _BLOCKS),
    _row("Fast-dLLM v2", "fast-dllm-v2", "test_fast_dllm", _BLOCKS),
    Row(
        "DFlash drafters beside their target",
        "",
        (
            Cell("yes", f"{_DFLASH}::test_logits_are_those_of_the_public_rule"),
            Cell("yes", f"{_DFLASH}::test_logits_are_those_of_the_public_rule"),
            Cell("yes", f"{_DFLASH}::test_half_a_drafter_is_an_error_of_one_line"),
            Cell("yes", f"{_DFLASH}::test_steps_accept_what_the_public_loop_accepts"),
            Cell("mask", f"{_FAMILIES}::test_dflash"),
        ),
    ),
    _row("LLaDA 2.x", "llada-2", "test_llada2", _BLOCKS, loader="test_logits_of_llada2_are_those_of_its_own_layers"),
)

_REFUSED = f"{_HERE}::test_what_cannot_be_had_is_refused_by_name"

# By the names of the package; the reason is the package's own.
NOT_DECODED = {
    "diffusion-gemma": ("DiffusionGemma", Cell("no")),
    "dflash": ("DFlash drafters without their target", Cell("no")),
    "dflash-like": ("DFlash2, DSpark, JetSpec drafters", Cell("no")),
    "llada": ("LLaDA, Dream", Cell("no")),
    "hybrid": ("Trida, FLARE on Qwen3.5 and other hybrids", Cell("no")),
}


def checkpoints_table() -> str:
    """A line for each system: what works, linked to the test that shows it."""
    lines = [
        f"| system | {' | '.join(COLUMNS)} |",
        f"| :--- |{' :---: |' * len(COLUMNS)}",
        *(f"| {row.title} | {' | '.join(map(_shown, row.cells))} |" for row in ROWS),
        *(
            f"| {title} | - | - | {_shown(Cell('refused', _REFUSED))} | no | {_shown(train)} |"
            for title, train in NOT_DECODED.values()
        ),
    ]
    return "\n".join(lines)


def _shown(cell: Cell) -> str:
    path = cell.test.partition("::")[0]
    return f"[{cell.said}](../{path})" if path else cell.said


SECTIONS: dict[str, Section] = {"checkpoints-systems": checkpoints_table}
