"""What a GPU should take for a step, predicted from the launch plan, so that a measurement has something to contradict.

    python -m benchmarks.model [--json]

Nothing here was measured on a GPU but what `H200` says. A kernel takes the longest of three: its bytes at the copy
bandwidth; the tiles of its busiest multiprocessor, at the rate of the multiplications or of the instruction slots that
the static report counts in the hot loop; and each launch costs a gap. docs/performance.md shows the predictions, and
beside them what `make gpu` measured, once it has.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tidar_kernels import KVCache, Pattern, patterns
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.ops.operands import Cached, Keys, Rows, Scores

from .decoding.models import LARGE, SHAPES, floor_of
from .operators.step_attention import Step, step
from .static.clocks import H200, Chip, clocks_of_tile, resident_blocks

REPORT = Path(__file__).parent / "results" / "static-report.json"
DTYPE = torch.bfloat16
JUDGING = 6 + 5  # launches of `verify` and of `sample`, with filters


@dataclass(frozen=True)
class Traffic:
    """What the launches of one step attention move and run.

    Attributes:
        kv_bytes: keys and values of context and in flight, read once.
        other_bytes: queries, results, keys in flight that are checked for finite values.
        partial_bytes: float32 results of splits, written once and read once.
        programs, dead: of the attention kernel; a dead one finds no key of its rows and returns.
        tiles: of BLOCK_M rows by BLOCK_N keys, in all programs.
        busiest: tiles of the multiprocessor that has the most.
        launches: kernels.
    """

    kv_bytes: int
    other_bytes: int
    partial_bytes: int
    programs: int
    dead: int
    tiles: int
    busiest: int
    launches: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.kv_bytes + self.other_bytes + self.partial_bytes


def plan_of(case: Step, chip: Chip, capacity: int | None = None) -> Any:
    """The launches of `case` on tensors without memory; the bound of the context is all that `capacity` holds."""
    from tidar_kernels.ops.step_attention.triton import plan_step_attention

    pattern = case.pattern

    def empty(heads: int, length: int) -> torch.Tensor:
        return torch.empty((case.batch, heads, length, case.head_dim), dtype=DTYPE, device="meta")

    slots = capacity or case.context_len + max(case.block_size, 1)
    keys, caches = ([empty(case.num_kv_heads, length) for _ in "kv"] for length in (pattern.q_len, slots))
    lengths = torch.empty(case.batch, dtype=torch.int32, device="meta")
    lead, own, _ = (x.to("meta") for x in pattern.on("cpu"))
    rows = Rows(empty(case.num_heads, pattern.q_len), lead, own)
    cached = Cached(caches[0], caches[1], lengths, capacity or case.context_len)
    return plan_step_attention(rows, Keys(keys[0], keys[1]), cached, Scores(case.head_dim**-0.5), chip.capability)[0]


def attention_launch(case: Step, chip: Chip, capacity: int | None = None) -> Any:
    """That of the attention kernel."""
    return next(one for one in plan_of(case, chip, capacity) if one.kernel.__name__ == "step_attention_kernel")


def busiest_of(programs: Iterable[int], multiprocessors: int) -> int:
    """Tiles of the multiprocessor that has the most, where programs of so many tiles go, in the order of the launch, to
    the multiprocessor that has the fewest: the one that is free first, or whose blocks share its rates with fewer."""
    loads = [0] * multiprocessors
    for tiles in programs:
        heapq.heapreplace(loads, loads[0] + tiles)
    return max(loads)


def traffic(case: Step, chip: Chip = H200, capacity: int | None = None) -> Traffic:
    """Counted from the launch plan of `case`.

    Args:
        capacity: slots of a cache whose lengths the host does not know, as in a captured graph; default context and
            step, with the length known.
    """
    launches, attend = plan_of(case, chip, capacity), attention_launch(case, chip, capacity)
    block_m, block_n, split = (attend.options[name] for name in ("BLOCK_M", "BLOCK_N", "SPLIT"))
    sharing = attend.grid[1]  # programs that share the splits of a row tile
    pattern, group, pairs = case.pattern, case.num_heads // case.num_kv_heads, case.batch * case.num_kv_heads
    live = held = 0
    tiles_of: list[list[int]] = []  # by row tile of a kv head, of each program that is not dead
    for begin in range(0, pattern.q_len * group, block_m):
        rows = slice(begin // group, -(-min(begin + block_m, pattern.q_len * group) // group))
        end, own = case.context_len + int(pattern.lead[rows, 1].max()), pattern.own[rows]
        own = own[own[:, 1] > own[:, 0]]
        splits = max(1, -(-end // split))
        of_splits = [-(-min(split, end - start) // block_n) for start in range(0, splits * split, split)]
        of_splits[0] += -(-int(own[:, 1].max() - own[:, 0].min()) // block_n) if len(own) else 0
        tiles_of.append([sum(of_splits[first::sharing]) for first in range(min(splits, sharing))])
        live += len(tiles_of[-1])
        held += splits * (min(begin + block_m, pattern.q_len * group) - begin)  # rows with a result of their split
    in_flight = 2 * pairs * pattern.q_len * case.head_dim * DTYPE.itemsize
    programs = attend.grid[0] * attend.grid[1]
    # Row tiles are the fastest index of the grid, then kv heads and sequences, then the programs of a tile.
    launched = [own[share] for share in range(sharing) for own in tiles_of * pairs if share < len(own)]
    names = [one.kernel.__name__ for one in launches]
    return Traffic(
        kv_bytes=2 * pairs * case.context_len * case.head_dim * DTYPE.itemsize + in_flight,
        other_bytes=in_flight * group + 2 * in_flight * ("sound_keys_kernel" in names),
        partial_bytes=2 * 4 * pairs * held * (case.head_dim + 1) * ("combine_splits_kernel" in names),
        programs=programs,
        dead=programs - live * pairs,
        tiles=sum(launched),
        busiest=busiest_of(launched, chip.multiprocessors),
        launches=len(launches),
    )


def least_partial_bytes(case: Step, chip: Chip = H200) -> tuple[int, int]:
    """`(programs, bytes)`: how many programs must share a row tile for one wave of them to fill the chip, and what they
    write and read again if each leaves one float32 result of its rows, whatever keys it had.

    No scheme with partial results moves less, unless it leaves multiprocessors idle. Ours, whose results are of splits
    and do not depend on who had them, moves `Traffic.partial_bytes`.
    """
    programs = max(1, chip.multiprocessors // attention_launch(case, chip).grid[0])
    rows = case.batch * case.num_heads * case.pattern.q_len
    return programs, 2 * 4 * rows * (case.head_dim + 1) * programs * (programs > 1)


@functools.cache
def _entries() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(REPORT.read_text())["rows"]
    return found


def _entry(chip: Chip, head_dim: int) -> dict[str, Any]:
    """The static report's entry of the step kernel."""
    names = ("step_attention", str(chip.capability), "bfloat16", head_dim, "")
    return next(
        one
        for one in _entries()
        if (one["kernel"], one["chip"], one["dtype"], one["head_dim"], one.get("variant", "")) == names
    )


def attention_us(case: Step, chip: Chip = H200) -> dict[str, Any]:
    """Microseconds of one step attention, gaps between its kernels included, and what bounds it."""
    moved = traffic(case, chip)
    entry = _entry(chip, case.head_dim)
    clocks, blocks = clocks_of_tile(entry, 2, chip), resident_blocks(entry)
    of_bytes = moved.bytes / chip.bytes_per_s
    waves = -(-(moved.programs - moved.dead) // (chip.multiprocessors * blocks))
    of_tiles = moved.busiest * clocks / chip.clock_hz
    seconds = max(of_bytes, of_tiles) + moved.launches * chip.gap_s
    seconds += moved.dead * chip.dead_s / chip.multiprocessors
    bound = "bytes" if of_bytes > of_tiles else "tiles"
    return {"us": seconds * 1e6, "bound": bound, "waves": waves, "launches": moved.launches}


class _Launches(TorchDispatchMode):
    """Counts operators that launch a kernel: those that do not return a view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if not (
            is_view or func._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe"))
        ):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@functools.cache
def launches_of_layer(qk_norm: bool = False) -> dict[str, int]:
    """Launches of one layer of the package's own model in a step, by kind, counted on the CPU: PyTorch's and ours."""
    found = []
    for layers in (1, 2):
        config = TransformerConfig(64, 32, 48, layers, 2, 1, 16, qk_norm=qk_norm)
        model, pattern = Transformer(config).requires_grad_(False), patterns.tidar_step(4)
        cache = KVCache(
            num_layers=layers, batch_size=1, num_kv_heads=1, head_dim=16, max_len=64, dtype=torch.float32, device="cpu"
        )
        with torch.inference_mode(False), torch.no_grad(), _Launches() as counted:
            model(torch.zeros(1, pattern.q_len, dtype=torch.int64), pattern, cache)
        found.append(counted.names)
    ours = [sum(name.startswith("tidar_kernels::") for name in names) for names in found]
    return {"torch": len(found[1]) - len(found[0]) - (ours[1] - ours[0]), "ours": ours[1] - ours[0]}


def step_us(model: str, block_size: int, context_len: int, chip: Chip = H200, *, lm_head_passes: int = 2) -> float:
    """Microseconds of a whole decoder step, batch 1, one CUDA graph; block size 0 is autoregressive."""
    config: TransformerConfig = SHAPES[model].config
    case = Step(model, config.num_heads, config.num_kv_heads, config.head_dim, block_size, context_len)
    rows = case.pattern.q_len
    drafts = max(block_size, 1)
    # Weights once, the lm_head once a pass; attention is counted by itself.
    alone: Pattern = patterns.causal(1)
    floor = floor_of(config, alone, 0, DTYPE, logits_rows=0)
    head = config.vocab_size * config.hidden_size
    layers_bytes = floor["bytes"] - head * DTYPE.itemsize
    flops = layers_bytes / DTYPE.itemsize * 2.0 * rows
    products = max(layers_bytes / chip.bytes_per_s, flops / chip.flops_per_s)
    passes = 1 if not block_size else lm_head_passes
    # One pass runs on the drafts and on every block, two on the drafts and then on the chosen block.
    asked = [rows] if passes == 1 else [drafts, drafts - 1]
    logits = sum(max(head * DTYPE.itemsize / chip.bytes_per_s, 2.0 * head * n / chip.flops_per_s) for n in asked)
    judged = 2 * (2 * drafts - 1) * config.vocab_size * DTYPE.itemsize / chip.bytes_per_s
    attention = attention_us(case, chip)
    counted = launches_of_layer()
    gaps = config.num_layers * (counted["torch"] + counted["ours"] - 1) + JUDGING
    return (products + logits + judged + gaps * chip.gap_s) * 1e6 + config.num_layers * attention["us"]


def attention_rows(chip: Chip = H200) -> list[dict[str, Any]]:
    """The traffic and the prediction of step attention by block size, context and batch, for Qwen3-8B's heads."""
    rows = []
    for context in (512, 8192, 32768, 131072):
        for block in (4, 8, 16):
            for batch in (1, 8, 64):
                case = step("Qwen3-8B", block, context, batch)
                moved, graph = traffic(case, chip), traffic(case, chip, capacity=max(4 * context, 32768))
                rows.append({
                    "block_size": block, "context_len": context, "batch": batch, "kv_mb": moved.kv_bytes / 1e6,
                    "partials": moved.partial_bytes / moved.kv_bytes, "programs": moved.programs,
                    "dead": moved.dead / moved.programs, "dead_in_a_graph": graph.dead / graph.programs,
                    **attention_us(case, chip),
                })  # fmt: skip
    return rows


def partial_rows(chip: Chip = H200) -> list[dict[str, Any]]:
    """Partial results at B = 4 and Qwen3-8B's heads, beside the least that they can be (`least_partial_bytes`)."""
    rows = []
    for batch in (1, 8):
        for context in (8192, 32768):
            case = step("Qwen3-8B", 4, context, batch)
            moved, (programs, least) = traffic(case, chip), least_partial_bytes(case, chip)
            rows.append({
                "batch": batch, "context_len": context, "row_tiles": attention_launch(case, chip).grid[0],
                "programs": programs, "least": least / moved.kv_bytes, "partials": moved.partial_bytes / moved.kv_bytes,
            })  # fmt: skip
    return rows


def step_rows(chip: Chip = H200) -> list[dict[str, Any]]:
    """Predicted steps of the models that TiDAR publishes figures for, in autoregressive steps, and the speed-up."""
    rows = []
    for model in LARGE:
        shape = SHAPES[model]
        for context in (512, 4096, 32768):
            plain = step_us(model, 0, context, chip)
            for block in (4, 8, 16):
                one, two = (step_us(model, block, context, chip, lm_head_passes=passes) for passes in (1, 2))
                best, published = min(one, two), shape.published.get(block)
                rows.append({
                    "model": model, "block_size": block, "context_len": context, "autoregressive_us": plain,
                    "step_us": best, "ratio": best / plain, "passes": 1 if one <= two else 2,
                    "speedup": published * plain / best if published else None,
                })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one object in place of lines")
    options = parser.parse_args(arguments)
    found = {"step_attention": attention_rows(), "partials": partial_rows(), "decoder_step": step_rows()}
    if options.json:
        print(json.dumps(found))
        return 0
    for name, rows in found.items():
        print(name)
        for row in rows:
            print(
                "  ",
                *(f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
