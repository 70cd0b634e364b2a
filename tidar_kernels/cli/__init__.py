"""The `tidar-kernels` command: one file of this package for every subcommand.

A subcommand's module has `SUMMARY`, `USAGE`, `EPILOG`, `add_arguments(parser)` and `run(options) -> exit code`, and
imports nothing heavy at the top: PyTorch is loaded once the arguments are known to be good, and never for `--help`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import bench, convert, doctor, draw, generate, train
from .common import FAILED, INTERRUPTED, OK, PROGRAM, USAGE, Parser, UserError, one_line

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS = {"generate": generate, "train": train, "convert": convert, "bench": bench, "doctor": doctor, "draw": draw}

_BROKEN_PIPE = 128 + 13  # as a shell reports a command that SIGPIPE ended

_EPILOG = f"""\
exit codes:
  {OK}    all went well
  {FAILED}    a check failed, or outputs differ that must not
  {USAGE}    an argument or an input file is no good; standard error says why
  {INTERRUPTED}  interrupted (Ctrl-C)

examples:
  {PROGRAM} generate --demo
  {PROGRAM} train --out runs/stdlib --steps 300
  {PROGRAM} convert ./Qwen3-0.6B ./Qwen3-0.6B-tidar --block-size 8
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

    Args:
        argv: the arguments without the program's name; default those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows "?" instead
            stream.reconfigure(errors="replace")
    try:
        try:
            code = _dispatch(argv)
        except UserError as error:
            sys.stdout.flush()
            print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
            code = USAGE
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_output()
        return _BROKEN_PIPE
    except OSError as error:  # of a full disk, say; what a command opens itself is checked where it is opened
        _abandon_output()
        print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
        return USAGE


def _abandon_output() -> None:
    """Python flushes standard output once more as it exits: let it write into nothing."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def _dispatch(argv: Sequence[str] | None) -> int:
    """Parse the arguments and run the subcommand that they name."""
    parser = build_parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or OK)
    if options.command is None:
        parser.error(f"expected a command ({', '.join(COMMANDS)}), got none")
    code: int = options.run(options)
    return code
