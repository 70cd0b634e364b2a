"""Attention patterns: context + two intervals of in-flight keys per query row, and for token trees a mask of bits.

Every mask of the "draft by diffusion, verify autoregressively" family is an instance of one rule
(TiDAR, arXiv 2511.08923; block diffusion; I-DLM, arXiv 2604.11035; self-speculation):

    visible(q, context key k)   = P - reach[q] <= k < P
    visible(q, in-flight key k) = lead_lo[q] <= k < lead_hi[q]  or  own_lo[q] <= k < own_hi[q]

*lead* are the clean or draft tokens a row is conditioned on, *own* is the row's own block, and *reach* is unlimited
except for sliding windows (`Pattern.windowed`). A `Pattern` holds these and nothing else: 16 bytes a row, where a dense
mask costs `kv_len` bytes a row, and one pattern serves every context length `P`. The ancestors of a node of a token
tree (Medusa, EAGLE) are no intervals: such patterns have a *tree mask* besides, one bit a key.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._moved import renamed_keyword
from . import drawing
from .arguments import check_device, check_int
from .rows import Role, intervals, ordinary, pack_tree_mask, unpack_tree_mask

__all__ = ["Pattern"]

# lead -> weak reference to the last pattern made with it.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Derived:
    """What a pattern computes from its fields and keeps. Not a dataclass: whatever copies, pickles or rebuilds a
    pattern takes the fields alone."""

    num_labels: int
    _versions: list[int]  # of the tensors in the fields, when the pattern was made
    _on_device: dict[torch.device, tuple[Tensor | None, ...]]
    _windowed: dict[int, Pattern]


@dataclass(frozen=True, eq=False)
class Pattern(_Derived):
    """Which keys each query row sees: the cached context as far as it reaches, and two intervals of in-flight keys.

    A pattern can be copied, pickled and rebuilt from its fields; to `torch.utils._pytree` it is a leaf. It may be made
    and used in inference mode and outside of it, and under any default device.

    Args:
        lead: int32 `[q_len, 2]`, half-open intervals over in-flight key indices.
        own: int32 `[q_len, 2]`, half-open; disjoint from `lead` in every row.
        positions: int32 `[q_len]`, the RoPE position of each row minus the context length `P`.
        kv_len: number of in-flight keys.
        roles: int8 `[q_len]`, a `Role` per row; default all `Role.CLEAN`.
        predicts: int32 `[q_len]`, index of the clean token that training wants the row to predict, -1 for none;
            default none. Labels are gathered by it, so a shift lives in the pattern and nowhere else.
        name: shown in drawings and errors.
        reach: int32 `[q_len]`, how many of the last context tokens each row sees; None for all of them.
        key_positions: int32 `[kv_len]`, the position of each in-flight key minus `P`, which windows need; default
            `positions` where there are as many rows as keys, else unknown (None).
        tree_mask: int32 `[q_len, ceil(kv_len / 32)]`, further visible keys of each row: bit i of word w, the
            sign bit included, is in-flight key 32 * w + i. None for none.
        window_positions: int32 `[q_len]`, the positions minus `P` from which the windows of rows count; default their
            own. Rows of a canvas (DiffusionGemma) share the window of its first row.

    Attributes:
        num_labels: one past the last clean token that any row predicts, 0 if none does.

    Raises:
        TypeError: a field is not an int32 (`roles`: int8) CPU tensor, or `kv_len` is not an int.
        ValueError: shapes disagree, an interval is reversed or leaves `[0, kv_len]`, `lead` and `own` of a row
            overlap (a key would count twice), a reach is negative, a role is not one of `Role`, or a tree mask
            holds a key in the `lead` or `own` of its row, or one that does not exist.
    """

    lead: Tensor
    own: Tensor
    positions: Tensor
    kv_len: int
    roles: Tensor = None  # type: ignore[assignment]  # None stands for all clean; never None once built
    predicts: Tensor = None  # type: ignore[assignment]
    name: str = "pattern"
    reach: Tensor | None = None
    key_positions: Tensor | None = None
    tree_mask: Tensor | None = None
    window_positions: Tensor | None = None

    def __post_init__(self) -> None:
        twin = self._twin()
        if twin is not None:
            vars(self).update(vars(twin))
            return
        with torch.inference_mode(False):  # a pattern made while decoding must still serve training
            self._fill_in()
            self._check()
        derived = {
            # Eager, unlike the cached properties: the loss asks for it in compiled graphs, which cannot read tensors.
            "num_labels": int(self.predicts.max()) + 1 if self.q_len else 0,
            "_versions": [tensor._version for tensor in self._tensors()],
            "_on_device": {},
            "_windowed": {},
        }
        vars(self).update(derived)
        _made[self.lead] = weakref.ref(self)

    def _twin(self) -> Pattern | None:
        """A pattern with the very same fields, if one is alive: what it has checked and copied holds for this one too.

        FSDP2's mixed precision rebuilds the dataclasses among a module's arguments, twice a module and forward pass.
        """
        made = _made.get(self.lead) if isinstance(self.lead, Tensor) else None
        twin = None if made is None else made()
        if type(twin) is not type(self) or twin._versions != [tensor._version for tensor in twin._tensors()]:
            return None
        pairs = [(getattr(self, field.name), getattr(twin, field.name)) for field in fields(self)]
        same = all(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in pairs)
        return twin if same else None

    def _tensors(self) -> list[Tensor]:
        values = [getattr(self, field.name) for field in fields(self)]
        return [value for value in values if isinstance(value, Tensor)]

    def _fill_in(self) -> None:
        """Defaults where a field is None, and ordinary tensors in the place of inference tensors."""
        check_int("kv_len", self.kv_len, 0, 2**31)  # intervals are int32
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.positions, Tensor):
            rows = self.positions.numel()
            if given["roles"] is None:
                given["roles"] = torch.zeros(rows, dtype=torch.int8, device="cpu")
            if given["predicts"] is None:
                given["predicts"] = torch.full((rows,), -1, dtype=torch.int32, device="cpu")
            if given["key_positions"] is None and self.kv_len == rows:
                given["key_positions"] = self.positions
        ordinary_of: dict[int, Tensor] = {}  # one copy of a tensor that serves two fields
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_inference():
                value = ordinary_of.setdefault(id(value), ordinary(value, value.device))
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        for name in ("lead", "own", "positions"):
            _check_tensor(name, getattr(self, name), torch.int32)
        rows = self.positions.numel()
        predicts = _check_tensor("predicts", self.predicts, torch.int32)
        if predicts.shape != (rows,) or bool(((predicts < -1) | (predicts >= self.kv_len)).any()):
            raise ValueError(
                f"predicts: expected {rows} clean token indices in [-1, {self.kv_len}), got shape "
                f"{list(predicts.shape)}, values {predicts.min() if rows else 0} to {predicts.max() if rows else 0}"
            )
        for name, shape in (("lead", (rows, 2)), ("own", (rows, 2)), ("positions", (rows,))):
            _check_shape(name, getattr(self, name), shape)
        _check_shape("roles", _check_tensor("roles", self.roles, torch.int8), (rows,))
        if not set(self.roles.unique().tolist()) <= set(Role):
            raise ValueError(f"roles: expected values of Role (0, 1, 2), got {self.roles.unique().tolist()}")
        if self.reach is not None:
            _check_shape("reach", _check_tensor("reach", self.reach, torch.int32), (rows,))
            if bool((self.reach < 0).any()):
                raise ValueError(f"reach: expected >= 0, got {int(self.reach.min())}")
        if self.window_positions is not None:
            _check_shape(
                "window_positions", _check_tensor("window_positions", self.window_positions, torch.int32), (rows,)
            )
        if self.key_positions is not None:
            _check_shape(
                "key_positions", _check_tensor("key_positions", self.key_positions, torch.int32), (self.kv_len,)
            )
        self._check_intervals()
        if self.tree_mask is not None:
            self._check_tree_mask(_check_tensor("tree_mask", self.tree_mask, torch.int32))

    def _check_intervals(self) -> None:
        for name in ("lead", "own"):
            lo, hi = getattr(self, name).unbind(1)
            bad = (lo < 0) | (hi < lo) | (hi > self.kv_len)
            if bad.any():
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"{name}: expected 0 <= lo <= hi <= kv_len = {self.kv_len}, "
                    f"got [{int(lo[row])}, {int(hi[row])}) in row {row}"
                )
        (lead_lo, lead_hi), (own_lo, own_hi) = self.lead.unbind(1), self.own.unbind(1)
        both = (torch.maximum(lead_lo, own_lo) < torch.minimum(lead_hi, own_hi)).nonzero()
        if both.numel():
            row = int(both[0])
            raise ValueError(
                f"own: expected an interval disjoint from lead, got lead {self.lead[row].tolist()} "
                f"and own {self.own[row].tolist()} in row {row}"
            )

    def _check_tree_mask(self, tree_mask: Tensor) -> None:
        words = -(-self.kv_len // 32)
        _check_shape("tree_mask", tree_mask, (self.q_len, words))
        seen = unpack_tree_mask(tree_mask, 32 * words)
        beyond, twice = seen[:, self.kv_len :].nonzero(), (seen[:, : self.kv_len] & self._in_intervals()).nonzero()
        if len(beyond):
            row, key = beyond[0].tolist()
            raise ValueError(
                f"tree_mask: expected keys below kv_len = {self.kv_len}, got key {self.kv_len + key} in row {row}"
            )
        if len(twice):
            row, key = twice[0].tolist()
            raise ValueError(
                f"tree_mask: expected keys outside lead {self.lead[row].tolist()} and own {self.own[row].tolist()}, "
                f"got key {key} in row {row}"
            )

    @property
    def q_len(self) -> int:
        """Number of query rows."""
        return self.positions.numel()

    @cached_property
    def causal_len(self) -> int:
        """Number of leading rows of tokens, not masks, that are plainly causal: row i, at position P + i, sees the
        context and in-flight keys `[0, i]`, or what one sliding window, the same for all, leaves of both.

        These rows compute what autoregressive decoding would, so their K/V may enter the cache. Rows that see keys by
        the tree mask are not among them.
        """
        rows = torch.arange(self.q_len, dtype=torch.int32, device="cpu")
        causal = (self.lead[:, 1] == rows + 1) & (self.own[:, 0] == self.own[:, 1]) & (self.positions == rows)
        causal &= self.roles != int(Role.MASK)
        if self.tree_mask is not None:
            causal &= (self.tree_mask == 0).all(1)
        if self.reach is None:
            causal &= self.lead[:, 0] == 0
        else:  # the window is what row 0 sees: itself and its reach
            before = self.reach[:1] - rows  # context tokens that the window leaves to row i; negative: keys it hides
            causal &= (self.reach == before.clamp(min=0)) & (self.lead[:, 0] == (-before).clamp(min=0))
        return int(causal.to(torch.int32).cumprod(0).sum())

    @cached_property
    def kept_len(self) -> int:
        """Number of leading rows whose K/V a step writes into the cache after the context: `causal_len`, or whole
        blocks of block-causal rows, or of a tree the rows that are its nodes.

        Block-causal rows are tokens at positions P, P + 1, .. that see the context and the keys up to the end of their
        block, and nothing after it (`block_causal`).

        A node is a token that sees itself and exactly what its parent sees, which is an earlier row, one position
        before it; a root sees itself alone. So it computes what autoregressive decoding would on its path. (With a
        sliding window it may see less of the path's beginning.)
        """
        if self.tree_mask is None:
            return max(self.causal_len, self._block_causal_len())
        if self.kv_len != self.q_len:
            return self.causal_len
        position, visible = self.positions, self.dense()
        for row in range(self.q_len):
            others = visible[row].nonzero().flatten()
            others = others[others != row]
            if self.roles[row] == int(Role.MASK) or not visible[row, row] or bool((others > row).any()):
                return row
            if not len(others):
                if position[row] == 0 or self.reach is not None:
                    continue
                return row
            parent = others[position[others].argmax()]
            hidden = (visible[parent] & ~visible[row]).nonzero().flatten()
            from_path = bool(visible[parent, others].all()) and bool(position[parent] == position[row] - 1)
            whole = not len(hidden) or (self.reach is not None and position[hidden].max() < position[others].min())
            if not (from_path and whole):
                return row
        return self.q_len

    def _block_causal_len(self) -> int:
        """Leading tokens, not masks, that see the whole context and all in-flight keys below some end, up to the last
        row of which none before it sees beyond: nothing that may be dropped has a say in their K/V."""
        if self.reach is not None:
            return 0
        rows, end = torch.arange(self.q_len, dtype=torch.int32, device="cpu"), self.lead[:, 1]
        suits = (self.lead[:, 0] == 0) & (end > rows) & (self.own[:, 0] == self.own[:, 1]) & (self.positions == rows)
        suits &= self.roles != int(Role.MASK)
        count = int(suits.to(torch.int32).cumprod(0).sum())
        closed = (end[:count].cummax(0).values == rows[:count] + 1).nonzero()
        return int(closed[-1]) + 1 if len(closed) else 0

    @cached_property
    def lead_end(self) -> int:
        """One past the last in-flight key that any row's lead sees."""
        seen = self.lead[self.lead[:, 1] > self.lead[:, 0], 1]
        return int(seen.max()) if seen.numel() else 0

    def on(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """`(lead, own, positions)` on `device`; copied once, then kept."""
        lead, own, positions, *_ = self._copies(device)
        return lead, own, positions

    def rows_on(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """`(lead, own, reach, tree_mask)` on `device`, copied once, then kept: what the operators take of a pattern."""
        copies = self._on_device.get(device) if isinstance(device, torch.device) else None
        lead, own, _, reach, tree_mask = copies or self._copies(device)
        return lead, own, reach, tree_mask  # type: ignore[return-value]  # lead and own are never None

    def reach_on(self, device: torch.device | str) -> Tensor | None:
        """Deprecated: the third of `rows_on`."""
        warnings.warn("Pattern.reach_on: use the third of Pattern.rows_on", FutureWarning, stacklevel=2)
        return self.rows_on(device)[2]

    @property
    def bits(self) -> Tensor | None:
        """Deprecated: `tree_mask`."""
        warnings.warn("Pattern.bits: use Pattern.tree_mask", FutureWarning, stacklevel=2)
        return self.tree_mask

    def bits_on(self, device: torch.device | str) -> Tensor | None:
        """Deprecated: the last of `rows_on`."""
        warnings.warn("Pattern.bits_on: use the last of Pattern.rows_on", FutureWarning, stacklevel=2)
        return self.rows_on(device)[3]

    def _copies(self, device: torch.device | str) -> tuple[Any, ...]:
        device = check_device("device", device)
        if device not in self._on_device:
            needed = (self.lead, self.own, self.positions, self.reach, self.tree_mask)
            self._on_device[device] = tuple(None if x is None else ordinary(x, device) for x in needed)
        return self._on_device[device]

    def to(self, *args: Any, **kwargs: Any) -> Pattern:
        """This pattern, with its copy on the device made: what frameworks call on everything in a batch.

        Takes what `torch.nn.Module.to` takes. The fields stay int32 on the CPU, whatever is asked for.
        """
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None:
            self._copies(device)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made of the fields, without what was derived from them."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def windowed(self, window: int) -> Pattern:
        """The same rows with a sliding window: a row sees itself and the `window - 1` positions before it.

        That is `sliding_window` of transformers; of a row with another of `window_positions`, the window of a row
        there. Keys at later positions, in bidirectional blocks, stay visible. The result is kept, so a layer can ask
        for it in every forward pass; windows of a windowed pattern intersect.

        Raises:
            TypeError, ValueError: `window` is not an int >= 1. ValueError: the positions of the keys are not known, or
                do not ascend by one within an interval, so that what a window leaves of it is no interval.
        """
        if check_int("window", window, 1) not in self._windowed:
            self._windowed[window] = self._clip(window)
        return self._windowed[window]

    def _clip(self, window: int) -> Pattern:
        window = min(window, torch.iinfo(torch.int32).max // 2)  # more tokens than a cache holds
        if self.key_positions is None:
            raise ValueError(
                f"window: expected a pattern with key_positions, which {self.kv_len} keys of {self.q_len} rows need, "
                f"got {self.name} without"
            )
        position = self.key_positions
        at = (self.positions if self.window_positions is None else self.window_positions).long()
        # Keys that follow their predecessor in position, counted: a run without a jump has as many as it has steps.
        follows = torch.cat([position.new_zeros(1), (position[1:] == position[:-1] + 1).int()]).cumsum(0)
        clipped = []
        for name in ("lead", "own"):
            lo, hi = getattr(self, name).long().unbind(1)
            live = lo < hi
            first, last = torch.where(live, lo, 0), torch.where(live, hi - 1, 0)
            if bool(live.any()):
                jumps = live & (follows[last] - follows[first] != last - first)
                if bool(jumps.any()):
                    row = int(jumps.nonzero()[0])
                    raise ValueError(
                        f"window: expected keys whose positions ascend by one in {name}, got "
                        f"{position[lo[row] : hi[row]].tolist()} in row {row} of {self.name}"
                    )
                lo = torch.maximum(lo, lo + at - (window - 1) - position[first])
            clipped.append(intervals(lo, hi, lo < hi))
        reach = (window - 1 - at).clamp(min=0).to(torch.int32)
        if self.reach is not None:
            reach = torch.minimum(reach, self.reach)
        tree_mask = None
        if self.tree_mask is not None:
            near = position.long() > at[:, None] - window
            tree_mask = pack_tree_mask(unpack_tree_mask(self.tree_mask, self.kv_len) & near)
        name = f"{self.name}.windowed({window})"
        return replace(self, lead=clipped[0], own=clipped[1], reach=reach, tree_mask=tree_mask, name=name)

    def subset(self, rows: Tensor) -> Pattern:
        """Some of the rows, in the order of `rows` int64 `[n]`, over all of the keys: what one of several devices has.

        Raises:
            TypeError, ValueError: `rows` is not an int64 CPU tensor of row indices.
        """
        _check_tensor("rows", rows, torch.int64)
        if rows.ndim != 1 or bool(((rows < 0) | (rows >= self.q_len)).any()):
            raise ValueError(f"rows: expected indices in [0, {self.q_len}), got {rows.flatten()[:8].tolist()}")
        by_row = ("lead", "own", "positions", "roles", "predicts", "reach", "tree_mask", "window_positions")
        chosen: dict[str, Any] = {name: getattr(self, name) for name in by_row}
        chosen = {name: None if value is None else value[rows] for name, value in chosen.items()}
        return replace(self, **chosen, name=f"{len(rows)} of {self.name}")

    def dense(self, context_len: int = 0) -> Tensor:
        """The mask as booleans, `[q_len, context_len + kv_len]`, context columns first: the oracle of every test.

        Raises:
            TypeError, ValueError: `context_len` is not an int >= 0.
        """
        check_int("context_len", context_len, 0, 2**31)
        with torch.inference_mode(False):  # a mask made while decoding must still serve training
            in_flight = self._in_intervals()
            if self.tree_mask is not None:
                in_flight |= unpack_tree_mask(self.tree_mask, self.kv_len)
            context = torch.ones(self.q_len, context_len, dtype=torch.bool, device="cpu")
            if self.reach is not None:
                context = torch.arange(context_len, device="cpu") >= context_len - self.reach[:, None].long()
            return torch.cat([context, in_flight], dim=1)

    def _in_intervals(self) -> Tensor:
        key = torch.arange(self.kv_len, dtype=torch.int32, device="cpu")
        seen = torch.zeros(self.q_len, self.kv_len, dtype=torch.bool, device="cpu")
        for interval in (self.lead, self.own):
            seen |= (interval[:, :1] <= key) & (key < interval[:, 1:])
        return seen

    def draw(self, path: Any = None, context_len: int = 0) -> str:
        """The pattern as text; with `path`, also as a PNG (needs matplotlib). See `tidar_kernels.patterns.drawing`."""
        if path is not None:
            drawing.save_png(self, path, context_len)
        return drawing.as_text(self, context_len)


Pattern.__init__ = renamed_keyword("bits", "tree_mask")(Pattern.__init__)  # type: ignore[method-assign]


def _check_tensor(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != dtype or value.device.type != "cpu":
        got = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        kind = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected an {kind} CPU tensor, got {got}")
    return value


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
