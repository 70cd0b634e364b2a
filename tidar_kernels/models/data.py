"""Training text: the Python standard library's own sources, read from the running interpreter; none of it is shipped.

A fixed list of modules is held out by name. They are never trained on, and the evaluation and the demo use them.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .tokenizer import EOS_ID

__all__ = ["HELD_OUT", "Corpus", "held_out_texts", "stdlib_folder", "training_files"]

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

# An additive recurrence with this step spreads window starts evenly over the corpus, at every number of windows.
_GOLDEN = 0.6180339887498949


def stdlib_folder() -> Path:
    """Where the running interpreter keeps the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def training_files(folder: Path | None = None) -> list[Path]:
    """The `.py` files that are trained on, relative to `folder` (default: the standard library), sorted by name.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = stdlib_folder() if folder is None else folder
    held_out = set(HELD_OUT)
    files = [
        path.relative_to(folder)
        for path in folder.rglob("*.py")
        if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts)
        and not any(part.startswith(SKIPPED_PREFIXES) for part in path.relative_to(folder).parts)
        and path.relative_to(folder).as_posix() not in held_out
    ]
    if not files:
        raise FileNotFoundError(f"folder: expected .py files to train on in {folder}, got none")
    return sorted(files, key=lambda path: path.as_posix())


def held_out_texts(folder: Path | None = None) -> dict[str, bytes]:
    """Name and source of every held-out module that this interpreter has."""
    folder = stdlib_folder() if folder is None else folder
    return {name: (folder / name).read_bytes() for name in HELD_OUT if (folder / name).is_file()}


class Corpus:
    """All training files in one stream of tokens, each ended by EOS.

    Attributes:
        tokens: int16 `[num_tokens]`.
        num_files: how many files went in.
        sha256: digest of the stream, which says whether two machines trained on the same text.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = stdlib_folder() if folder is None else folder
        files = training_files(folder)
        end = np.array([EOS_ID], dtype=np.int16)
        parts = [part for f in files for part in (np.frombuffer((folder / f).read_bytes(), np.uint8), end)]
        self.tokens = np.concatenate(parts).astype(np.int16)
        self.num_files = len(files)
        self.sha256 = hashlib.sha256(self.tokens.tobytes()).hexdigest()

    def windows(self, first: int, count: int, length: int, seed: int) -> Tensor:
        """Windows number `first .. first + count` of the endless sequence of windows that `seed` fixes.

        Starts follow an additive recurrence, so they cover the corpus evenly and fall on every block alignment, and a
        window is a function of its number alone: a resumed run sees what an uninterrupted one would have seen.

        Returns:
            int64 `[count, length]`.

        Raises:
            ValueError: the corpus is shorter than `length`.
        """
        room = len(self.tokens) - length + 1
        if room < 1:
            raise ValueError(f"length: expected <= {len(self.tokens)} tokens of corpus, got {length}")
        offset = np.random.default_rng(seed).random()
        places = (offset + np.arange(first, first + count) * _GOLDEN) % 1.0
        starts = (places * room).astype(np.int64)
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(length)].astype(np.int64))
