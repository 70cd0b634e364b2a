"""Write what is generated in README.md and docs/: tables, listings and pictures.

    python docs/generate.py            rewrite sections and pictures
    python docs/generate.py --check    write nothing; exit 1 and name what is stale

A page holds a generated section between two markers, each on a line of its own:

    <!-- generated: NAME -->
    <!-- /generated -->

NAME is a key of `SECTIONS` in one of the modules of docs/sections/. A picture is compared by the description that is
stored in it, never by its bytes.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import sections  # noqa: E402
from sections import Picture, Section  # noqa: E402

Offer = TypeVar("Offer", Section, Picture)
MARKED = re.compile(r"(^<!-- generated: ([\w-]+) -->\n)(.*?)(^<!-- /generated -->$)", re.DOTALL | re.MULTILINE)


def registered() -> tuple[dict[str, Section], dict[str, Picture]]:
    """All sections and pictures of docs/sections/.

    Raises:
        ValueError: two modules offer the same name.
    """
    texts: dict[str, Section] = {}
    pictures: dict[str, Picture] = {}
    for info in pkgutil.iter_modules(sections.__path__):
        module = importlib.import_module(f"sections.{info.name}")
        _merge(texts, getattr(module, "SECTIONS", {}), info.name)
        _merge(pictures, getattr(module, "PICTURES", {}), info.name)
    return texts, pictures


def _merge(known: dict[str, Offer], offered: dict[str, Offer], module: str) -> None:
    for name in offered:
        if name in known:
            raise ValueError(f"{name}: expected one module to offer it, got a second, docs/sections/{module}.py")
    known.update(offered)


def fill(page: str, text: str, offered: dict[str, Section]) -> tuple[str, set[str]]:
    """`text` with every marked section generated anew, and the names of these sections.

    Raises:
        ValueError: a marker names no section, or is not closed. The message names `page`.
    """
    used: set[str] = set()

    def generate(match: re.Match[str]) -> str:
        name = match[2]
        if name not in offered:
            raise ValueError(f"{page}: expected one of the sections {', '.join(sorted(offered))}, got {name!r}")
        if "<!-- generated:" in match[3]:
            raise ValueError(f"{page}: expected <!-- /generated --> after section {name!r}, got another section")
        used.add(name)
        return f"{match[1]}\n{offered[name]().strip()}\n\n{match[4]}"

    filled = MARKED.sub(generate, text)
    for line in MARKED.sub("", text).splitlines():
        if line.startswith(("<!-- generated:", "<!-- /generated")):
            raise ValueError(f"{page}: expected a pair of section markers, got a lone {line!r}")
    return filled, used


def is_fresh(path: Path, picture: Picture) -> bool:
    """The picture is there and, where it has a description, holds that one."""
    if not path.is_file():
        return False
    if picture.description is None:
        return True
    from PIL import Image

    with Image.open(path) as image:
        return bool(image.info.get("Description") == picture.description())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the generated parts of README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything is stale")
    check = parser.parse_args(arguments).check

    offered, pictures = registered()
    unused, stale = set(offered), []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if not path.is_file():
            continue
        page, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        filled, used = fill(page, text, offered)
        unused -= used
        if filled != text:
            stale.append(page)
            if not check:
                path.write_text(filled, encoding="utf-8")
    for name, picture in pictures.items():
        path = ROOT / "docs" / name
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        elif not is_fresh(path, picture):
            stale.append(f"docs/{name}")

    if unused:
        print(f"no page shows the sections: {', '.join(sorted(unused))}", file=sys.stderr)
    if check and stale:
        print(f"stale, run `make docs`: {', '.join(stale)}", file=sys.stderr)
    elif not check:
        print(f"{len(stale)} page(s) changed, {len(pictures)} picture(s) drawn")
    return 1 if unused or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
