"""Ragged batches: requests in one launch, each with a pattern and a number of rows of its own, known to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_device, check_instances, check_int, check_ints, check_sequence
from .causal import causal
from .pattern import Pattern
from .rows import ordinary, pack_tree_mask, unpack_tree_mask

__all__ = ["PatternBatch", "PatternTable", "batch", "cut"]

UNLIMITED = 2**31 - 1  # the reach of a row without a window, beside rows that have one


class PatternTable(NamedTuple):
    """The rows of several patterns one after another, int32 on one device.

    Attributes:
        offsets: `[patterns + 1]`: the rows of pattern j are `[offsets[j], offsets[j + 1])` of what follows.
        lead, own: `[table_rows, 2]`, intervals over the in-flight keys of the request, as in `Pattern`.
        positions: `[table_rows]`, minus the request's context.
        reach: `[table_rows]`, `2**31 - 1` for a row without a window; None if no row has one.
        tree_mask: `[table_rows, words]`, with the words of the widest pattern; None if no pattern has one.
        kept_lens: `[patterns]`, the leading rows whose K/V may enter the cache (`Pattern.kept_len`).
    """

    offsets: Tensor
    lead: Tensor
    own: Tensor
    positions: Tensor
    reach: Tensor | None
    tree_mask: Tensor | None
    kept_lens: Tensor


class _Derived:
    """What a batch computes from its fields. Not a dataclass: copies, pickles and rebuilt batches take the fields."""

    table: PatternTable
    _windowed: dict[int, PatternBatch]


@dataclass(frozen=True, eq=False)
class PatternBatch(_Derived):
    """Requests of one launch: request b has the first `cu_rows[b + 1] - cu_rows[b]` rows of pattern `kinds[b]`.

    Rows are also keys: of a request with fewer rows than its pattern (a cut step) the keys past them are not there, so
    intervals end at its number of rows. Its rows see its own context and its own keys, and those of nobody else.

    `kinds` and `cu_rows` may be written in place (`copy_`): a graph that was captured with this batch then serves
    another mix of the same patterns, as long as its rows fit.

    It can be copied, pickled and rebuilt from its fields; to `torch.utils._pytree` it is a leaf. Made by `batch`.

    Args:
        patterns: the distinct patterns.
        kinds: int32 `[batch]`, an index into `patterns`; of an idle request -1 or anything else.
        cu_rows: int32 `[batch + 1]`, ascending from 0, on the device of `kinds`.
        num_rows: rows of the operands; those at and past `cu_rows[batch]` are nobody's.

    Attributes:
        table: the rows of the patterns, on the same device (`PatternTable`).

    Raises:
        TypeError: a field has another type or dtype. ValueError: shapes or devices disagree, there is no pattern, or
            one does not have as many keys as rows.
    """

    patterns: tuple[Pattern, ...]
    kinds: Tensor
    cu_rows: Tensor
    num_rows: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(check_instances("patterns", self.patterns, Pattern)))
        for index, pattern in enumerate(self.patterns):
            if pattern.kv_len != pattern.q_len:
                raise ValueError(
                    f"patterns: expected as many keys as rows, got {pattern.kv_len} keys of {pattern.q_len} rows in "
                    f"{pattern.name} at {index}"
                )
        check_int("num_rows", self.num_rows, 0, 2**31)  # cu_rows is int32
        for name in ("kinds", "cu_rows"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != torch.int32 or value.ndim != 1:
                got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name}: expected an int32 tensor of one dimension, got {got}")
            object.__setattr__(self, name, ordinary(value, value.device))
        if len(self.cu_rows) != len(self.kinds) + 1:
            raise ValueError(f"cu_rows: expected shape [{len(self.kinds) + 1}], got {list(self.cu_rows.shape)}")
        if self.cu_rows.device != self.kinds.device:
            raise ValueError(f"cu_rows: expected device {self.kinds.device} like kinds, got {self.cu_rows.device}")
        with torch.inference_mode(False):  # a batch made while decoding must still serve training
            vars(self)["table"] = _table(self.patterns, self.kinds.device)
        vars(self)["_windowed"] = {}

    def __len__(self) -> int:
        """Number of requests, idle ones included."""
        return len(self.kinds)

    @property
    def device(self) -> torch.device:
        return self.kinds.device

    def rows_of(self) -> tuple[Tensor, Tensor]:
        """`(request, token)` of each row, int64 `[num_rows]` on the device; the request of a row that is nobody's is
        the batch size."""
        row = torch.arange(self.num_rows, device=self.device)
        request = torch.searchsorted(self.cu_rows[1:], row, right=True)
        return request, row - self.cu_rows[request]

    def positions(self, lengths: Tensor | None = None) -> Tensor:
        """The position of each row, int64 `[num_rows]` on the device: minus its request's context, or with `lengths
        [batch]`, int32 or int64 and on that device, not; 0 of a row that is nobody's.

        Raises:
            TypeError, ValueError: `lengths` is none of these.
        """
        if lengths is not None:
            if not isinstance(lengths, Tensor):
                raise TypeError(f"lengths: expected a torch.Tensor, got {type(lengths).__name__}")
            if lengths.shape != (len(self),):
                raise ValueError(f"lengths: expected shape [{len(self)}], got {list(lengths.shape)}")
            if lengths.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"lengths: expected dtype int32 or int64, got {lengths.dtype}")
            if lengths.device != self.device:
                raise ValueError(f"lengths: expected device {self.device} like the batch, got {lengths.device}")
        request, token = self.rows_of()
        somebodys = request < len(self)
        request = torch.where(somebodys, request, 0)
        row = self.table.offsets[self.kinds[request]] + torch.where(somebodys, token, 0)
        position = self.table.positions[torch.where(somebodys, row, 0)].long()
        if lengths is not None:
            position = position + lengths[request]
        return torch.where(somebodys, position, 0)

    @property
    def kept(self) -> Tensor:
        """The leading rows of each request whose K/V may enter the cache, int32 `[batch]` on the device."""
        rows = self.cu_rows.diff()
        return torch.minimum(self.table.kept_lens[torch.where(rows > 0, self.kinds, 0)], rows)

    def pattern(self, request: int) -> Pattern:
        """What the rows of one request see, as a pattern of their number; of an idle request one without rows.

        Reads the device.

        Raises:
            ValueError: no such request.
        """
        if not 0 <= check_int("request", request, 0) < len(self):
            raise ValueError(f"request: expected 0 <= request < {len(self)}, got {request}")
        first, end = self.cu_rows[request : request + 2].tolist()
        kind = int(self.kinds[request]) if end > first else 0
        return cut(self.patterns[kind], end - first)

    def dense(self, context_lens: Sequence[int]) -> list[Tensor]:
        """The mask of each request, bool `[rows, context_len + rows]`, context columns first: the oracle of every test.

        Raises:
            ValueError: there is not one context length a request.
        """
        context_lens = check_ints("context_lens", context_lens, 0, 2**31)
        if len(context_lens) != len(self):
            raise ValueError(f"context_lens: expected {len(self)} lengths, got {len(context_lens)}")
        return [self.pattern(request).dense(length) for request, length in enumerate(context_lens)]

    def windowed(self, window: int) -> PatternBatch:
        """The same requests with a sliding window (`Pattern.windowed`); kept, and on the same `kinds` and `cu_rows`."""
        if check_int("window", window, 1) not in self._windowed:
            self._windowed[window] = replace(self, patterns=tuple(p.windowed(window) for p in self.patterns))
        return self._windowed[window]

    def copy_(self, other: PatternBatch) -> PatternBatch:
        """Take over another mix of the same patterns, in place on the device.

        Raises:
            TypeError: no batch. ValueError: `other` has other patterns, another number of requests, or more rows.
        """
        if not isinstance(other, PatternBatch):
            raise TypeError(f"other: expected a PatternBatch, got {type(other).__name__}")
        if len(self.patterns) != len(other.patterns) or not all(map(_equal, self.patterns, other.patterns)):
            raise ValueError("other: expected the same patterns in the same order; give both batches one `table`")
        if len(self) != len(other):
            raise ValueError(f"other: expected {len(self)} requests, got {len(other)}")
        if other.num_rows > self.num_rows:
            raise ValueError(f"other: expected at most {self.num_rows} rows, got {other.num_rows}")
        self.kinds.copy_(other.kinds)
        self.cu_rows.copy_(other.cu_rows)
        return self

    def to(self, *args: Any, **kwargs: Any) -> PatternBatch:
        """This batch on another device; takes what `torch.nn.Module.to` takes, and leaves dtypes as they are."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is None or device == self.device:
            return self
        return replace(self, kinds=ordinary(self.kinds, device), cu_rows=ordinary(self.cu_rows, device))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made of the fields, without what was derived from them."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


def batch(
    patterns: Sequence[Pattern | None],
    rows: Sequence[int] | None = None,
    *,
    num_rows: int | None = None,
    table: Sequence[Pattern] | None = None,
    device: torch.device | str = "cpu",
) -> PatternBatch:
    """Requests of one launch, each with its pattern: a prefill chunk (`causal`), a step, a cut step, none (idle).

    Args:
        patterns: of each request; None for an idle one. Equal patterns are one kind.
        rows: rows of each request, at most those of its pattern: the first ones, drafts before masks. Default all.
        num_rows: rows of the operands, for graphs that are captured once; default those of the requests.
        table: the kinds, in order, where they are to be the same in several batches; default the patterns that occur.
        device: of the batch.

    Raises:
        TypeError: an entry is neither a `Pattern` nor None. ValueError: there is no request, a pattern does not have as
            many keys as rows or is not in `table`, or rows do not fit.
    """
    device = check_device("device", device)
    patterns = check_sequence("patterns", patterns, "patterns")
    if not patterns:
        raise ValueError("patterns: expected at least one request, got none")
    for request, pattern in enumerate(patterns):
        if pattern is not None and not isinstance(pattern, Pattern):
            raise TypeError(f"patterns: expected tidar_kernels.Pattern, got {type(pattern).__name__} at {request}")
    counts = [0 if pattern is None else pattern.q_len for pattern in patterns]
    if rows is not None:
        rows = check_ints("rows", rows, 0)
        if len(rows) != len(patterns):
            raise ValueError(f"rows: expected {len(patterns)} numbers of rows, got {len(rows)}")
        for request, (count, most) in enumerate(zip(rows, counts, strict=True)):
            if count > most:
                raise ValueError(f"rows: expected at most the {most} rows of its pattern, got {count} in {request}")
        counts = rows
    distinct = [] if table is None else check_instances("table", table, Pattern)
    kinds = []
    for pattern in patterns:
        if pattern is None:
            kinds.append(-1)
            continue
        kind = next((kind for kind, known in enumerate(distinct) if _equal(known, pattern)), None)
        if kind is None:
            if table is not None:
                raise ValueError(f"table: expected the patterns of all requests, got none like {pattern.name}")
            kind = len(distinct)
            distinct.append(pattern)
        kinds.append(kind)
    if not distinct:  # so that there is something to look up for idle requests
        distinct.append(causal(1))
    with torch.inference_mode(False):
        ends = torch.tensor([0, *counts], device="cpu").cumsum(0)
        total = int(ends[-1])
        if num_rows is not None and check_int("num_rows", num_rows, 0) < total:
            raise ValueError(f"num_rows: expected at least the {total} rows of the requests, got {num_rows}")
        return PatternBatch(
            tuple(distinct),
            torch.tensor(kinds, dtype=torch.int32, device="cpu").to(device),
            ends.to(torch.int32).to(device),
            total if num_rows is None else num_rows,
        )


def cut(pattern: Pattern, rows: int) -> Pattern:
    """The first rows of a pattern whose rows are its keys, with the keys of the others gone."""
    if rows == pattern.q_len:
        return pattern
    lead, own = (x[:rows].clamp(max=rows) for x in (pattern.lead, pattern.own))
    tree_mask = pattern.tree_mask
    if tree_mask is not None:
        tree_mask = pack_tree_mask(unpack_tree_mask(tree_mask[:rows], pattern.kv_len)[:, :rows])
    return Pattern(
        lead,
        own,
        pattern.positions[:rows],
        rows,
        pattern.roles[:rows],
        name=f"{pattern.name}[:{rows}]",
        reach=None if pattern.reach is None else pattern.reach[:rows],
        window_positions=None if pattern.window_positions is None else pattern.window_positions[:rows],
        tree_mask=tree_mask,
    )


def _equal(one: Pattern, other: Pattern) -> bool:
    """Whether two patterns have the same rows; what they predict and what they are called does not matter here."""
    if one is other:
        return True
    if one.q_len != other.q_len or one.kv_len != other.kv_len:
        return False
    for name in ("lead", "own", "positions", "roles", "reach", "key_positions", "tree_mask", "window_positions"):
        a, b = getattr(one, name), getattr(other, name)
        if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
            return False
    return True


def _table(patterns: Sequence[Pattern], device: torch.device) -> PatternTable:
    """The rows of the patterns one after another."""
    counts = torch.tensor([0, *(p.q_len for p in patterns)], device="cpu")
    reach = tree_mask = None
    if any(p.reach is not None for p in patterns):
        unlimited = [torch.full((p.q_len,), UNLIMITED, dtype=torch.int32, device="cpu") for p in patterns]
        reach = torch.cat([other if p.reach is None else p.reach for p, other in zip(patterns, unlimited, strict=True)])
    words = max((p.tree_mask.shape[1] for p in patterns if p.tree_mask is not None), default=0)
    if any(p.tree_mask is not None for p in patterns):
        masks = [
            torch.zeros(p.q_len, 0, dtype=torch.int32, device="cpu") if p.tree_mask is None else p.tree_mask
            for p in patterns
        ]
        tree_mask = torch.cat([torch.nn.functional.pad(mask, (0, words - mask.shape[1])) for mask in masks])
    table = PatternTable(
        counts.cumsum(0).to(torch.int32),
        torch.cat([p.lead for p in patterns]),
        torch.cat([p.own for p in patterns]),
        torch.cat([p.positions for p in patterns]),
        reach,
        tree_mask,
        torch.tensor([p.kept_len for p in patterns], dtype=torch.int32, device="cpu"),
    )
    return PatternTable(*(None if x is None else ordinary(x, device) for x in table))  # type: ignore[arg-type]
