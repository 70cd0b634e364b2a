"""Attention patterns: context + two intervals of in-flight keys per query row.

Every mask of the "draft by diffusion, verify autoregressively" family is an instance of one rule
(TiDAR, arXiv 2511.08923; block diffusion; I-DLM, arXiv 2604.11035; self-speculation):

    visible(q, context key k)   = P - reach[q] <= k < P
    visible(q, in-flight key k) = lead_lo[q] <= k < lead_hi[q]  or  own_lo[q] <= k < own_hi[q]

*lead* are the clean or draft tokens a row is conditioned on, *own* is the row's own block, and *reach* is without
bound but for sliding windows (`Pattern.windowed`). A `Pattern` holds these and nothing else, so it costs 16 bytes a row
where a dense mask costs `kv_len` a row, and it is built once and reused at every prefix length `P`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pattern", "Role", "causal", "tidar_prefill", "tidar_step", "tidar_training"]


class Role(IntEnum):
    """What the token of an in-flight row is. Attention never reads it; drawing and decoding do."""

    CLEAN = 0  # a known token: a prompt token, or the clean half of training
    DRAFT = 1  # a drafted token that this forward pass verifies
    MASK = 2  # a mask token that this forward pass fills


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which keys each query row sees: the cached context as far as it reaches, and two intervals of in-flight keys.

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
        num_labels: derived; one past the last clean token that any row predicts, 0 if none does.

    Raises:
        TypeError: a field is not an int32 (`roles`: int8) CPU tensor, or `kv_len` is not an int.
        ValueError: shapes disagree, an interval is reversed or leaves `[0, kv_len]`, `lead` and `own` of a row
            overlap (a key would count twice), a reach is negative, or a role is not one of `Role`.
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
    num_labels: int = field(init=False, default=0)
    _on_device: dict[torch.device, tuple[Tensor, ...]] = field(init=False, default_factory=dict, repr=False)
    _windowed: dict[int, Pattern] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.kv_len, int) or isinstance(self.kv_len, bool):
            raise TypeError(f"kv_len: expected an int, got {type(self.kv_len).__name__}")
        for name in ("lead", "own", "positions"):
            _check_tensor(name, getattr(self, name), torch.int32)
        rows = self.positions.numel()
        optional: dict[str, Any] = {"predicts": self.predicts, "roles": self.roles}
        if optional["predicts"] is None:
            object.__setattr__(self, "predicts", torch.full((rows,), -1, dtype=torch.int32))
        predicts = _check_tensor("predicts", self.predicts, torch.int32)
        if predicts.shape != (rows,) or bool(((predicts < -1) | (predicts >= self.kv_len)).any()):
            raise ValueError(
                f"predicts: expected {rows} clean token indices in [-1, {self.kv_len}), got shape "
                f"{list(predicts.shape)}, values {predicts.min() if rows else 0} to {predicts.max() if rows else 0}"
            )
        for name, shape in (("lead", (rows, 2)), ("own", (rows, 2)), ("positions", (rows,))):
            _check_shape(name, getattr(self, name), shape)
        if optional["roles"] is None:
            object.__setattr__(self, "roles", torch.zeros(rows, dtype=torch.int8))
        _check_shape("roles", _check_tensor("roles", self.roles, torch.int8), (rows,))
        if not set(self.roles.tolist()) <= set(Role):
            raise ValueError(f"roles: expected values of Role (0, 1, 2), got {sorted(set(self.roles.tolist()))}")
        if self.reach is not None:
            _check_shape("reach", _check_tensor("reach", self.reach, torch.int32), (rows,))
            if bool((self.reach < 0).any()):
                raise ValueError(f"reach: expected >= 0, got {int(self.reach.min())}")
        if self.key_positions is None and self.kv_len == rows:
            object.__setattr__(self, "key_positions", self.positions)
        if self.key_positions is not None:
            _check_shape(
                "key_positions", _check_tensor("key_positions", self.key_positions, torch.int32), (self.kv_len,)
            )
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
        # Eager, unlike the cached properties: the loss asks for it inside compiled graphs, which cannot read tensors.
        object.__setattr__(self, "num_labels", int(self.predicts.max()) + 1 if rows else 0)

    @property
    def q_len(self) -> int:
        """Number of query rows."""
        return self.positions.numel()

    @cached_property
    def causal_len(self) -> int:
        """Number of leading rows of tokens, not masks, that are plainly causal: row i sees in-flight keys `[0, i]`, at
        position P + i, or as much of context and keys as one window leaves of them.

        Exactly these rows compute what autoregressive decoding would, so exactly their K/V may enter the cache.
        """
        rows = torch.arange(self.q_len, dtype=torch.int32)
        causal = (self.lead[:, 1] == rows + 1) & (self.own[:, 0] == self.own[:, 1]) & (self.positions == rows)
        causal &= self.roles != int(Role.MASK)
        if self.reach is None:
            causal &= self.lead[:, 0] == 0
        else:  # the window is what row 0 sees: itself and its reach
            behind = self.reach[:1] - rows
            causal &= (self.reach == behind.clamp(min=0)) & (self.lead[:, 0] == (-behind).clamp(min=0))
        return int(causal.to(torch.int32).cumprod(0).sum())

    @cached_property
    def lead_end(self) -> int:
        """One past the last in-flight key that any row's lead sees."""
        seen = self.lead[self.lead[:, 1] > self.lead[:, 0], 1]
        return int(seen.max()) if seen.numel() else 0

    def on(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """`(lead, own, positions)` on `device`; copied once, then kept."""
        lead, own, positions, *_ = self._copies(device)
        return lead, own, positions

    def reach_on(self, device: torch.device | str) -> Tensor | None:
        """`reach` on `device`, copied once, then kept; None if every row sees the whole context."""
        return None if self.reach is None else self._copies(device)[3]

    def _copies(self, device: torch.device | str) -> tuple[Tensor, ...]:
        device = torch.device(device)
        if device not in self._on_device:
            fields = (self.lead, self.own, self.positions) + (() if self.reach is None else (self.reach,))
            with torch.inference_mode(False):  # a copy made while decoding must still serve training
                self._on_device[device] = tuple(x.to(device) for x in fields)
        return self._on_device[device]

    def windowed(self, window: int) -> Pattern:
        """The same rows behind a sliding window: a key stays visible if it is less than `window` positions behind.

        That is `sliding_window` of transformers: a row sees itself and `window - 1` tokens before it. Keys at later
        positions, in bidirectional blocks, stay visible. Each window is made once and kept, so a layer can ask for its
        own in every forward pass; windows of a windowed pattern intersect.

        Raises:
            TypeError, ValueError: `window` is not an int >= 1. ValueError: the positions of the keys are not known, or
                do not ascend by one within an interval, so that what a window leaves of it is no interval.
        """
        if window not in self._windowed:
            check_int("window", window, 1)
            with torch.inference_mode(False):  # as in `_copies`
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
                lo = torch.maximum(lo, lo + self.positions.long() - (window - 1) - position[first])
            clipped.append(_intervals(lo, hi, lo < hi))
        reach = (window - 1 - self.positions.long()).clamp(min=0).to(torch.int32)
        if self.reach is not None:
            reach = torch.minimum(reach, self.reach)
        return replace(self, lead=clipped[0], own=clipped[1], reach=reach, name=f"{self.name}.windowed({window})")

    def dense(self, context_len: int = 0) -> Tensor:
        """The mask as booleans, `[q_len, context_len + kv_len]`, context columns first: the oracle of every test.

        Raises:
            TypeError, ValueError: `context_len` is not an int >= 0.
        """
        check_int("context_len", context_len, 0)
        key = torch.arange(self.kv_len, dtype=torch.int32)
        in_flight = torch.zeros(self.q_len, self.kv_len, dtype=torch.bool)
        for interval in (self.lead, self.own):
            in_flight |= (interval[:, :1] <= key) & (key < interval[:, 1:])
        context = torch.ones(self.q_len, context_len, dtype=torch.bool)
        if self.reach is not None:
            context = torch.arange(context_len) >= context_len - self.reach[:, None].long()
        return torch.cat([context, in_flight], dim=1)

    def draw(self, path: Any = None, context_len: int = 0) -> str:
        """The pattern as text; with `path`, also as a PNG (needs matplotlib). See `tidar_kernels.drawing`."""
        from tidar_kernels import drawing

        if path is not None:
            drawing.save_png(self, path, context_len)
        return drawing.as_text(self, context_len)


def check_int(name: str, value: Any, at_least: int) -> int:
    """`value`, if it is an int >= `at_least`; else the TypeError or ValueError that says what came instead."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name}: expected >= {at_least}, got {value}")
    return value


def _check_tensor(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != dtype or value.device.type != "cpu":
        got = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        kind = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected an {kind} CPU tensor, got {got}")
    return value


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def _intervals(lo: Tensor, hi: Tensor, live: Tensor) -> Tensor:
    """Stack `[lo, hi)`, written as `[0, 0)` where `live` is false."""
    return torch.where(live[:, None], torch.stack([lo, hi], dim=1), 0).to(torch.int32)


def causal(length: int) -> Pattern:
    """Plain causal rows: autoregressive decoding (`length = 1`), verification, or a chunk of prefill.

    Raises:
        TypeError, ValueError: `length` is not an int >= 1.
    """
    row = torch.arange(check_int("length", length, 1))
    live = torch.ones_like(row, dtype=torch.bool)
    return Pattern(
        lead=_intervals(torch.zeros_like(row), row + 1, live),
        own=_intervals(row, row, ~live),
        positions=row.to(torch.int32),
        kv_len=length,
        name=f"causal(length={length})",
    )


def tidar_prefill(prompt_len: int, block_size: int) -> Pattern:
    """Prompt and first draft in one forward pass: `[prompt (n) | M x B]` (TiDAR, "prefill").

    Prompt rows are causal and blind to the masks; mask rows, at positions n..n+B-1, see the whole prompt and each
    other. With a cached context the same pattern is the last chunk of a chunked prefill.

    Raises:
        TypeError, ValueError: `prompt_len` or `block_size` is not an int >= 1.
    """
    n, block = check_int("prompt_len", prompt_len, 1), check_int("block_size", block_size, 1)
    row = torch.arange(n + block)
    is_mask = row >= n
    zero = torch.zeros_like(row)
    return Pattern(
        lead=_intervals(zero, (row + 1).clamp(max=n), row >= 0),
        own=_intervals(zero + n, zero + n + block, is_mask),
        positions=row.to(torch.int32),
        kv_len=n + block,
        roles=torch.where(is_mask, int(Role.MASK), int(Role.CLEAN)).to(torch.int8),
        name=f"tidar_prefill(prompt_len={n}, block_size={block})",
    )


def tidar_step(block_size: int, bidirectional: bool = True, levels: Sequence[int] | None = None) -> Pattern:
    """One TiDAR decode step: `[d_0 .. d_{B-1} | block 1 | ... | block B]`, B + B*B rows (arXiv 2511.08923).

    With g = q // B and m = q % B: draft row m (g = 0) sees drafts `[0, m]`; row m of block g sees the first g
    drafts, on whose acceptance it is conditioned, and its own block. There is no block 0: the first draft is
    always accepted.

    Args:
        block_size: B, tokens drafted and verified a step.
        bidirectional: mask rows see their whole block (the paper); False for checkpoints trained with causal blocks.
        levels: numbers of accepted drafts that get a block, ascending; the first is 1, for that many are always
            accepted. Default 1..B. Block g is then conditioned on `levels[g - 1]` drafts.

    Raises:
        TypeError, ValueError: `block_size` is not an int >= 1, `bidirectional` is not a bool, or `levels` are not
            ascending ints from 1 to at most B.
    """
    block = check_int("block_size", block_size, 1)
    if not isinstance(bidirectional, bool):
        raise TypeError(f"bidirectional: expected a bool, got {type(bidirectional).__name__}")
    chosen = list(range(1, block + 1)) if levels is None else [check_int("levels", level, 1) for level in levels]
    if chosen[:1] != [1] or chosen != sorted(set(chosen)) or chosen[-1] > block:
        raise ValueError(f"levels: expected ascending ints from 1 to at most {block}, got {chosen}")
    row = torch.arange(block + len(chosen) * block)
    g, m = row // block, row % block
    level = torch.tensor([0, *chosen])[g]
    is_mask = g >= 1
    options = f"{'' if bidirectional else ', bidirectional=False'}{'' if levels is None else f', levels={chosen}'}"
    return Pattern(
        lead=_intervals(torch.zeros_like(row), torch.where(is_mask, level, m + 1), row >= 0),
        own=_intervals(g * block, g * block + (block if bidirectional else m + 1), is_mask),
        positions=(level + m).to(torch.int32),
        kv_len=row.numel(),
        roles=torch.where(is_mask, int(Role.MASK), int(Role.DRAFT)).to(torch.int8),
        name=f"tidar_step(block_size={block}{options})",
    )


def tidar_training(
    seq_len: int,
    block_size: int,
    document_lengths: Sequence[int] | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Pattern:
    """The doubled training sequence `[x_0 .. x_{S-1} | masks]` (TiDAR, "training"): S clean rows, then a mask row each.

    Clean rows are causal and never see masks. The mask rows of block b see strictly earlier clean blocks, `[0, b*B)`,
    and their own block: a mask row that saw its own block's clean tokens would read its labels. Clean row i predicts
    token i + 1, the mask row at p predicts token p.

    With `document_lengths` the sequence holds documents that do not see each other; blocks and positions restart at
    each. The first `prompt_lengths[i]` tokens of document i have no mask row and are not predicted: its blocks cover
    the response and see the whole prompt. Then row j of the mask half stands for the j-th token not in a prompt.

    Args:
        seq_len: S, clean tokens.
        block_size: B.
        document_lengths: tokens of each document, S in all; default one document.
        prompt_lengths: of each document; default all 0.

    Raises:
        TypeError, ValueError: `seq_len`, `block_size` or a document's length is not an int >= 1, the lengths do not
            sum to `seq_len`, a prompt length is not an int between 0 and its document's length, or there are not as
            many prompts as documents.
    """
    s, block = check_int("seq_len", seq_len, 1), check_int("block_size", block_size, 1)
    documents = [s] if document_lengths is None else [check_int("document_lengths", n, 1) for n in document_lengths]
    if sum(documents) != s:
        raise ValueError(f"document_lengths: expected a sum of seq_len = {s}, got {sum(documents)}")
    prompts = [0] * len(documents) if prompt_lengths is None else list(prompt_lengths)
    if len(prompts) != len(documents):
        raise ValueError(f"prompt_lengths: expected one for each of {len(documents)} documents, got {len(prompts)}")
    for length, prompt in zip(documents, prompts, strict=True):
        if check_int("prompt_lengths", prompt, 0) > length:
            raise ValueError(f"prompt_lengths: expected <= the document's length {length}, got {prompt}")

    lengths = torch.tensor(documents)
    document, token = torch.arange(len(documents)).repeat_interleave(lengths), torch.arange(s)
    first = (lengths.cumsum(0) - lengths)[document]
    response = token - first - torch.tensor(prompts)[document]  # index in the response, negative in the prompt
    masked = response >= 0
    mask_row = s + masked.cumsum(0) - 1  # of a token that is not in a prompt
    block_start = (token - response % block)[masked]
    block_len = torch.minimum(block_start + block, (first + lengths[document])[masked]) - block_start
    own_start = mask_row[block_start]
    is_mask = torch.arange(s + len(block_start)) >= s
    lead_lo, lead_hi = torch.cat([first, first[masked]]), torch.cat([token + 1, block_start])
    own_lo, own_hi = torch.cat([token, own_start]), torch.cat([token, own_start + block_len])
    follows = torch.cat([(document[1:] == document[:-1]) & masked[1:], torch.zeros(1, dtype=torch.bool)])
    options = "" if document_lengths is None else f", {len(documents)} documents"
    return Pattern(
        lead=_intervals(lead_lo, lead_hi, lead_lo < lead_hi),
        own=_intervals(own_lo, own_hi, is_mask),
        positions=torch.cat([token - first, (token - first)[masked]]).to(torch.int32),
        kv_len=len(is_mask),
        roles=torch.where(is_mask, int(Role.MASK), int(Role.CLEAN)).to(torch.int8),
        predicts=torch.cat([torch.where(follows, token + 1, -1), token[masked]]).to(torch.int32),
        name=f"tidar_training(seq_len={s}, block_size={block}{options})",
    )
