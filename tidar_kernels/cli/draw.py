"""`tidar-kernels draw`: an attention pattern as text or as a PNG."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .common import (
    MAX_TOKENS,
    OK,
    PROGRAM,
    UserError,
    add_json_argument,
    any_path,
    import_torch,
    print_json,
    user_errors,
    whole_number,
)

if TYPE_CHECKING:
    from ..patterns import Pattern

SUMMARY = "draw an attention pattern as text, or as a PNG"

USAGE = "PATTERN [options]"

EPILOG = f"""\
examples:
  {PROGRAM} draw step --block-size 4
  {PROGRAM} draw step --block-size 8 --context-len 100 --out step.png
  {PROGRAM} draw training --seq-len 16 --block-size 4
  {PROGRAM} draw isd --stride 4 --unshifted
  {PROGRAM} draw tree --tokens 4 --json

`{PROGRAM} draw PATTERN --help` lists the parameters of a pattern.
PNG files need matplotlib.
"""

# Rows beyond this are a slip of the keyboard: a million rows take seconds, and any pattern is binned to fit a page.
MAX_ROWS = 2**20
MAX_TREE = 1024  # a tree has a bit for every pair of its nodes


@dataclass(frozen=True)
class _Parameter:
    """A whole number that a pattern is made from: its option, its default, what it means, and its range."""

    option: str
    default: int
    help: str
    least: int = 1
    most: int = MAX_TOKENS

    @property
    def name(self) -> str:
        return self.option.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class _Drawable:
    """A pattern that can be drawn.

    Attributes:
        constructor: module of the package and name of what makes it, or makes the strategy whose `pattern` it is.
        rows: how many rows it has, from its parameters; known before anything is allocated.
        flags: options without a value, `{option: (keyword arguments of the constructor, help)}`.
    """

    summary: str
    constructor: str
    parameters: tuple[_Parameter, ...]
    rows: Callable[..., int]
    flags: dict[str, tuple[dict[str, Any], str]]


_BLOCK_SIZE = _Parameter("--block-size", 4, "B, tokens of a block")

PATTERNS = {
    "step": _Drawable(
        "one TiDAR decode step: B drafts, and a block of B masks for every number of accepted drafts",
        "patterns.tidar_step",
        (_BLOCK_SIZE,),
        lambda block_size: block_size * (block_size + 1),
        {"--causal-blocks": ({"bidirectional": False}, "mask rows see their own block only up to themselves")},
    ),
    "prefill": _Drawable(
        "prompt and first draft in one forward pass",
        "patterns.tidar_prefill",
        (_Parameter("--prompt-len", 8, "tokens of the prompt"), _BLOCK_SIZE),
        lambda prompt_len, block_size: prompt_len + block_size,
        {},
    ),
    "training": _Drawable(
        "the doubled training sequence: clean tokens, then as many masks",
        "patterns.tidar_training",
        (_Parameter("--seq-len", 16, "S, clean tokens"), _BLOCK_SIZE),
        lambda seq_len, block_size: 2 * seq_len,
        {},
    ),
    "causal": _Drawable(
        "plain causal rows",
        "patterns.causal",
        (_Parameter("--length", 8, "number of rows"),),
        lambda length: length,
        {},
    ),
    "isd": _Drawable(
        "one ISD step: N rows that are verified, then masks, all causal",
        "patterns.isd_step",
        (_Parameter("--stride", 4, "N, the most tokens of a step", 2),),
        lambda stride: 2 * stride - 1,
        {
            "--bidirectional": ({"bidirectional": True}, "FLARE rows: the masks see each other both ways"),
            "--unshifted": ({"shifted": False}, "masks that predict the token at their own position: one mask more"),
        },
    ),
    "block": _Drawable(
        "a bidirectional block: a pass of block diffusion, or of self-speculation's drafts",
        "patterns.block_step",
        (_Parameter("--length", 8, "tokens of the block"),),
        lambda length: length,
        {},
    ),
    "tree": _Drawable(
        "the pass that verifies a token tree, each node sees the path to itself",
        "decoding.strategies.tree",
        (_Parameter("--tokens", 8, "the most tokens of a step; the tree has twice as many nodes", 2, MAX_TREE),),
        lambda tokens: 2 * tokens,
        {},
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    patterns = parser.add_subparsers(metavar="PATTERN", title="patterns", dest="pattern", required=True)
    for name, drawable in PATTERNS.items():
        pattern = patterns.add_parser(
            name,
            prog=f"{PROGRAM} draw {name}",
            usage=f"{PROGRAM} draw {name} [options]",
            help=drawable.summary,
            description=drawable.summary[0].upper() + drawable.summary[1:] + ".",
            epilog=f"example:\n  {PROGRAM} draw {name} "
            + " ".join(f"{p.option} {p.default}" for p in drawable.parameters)
            + f" --out {name}.png",
        )
        for parameter in drawable.parameters:
            pattern.add_argument(
                parameter.option,
                type=whole_number(parameter.least, parameter.most),
                default=parameter.default,
                metavar="N",
                help=f"{parameter.help} (default: {parameter.default})",
            )
        for option, (_, text) in drawable.flags.items():
            pattern.add_argument(option, action="store_true", help=text)
        pattern.add_argument(
            "--context-len",
            type=whole_number(0, MAX_TOKENS),
            default=0,
            metavar="N",
            help="P, cached keys that every row sees, drawn before the others (default: 0)",
        )
        pattern.add_argument("--out", type=any_path, metavar="FILE.png", help="write a PNG instead of text")
        add_json_argument(pattern)


def run(options: argparse.Namespace) -> int:
    drawable = PATTERNS[options.pattern]
    arguments = {parameter.name: getattr(options, parameter.name) for parameter in drawable.parameters}
    rows = drawable.rows(**arguments)
    if rows > MAX_ROWS:
        given = ", ".join(f"{parameter.option} {arguments[parameter.name]}" for parameter in drawable.parameters)
        raise UserError(f"{given}: expected a pattern of at most {MAX_ROWS} rows, got {rows}")
    for option, (flag, _) in drawable.flags.items():
        if getattr(options, option.removeprefix("--").replace("-", "_")):
            arguments.update(flag)

    import_torch()
    module, name = drawable.constructor.rsplit(".", 1)
    numbers = [arguments.pop(parameter.name) for parameter in drawable.parameters]
    with user_errors(ValueError, rename={parameter.name: parameter.option for parameter in drawable.parameters}):
        made = getattr(import_module(f"tidar_kernels.{module}"), name)(*numbers, **arguments)
    pattern: Pattern = getattr(made, "pattern", made)
    with user_errors(ImportError, ValueError, rename={"path": "--out"}):
        text = pattern.draw(options.out, context_len=options.context_len)
    if options.json:
        print_json(_described(pattern, options.context_len) | {"png": options.out and str(options.out)})
    elif options.out is not None:
        print(f"{pattern.name}: wrote {options.out}")
    else:
        print(text, end="")
    return OK


def _described(pattern: Pattern, context_len: int) -> dict[str, Any]:
    """A pattern as data: half-open intervals `[lo, hi)` over in-flight keys, and of a tree's rows the keys that
    the tree mask adds; positions relative to the context."""
    from ..patterns import Role
    from ..patterns.rows import unpack_tree_mask

    fields = (pattern.roles, pattern.positions, pattern.lead, pattern.own)
    rows: list[dict[str, Any]] = [
        {"role": Role(role).name.lower(), "position": position, "lead": lead, "own": own}
        for role, position, lead, own in zip(*(field.tolist() for field in fields), strict=True)
    ]
    visible = int((pattern.lead + pattern.own).diff().sum()) + pattern.q_len * context_len
    if pattern.tree_mask is not None:
        others = unpack_tree_mask(pattern.tree_mask, pattern.kv_len)
        visible += int(others.sum())
        for row, seen in zip(rows, others, strict=True):
            row["tree_mask"] = seen.nonzero().flatten().tolist()
            row["bits"] = row["tree_mask"]  # the old name, for a release
    return {
        "pattern": pattern.name,
        "q_len": pattern.q_len,
        "kv_len": pattern.kv_len,
        "context_len": context_len,
        "visible_pairs": visible,
        "rows": rows,
    }
