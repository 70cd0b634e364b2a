"""Ragged rows in kernels: which sequence a row is of, from `cu_rows` on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Ragged(NamedTuple):
    """`cu_rows` as a kernel operand, with the number of sequences."""

    ptr: Any
    batch: int


@triton.jit
def sequence_of(row, ragged):
    """`(sequence, token)` of ragged rows: as many sequences as end at or before a row come before its own."""
    sequence = tl.zeros_like(row)
    for first in range(0, ragged.batch, 64):
        i = first + tl.arange(0, 64)
        end = tl.load(ragged.ptr + 1 + i, mask=i < ragged.batch, other=2147483647).to(tl.int64)
        sequence += tl.sum((end[None, :] <= row[:, None]).to(tl.int64), axis=1)
    return sequence, row - tl.load(ragged.ptr + sequence, mask=sequence < ragged.batch, other=0)
