"""What speculation changes in a real model's text: `tidar-kernels lossless` in each dtype, exact and not.

    python -m benchmarks.decoding.lossless MODEL --title "SmolLM2-135M-Instruct" [--out benchmarks/results]

A part of the results file; docs/lossless.md shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

from benchmarks.core import record
from tidar_kernels import cli

RUNS = (
    ("--dtype", "float32"),
    ("--dtype", "float32", "--exact"),
    ("--dtype", "bfloat16"),
    ("--dtype", "bfloat16", "--exact"),
    ("--dtype", "bfloat16", "--strategy", "prompt-lookup"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding.lossless", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("--title", required=True, help="what the page calls the model")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="of each prompt; default 32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    options = parser.parse_args(arguments)
    runs = []
    for run in RUNS:
        print("lossless", *run, file=sys.stderr, flush=True)
        printed = io.StringIO()
        run = (*run, "--max-new-tokens", str(options.max_new_tokens))
        with contextlib.redirect_stdout(printed):
            code = cli.main(["lossless", options.model, *run, "--json"])
        if code not in (0, 1):  # 1: some texts differ, which is a result
            return code
        found = json.loads(printed.getvalue())
        command = " ".join(["tidar-kernels lossless", options.title, *run])
        runs.append({**found, "model": options.title, "command": command})
    record.add(options.out, "lossless", "cpu", runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
