"""Files that are whole at every moment, written beside, then put in place; JSON and saved states, read or refused."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["loading_state", "read_json", "read_state", "replacing"]


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


def read_state(path: Path, kinds: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """A dict that `torch.save` wrote, on the CPU, with entries of these types.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is truncated, damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"resume: expected {path}, got no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"damaged data in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
        missing = kinds.keys() - state.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))} in it")
        for name, kind in kinds.items():
            if not isinstance(state[name], kind) or isinstance(state[name], bool):
                raise ValueError(f"a {type(state[name]).__name__} as {name}")
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected the whole state of a training run, got {reason}") from None
    return state


@contextlib.contextmanager
def loading_state(path: Path) -> Iterator[None]:
    """Within it what a state holds is put into a model and its optimisers.

    Raises:
        ValueError: it does not fit them.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: expected weights and optimisers of the model that its config says, got {reason}"
        ) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end of the block.

    A killed process, a full disk or an exception in the block leaves the old file as it was; and the unfinished one
    is removed, where there is still a process to do it. Only a file can be replaced: a device would be gone for all.

    Raises:
        OSError: it could not be written, or `path` is there and no file.
    """
    if path.exists() and not path.is_file():
        raise OSError(
            f"{path}: expected a file, or a name that is free, got {'a folder' if path.is_dir() else 'a device'}"
        )
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
