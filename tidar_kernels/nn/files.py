"""Files that are whole at every moment, written beside and then put in place; and JSON, read or refused by name."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["read_json", "replacing"]


def read_json(name: str, path: Path) -> dict[str, Any]:
    """The object in a JSON file of a folder.

    Args:
        name: of the argument that is the folder, for errors.

    Raises:
        FileNotFoundError: there is no such file; other OSErrors: it cannot be read. ValueError: it is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a folder with {path.name}, got {path.parent}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, got one that is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end of the block.

    A killed process, a full disk or an exception in the block leaves the old file as it was; and the unfinished one
    is removed, where there is still a process to do it.

    Raises:
        OSError: it could not be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # which would hide why it failed
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk too, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
