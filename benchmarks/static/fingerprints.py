"""What a compiled kernel depends on, as one short hash, without compiling it.

That is the source of the kernel and of every device function and constant that it names, the types and specialised
properties of its arguments, and its options. Triton's own `JITFunction.cache_key` would not do: it hashes the text with
its comments, docstrings and line numbers, so that a word in `common.py`, which every kernel calls, would make all
entries stale, and compiling them takes a quarter of an hour. Here none of these change the hash.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import KernelInterface

from tidar_kernels.ops._triton.launch import Launch

_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


def normalised(source: str) -> str:
    """`source` without comments, docstrings and line breaks within statements."""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in _LAYOUT]
    breaks = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    kept: list[str] = []
    starts, waiting = True, False  # at the start of a statement; after a string that started one
    for token in tokens:
        if waiting and token.type == tokenize.NEWLINE:
            kept.pop()
        else:
            kept.append(tokenize.tok_name[token.type] if token.type in breaks else token.string)
        waiting = starts and token.type == tokenize.STRING
        starts = token.type in breaks
    return " ".join(kept)


@functools.cache
def sources(kernel: Any) -> dict[str, str]:
    """Name -> source or value of a kernel and of all that it names, directly or through others."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop().fn
        if function.__name__ in found:
            continue
        source = textwrap.dedent(inspect.getsource(function))
        found[function.__name__] = normalised(source)
        for name in sorted({node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}):
            value = function.__globals__.get(name)
            if isinstance(value, KernelInterface):
                waiting.append(value)
            elif isinstance(value, (bool, int, float, str, tl.constexpr)):
                found[name] = repr(value)
    return found


def _described(value: Any) -> Iterator[str]:
    """An argument as far as Triton specialises on it: of a tensor no address, of a float no value."""
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{' large' if value.untyped_storage().size() >= 2**31 else ''}"
    elif isinstance(value, tuple):
        for part in value:
            yield from _described(part)
    else:
        yield "float" if isinstance(value, float) else repr(value)


def fingerprint(launch: Launch) -> str:
    """16 hexadecimal digits that change with whatever the binary of `launch` depends on, but for Triton and chip."""
    parts = [*sorted(sources(launch.kernel).items()), *_described(launch.args), *sorted(launch.options.items())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
