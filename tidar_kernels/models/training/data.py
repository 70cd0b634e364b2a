"""Training text: the Python standard library's own sources, read from the running interpreter, or any folder's files.

Of the standard library a fixed list of modules is held out by name, of another folder the files that the caller names
or a fixed choice of them. They are never trained on; the evaluation and the demo use them. No text is shipped.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops import checks
from ...patterns.arguments import check_instance, check_int, check_path, check_strings
from ..tokenizer import EOS_ID

__all__ = [
    "HELD_OUT",
    "Corpus",
    "TextFiles",
    "document_lengths",
    "folder_files",
    "held_out_texts",
    "stdlib_files",
    "stdlib_folder",
]

# Different styles on purpose: algorithms, classes, numerics, threading, text handling, docstring-heavy and terse code.
HELD_OUT = (
    "colorsys.py",
    "csv.py",
    "graphlib.py",
    "heapq.py",
    "json/encoder.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "string.py",
    "textwrap.py",
    "wsgiref/util.py",
)

# Tests outweigh the library and often quote the module they test; encodings and pydoc_data are generated tables.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
# Written when the interpreter was built: they name the machine and its compiler.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

# Where no held-out files are named, one file in so many is held out.
_HELD_OUT_SHARE = 20

# An additive recurrence with this step spreads window starts evenly over the corpus, at every number of windows.
_GOLDEN = 0.6180339887498949


def stdlib_folder() -> Path:
    """Where the running interpreter keeps the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


@dataclass(frozen=True)
class TextFiles:
    """Files of a folder: those trained on and those held out, by their names relative to it, each sorted.

    Attributes:
        suffixes: how the names end that were looked for; None for the standard library, which has its own rule.
    """

    folder: Path
    training: tuple[str, ...]
    held_out: tuple[str, ...]
    suffixes: tuple[str, ...] | None = None

    def held_out_texts(self) -> dict[str, bytes]:
        """Name and bytes of every held-out file."""
        return {name: (self.folder / name).read_bytes() for name in self.held_out}

    def record(self) -> dict[str, Any] | None:
        """What `from_record` needs to find the same files again; None for the standard library."""
        if self.suffixes is None:
            return None
        folder = str(self.folder.resolve())
        return {"folder": folder, "suffixes": list(self.suffixes), "held_out": list(self.held_out)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any] | None) -> TextFiles:
        """Raises what `folder_files` and `stdlib_files` raise, if the files are no longer there."""
        if record is None:
            return stdlib_files()
        return folder_files(Path(record["folder"]), record["suffixes"], record["held_out"])


def stdlib_files(folder: Path | None = None) -> TextFiles:
    """The standard library in `folder` (default: the running interpreter's), without tests and generated tables.

    Raises:
        FileNotFoundError: there is no `.py` file to train on.
    """
    folder = stdlib_folder() if folder is None else check_path("folder", folder)
    names = [
        name
        for name in _names(folder, (".py",))
        if not SKIPPED_FOLDERS & set(PurePosixPath(name).parts)
        and not any(part.startswith(SKIPPED_PREFIXES) for part in PurePosixPath(name).parts)
        and name not in HELD_OUT
    ]
    if not names:
        raise FileNotFoundError(f"folder: expected .py files to train on in {folder}, got none")
    return TextFiles(folder, tuple(names), tuple(name for name in HELD_OUT if (folder / name).is_file()))


def folder_files(folder: Path, suffixes: Sequence[str] = (".py",), held_out: Sequence[str] = ()) -> TextFiles:
    """All files below `folder` whose names end in one of `suffixes`, except hidden ones and those in hidden folders.

    Args:
        held_out: names relative to the folder. By default about 1 in 20, at least one and never all, chosen by a hash
            of the name: other files coming or going do not change on which side a file is.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
        TypeError, ValueError: an argument is of another type, a held-out file is not among the files, or none is left
            to train on.
    """
    folder, suffixes = check_path("folder", folder), check_strings("suffixes", suffixes)
    held_out = check_strings("held_out", held_out)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected a folder, got {folder}")
    wanted = ", ".join(suffixes)
    names = [name for name in _names(folder, tuple(suffixes)) if "/." not in f"/{name}"]
    if not names:
        raise FileNotFoundError(f"folder: expected {wanted} files in {folder}, got none")
    if len(names) < 2:
        raise ValueError(f"folder: expected two or more {wanted} files in {folder}, one to hold out, got {names[0]}")
    chosen = {PurePosixPath(name).as_posix() for name in held_out} or _choice(names)
    if unknown := sorted(chosen - set(names)):
        raise ValueError(f"held_out: expected names of {wanted} files in {folder}, got {unknown[0]}")
    training = tuple(name for name in names if name not in chosen)
    if not training:
        raise ValueError(f"held_out: expected some of the {len(names)} files of {folder} to be left, got all of them")
    return TextFiles(folder, training, tuple(sorted(chosen)), tuple(suffixes))


def _names(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    found = (path for path in folder.rglob("*") if path.name.endswith(suffixes) and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _choice(names: Sequence[str]) -> set[str]:
    """Held-out files of two or more `names`."""
    by_hash = sorted(names, key=_hash)
    chosen = [name for name in by_hash if _hash(name) % _HELD_OUT_SHARE == 0]
    return set(chosen[: len(names) - 1] or by_hash[:1])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()[:8], "big")


def held_out_texts() -> dict[str, bytes]:
    """Name and source of every held-out module that this interpreter has."""
    folder = stdlib_folder()
    return {name: (folder / name).read_bytes() for name in HELD_OUT if (folder / name).is_file()}


def document_lengths(tokens: Tensor) -> list[int]:
    """Tokens of each document in windows `[batch, S]` laid end to end: EOS ends a document, and so does a window.

    Raises:
        TypeError, ValueError: `tokens` are no ints `[batch, S]`, S >= 1.
    """
    checks.tensor("tokens", tokens, 2)
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens: expected dtype int64, got {tokens.dtype}")
    if not tokens.shape[1]:
        raise ValueError(f"tokens: expected at least one in a window, got shape {list(tokens.shape)}")
    ends = tokens == EOS_ID
    ends[:, -1] = True
    last = ends.flatten().nonzero().flatten()
    return torch.diff(last, prepend=last.new_tensor([-1])).tolist()


class Corpus:
    """All training files in one stream of tokens, each ended by EOS.

    Args:
        files: default the standard library.

    Attributes:
        tokens: int16 `[num_tokens]`.
        num_files: how many files went in.
        sha256: digest of the stream, which says whether two machines trained on the same text.
    """

    def __init__(self, files: TextFiles | None = None) -> None:
        self.files = stdlib_files() if files is None else check_instance("files", files, TextFiles)
        end = np.array([EOS_ID], dtype=np.int16)
        texts = ((self.files.folder / name).read_bytes() for name in self.files.training)
        parts = [part for text in texts for part in (np.frombuffer(text, np.uint8), end)]
        self.tokens = np.concatenate(parts).astype(np.int16)
        self.num_files = len(self.files.training)
        self.sha256 = hashlib.sha256(self.tokens.tobytes()).hexdigest()

    def windows(self, first: int, count: int, length: int, seed: int) -> Tensor:
        """Windows number `first .. first + count` of the endless sequence of windows that `seed` fixes.

        Starts follow an additive recurrence, so they cover the corpus evenly and fall on every block alignment, and a
        window is a function of its number alone: a resumed run sees what an uninterrupted one would have seen.

        Returns:
            int64 `[count, length]`.

        Raises:
            TypeError, ValueError: a number is no int that fits, or the corpus is shorter than `length`.
        """
        check_int("first", first, 0, 2**62)
        check_int("count", count, 0, 2**31)
        check_int("seed", seed, 0, 2**64)
        check_int("length", length, 1)
        room = len(self.tokens) - length + 1
        if room < 1:
            raise ValueError(f"length: expected <= {len(self.tokens)} tokens of corpus, got {length}")
        offset = np.random.default_rng(seed).random()
        places = (offset + np.arange(first, first + count) * _GOLDEN) % 1.0
        starts = (places * room).astype(np.int64)
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(length)].astype(np.int64))
