"""What the subcommands that take a transformers checkpoint share: reading it quietly, and reading prompts for it."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from .common import UserError, any_path, import_torch, resolve_device, user_errors

__all__ = ["PROMPTS", "add_model_arguments", "add_prompt_arguments", "load_model", "quiet", "read_prompts", "reading"]

DTYPES = ("float32", "bfloat16", "float16")
_MAX_FILE_BYTES = 2**28

# Plain texts and beginnings of code, for a model of any kind.
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature in the mountains because",
    "import json\n\ndef read_config(path):\n",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 times 23?\nA:",
    "The three laws of motion are:\n1.",
    "SELECT name, COUNT(*) FROM orders",
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with a model and its tokenizer, or a name on the Hub")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")


def add_prompt_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--prompts",
        type=any_path,
        metavar="FILE",
        help='a prompt a line, or JSON lines with a "prompt" each (.jsonl, .jsonl.gz); default a few of our own',
    )


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a file, or the few that need none.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or JSON lines, or holds no prompt.
    """
    if path is None:
        return list(PROMPTS)
    expected = '--prompts: expected UTF-8 text with a prompt a line, or JSON lines with a "prompt" each'
    with user_errors(OSError, ValueError, EOFError, otherwise=expected):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise UserError(f"--prompts: expected at most {_MAX_FILE_BYTES} bytes, got more in {path}")
        # Not splitlines, which also ends lines at characters that JSON strings and prompts may hold (U+2028, U+0085).
        lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n") if line.strip()]
        if ".jsonl" in path.suffixes:
            rows = [json.loads(line) for line in lines]
            if not all(isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows):
                raise UserError(f"{expected}, got a line without one in {path}")
            lines = [row["prompt"] for row in rows]
            "".join(lines).encode()  # a JSON escape may be half of a pair, which is no text: a ValueError
    if not lines:
        raise UserError(f"--prompts: expected at least one prompt, got none in {path}")
    return lines


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing inside: the one line of an error, or the report, says all that there is to say.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"transformers: expected it installed (pip install 'tidar-kernels[hf]'), got: {error}"
        ) from None
    logs, hub = transformers.utils.logging, logging.getLogger("huggingface_hub")  # which tells of every retry
    verbosity, of_hub = logs.get_verbosity(), hub.level
    logs.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    logs.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # progress bars of the packages that it calls
            yield
    finally:
        logs.enable_progress_bar()
        logs.set_verbosity(verbosity)
        hub.setLevel(of_hub)


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a checkpoint, in evaluation mode.

    Raises:
        UserError: the device is not there, or the checkpoint cannot be read or lacks weights.
    """
    import_torch()
    import torch

    where = resolve_device(device)
    with reading():
        from ..integrations.transformers.checkpoints import load_any

        model, tokenizer = load_any(name, getattr(torch, dtype))
        return model.to(where), tokenizer


@contextmanager
def reading() -> Iterator[None]:
    """A checkpoint is read inside; what is wrong with it becomes the one line of a `UserError`."""
    with (
        quiet(),
        user_errors(
            Exception,
            rename={"model_path": "MODEL", "model": "MODEL"},
            otherwise="MODEL: expected a checkpoint that transformers can read",
        ),
    ):
        yield
