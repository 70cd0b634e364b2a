"""Every way to decode, side by side: the shipped model on held-out prompts.

    python -m benchmarks.decoding.strategies --out DIR [--new-tokens N] [--prompts N] [--only LABEL]

Tokens a forward pass, rows a forward pass, tokens a second; whether the output must be that of autoregressive decoding,
and whether it was. The levels of `strategies.auto` are chosen once, by what this machine's rows cost and by the
acceptance on the package's training text, not on the prompts that are timed; `block_size="auto"` goes by the running
acceptance.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tidar_kernels import Decoder
from tidar_kernels.decoding.profile import profile
from tidar_kernels.decoding.strategies import BlockDiffusion, Profile, SelfSpeculation, Strategy, isd, tidar, tree
from tidar_kernels.decoding.strategies.isd import acceptance_of
from tidar_kernels.decoding.strategies.isd import expected_tokens as expected_of_isd
from tidar_kernels.decoding.strategies.levels import expected_tokens, plan
from tidar_kernels.models import shipped
from tidar_kernels.models.training import data

from ..core import record
from .turns import PROMPT_BYTES, described, excerpt, prompts, take_turns

PROGRAM = "python -m benchmarks.decoding.strategies"


@dataclass(frozen=True)
class Candidate:
    """A way to decode: what it is called, the strategy (None: autoregression), and the mean rows of its passes.

    `adapted`: mask rows run the shipped adapter. `adaptive`: by `block_size="auto"` of the decoder, without a strategy;
    how many rows its passes have shows as it runs.
    """

    name: str
    label: str
    strategy: Strategy | None
    rows: float | None
    expected: float | None = None
    adapted: bool = False
    adaptive: bool = False


def candidates(measured: Profile) -> list[Candidate]:
    """All strategies at the settings that suit a model of unshifted masks and bidirectional blocks."""
    found = [Candidate("autoregressive", "autoregressive", None, 1)]
    chosen = plan(measured)
    auto = f"TiDAR, auto: B = {chosen.block_size}, levels {' '.join(map(str, chosen.levels))}"
    for name, label, block, levels in (
        *(("tidar", f"TiDAR, B = {block}", block, None) for block in (4, 8, 16)),
        ("tidar_levels", "TiDAR, B = 8, levels 1 2 4", 8, (1, 2, 4)),
        ("tidar_levels", "TiDAR, B = 16, levels 1 2 3 4 6 8", 16, (1, 2, 3, 4, 6, 8)),
        ("tidar_auto", auto, chosen.block_size, chosen.levels),
    ):
        made = tidar(block, levels=levels)
        expected = expected_tokens(measured.acceptance, block, levels or range(1, block + 1))
        found.append(Candidate(name, label, made, made.pattern.q_len, round(expected, 3)))
    found.append(Candidate("adaptive", 'TiDAR, block_size="auto"', None, None, adaptive=True))
    for stride in (4, 8):
        causal, both = isd(stride, shifted=False), isd(stride, bidirectional=True, shifted=False)
        found.append(Candidate("isd", f"ISD, N = {stride}", causal, causal.pattern.q_len))
        found.append(Candidate("flare", f"FLARE rows, N = {stride}", both, both.pattern.q_len))
    found += [Candidate("self_speculation", f"self-speculation, L = {n}", SelfSpeculation(n), n) for n in (4, 8)]
    # Passes of n and 2n rows take turns.
    found += [Candidate("tree", f"token tree, L = {n}", tree(n), 3 * n / 2) for n in (4, 8)]
    adapted = [c for c in found if c.name == "isd" or c.label == "self-speculation, L = 8"]
    found += [replace(c, label=f"{c.label}, adapter", adapted=True) for c in adapted]
    return found + [
        Candidate("block_diffusion", f"block diffusion, L = 8, threshold {threshold}", BlockDiffusion(8, threshold), 8)
        for threshold in (0.9, 0.5)
    ]


def run(
    model: Any,
    adapted: Any,
    chosen: list[Candidate],
    batch: list[list[int]],
    new_tokens: int,
    repeats: int = 2,
) -> list[dict[str, Any]]:
    """One row a candidate, the first the baseline; candidates take turns on every prompt, and the faster run counts.

    `adapted` is the same model with adapters on it.
    """
    decoders = {c.label: _decoder(c, adapted if c.adapted else model) for c in chosen}
    turns = take_turns(decoders, [[prompt] for prompt in batch], new_tokens, repeats)
    tokens, rows = new_tokens * len(batch), []
    for c in chosen:
        turn = turns[c.label]
        rows.append(
            {
                "operator": "strategy",
                "name": c.name,
                "label": c.label,
                "rows": c.rows,
                "exact": c.strategy is None or c.strategy.equals_autoregression,
                "prompts": len(batch),
                "prompt_tokens": len(batch[0]),
                **turn.figures(tokens, turns[chosen[0].label]),
                "tokens_per_forward": round(tokens / turn.forwards, 4),
                "expected_tokens_per_forward": _expected(c, turn.accepted),
            }
        )
    return rows


def _decoder(candidate: Candidate, model: Any) -> Decoder:
    if candidate.adaptive:
        return Decoder(model, block_size="auto")
    if candidate.strategy is None:
        return Decoder(model, mode="autoregressive")
    return Decoder(model, strategy=candidate.strategy)


def _expected(candidate: Candidate, accepted: list[list[int]]) -> float | None:
    """What theory says: before the run for TiDAR, and for ISD at the acceptance of the run itself."""
    if candidate.name not in ("isd", "flare") or candidate.strategy is None:
        return candidate.expected
    stride = candidate.strategy.drafts
    kept = [acceptance_of(counts, stride) for counts in accepted]
    weights = [len(counts) for counts in accepted]
    mean = sum(share * weight for share, weight in zip(kept, weights, strict=True)) / sum(weights)
    return round(expected_of_isd(mean, stride), 4)


def calibration_prompts(count: int = 8) -> list[list[int]]:
    """Prompts like the timed ones, from files that the model was trained on."""
    files = data.stdlib_files()
    texts = [(files.folder / name).read_bytes() for name in files.training]
    long = [text for text in texts if len(text) > 4 * PROMPT_BYTES]
    step = max(1, len(long) // count)
    return [excerpt(text) for text in long[::step][:count]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts, at most 12")
    parser.add_argument("--only", metavar="LABEL", help="this row of the table, and autoregression")
    options = parser.parse_args(arguments)
    model, _ = shipped.load_shipped()
    adapted = shipped.load_shipped_adapter(shipped.load_shipped()[0])
    measured = profile(model, calibration_prompts(), max_block_size=16)
    chosen = candidates(measured)
    if options.only:
        chosen = [chosen[0], *(c for c in chosen[1:] if c.label == options.only)]
    rows = run(model, adapted, chosen, prompts()[: options.prompts], options.new_tokens)
    for line in rows:
        print(
            f"{line['label']:38} {line['rows'] or '..':>4} rows {described(line)}, must be: {line['exact']}", flush=True
        )
        line["command"] = f"{PROGRAM} --out DIR --new-tokens {options.new_tokens} --prompts {options.prompts} --only "
        line["command"] += shlex.quote(line["label"])
    acceptance = [round(share, 4) for share in measured.acceptance]
    step_ms = [round(seconds * 1e3, 4) for seconds in measured.seconds]
    rows.append({"operator": "profile", "acceptance": acceptance, "rows": [*measured.rows], "step_ms": step_ms})
    record.add(options.out, "strategies", "cpu", rows)
    return 0 if all(line["identical"] or not line["exact"] for line in rows if line["operator"] == "strategy") else 1


if __name__ == "__main__":
    sys.exit(main())
