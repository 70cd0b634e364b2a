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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

if TYPE_CHECKING:
    import torch
    from _typeshed import SupportsWrite

Number = TypeVar("Number", int, float)

PROGRAM = "tidar-kernels"
OK, FAILED, USAGE = 0, 1, 2
INTERRUPTED = 128 + 2  # as a shell reports a command that SIGINT ended

# The largest values that options take. Sizes below them are held against the memory at hand before it is allocated.
MAX_THREADS = 4 * (os.cpu_count() or 1)  # more only get in each other's way, and far more end the process
MAX_TOKENS = 2**30  # of a text: positions and lengths are int32
MAX_BLOCK_SIZE = 1024  # a TiDAR step of this block length has a million rows

_LONGEST_LINE = 1200
_NO_RESOURCES = r"can't allocate|cannot allocate|not enough memory|calculation overflowed|can't start new thread"


class UserError(Exception):
    """Bad input. `main` prints it on one line and exits with code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose examples keep their line breaks."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Before Python 3.13 argparse takes a value "--" (`--option=--`) for the end of the options, and returns [].
        if action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected one argument, got '--'")
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        # argparse's own hides that a help text could not be written.
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


@contextmanager
def user_errors(
    *kinds: type[Exception], rename: Mapping[str, str] | None = None, otherwise: str = ""
) -> Iterator[None]:
    """Exceptions of these kinds, raised inside, are the user's to mend: they become a `UserError`.

    Args:
        rename: messages of the package begin with an argument's name; which option it came from.
        otherwise: `option: expected ..` for messages that do not begin so. Readers raise anything on a file that is not
            what they expect: where one is read, catch `Exception` and say here what it should have been.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        if out_of_resources(error):
            raise
        message = one_line(error)
        name, colon, rest = message.partition(":")
        if otherwise and not rest.startswith(" expected "):
            raise UserError(f"{otherwise}, got {described(error)}") from error
        raise UserError(f"{(rename or {}).get(name, name)}{colon}{rest}") from error


def out_of_resources(error: BaseException) -> bool:
    """Whether memory or threads gave out: Python, PyTorch and its allocators each say so in their own way."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return True
    return isinstance(error, RuntimeError) and re.search(_NO_RESOURCES, str(error)) is not None


def described(error: BaseException) -> str:
    """What an exception says, on one line, and its kind where that says more."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.strerror):
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__


def one_line(message: object) -> str:
    """A message, or what an exception says, on one line, the middle of a very long one cut out."""
    text = " ".join(str(message).split()) or type(message).__name__
    return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE * 2 // 3]} ... {text[-_LONGEST_LINE // 4 :]}"


def whole_number(at_least: int, at_most: int) -> Callable[[str], int]:
    """An argparse type: an int from `at_least` to `at_most`, both included; an error names the bound that it passes."""

    def convert(text: str) -> int:
        value = _parsed(int, text)
        if value is None or value < at_least:
            raise _unfit(f"a whole number >= {at_least}", text)
        if value > at_most:
            raise _unfit(f"a whole number <= {at_most}", text)
        return value

    return convert


def number(kind: type[Number], fits: Callable[[Number], bool], expected: str) -> Callable[[str], Number]:
    """An argparse type: a number of this kind that fits; `expected` says in words which do."""

    def convert(text: str) -> Number:
        value = _parsed(kind, text)
        if value is None or not fits(value):
            raise _unfit(expected, text)
        return value

    return convert


def whole_numbers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers with commas between them."""
    values = [_parsed(int, part) for part in text.split(",")]
    numbers = tuple(value for value in values if value is not None)
    if len(numbers) < len(values):
        raise _unfit("whole numbers with commas between them", text)
    return numbers


def _parsed(kind: type[Number], text: str) -> Number | None:
    """The number that `text` spells in plain ASCII: what else Python reads (1_000, other scripts' digits) is a slip."""
    if not re.fullmatch(r"[+\-.0-9a-zA-Z]+", text):
        return None
    try:
        return kind(text)
    except ValueError:
        return None


def _unfit(expected: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def any_path(text: str) -> Path:
    """An argparse type: the path of a file or a folder, there or not; empty it would mean the current folder."""
    if not text:
        raise _unfit("a path", text)
    return Path(text)


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
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise _unfit("auto, cpu, cuda or cuda:N", text)
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
    # As digits: PyTorch keeps an index in 8 bits, and refuses or wraps a larger one.
    digits = name.partition(":")[2]
    index = digits.lstrip("0") or "0" if digits else str(torch.cuda.current_device() if count else 0)
    if len(index) > 3 or int(index) >= count:
        seen = f"PyTorch sees {count} GPU(s)" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise UserError(f"--device: expected a device of this machine, got {name} ({seen})")
    return torch.device("cuda", int(index))


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
