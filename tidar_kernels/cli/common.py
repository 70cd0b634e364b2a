"""What the subcommands share: errors, the parser, common options, tables, and the look of a terminal."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

if TYPE_CHECKING:
    import torch

Number = TypeVar("Number", int, float)

PROGRAM = "tidar-kernels"
OK, FAILED, USAGE = 0, 1, 2
INTERRUPTED = 128 + 2  # as a shell reports a command that SIGINT ended


class UserError(Exception):
    """Bad input. `main` prints it on one line and exits with code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose examples keep their line breaks."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


@contextmanager
def user_errors(*kinds: type[Exception], rename: Mapping[str, str] | None = None) -> Iterator[None]:
    """Exceptions of these kinds, raised inside, are the user's to mend: they become a `UserError`.

    Messages of the package begin with the argument's name; `rename` says which option it came from.
    """
    try:
        yield
    except kinds as error:
        name, colon, rest = one_line(error).partition(":")
        raise UserError(f"{(rename or {}).get(name, name)}{colon}{rest}") from error


def one_line(message: object) -> str:
    """A message, or what an exception says, on one line."""
    return " ".join(str(message).split()) or type(message).__name__


def whole_number(at_least: int) -> Callable[[str], int]:
    """An argparse type: an int >= `at_least`."""
    return number(int, lambda value: value >= at_least, f"a whole number >= {at_least}")


def number(kind: type[Number], fits: Callable[[Number], bool], expected: str) -> Callable[[str], Number]:
    """An argparse type: a number of this kind that fits; `expected` says in words which do."""

    def convert(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


def add_json_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device",
        type=_device_name,
        default="auto",
        metavar="NAME",
        help="cpu, cuda or cuda:N; default the GPU where there is one (auto)",
    )


def _device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def import_torch() -> None:
    """Import PyTorch, so that Ctrl-C ends the program meanwhile: some of its libraries swallow the exception."""
    in_main = threading.current_thread() is threading.main_thread()
    replaced = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if replaced:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import_module("torch")
    finally:
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def resolve_device(name: str) -> torch.device:
    """The device that `--device NAME` means on this machine.

    Raises:
        UserError: it names a GPU that PyTorch does not see.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device(name)
    index = torch.cuda.current_device() if count and device.index is None else device.index or 0
    if index >= count:
        seen = f"PyTorch sees {count} GPU(s)" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise UserError(f"--device: expected a device of this machine, got {name} ({seen})")
    return torch.device("cuda", index)


def versions() -> dict[str, str | None]:
    """Versions of the package, of Python and of what it runs on; None for what is not installed."""
    from .. import __version__

    installed = {name: _installed_version(name) for name in ("torch", "triton", "numpy")}
    return {"tidar_kernels": __version__, "python": platform.python_version(), **installed}


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def print_json(value: Any) -> None:
    """One JSON object on standard output, readable and in UTF-8."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lines of a table whose first row is its head; `align` has `<` or `>` for every column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


class Terminal:
    """Colours and live lines of an output stream, which a file, a pipe or `NO_COLOR` does without."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.live and not os.environ.get("NO_COLOR")

    def dim(self, text: str) -> str:
        return self._styled("2", text)

    def bold(self, text: str) -> str:
        return self._styled("1", text)

    def cyan(self, text: str) -> str:
        return self._styled("36", text)

    def red(self, text: str) -> str:
        return self._styled("31", text)

    def green(self, text: str) -> str:
        return self._styled("32", text)

    def _styled(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text else text

    def safe(self, text: str) -> str:
        """`text` without control characters that a terminal would obey; unchanged elsewhere."""
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text) if self.live else text

    def write(self, text: str) -> None:
        """Write at once, without a line end."""
        self.stream.write(text)
        self.stream.flush()

    def status(self, text: str) -> None:
        """Rewrite the current line with passing news; nothing where nobody watches."""
        if self.live:
            self.write(f"\r{text}\x1b[K")
