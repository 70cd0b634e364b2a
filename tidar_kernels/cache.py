"""KV cache: preallocated, appended exactly, committed by lengths that live on the device; in pages where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .ops import checks, rotary_append
from .patterns.arguments import FLOAT_DTYPES, check_device, check_int, check_ints
from .patterns.rows import ordinary

__all__ = ["KVCache", "PagePool"]

DUMP = 0  # the page that entries name which no sequence has a page for: written, and never read
UNLIMITED = 2**62  # slots of a sequence whose tokens nobody asked to keep


class PagePool:
    """Which pages of a cache are free, and how many sequences have each of the others. All of it on the host.

    Args:
        num_pages: pages to give away; their numbers are 1 .. num_pages.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._users = [0] * (num_pages + 1)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def users(self, page: int) -> int:
        """How many sequences have a page."""
        return self._users[page]

    def take(self, count: int) -> list[int]:
        """Pages that nobody has.

        Raises:
            ValueError: fewer are free; none is taken then.
        """
        if count > len(self._free):
            raise ValueError(f"num_pages: expected {count} free pages, got {len(self._free)} of {self.num_pages}")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more sequence has these."""
        for page in pages:
            self._users[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """One sequence fewer has these; a page that nobody has any longer is free."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)


class KVCache:
    """K/V of every layer, with one committed length per sequence.

    Slots `[0, lengths[b])` of sequence b are committed. A forward pass writes its causal rows after them (`append`);
    `commit` then advances the lengths by what was accepted. Slots past the length are stale by definition: the next
    append overwrites them, and nothing reads them.

    Overflow is caught on the host, without reading the device: the cache keeps an upper bound of every length, which
    `commit` raises by the most that can have been accepted and `lengths_known` tightens once the host knows better.

    With a `page_size` the slots of a sequence lie in pages that it takes from a pool as it grows, and gives back when
    it is `reset` or `release`d: memory follows the tokens that are there, not the longest sequence that might come. A
    captured graph cannot take pages: `reserve` them before. Sequences that begin with the same tokens may `share`
    pages.

    Args:
        num_layers, batch_size, num_kv_heads, max_len, head_dim: all >= 1; `max_len` in tokens per sequence.
        dtype, device: of the buffers. A float8 cache has a scale for every slot and head, which an append writes.
        page_size: tokens of a page; None: every sequence has `max_len` slots of its own.
        num_pages: pages in the pool; default enough for every sequence at its longest. One more is allocated, for what
            is written after sequences without pages.

    Attributes:
        lengths: int32 `[batch_size]` on the device, committed tokens.
        k, v: `[num_layers, batch_size, num_kv_heads, max_len, head_dim]`, or with pages
            `[num_layers, 1 + num_pages, num_kv_heads, page_size, head_dim]`.
        k_scale, v_scale: of a float8 cache, float32 in the shape of k without head_dim; else None.
        block_table: int32 `[batch_size, max_pages]` on the device, the pages of each sequence; None without pages.
        pool: the free pages; None without pages.

    Raises:
        TypeError: the dtype is none of the operators'. ValueError: a size is no int in `[1, 2**31)`, or `num_pages`
            comes without `page_size`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        sizes: dict[str, Any] = {
            "num_layers": num_layers,
            "batch_size": batch_size,
            "num_kv_heads": num_kv_heads,
            "max_len": max_len,
            "head_dim": head_dim,
        }
        if page_size is not None:
            sizes["page_size"] = page_size
        if num_pages is not None:
            sizes["num_pages"] = num_pages
            if page_size is None:
                raise ValueError(f"num_pages: expected None without a page_size, got {num_pages!r}")
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {size!r}")
            if size >= 2**31:  # lengths and pages are int32
                raise ValueError(f"{name}: expected an int < 2**31, got {size}")
        if dtype not in (*FLOAT_DTYPES, *checks.FLOAT8_DTYPES):
            raise TypeError(f"dtype: expected a float dtype, float8_e4m3fn or float8_e5m2, got {dtype}")
        device = check_device("device", device)
        self._max_len = max_len
        self.pool: PagePool | None = None
        self.block_table: Tensor | None = None
        shape = (num_layers, batch_size, num_kv_heads, max_len)
        columns = 0
        if page_size is not None:
            columns = -(-max_len // page_size)
            num_pages = batch_size * columns if num_pages is None else num_pages
            shape = (num_layers, 1 + num_pages, num_kv_heads, page_size)
        with torch.inference_mode(False):  # a cache made in inference mode may be written outside of it
            # Zeroed, not empty: a fresh cache is finite everywhere, so a debugging dump of it is too.
            self.k = torch.zeros((*shape, head_dim), dtype=dtype, device=device)
            self.v = torch.zeros((*shape, head_dim), dtype=dtype, device=device)
            self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
            if page_size is not None:
                self.block_table = torch.full((batch_size, columns), DUMP, dtype=torch.int32, device=device)
            scaled = dtype in checks.FLOAT8_DTYPES
            self.k_scale = torch.ones(shape, device=device) if scaled else None
            self.v_scale = torch.ones(shape, device=device) if scaled else None
        if num_pages is not None:  # once there is memory for them
            self.pool = PagePool(num_pages)
        self._pages: list[list[int]] = [[] for _ in range(batch_size)]
        self.length_bounds = np.zeros(batch_size, dtype=np.int64)
        self._slots = np.full(batch_size, 0 if page_size else max_len, dtype=np.int64)  # that each sequence has

    _context: Tensor | None = None  # what `reading` was given

    def __getstate__(self) -> dict[str, Any]:
        """Pickle has no tensors of float8: theirs go as bytes, with their dtype."""
        state = vars(self).copy()
        if self.k.dtype in checks.FLOAT8_DTYPES:
            state |= {"k": self.k.view(torch.uint8), "v": self.v.view(torch.uint8), "_float8": self.k.dtype}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, also one made in inference mode, may be written outside of it."""
        dtype = state.pop("_float8", None)
        with torch.inference_mode(False):
            for name, value in state.items():
                setattr(self, name, ordinary(value, value.device) if isinstance(value, Tensor) else value)
            if dtype is not None:
                self.k, self.v = self.k.view(dtype), self.v.view(dtype)

    @property
    def num_layers(self) -> int:
        return self.k.shape[0]

    @property
    def batch_size(self) -> int:
        return len(self._pages)

    @property
    def max_len(self) -> int:
        return self._max_len

    @property
    def page_size(self) -> int | None:
        return None if self.block_table is None else self.k.shape[3]

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has; 0 of a cache without pages."""
        return 0 if self.pool is None else self.pool.free_pages

    @property
    def context_lengths(self) -> Tensor:
        """int32 `[batch_size]` on the device: the committed tokens that attention reads, `lengths` but in `reading`."""
        return self.lengths if self._context is None else self._context

    @contextmanager
    def reading(self, lengths: Tensor) -> Iterator[None]:
        """Context in which attention reads so many committed tokens of each sequence, 0 of one that is idle.

        Where tokens are appended, and at which positions, stays as it is.

        Args:
            lengths: int32 `[batch_size]` on the device, each 0 or that of `self.lengths`.

        Raises:
            TypeError, ValueError: on entering, it is no such tensor.
        """
        checks.tensor("lengths", lengths, 1)
        checks.shape("lengths", lengths, (self.batch_size,))
        if lengths.dtype != torch.int32:
            raise TypeError(f"lengths: expected torch.int32, got {lengths.dtype}")
        before, self._context = self._context, lengths
        try:
            yield
        finally:
            self._context = before

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """`(k_cache, v_cache)` of one layer, each `[batch, num_kv_heads, max_len, head_dim]`, or its pages: views.

        Raises:
            ValueError: `index` is not in `[0, num_layers)`.
        """
        self._check_index("index", index, "num_layers")
        return self.k[index], self.v[index]

    def options(self, index: int) -> dict[str, Any]:
        """What operators take beside `layer(index)`: block_table, k_scale and v_scale, those that there are."""
        found: dict[str, Any] = {}
        if self.block_table is not None:
            found["block_table"] = self.block_table
        if self.k_scale is not None and self.v_scale is not None:
            found["k_scale"], found["v_scale"] = self.k_scale[index], self.v_scale[index]
        return found

    def sequence(self, index: int) -> KVCache:
        """Sequence `index` alone, as a cache of batch size 1 on the same memory, lengths and bounds included.

        Raises:
            ValueError: `index` is not in `[0, batch_size)`.
        """
        self._check_index("index", index)
        at = slice(index, index + 1)
        view = object.__new__(KVCache)
        view.__dict__.update(self.__dict__)
        view.lengths, view.length_bounds, view._slots = self.lengths[at], self.length_bounds[at], self._slots[at]
        view._context = None if self._context is None else self._context[at]
        view._pages = self._pages[at]  # the list itself: pages that the view takes are those of the sequence
        if self.block_table is not None:
            view.block_table = self.block_table[at]
        else:
            view.k, view.v = self.k[:, at], self.v[:, at]
            if self.k_scale is not None and self.v_scale is not None:
                view.k_scale, view.v_scale = self.k_scale[:, at], self.v_scale[:, at]
        return view

    def from_layer(self, first: int) -> KVCache:
        """Layers `first`, `first + 1`, .. alone, as a cache of the same sequences on the same memory.

        What is committed, reserved or reset is so of both: a drafter's layers stand after those of its target.

        Raises:
            ValueError: `first` is not in `[0, num_layers)`.
        """
        self._check_index("first", first, "num_layers")
        view = object.__new__(KVCache)
        view.__dict__.update(self.__dict__)
        view.k, view.v = self.k[first:], self.v[first:]
        if self.k_scale is not None and self.v_scale is not None:
            view.k_scale, view.v_scale = self.k_scale[first:], self.v_scale[first:]
        return view

    def _check_index(self, name: str, index: int, of: str = "batch_size") -> None:
        """`index` counts sequences, or layers."""
        if not isinstance(index, (int, np.integer)) or isinstance(index, bool) or not 0 <= index < getattr(self, of):
            raise ValueError(f"{name}: expected 0 <= {name} < {of} = {getattr(self, of)}, got {index!r}")

    def check_room(self, num_tokens: int) -> None:
        """Raise before anything is written if `num_tokens` more would pass `max_len` in any sequence.

        With pages, sequences that need more take them here.

        Raises:
            TypeError: `num_tokens` is no number. ValueError: naming the sequence, its length bound, `num_tokens` and
                `max_len`; or too few pages are free.
        """
        check_int("num_tokens", num_tokens, 0)
        short = self.length_bounds + num_tokens > self._slots
        if True not in short.tolist():  # every layer asks, and NumPy's `any` takes longer than the rest
            return
        fullest = int(np.where(short, self.length_bounds, -1).argmax())
        bound = int(self.length_bounds[fullest])
        if bound + num_tokens > self.max_len:
            raise ValueError(
                f"max_len: expected room for {num_tokens} more tokens in sequence {fullest}, "
                f"got {bound} of {self.max_len} slots taken"
            )
        sequences = [int(index) for index in short.nonzero()[0]]
        self._take([(index, int(self.length_bounds[index]) + num_tokens) for index in sequences])

    # Pages.

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold this many tokens; 0 of a cache without pages."""
        return 0 if self.page_size is None else -(-check_int("num_tokens", num_tokens, 0) // self.page_size)

    def reserve(self, sequence: int, num_tokens: int) -> None:
        """Give a sequence pages for `num_tokens` in all, those that it has included. Without pages it has them.

        Raises:
            ValueError: no such sequence, more than `max_len` tokens, or too few pages are free; nothing is taken then.
        """
        self._check_index("sequence", sequence)
        if check_int("num_tokens", num_tokens, 0) > self.max_len:
            raise ValueError(f"num_tokens: expected 0 <= num_tokens <= max_len = {self.max_len}, got {num_tokens}")
        if self.page_size is None:
            return
        if self._slots[sequence] == UNLIMITED:
            self._slots[sequence] = self._slots_of(self._pages[sequence])
        self._take([(sequence, num_tokens)])

    def release(self, sequence: int) -> None:
        """Forget a sequence and give its pages back; until `reserve` or `reset` what is appended to it is lost.

        So a step may compute all sequences of a batch, of which some are idle. Without pages it is a `reset`.

        Raises:
            ValueError: no such sequence.
        """
        self._check_index("sequence", sequence)
        self.sequence(sequence).reset()
        if self.block_table is not None:
            self._slots[sequence] = UNLIMITED

    def share(self, sequence: int, of: int, num_tokens: int) -> None:
        """Begin a sequence with the first `num_tokens` committed tokens of another one, without computing them again.

        Whole pages are shared; nobody writes into them, for both go on after them. The last one, where the tokens fill
        a part of it, is copied. Without pages all of the tokens are copied.

        Args:
            sequence: becomes these tokens, committed; what it had is forgotten.
            of: the other one; has at least these tokens.

        Raises:
            ValueError: no such sequences, or they are the same one, `num_tokens` is more than `of` has, or no page is
                free for the copy; nothing has changed then.
        """
        self._check_index("sequence", sequence)
        self._check_index("of", of)
        if sequence == of:
            raise ValueError(f"of: expected another sequence than {sequence}, got the same")
        if check_int("num_tokens", num_tokens, 0) > self.length_bounds[of]:
            raise ValueError(
                f"num_tokens: expected 0 <= num_tokens <= the {self.length_bounds[of]} tokens of sequence {of}, "
                f"got {num_tokens}"
            )
        buffers = [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]
        one = self.sequence(sequence)
        if self.pool is None or self.block_table is None:
            one.reset()
            for x in buffers:
                x[:, sequence, :, :num_tokens] = x[:, of, :, :num_tokens]
        else:
            page_size = self.k.shape[3]
            whole, rest = divmod(num_tokens, page_size)
            own = self._pages[sequence]
            if rest and not self.pool.free_pages and all(self.pool.users(page) > 1 for page in own):
                raise ValueError(f"num_pages: expected a free page, got 0 of {self.pool.num_pages}")
            shared = self._pages[of][:whole]
            self.pool.share(shared)  # before its own pages are given back: they may be the same
            one.reset()
            self._append_pages(sequence, shared)
            if rest:
                (copy,) = self.pool.take(1)
                for x in buffers:
                    x[:, copy, :, :rest] = x[:, self._pages[of][whole], :, :rest]
                self._append_pages(sequence, [copy])
        self.lengths[sequence] = num_tokens
        self.length_bounds[sequence] = num_tokens

    def pages_of(self, sequence: int) -> tuple[int, ...]:
        """The pages of a sequence, in order; none of a cache without pages."""
        self._check_index("sequence", sequence)
        return tuple(self._pages[sequence])

    def _take(self, wanted: list[tuple[int, int]]) -> None:
        """Pages for `(sequence, tokens in all)`, for all of them or for none."""
        if self.pool is None:
            return
        counts = [max(0, self.pages_for(tokens) - len(self._pages[sequence])) for sequence, tokens in wanted]
        pages = self.pool.take(sum(counts))
        for (sequence, _), count in zip(wanted, counts, strict=True):
            self._append_pages(sequence, pages[:count])
            pages = pages[count:]

    def _append_pages(self, sequence: int, pages: list[int]) -> None:
        """Pages after those that a sequence has, on the host and in the table."""
        if not pages or self.block_table is None:
            return
        held = self._pages[sequence]
        entries = torch.tensor(pages, dtype=torch.int32, device="cpu").to(self.block_table.device)
        self.block_table[sequence, len(held) : len(held) + len(pages)] = entries
        held += pages
        self._slots[sequence] = self._slots_of(held)

    def _slots_of(self, held: list[int]) -> int:
        return min(len(held) * self.k.shape[3], self.max_len)

    # Tokens.

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write `k, v [batch, num_kv_heads, n, head_dim]` into slots `lengths[b] .. lengths[b] + n` of one layer.

        Nothing is committed: until `commit`, these slots are invisible. No gradient flows through the cache.

        Raises:
            TypeError, ValueError: there is no such layer, the slots would pass `max_len`, or k and v do not fit;
                nothing is written then.
        """
        self._check_index("layer", layer, "num_layers")
        for name, value in (("k", k), ("v", v)):
            if not isinstance(value, Tensor) or value.ndim != 4:
                checks.tensor(name, value, 4)
        self.check_room(k.shape[2])
        ops.append_kv(*self.layer(layer), k.detach(), v.detach(), self.lengths, **self.options(layer))

    def rotary_append(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], keep: int
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k, and `append` the first `keep` rows' rotated k and v, in one launch; returns `(q, k)` rotated.

        Raises:
            ValueError: as `append`, and `tidar_kernels.rotary_append`.
        """
        self._check_index("layer", layer, "num_layers")
        self.check_room(check_int("keep", keep, 0))
        return rotary_append(q, k, v, rotary, *self.layer(layer), self.lengths, keep, **self.options(layer))

    def commit(self, accepted: Tensor | int, at_most: int | None = None) -> None:
        """Advance the lengths: the first `accepted[b]` appended slots become context.

        Args:
            accepted: tokens to commit, int for all or an integer tensor `[batch]`, on the device.
            at_most: the most any sequence can have accepted; needed with a tensor, which is not read.

        Raises:
            TypeError: `accepted` is neither. ValueError: `at_most` is missing or negative, or would pass `max_len`, or
                there is not one count a sequence; nothing is committed then.
        """
        if isinstance(accepted, int):
            at_most = check_int("accepted", accepted, 0)
        else:
            checks.tensor("accepted", accepted, 1)
            checks.shape("accepted", accepted, (self.batch_size,))
            if accepted.dtype.is_floating_point or accepted.dtype.is_complex:
                raise TypeError(f"accepted: expected an integer dtype, got {accepted.dtype}")
            if at_most is None:
                raise ValueError("at_most: expected an int beside a tensor of accepted counts, got None")
            check_int("at_most", at_most, 0)
        self.check_room(at_most)
        self.lengths += accepted
        self.length_bounds += at_most

    def compact(self, path: Tensor) -> None:
        """Move the K/V of an accepted path of a token tree together, in every layer: see `tidar_kernels.compact_kv`.

        Nothing is committed. `path` is an integer tensor `[batch, n]` on the device.

        Raises:
            TypeError, ValueError: as `tidar_kernels.compact_kv`, or n slots would pass `max_len`; nothing is written
                then.
        """
        checks.tensor("path", path, 2)
        self.check_room(path.shape[1])
        # The layers as further sequences, with pages of their own: one launch moves them all.
        k, v = (x.view(-1, *x.shape[2:]) for x in (self.k, self.v))
        scales = [None if x is None else x.view(-1, *x.shape[2:]) for x in (self.k_scale, self.v_scale)]
        table = self.block_table
        if table is not None:
            first = torch.arange(self.num_layers, dtype=torch.int32, device=table.device) * self.k.shape[1]
            table = (table + first[:, None, None]).flatten(0, 1)
        lengths, paths = self.lengths.repeat(self.num_layers), path.repeat(self.num_layers, 1)
        ops.compact_kv(k, v, lengths, paths, block_table=table, k_scale=scales[0], v_scale=scales[1])

    def lengths_known(self, lengths: list[int]) -> None:
        """Tell the host's bounds the exact lengths, once they were read for another reason.

        Raises:
            ValueError: there is not one for each sequence, or one for all.
        """
        lengths = check_ints("lengths", lengths, 0)
        if len(lengths) not in (1, self.batch_size):
            raise ValueError(f"lengths: expected {self.batch_size} lengths, got {len(lengths)}")
        self.length_bounds[:] = lengths

    def reset(self) -> None:
        """Forget every committed token; the buffers stay, pages go back to the pool."""
        self.lengths.zero_()
        self.length_bounds[:] = 0
        if self.pool is not None and self.block_table is not None:
            for held in self._pages:
                self.pool.give_back(held)
                held.clear()
            self.block_table.fill_(DUMP)
            self._slots[:] = 0
