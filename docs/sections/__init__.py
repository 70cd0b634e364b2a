"""What `docs/generate.py` writes: each module here offers `SECTIONS`, `PICTURES`, or both.

`SECTIONS` maps the name in a page's marker to a function that returns Markdown; `PICTURES` maps a path below `docs/`
to a `Picture`. A new module is found by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Section = Callable[[], str]


@dataclass(frozen=True)
class Picture:
    """A generated PNG.

    `save` writes it to a path. `description`, where given, is the text that `save` stores in the file under
    `Description`: it tells a stale picture from a fresh one on any machine, where bytes differ with the fonts.
    """

    save: Callable[[Path], None]
    description: Callable[[], str] | None = None
