"""`tidar-kernels convert`: an autoregressive transformers checkpoint made ready for TiDAR."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from .checkpoints import quiet
from .common import (
    MAX_BLOCK_SIZE,
    OK,
    PROGRAM,
    UserError,
    add_json_argument,
    any_path,
    import_torch,
    print_json,
    user_errors,
    whole_number,
)

SUMMARY = "make a transformers checkpoint ready for TiDAR: a mask token and a configuration entry"

USAGE = "SRC DST --block-size B [options]"

EPILOG = f"""\
SRC is a folder with a causal language model and its tokenizer, or a name on the
Hub. DST is a folder that does not exist or is empty; it appears complete or not
at all. What is in it is an ordinary checkpoint, with weights as safetensors: it
opens without this package, and until it is trained it writes what SRC writes.

A mask token that the tokenizer does not know is added, with the mean of all
embeddings; one that it has in reserve is taken as it is. Needs transformers.

examples:
  {PROGRAM} convert ./Qwen3-0.6B ./Qwen3-0.6B-tidar --block-size 8
  {PROGRAM} convert SRC DST --block-size 16 --mask-token '<|reserved_special_token_0|>' --json
"""

_MAX_MULTIPLE = 2**16  # rows that nothing uses cost memory; hardware asks for 8 to 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the autoregressive checkpoint")
    parser.add_argument("target", type=any_path, metavar="DST", help="the folder to write")
    parser.add_argument(
        "--block-size",
        type=whole_number(1, MAX_BLOCK_SIZE),
        required=True,
        metavar="B",
        help="tokens of a block, to train with",
    )
    parser.add_argument("--mask-token", metavar="TOKEN", help="default the tokenizer's own, or <|mask|> if it has none")
    parser.add_argument(
        "--pad-to-multiple-of",
        type=whole_number(1, _MAX_MULTIPLE),
        metavar="N",
        help="round the rows of the embedding up to a multiple of N, if it has to grow",
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    target: Path = options.target
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"DST: expected a new or an empty folder, got {target}")  # before seconds of imports
    import_torch()
    with (
        quiet(),
        user_errors(
            Exception,
            rename={"model_path": "SRC", "out_path": "DST", "token": "--mask-token", "tokenizer": "SRC"},
            otherwise="SRC: expected a checkpoint that transformers can read, and room for DST",
        ),
    ):
        from ..integrations.transformers.conversion import convert

        done = convert(
            options.source,
            target,
            block_size=options.block_size,
            mask_token=options.mask_token,
            pad_to_multiple_of=options.pad_to_multiple_of,
        )
    if options.json:
        print_json(asdict(done))
        return OK
    origin = "added" if done.added else "already there"
    print(f"{done.path}: {done.model}, {done.parameters:,} parameters, vocabulary of {done.vocab_size:,}")
    print(f"mask token {done.mask_token} = {done.mask_token_id} ({origin}), block size {done.block_size}")
    return OK
