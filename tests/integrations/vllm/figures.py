"""Tokens a step of vLLM's engine with drafts, for docs/vllm.md: `python -m tests.integrations.vllm.figures`.

Every engine is asked the same prompts at once, greedily and sampled, and so is one without drafts: their tokens must be
the same. Writes a line an engine into a results file; exit code 1 if a token differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from benchmarks.core import record
from tidar_kernels.integrations.vllm import engine_options
from tidar_kernels.integrations.vllm.plugin import installed_version

from . import engines
from .checkpoints import shipped

RESULTS = Path("benchmarks/results")
ENGINES: dict[str, dict[str, Any]] = {
    "tidar, B = 8": {},
    "tidar, B = 8, levels 1 2 4": {"levels": [1, 2, 4]},
    "tidar, B = 4": {"block_size": 4},
    "flare, N = 4": {"strategy": "flare", "block_size": 4},
    "isd, N = 4": {"strategy": "isd", "block_size": 4},
}
NEW_TOKENS = 48


def asked() -> dict[str, list[engines.Ask]]:
    """Requests by how they are sampled."""
    return {
        name: [replace(ask, params=ask.params | {"max_tokens": NEW_TOKENS}) for ask in engines.cases()[name]]
        for name in ("greedy", "sampled")
    }


def measured(checkpoint: Path, options: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Of one engine: tokens a step of requests that decode, and whether its tokens are those that are expected."""
    found: dict[str, Any] = {"equal": 0, "requests": 0}
    with engines.running(**engine_options(checkpoint, **{"max_num_seqs": 4} | options)) as llm:
        for name, requests in asked().items():
            with engines.recorded(pytest.MonkeyPatch()) as steps:
                got = engines.tokens(engines.answers(llm, requests))
            found[name] = round(steps.tokens_per_step, 4)
            found["equal"] += sum(a == b for a, b in zip(got, expected[name], strict=True))
            found["requests"] += len(requests)
    return found


def run() -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        checkpoint = shipped(Path(folder) / "shipped")
        with engines.running(**engines.plain(checkpoint), max_num_batched_tokens=512) as llm:
            expected = {name: engines.tokens(engines.answers(llm, requests)) for name, requests in asked().items()}
        common = {"operator": "vllm", "vllm": installed_version(), "new_tokens": NEW_TOKENS}
        common |= {"command": "python -m tests.integrations.vllm.figures"}
        return [common | {"engine": name} | measured(checkpoint, given, expected) for name, given in ENGINES.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.integrations.vllm.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=f"default {RESULTS}")
    rows = run()
    record.add(parser.parse_args(arguments).out, "vllm", "cpu", rows)
    return int(any(row["equal"] < row["requests"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
