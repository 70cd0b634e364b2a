"""Tables and pictures of operators, whole steps, peers and targets, for README.md and docs/performance.md."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.core.operands import OURS, Implementation
from benchmarks.operators.attention import Attention
from benchmarks.operators.models import SAME_HEADS
from benchmarks.operators.step_peers import STEP
from benchmarks.reports import pictures, targets
from sections import Picture, Section, measured

DEVICES = {"cpu": ("operators", measured.NO_CPU), "cuda": ("step", measured.NO_GPU)}


def _time(row: dict[str, Any] | None, unit: float) -> str:
    if row is None or "p50_us" not in row:
        return "–"
    value = row["p50_us"] / unit
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _share(row: dict[str, Any]) -> str:
    """Of its floor, per cent."""
    return f"{100 * row['of_floor']:.0f}" if "of_floor" in row else "–"


def _spread(row: dict[str, Any]) -> str:
    """20th to 80th percentile against the median, per cent."""
    if "p20_us" not in row:
        return "–"
    return f"−{100 * (1 - row['p20_us'] / row['p50_us']):.0f} +{100 * (row['p80_us'] / row['p50_us'] - 1):.0f}"


def _picture(name: str, device: str, what: str) -> list[str]:
    known = pictures.part_for(measured.RESULTS, name, device)
    return [f"![{what}](images/{name}_{device}.png)"] if known else []


def step_table(device: str, with_pictures: bool = True) -> str:
    """Step attention beside its peers."""
    kind, nothing = DEVICES[device]
    unit, name, scale, rate = (1e3, "ms", 1e3, "GFLOP/s") if device == "cpu" else (1.0, "µs", 1.0, "TFLOP/s")
    found = []
    for part in measured.parts(kind, device):
        cases = list(targets.step_cases(part["rows"]))
        known = [n for n in STEP if n != OURS and any(n in case for case in cases)]
        head = ["heads of", "B", "context", f"`step_attention`, {name}", "± %", rate, "GB/s", "of its floor, %"]
        lines = []
        for case in cases:
            ours = case[OURS]
            batch = f" x {ours['batch']}" if ours["batch"] > 1 else ""
            first = [ours["model"], str(ours["block_size"] or "AR"), f"{ours['context_len']}{batch}"]
            rates = [
                f"{ours[field] * by:.3g}" if field in ours else "–"
                for field, by in (("tflops", scale), ("gbytes_per_s", 1))
            ]
            own = [_time(ours, unit), _spread(ours), *rates, _share(ours)]
            lines.append([*first, *own, *(_time(case.get(peer), unit) for peer in known)])
        if not lines:
            continue
        same = "; ".join(f"{other} has the heads of {one}" for other, one in SAME_HEADS.items())
        found += [
            *(
                _picture("step_prefix", device, "time of step attention over the prefix, beside its peers")
                * with_pictures
            ),
            measured.table([*head, *(STEP[peer].label for peer in known)], lines),
            f"{cases[0][OURS].get('dtype', 'float32')}, one layer, cold operands by rotation, medians, with the 20th "
            f"and 80th percentile around them; peers in {name}. {same}. Those without mask compute other numbers and "
            f"are a yardstick. {measured.where(part)}.{measured.left_out(part)}",
            *(_picture("step_roofline", device, "step attention under the roofline") * with_pictures),
        ]
    return "\n\n".join(found) or nothing


OTHERS = {
    "append_kv": ("new_tokens", "tokens"),
    "compact_kv": ("nodes", "nodes"),
    "rotary_append": ("block_size", "B ="),
    "verify": ("vocab_size", "vocabulary"),
    "projection": ("num_rows", "rows"),
}


def _case(row: dict[str, Any]) -> str:
    field, what = OTHERS[row["operator"]]
    words = [str(row.get("model", "")), f"{what} {row[field]}" if what[-1] == "=" else f"{row[field]} {what}"]
    if row["operator"] == "verify":
        words = [f"{row['block_size']} drafts, vocabulary {row['vocab_size']}, temperature {row['temperature']:g}"]
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        words += [f"{name.replace('_', '-')} {row[name]:g}" for name in off if row.get(name, off[name]) != off[name]]
    words += [f"batch {row['batch']}"] if row.get("batch", 1) > 1 else []
    return ", ".join(word for word in words if word)


def others_table(device: str) -> str:
    """Append, rotation with append, verification and projections, beside what a user would write instead."""
    found = []
    for part in measured.parts("operators", device):
        cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for row in part["rows"]:
            if row["operator"] in OTHERS and "p50_us" in row and "command" in row:
                cases.setdefault((row["operator"], _case(row)), {})[row["implementation"]] = row
        lines = []
        for (operator, what), rows in cases.items():
            ours = rows.pop(OURS, None)
            if ours is None:
                continue
            beside = ", ".join(f"{name} {_time(row, 1.0)}" for name, row in rows.items())
            lines.append([f"`{operator}`", what, _time(ours, 1.0), _spread(ours), _share(ours), beside])
        if lines:
            head = ["", "case", "µs", "± %", "of its floor, %", "beside it, µs"]
            note = "copy: `copy_` of as many bytes; argmax: of the same logits. Operands that fit a cache can pass the "
            note += "floor, which is of memory."
            found += [measured.table(head, lines, 2), f"{note} {measured.where(part)}.{measured.left_out(part)}"]
    return "\n\n".join(found) or DEVICES[device][1]


def decoder_step_table() -> str:
    """Whole decoder steps on CUDA, where somebody has run `make gpu`."""
    found = []
    for part in measured.parts("decoder_step", "cuda"):
        lines = [
            [
                row["model"], str(row["block_size"] or "AR"), str(row["rows"]), str(row["context_len"]),
                f"{row['p50_us'] / 1e3:.3f}", _share(row), f"{row.get('of_autoregressive', 0.0):.2f}",
                f"{row['projected_speedup']:.2f} x" if "projected_speedup" in row else "",
            ]
            for row in part["rows"]
            if row["operator"] == "decoder_step" and "p50_us" in row
        ]  # fmt: skip
        head = ["shape of", "B", "rows", "context", "step, ms", "of its floor, %", "times AR", "projected speed-up"]
        found += [
            measured.table(head, lines),
            "bfloat16, batch 1, random weights, one CUDA graph a step, verification and the lm_head within. Floor: "
            "weights and K/V read once at the measured bandwidth, or the multiplications at the measured rate. "
            "Projected: the tokens a forward pass that TiDAR publishes for the model, over the step's time in "
            f"autoregressive steps. {measured.where(part)}.{measured.left_out(part)}",
        ]
    return "\n\n".join(found) or measured.NO_GPU


def slots_section() -> str:
    """Free token slots, of every device that was measured."""
    found = []
    for device in ("cpu", "cuda"):
        for part in measured.newest("token_slots", device):
            for model, each in pictures.slot_series(part).items():
                head = ["tokens in flight", *(f"{context} of context, ms" for context in each)]
                counts = sorted({n for points in each.values() for n, _, _ in points})
                times = [{n: ms for n, ms, _ in points} for points in each.values()]
                lines = [[str(n), *(f"{at[n]:.2f}" if n in at else "–" for at in times)] for n in counts]
                name = "The shipped model" if model == "shipped" else model
                found += [measured.table(head, lines), f"{name}. {measured.where(part)}.{measured.left_out(part)}"]
        found[:0] = _picture("token_slots", device, "time of a forward pass over the tokens in flight")
    return "\n\n".join(found) or measured.NO_CPU


def small_steps() -> str:
    """Steps and token slots of a model whose weights do not fit a CPU's caches, in both dtypes."""
    found = []
    for part in measured.newest("steps", "cpu"):
        rows = [row for row in part["rows"] if "p50_us" in row]
        for operator, head in (
            ("decoder_step", ["", "rows", "step, ms", "times AR", "of its floor, %"]),
            ("token_slots", ["", "tokens in flight", "pass, ms", "times one token", "of its floor, %"]),
        ):
            mine = [row for row in rows if row["operator"] == operator]
            ones = {row["dtype"]: row["p50_us"] for row in mine if row["rows"] == 1}
            lines = [
                [
                    row["dtype"] if operator == "token_slots" else f"{row['dtype']}, {_step(row)}",
                    str(round(row["rows"])),
                    _time(row, 1e3),
                    f"{row['p50_us'] / ones[row['dtype']]:.2f}" if row["dtype"] in ones else "–",
                    _share(row),
                ]
                for row in mine
            ]
            found += [measured.table(head, lines)] * bool(lines)
        if rows:
            found.append(
                f"{rows[-1]['model']}'s shape, random weights, {rows[-1]['context_len']} tokens of context, batch 1; "
                f"bfloat16 with packed weights. {measured.where(part)}.{measured.left_out(part)}"
            )
    return "\n\n".join(found) or measured.NO_CPU


def _step(row: dict[str, Any]) -> str:
    """The setting of a decoder step."""
    if not row["block_size"]:
        return "autoregressive"
    return f"B = {row['block_size']}" + {0: "", 1: ", one level", 2: ", two levels"}[row["levels"]]


def peers_table() -> str:
    """Every peer: where it was measured, or how to install it."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for device in ("cpu", "cuda"):
        for kind in ("operators", "step", "training"):
            for part in measured.parts(kind, device):
                for row in part["rows"]:
                    if row["operator"] == "peer" and row["of"] in ("step_attention", "attention"):
                        found.setdefault((row["of"], row["label"]), {})[device] = row
    lines = []
    for (operator, label), rows in found.items():
        cells = [_presence(rows.get(device)) for device in ("cpu", "cuda")]
        how = next(iter(rows.values()))["install"]
        lines.append([f"`{operator}`", label, *cells, how if how == Implementation.install else f"`{how}`"])
    return measured.table(["of", "peer", "CPU", "CUDA", "install"], lines, 5) if lines else measured.NO_CPU


def _presence(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured yet"
    if row["device"] not in {**Attention.implementations, **STEP}[row["implementation"]].devices:
        return "does not run there"
    return f"absent: {row['absent']}" if row["absent"] else f"{row['version'] or 'there'}"


def targets_table() -> str:
    """Every target beside what was reached."""
    lines = []
    for device, found in (("CPU", targets.cpu(measured.RESULTS)), ("CUDA", targets.cuda(measured.RESULTS))):
        for target in found:
            sign = "≥" if target.at_least else "≤"
            aim = f"{sign} {target.aim:g} {target.unit}"
            worst = f"{target.reached:.3g} {target.unit} ({target.worst})"
            lines.append([device, target.what, aim, f"{target.met} of {target.cases}", worst])
    head = ["", "against what", "aim", "cases that reach it", "the worst"]
    return measured.table(head, lines, 3) if lines else measured.NO_CPU


SECTIONS: dict[str, Section] = {
    "decoder-step-table": decoder_step_table,
    "gpu-operators-table": partial(others_table, "cuda"),
    "gpu-readme-table": partial(step_table, "cuda", False),
    "gpu-table": partial(step_table, "cuda"),
    "operators-table": partial(others_table, "cpu"),
    "peers-table": peers_table,
    "slots": slots_section,
    "small-steps": small_steps,
    "step-table": partial(step_table, "cpu"),
    "targets-table": targets_table,
}


# A picture exists where its results do.
PICTURES = {
    f"images/{name}_{device}.png": Picture(
        partial(pictures.save, name, part), partial(pictures.description, name, part)
    )
    for device in ("cpu", "cuda")
    for name in pictures.PICTURES
    if (part := pictures.part_for(measured.RESULTS, name, device)) is not None
}
