"""The `tidar-kernels` command: one file of this package for every subcommand.

A subcommand's module has `SUMMARY`, `USAGE`, `EPILOG`, `add_arguments(parser)` and `run(options) -> exit code`, and
imports nothing heavy at the top: PyTorch is loaded once the arguments are known to be good, and never for `--help`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from .. import __version__
from . import bench, convert, doctor, draw, generate, lossless, serve, train, train_adapter
from .common import (
    FAILED,
    INTERRUPTED,
    OK,
    PROGRAM,
    USAGE,
    Parser,
    UserError,
    described,
    one_line,
    out_of_resources,
)

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS = {
    "generate": generate,
    "train": train,
    "convert": convert,
    "train-adapter": train_adapter,
    "lossless": lossless,
    "serve": serve,
    "bench": bench,
    "doctor": doctor,
    "draw": draw,
}

_BROKEN_PIPE = 128 + 13  # as a shell reports a command that SIGPIPE ended

_EPILOG = f"""\
exit codes:
  {OK}    all went well
  {FAILED}    a check failed, or outputs differ that must not
  {USAGE}    bad input, a stream that cannot be written, or too little memory; standard error says why
  {INTERRUPTED}  interrupted (Ctrl-C)

examples:
  {PROGRAM} generate --demo
  {PROGRAM} train --out runs/stdlib --steps 300
  {PROGRAM} convert ./Qwen3-0.6B ./Qwen3-0.6B-tidar --block-size 8
  {PROGRAM} train-adapter ./Qwen3-0.6B --out runs/adapter
  {PROGRAM} lossless ./Qwen3-0.6B --strategy isd
  {PROGRAM} serve ./Qwen3-0.6B-tidar --strategy tidar
  {PROGRAM} bench strategies --out results
  {PROGRAM} doctor --parity
  {PROGRAM} draw step --block-size 4

`{PROGRAM} COMMAND --help` says more.
`python -m tidar_kernels` is the same command.
"""


def build_parser() -> Parser:
    """The parser of the command and of every subcommand."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [options]",
        description="Language models that draft by diffusion and verify autoregressively in one forward pass.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", title="commands", dest="command", prog=PROGRAM)
    for name, module in COMMANDS.items():
        command = subparsers.add_parser(
            name,
            usage=f"{PROGRAM} {name} {module.USAGE}",
            help=module.SUMMARY,
            description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
            epilog=module.EPILOG,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Whatever is wrong with the input, the machine or the streams ends here, as one line on standard error. Only a bug
    leaves as the exception that it is.

    Args:
        argv: the arguments without the program's name; default those of the process.
    """
    if sys.stderr is None:  # closed by the caller; print would fall back on standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    if sys.stdout is None:
        return _refused("standard output: expected an open one, got none")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows "?" instead
            stream.reconfigure(errors="replace")
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _refused(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_streams()
        return _BROKEN_PIPE
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", __name__.partition(".")[0]):
            raise
        return _refused(f"{library}: expected it installed, got: {error}")
    except RecursionError:
        return _refused("expected input that is nested less deeply, got more than Python's limit on recursion")
    except (OSError, UnicodeError) as error:  # what a command opens itself is checked where it is opened
        return _refused(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_resources(error):
            raise
        return _refused(f"expected memory and threads enough for this, got {described(error)}")


def _refused(message: object) -> int:
    """Print the error's one line, as far as the streams still take it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        message = error
        _abandon_streams()
    try:
        print(f"{PROGRAM}: error: {one_line(message)}", file=sys.stderr, flush=True)
    except OSError:
        _abandon_streams()
    return USAGE


def _abandon_streams() -> None:
    """Python flushes both streams once more as it exits: what cannot be written goes into nothing."""
    for stream in (sys.stdout, sys.stderr):
        if not _flushed(stream):
            with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())


def _flushed(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:
        return False
    return True


def _dispatch(argv: Sequence[str] | None) -> int:
    """Parse the arguments and run the subcommand that they name."""
    if argv is not None and (
        isinstance(argv, (str, bytes))
        or not isinstance(argv, Sequence)
        or not all(isinstance(argument, str) for argument in argv)
    ):
        raise UserError(f"argv: expected a sequence of strings, got {argv!r}")
    parser = build_parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or OK)
    if options.command is None:
        parser.error(f"expected a command ({', '.join(COMMANDS)}), got none")
    code: int = options.run(options)
    return code
