"""`tidar-kernels serve`: vLLM's OpenAI-compatible server, with the engine arguments that a TiDAR checkpoint needs."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from .common import (
    MAX_BLOCK_SIZE,
    MAX_TOKENS,
    PROGRAM,
    UserError,
    add_json_argument,
    any_path,
    import_torch,
    print_json,
    user_errors,
    whole_number,
    whole_numbers,
)

SUMMARY = "serve a checkpoint with vLLM, several tokens a step"

USAGE = "FOLDER [options]"

EPILOG = f"""\
FOLDER is a transformers checkpoint whose config.json has an entry tidar
({PROGRAM} convert writes it). The server is vLLM's own, OpenAI-compatible, in
this process's place: --set passes any other of its arguments on, without the
dashes. Needs vLLM, of a version that was tried; see docs/vllm.md.

examples:
  {PROGRAM} serve ./Qwen3-0.6B-tidar
  {PROGRAM} serve ./Qwen3-0.6B-tidar --strategy isd --block-size 4 --set port=8001
  {PROGRAM} serve ./Qwen3-0.6B-tidar --set tensor-parallel-size=2 --json
"""

# Those that vLLM's runner can do, of `decoding.strategies`, which is not asked because it would load PyTorch.
STRATEGIES = ("tidar", "isd", "flare")

SERVER = "vllm.entrypoints.openai.api_server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=any_path, metavar="FOLDER", help="the checkpoint")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, help="how it drafts (default: the checkpoint's own, or tidar)"
    )
    parser.add_argument(
        "--block-size",
        type=whole_number(2, MAX_BLOCK_SIZE),
        metavar="B",
        help="the most tokens a step commits (default: the checkpoint's)",
    )
    parser.add_argument(
        "--levels", type=whole_numbers, metavar="L,..", help="numbers of accepted drafts that get a block, as in 1,2,4"
    )
    parser.add_argument(
        "--adapter", type=any_path, metavar="DIR", help="refused, for vLLM cannot run one on mask rows alone"
    )
    parser.add_argument(
        "--max-num-seqs",
        type=whole_number(1, MAX_TOKENS),
        default=16,
        metavar="N",
        help="requests that run at once (default: 16)",
    )
    parser.add_argument(
        "--set",
        type=_engine_argument,
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="another argument of vLLM's server, as in port=8001",
    )
    add_json_argument(parser)
    parser.description = f"{SUMMARY[0].upper()}{SUMMARY[1:]}. With --json, print how, and start nothing."


def _engine_argument(text: str) -> tuple[str, str | None]:
    """An argparse type: `name` or `name=value`."""
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise argparse.ArgumentTypeError(f"expected NAME or NAME=VALUE, as in port=8001, got {text!r}")
    return name.replace("_", "-"), value if equals else None


def run(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    if options.adapter is not None:
        raise UserError(
            "--adapter: expected none, for vLLM runs an adapter on every row of a request, and one that drafts would "
            f"change the text there; {PROGRAM} generate runs it on mask rows alone, got {options.adapter}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"FOLDER: expected a folder with a config.json, got {folder}")  # before seconds of imports
    import_torch()
    from ..integrations.vllm import engine_options

    with user_errors(
        ImportError,
        TypeError,
        ValueError,
        rename={"folder": "FOLDER", "block_size": "--block-size", "levels": "--levels", "strategy": "--strategy"},
        otherwise="FOLDER: expected a transformers checkpoint",
    ):
        engine = engine_options(
            folder,
            options.strategy,
            block_size=options.block_size,
            levels=options.levels,
            max_num_seqs=options.max_num_seqs,
        )
    command = [sys.executable, "-m", SERVER, *arguments(engine), *_given(options.set)]
    if options.json:
        print_json({"engine": engine, "command": command})
        return 0
    sys.stdout.flush()
    os.execv(command[0], command)


def arguments(engine: dict[str, Any]) -> list[str]:
    """Engine arguments as vLLM's command line takes them."""
    words = []
    for name, value in engine.items():
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list):
            words += map(str, value)
        else:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def _given(pairs: list[tuple[str, str | None]]) -> list[str]:
    return [word for name, value in pairs for word in (f"--{name}", *([] if value is None else [value]))]
