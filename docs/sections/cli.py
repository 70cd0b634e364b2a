"""docs/cli.md: what `tidar-kernels --help` prints, for every command, and a drawing."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from functools import partial
from unittest import mock

from sections import Section
from tidar_kernels import cli


def printed(*arguments: str) -> str:
    """What the command prints, as a code block; lines are as wide as the pages are."""
    with redirect_stdout(io.StringIO()) as out, mock.patch.dict(os.environ, COLUMNS="102"):
        code = cli.main(arguments)
    if code:
        raise RuntimeError(f"tidar-kernels {' '.join(arguments)}: expected exit code 0, got {code}")
    return f"```text\n{out.getvalue().rstrip()}\n```"


SECTIONS: dict[str, Section] = {
    "cli-help": partial(printed, "--help"),
    **{f"cli-{name}": partial(printed, name, "--help") for name in cli.COMMANDS},
    "cli-draw-step": partial(printed, "draw", "step", "--help"),
    "cli-drawing": partial(printed, "draw", "step", "--block-size", "3", "--context-len", "4"),
}
