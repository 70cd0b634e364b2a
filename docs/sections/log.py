"""The log of docs/performance.md: what was predicted, what was changed, what came of it, and the speed once measured.

An entry whose speed only a GPU can tell says where to look: the rows of `make gpu`. Without a results file that has
them it says that its speed is open.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.core.operands import OURS
from sections import Section, measured


@dataclass(frozen=True)
class Timed:
    """Which rows tell the speed of an entry: ours of a part, with these fields, of GPUs of a capability, or of any."""

    part: str
    fields: dict[str, Any] = field(default_factory=dict)
    capability: str | None = None

    def speed(self) -> str:
        """What they say, one GPU after the other; or that nothing is known."""
        found = []
        for part in measured.parts(self.part, "cuda"):
            machine = part["machine"]
            rows = [row for row in part["rows"] if self._is_meant(row)]
            if rows and self.capability in (None, machine.get("capability")):
                found.append(f"{machine['gpu']}: {_summary(rows)}")
        return "speed open" if not found else "speed on " + "; ".join(found)

    def _is_meant(self, row: dict[str, Any]) -> bool:
        is_ours = row.get("implementation") == OURS and "p50_us" in row
        return is_ours and all(row.get(name) == value for name, value in self.fields.items())


def _summary(rows: list[dict[str, Any]]) -> str:
    """From the least to the most of some rows."""

    def between(values: Iterable[float], form: str) -> str:
        held = sorted(values)
        low, high = format(held[0], form), format(held[-1], form)
        return low if low == high else f"{low} to {high}"

    said = [f"{between((row['p50_us'] for row in rows), '.4g')} µs"]
    if all("of_floor" in row for row in rows):
        said.append(f"{between((100 * row['of_floor'] for row in rows), '.0f')} % of the floor")
    return f"{', '.join(said)} ({len(rows)} case{'s' * (len(rows) > 1)})"


class Entry(NamedTuple):
    """A line of the log."""

    title: str
    prediction: str
    change: str
    outcome: str
    timed: Timed | None = None

    @property
    def told(self) -> str:
        """The outcome, and the speed where a GPU tells it."""
        return "; ".join(filter(None, (self.outcome, self.timed and self.timed.speed())))


LOG = (
    Entry(
        "step kernel",
        "the context of a step needs no mask; tiles that no row sees need not run",
        "three loops: whole context tiles unmasked, the edge masked, own blocks in split 0 alone",
        "equals the twin in every parity test",
        Timed("step", {"block_size": 8}),
    ),
    Entry(
        "step kernel, tiles",
        "128 packed rows hold a whole step at B = 4, so K/V is read once",
        "128 x 64 tiles from cc 90, 64 rows on cc 80",
        "no spill, `wgmma` on cc 90",
        Timed("step", {"block_size": 4}),
    ),
    Entry(
        "step kernel, cc 80, d = 128",
        "half the registers a thread leave room for loads in flight",
        "8 warps in place of 4, which filled all 255 registers",
        "taken back: 4 warps and 32 keys at a time leave room for a third stage and for a second block, at as "
        "many barriers",
        Timed("step", {"head_dim": 128}, capability="8.0"),
    ),
    Entry(
        "step kernel, float32",
        "exact products run on the FMA units, registers decide",
        "small tiles; a second stage or 32 rows spill from d = 128 on",
        "no spill",
        Timed("step", {"dtype": "float32"}),
    ),
    Entry(
        "splits",
        "64 splits at capacity fill a chip; merging few stays cheap",
        "a fixed size from the cache's capacity, 512 to 4096 keys",
        "bits do not depend on the launch",
        Timed("step", {"batch": 1, "context_len": 8192}),
    ),
    Entry(
        "training forward",
        "a loop over both intervals is half the code",
        "tried, at d = 128 on cc 100 it spilled: unrolled",
        "no spill",
        Timed("training", {"direction": "forward"}),
    ),
    Entry(
        "training backward",
        "64-bit offsets cost registers in the inner loop",
        "32-bit offsets within a tile, where strides allow",
        "no spill at d = 128 on cc 90",
        Timed("training", {"direction": "backward", "head_dim": 128}, capability="9.0"),
    ),
    Entry(
        "pipelining depth",
        "with 2 stages the loop asks for a tile at its end and waits for it at its start: the latency of every "
        "tile is in sight, most of all at B = 4, which waits for memory",
        "at least 3 stages on NVIDIA's chips in half precision, 4 where shared memory is free",
        'no spill; "copies ahead" of the static report went from 0 to 2 and more, and its budget now fails where '
        "there are none, but for exceptions with a reason",
        Timed("step", {"block_size": 4}),
    ),
    Entry(
        "training backward, dK and dV",
        "no number of stages helped there: a row tile's number came from a list in memory, and its copies could "
        "not start before it was read",
        "row tiles as runs `[first, end)`, found on the device; the walk within a run needs no load",
        "copies ahead at last, in a loop with fewer instructions; on cc 100 twice the rows at d = 64 without a "
        "spill; on cc 90 at d = 128 64 rows spill a little, so 32",
        Timed("training", {"direction": "backward"}),
    ),
    Entry(
        "training backward, dK and dV, cc 90",
        "lse and delta start the accumulators of two products, and wgmma waited for their plain loads in each "
        "iteration",
        "those of the next row tile are loaded during this tile's products (`ROWS_AHEAD`)",
        "the 8 loads moved from before the first product to after it, an iteration ahead; at d = 128 as many "
        "registers, no spill, 16 moves more; not with a cap or on cc 100, where the compiler copies them "
        "asynchronously itself; on cc 100 it spilled 156 bytes at d = 64",
        Timed("training", {"direction": "backward"}, capability="9.0"),
    ),
    Entry(
        "training backward, runs",
        "a list of as many runs as there are row tiles takes memory quadratic in the length: 2 GB at 512k rows",
        "at most 256 runs a key tile, the last of which covers the rest",
        "2 kB a key tile, 8 MB at 512k rows with 128 keys a tile",
    ),
    Entry(
        "training, d = 72",
        "strides that are no multiples of 16 hide from the compiler that rows are aligned: single loads, 1.9 to "
        "4.3 kB of spills",
        "such operands are copied into aligned rows",
        "no spill on cc 90",
        Timed("training", {"head_dim": 72}),
    ),
    Entry(
        "merge of splits",
        "it walked splits one by one, each with two loads that waited for each other and barriers between: a "
        "chain that grows with the context",
        "8 splits a turn, all loads of a turn independent; fewer rows a program, so more programs; bits of a row "
        "still its own",
        "one trip to memory for 8 splits",
        Timed("step", {"context_len": 32768}),
    ),
    Entry(
        "size of splits",
        "1024 keys would halve what compute-bound steps (B ≥ 8) write and merge, but leave half a chip idle below"
        " 16k tokens of one sequence",
        "none: 512 keys up to 32k slots",
        "",
        Timed("step", {"batch": 1, "block_size": 16}),
    ),
    Entry(
        "scores ahead, cc 90 and 100",
        "one block fills a multiprocessor at d = 128, and its tensor cores idle during every softmax",
        "the next tile's scores are multiplied while this tile's softmax runs, in the one loop that step and "
        "training share (`attend_whole_tiles`)",
        "same bits, no spill; half of the exponentials and more are issued under a wgmma, none before (a test "
        "counts them); on cc 100 fewer instructions too",
        Timed("step", {"head_dim": 128, "block_size": 16}),
    ),
    Entry(
        "values in flight checked",
        "NaN of one row reached others of its tile: 0 x NaN in the product",
        "within the kernels the check took registers: on cc 90, d = 128, no exponential was issued under a wgmma "
        "any more (34 before), and others spilled. A launch of its own leaves the loops as they were; it copies "
        "the keys in flight and costs a launch a layer",
        "",
        Timed("step", {"context_len": 512}),
    ),
    Entry(
        "two blocks a multiprocessor, d ≤ 64",
        "where two fit, one's products fill the other's softmax without more registers",
        "4 warps for 128 rows on cc 90 and 100",
        "no spill",
        Timed("training", {"head_dim": 64, "direction": "forward"}),
    ),
    Entry(
        "step kernel, 128 keys a tile",
        "a rescaling of the sums for twice the keys",
        "tried at d = 128: spills with and without scores ahead",
        "not taken",
    ),
    Entry(
        "TMA descriptors",
        "copies by one thread free the others of addresses",
        "tried in the forward loop on cc 90: fewer registers, a few instructions less a turn; 128 keys with "
        "scores ahead still spill",
        "not taken there: it wants aligned, contiguous heads, so a second path; that path is the next but one",
    ),
    Entry(
        "warp specialisation, by the compiler",
        "copies and products in warps of their own",
        "`warp_specialize=True` on the forward loop: no change of the binary on cc 90, spills on cc 100",
        "not taken",
    ),
    Entry(
        "training forward in Gluon, cc 90",
        "one warp that copies by TMA leaves those that multiply no addresses and registers for 128 keys a tile; of two "
        "groups of 64 rows one multiplies during the other's softmax",
        "`ops/attention/gluon_forward.py`, without a cap and sinks",
        "no spill at 64 and 128 keys; at d = 128 a pair takes 57 % of the instruction slots; its text is tested on "
        "threads with mbarriers, as no interpreter runs Gluon; off until a GPU has measured it: no table entry asks "
        "for it, `bench --tune` tries it",
    ),
    Entry(
        "dK and dV, 16 warps",
        "half the sums a thread",
        "tried on cc 90 and 100: 128 registers a thread are too few, it spills",
        "not taken",
    ),
    Entry(
        "persistent grids",
        "no launch of a program, no tail",
        "not tried: long programs start first, and a training pass has dozens of programs a multiprocessor",
        "open",
    ),
    Entry(
        "verify, passes over a vocabulary",
        "each tile was loaded, waited for and reduced across all warps before the next was asked for; and loads "
        "were of 2 bytes, as nothing told the compiler that the vocabulary is a multiple of 16",
        "running maxima and sums a lane, which meet once a pass; tiles copied ahead, 16 bytes a load; 8 warps a row",
        "of barriers a tile those of the pipeline alone are left; with a repetition penalty, whose loop over "
        "drafts stands in the way, wide loads alone",
        Timed("operators", {"operator": "verify"}),
    ),
    Entry(
        "verify",
        "the compiler limits registers to fit more programs and spills for it",
        "`maxnreg` at its maximum",
        "no spill",
        Timed("operators", {"operator": "verify"}),
    ),
    Entry(
        "CPU step",
        "ATen's fused attention is fastest without a mask",
        "context in one call without mask, in-flight keys in a small masked one, merged by log-sum-exp; heads of "
        "a group packed into rows",
        "the table of step attention",
    ),
    Entry(
        "CPU training",
        "rectangles and staircases that ATen runs unmasked make up nearly all live pairs",
        "the pattern cut into them, the edges gathered into small masked tiles",
        "the table of training attention",
    ),
    Entry(
        "CPU training, chunks",
        "longer chunks amortise a call, shorter ones leave less to edges",
        "256 rows; 128 took longer a pair, and 4096 gathered keys cost page faults",
        "kept at 256 rows, 1024 keys",
    ),
    Entry(
        "CPU training, bfloat16",
        "ATen's bfloat16 backward is slow on small tiles",
        "edge tiles go backward in float32",
        "faster on these tiles; the table of training attention",
    ),
)


def log_table() -> str:
    """The whole log."""
    head = ["", "prediction", "change", "outcome"]
    return measured.table(head, [[one.title, one.prediction, one.change, one.told] for one in LOG], 4)


def bits_line() -> str:
    """Whether rows of a step have the bits of single tokens, of every GPU that was asked."""
    found = []
    for part in measured.parts("bits", "cuda"):
        equal = [row["equal"] for row in part["rows"] if row["operator"] == "step_bits" and "equal" in row]
        agree = [row["equal"] for row in part["rows"] if row["operator"] == "tile_bits"]
        found.append(
            f"Rows of a step have the bits of single tokens in {sum(equal)} of {len(equal)} cases; tiles of 64 and of "
            f"128 rows agree in {sum(agree)} of {len(agree)}. {measured.where(part)}."
        )
    return "\n\n".join(found) or measured.NO_GPU


def stored_table() -> str:
    """Steps over pages, float8 and spare slots, against a plain cache."""
    found = []
    for part in measured.parts("stored", "cuda"):
        lines = [
            [
                row["model"], str(row["block_size"] or "AR"), str(row["context_len"]), str(row["batch"]),
                str(row["page_size"] or "none"), row["cache_dtype"] or row["dtype"],
                str(row["capacity"] or "as needed"),
                f"{row['p50_us']:.1f}", f"{row['of_plain']:.2f} x" if "of_plain" in row else "",
            ]
            for row in part["rows"]
            if row["operator"] == "step_stored" and "p50_us" in row
        ]  # fmt: skip
        head = ["heads of", "B", "context", "batch", "page", "cache", "slots", "µs", "of the plain cache"]
        found.append(measured.table(head, lines) + f"\n\n{measured.where(part)}.{measured.left_out(part)}")
    return "\n\n".join(found) or measured.NO_GPU


SECTIONS: dict[str, Section] = {"gpu-bits": bits_line, "gpu-stored-table": stored_table, "log-table": log_table}
