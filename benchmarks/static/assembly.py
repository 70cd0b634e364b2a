"""Reading assembly: the loop that a kernel spends its time in, counted by class of instruction. Text in, numbers out.

NVIDIA's SASS as nvdisasm prints it, and AMD's as the compiler leaves it in `asm["amdgcn"]`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx


@dataclass(frozen=True)
class Dialect:
    """How one assembler writes things. All patterns match one line from its start, comments and addresses removed.

    Args:
        noise: what is removed from a line before it is read.
        jump: a branch to a label, captured; its line also matches `always` where nothing falls through.
        always: a line after which control does not go on to the next.
        classes: instruction classes in the order they are tried; what matches none is "other".
    """

    noise: re.Pattern[str]
    jump: re.Pattern[str]
    always: re.Pattern[str]
    classes: dict[str, re.Pattern[str]]


SASS = Dialect(
    noise=re.compile(r"/\*.*?\*/|;.*"),
    jump=re.compile(r"(?:@\S+\s+)?(?:BRA|CALL)\S*\s.*`\((\.\w+)\)"),
    always=re.compile(r"BRA\S*\s+`|EXIT|RET|KILL|BRX|JMP"),
    classes={
        "mma": re.compile(r"(?:@\S+\s+)?[A-Z]+MMA\b"),
        "fma": re.compile(r"(?:@\S+\s+)?F(?:FMA|ADD|MUL)2?\b"),
        "mufu": re.compile(r"(?:@\S+\s+)?MUFU\b"),
        "shared": re.compile(r"(?:@\S+\s+)?(?:LDSM?|STSM?)\b"),
        "global": re.compile(r"(?:@\S+\s+)?(?:LDG|LDGSTS|UTMALDG|STG|UBLKCP)\b"),
        "local": re.compile(r"(?:@\S+\s+)?(?:LDL|STL)\b"),
        "barrier": re.compile(r"(?:@\S+\s+)?BAR\b"),
    },
)
AMDGCN = Dialect(
    noise=re.compile(r";.*|//.*"),
    jump=re.compile(r"s_c?branch\w*\s+(\.\w+)"),
    always=re.compile(r"s_branch|s_endpgm|s_setpc"),
    classes={
        "mma": re.compile(r"v_\w*mfma"),
        "fma": re.compile(r"v_(?:pk_)?(?:fma|fmac|add|mul|mac)(?:k|ak|mk)?_f32"),
        "mufu": re.compile(r"v_(?:exp|log|rcp|rsq|sqrt)_f32"),
        "shared": re.compile(r"ds_(?:read|write|load|store)"),
        "global": re.compile(r"(?:global|buffer|flat)_(?:load|store)"),
        "local": re.compile(r"scratch_(?:load|store)"),
        "barrier": re.compile(r"s_barrier"),
    },
)
_LABEL = re.compile(r"(\.\w+):")
_COPY_WAIT = re.compile(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)")
_LOAD = re.compile(r"(?:@\S+\s+)?LDG\S*?(\.64|\.128)?\s+R(\d+),")
_INSTRUCTION = re.compile(r"(?:@\S+\s+)?[A-Za-z][\w.]*(?:\s|$)")


@dataclass
class _Block:
    """Instructions without a branch between them; `next` holds indices of blocks."""

    lines: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


def instructions(text: str, dialect: Dialect) -> list[str]:
    """The instructions of a listing in order, without addresses, comments, labels and directives."""
    stripped = (dialect.noise.sub("", line).strip() for line in text.splitlines())
    return [line for line in stripped if _INSTRUCTION.match(line)]


def _blocks(text: str, dialect: Dialect) -> list[_Block]:
    blocks, at, jumps = [_Block()], {}, []
    falls = True  # whether the line before goes on to this one
    for raw in text.splitlines():
        line = dialect.noise.sub("", raw).strip()
        label = _LABEL.match(line)
        if label or (not falls and blocks[-1].lines):
            if falls:
                blocks[-1].next.append(len(blocks))
            blocks.append(_Block())
            falls = True
        if label:
            at[label[1]] = len(blocks) - 1
        elif _INSTRUCTION.match(line):
            blocks[-1].lines.append(line)
            target = dialect.jump.match(line)
            if target:
                jumps.append((len(blocks) - 1, target[1]))
            falls = dialect.always.match(line) is None
            if target and falls:
                blocks[-1].next.append(len(blocks))
                blocks.append(_Block())
    for index, name in jumps:
        if name in at:
            blocks[index].next.append(at[name])
    return blocks


def _loops(blocks: Sequence[_Block]) -> list[frozenset[int]]:
    """Natural loops as sets of blocks: a branch back to a block that dominates it, and all between."""
    graph = networkx.DiGraph((index, to) for index, block in enumerate(blocks) for to in block.next)
    graph.add_node(0)
    graph = graph.subgraph({0} | networkx.descendants(graph, 0))
    found = []
    for head in graph:
        others = graph.subgraph(set(graph) - {head})
        past = {0} | networkx.descendants(others, 0) if head else set()  # what is reached without passing it
        ends = set(graph.predecessors(head)) - past
        if ends:
            found.append(frozenset(ends.union({head}, *(networkx.ancestors(others, end) for end in ends - {head}))))
    return found


def hot_loop(text: str, dialect: Dialect) -> list[str]:
    """The instructions of the loop that does the multiplying; empty if no loop multiplies.

    That is a loop with tensor-core instructions, or where no loop has them one with plain multiplications, inside which
    there is no other such loop. Of several, as the loops over unmasked and masked tiles, it is the one with most of
    them, then one that waits for asynchronous copies, as only a loop that is worth a pipeline does, and then the
    shortest.
    """
    blocks = _blocks(text, dialect)
    counted = []
    for body in _loops(blocks):
        lines = [line for index in sorted(body) for line in blocks[index].lines]
        counted.append((body, lines, Counter(_class(line, dialect) for line in lines)))
    for kind in ("mma", "fma"):
        multiplying = [(body, lines, count) for body, lines, count in counted if count[kind]]
        innermost = [one for one in multiplying if not any(body < one[0] for body, _, _ in multiplying)]
        if innermost:
            return min(innermost, key=lambda one: (-one[2][kind], copies_ahead(one[1]) is None, len(one[1])))[1]
    return []


def by_class(lines: Sequence[str], dialect: Dialect) -> dict[str, int]:
    """How many instructions of each class; empty for no lines."""
    count = Counter(_class(line, dialect) for line in lines)
    return {name: count[name] for name in (*dialect.classes, "other")} if lines else {}


def copies_ahead(lines: Sequence[str]) -> int | None:
    """Of SASS: groups of asynchronous copies to shared memory that are still under way where a loop waits for its own.

    0 means that each iteration waits for all its copies: nothing of their latency overlaps with its work. None if the
    loop waits for none.
    """
    waits = [int(found[1], 16) for line in lines if (found := _COPY_WAIT.match(line))]
    return min(waits, default=None)


def load_to_use(lines: Sequence[str]) -> tuple[int, int] | None:
    """Of SASS: what a loop does between a load of global memory into registers and the first use of what it loads.

    Counted in `(instructions, tensor-core instructions among them)`, over the end of an iteration into the next; of
    several loads, that with the least between. None for a loop without one: asynchronous copies are waited for
    elsewhere (`copies_ahead`).
    """
    found = []
    for at, line in enumerate(lines):
        if load := _LOAD.match(line):
            first = int(load[2])
            names = "|".join(str(first + i) for i in range({None: 1, ".64": 2, ".128": 4}[load[1]]))
            names_one = re.compile(rf"\bR(?:{names})\b")
            after = [*lines[at + 1 :], *lines[:at]]
            between = next((i for i, other in enumerate(after) if names_one.search(other)), len(after))
            found.append((between, sum(_class(other, SASS) == "mma" for other in after[:between])))
    return min(found, default=None)


def _class(line: str, dialect: Dialect) -> str:
    return next((name for name, pattern in dialect.classes.items() if pattern.match(line)), "other")
