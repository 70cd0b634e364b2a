"""Tables of the static report: what the compiler made of the kernels, without a GPU."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.static.occupancy import LIMITS
from sections import Section
from sections.measured import RESULTS, table
from tidar_kernels.ops._triton.tables import CHIPS

HEAD_DIM, DTYPE = 128, "bfloat16"
# Projections have no head dim: the wide tile stands for them.
LARGE = {
    "step_attention": "",
    "attention_forward": "",
    "attention_dq": "",
    "attention_dkdv": "",
    "linear": "wide",
}
SMALL = {
    "sound_keys": "",
    "combine_splits": "",
    "append_kv": "",
    "compact_kv": "",
    "rotary_append": "",
    "scan_chunks": "coupled",
    "count_chunks": "coupled",
    "gather_chunks": "coupled",
    "select_rows": "coupled",
    "race_chunks": "coupled",
    "decide": "coupled",
    "attention_rows": "",
    "row_tile_bounds": "",
    "list_row_runs": "",
    "gated_rows": "down",
    "gated_sum": "sum",
}


def _chip(name: int | str) -> str:
    return f"cc {name}" if isinstance(name, int) else name


def _chosen(kernels: dict[str, str], rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """(kernel, chip) -> entry."""
    return {
        (row["kernel"], row["chip"]): row
        for row in rows
        if kernels.get(row["kernel"]) == row["variant"] and row["dtype"] == DTYPE and row["head_dim"] in (0, HEAD_DIM)
    }


def _spills(row: dict[str, Any]) -> str:
    return str(max(row["spill_bytes"], row["stack_bytes"]) or "–")


def static_table() -> str:
    """Registers, shared memory, occupancy, tensor cores and the inner loop of every kernel on every chip."""
    path = RESULTS / "static-report.json"
    if not path.is_file():
        return "No report is published yet: `make report` compiles it, without a GPU."
    report = json.loads(path.read_text())
    large, small = _chosen(LARGE, report["rows"]), _chosen(SMALL, report["rows"])
    head = ["kernel", "chip", "tile", "warps", "stages", "registers", "spilled", "shared, kB", "resident warps"]
    head += ["tensor cores", "of the inner loop: tensor", "FMA", "MUFU", "shared", "global", "barriers", "other"]
    head += ["copies ahead"]
    lines = []
    for kernel in LARGE:
        for chip in CHIPS:
            row = large.get((kernel, str(chip)))
            if row is None:
                continue
            config, loop = row["config"], row["loop"]
            tile = " x ".join(str(config[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in config)
            tile += ", scores ahead" if config.get("SCORES_AHEAD") else ""
            tile += ", rows ahead" if config.get("ROWS_AHEAD") else ""
            lines.append(
                [f"`{kernel}`", _chip(chip), tile, *(str(config[name]) for name in ("num_warps", "num_stages"))]
                + [str(row["registers"]), _spills(row), f"{row['shared_bytes'] / 1024:.0f}"]
                + [f"{row['warps']}/{LIMITS[chip].warps}", ", ".join(row["tensor_core"]) or "–"]
                + [str(loop.get(name, "–")) for name in ("mma", "fma", "mufu", "shared", "global", "barrier", "other")]
                + ["–" if row["copies_ahead"] is None else str(row["copies_ahead"])]
            )
    others = [
        [f"`{kernel}`", *(_brief(small.get((kernel, str(chip))), LIMITS[chip].warps) for chip in CHIPS)]
        for kernel in SMALL
    ]
    return "\n\n".join(
        [
            table(head, lines, left=2),
            f"{DTYPE}, head dim {HEAD_DIM}; a projection to 12288 results stands for all. Instructions are of one "
            "turn of the innermost loop that multiplies; one wgmma or tcgen05 instruction does the work of dozens of "
            "mma. Copies ahead: groups of copies to shared memory, one a tile of K or V, still under way where the "
            "loop waits for those it needs; with 0 nothing overlaps their latency. Resident warps: as many "
            "as registers, shared and tensor memory let a multiprocessor (AMD: compute unit) hold. "
            f"Triton {report['triton']}.",
            "The others, as registers and resident warps:",
            table(["kernel", *map(_chip, CHIPS)], others),
        ]
    )


def _brief(row: dict[str, Any] | None, most: int) -> str:
    if row is None:
        return "–"
    spilled = "" if _spills(row) == "–" else f", {_spills(row)} spilled"
    return f"{row['registers']}, {row['warps']}/{most}{spilled}"


SECTIONS: dict[str, Section] = {"static-table": static_table}
