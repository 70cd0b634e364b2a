"""KV cache: preallocated, appended exactly, committed by lengths that live on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import ops
from .ops import checks, rotary_append

__all__ = ["KVCache"]


class KVCache:
    """K/V of every layer, with one committed length per sequence.

    Slots `[0, lengths[b])` of sequence b are committed. A forward pass writes its causal rows after them (`append`);
    `commit` then advances the lengths by what was accepted. Slots past the length are stale by definition: the next
    append overwrites them, and nothing reads them.

    Overflow is caught on the host, without reading the device: the cache keeps an upper bound of every length, which
    `commit` raises by the most that can have been accepted and `lengths_known` tightens once the host knows better.

    Args:
        num_layers, batch_size, num_kv_heads, max_len, head_dim: all >= 1; `max_len` in tokens per sequence.
        dtype, device: of the buffers.

    Attributes:
        lengths: int32 `[batch_size]` on the device, committed tokens.
        k, v: `[num_layers, batch_size, num_kv_heads, max_len, head_dim]`.

    Raises:
        ValueError: a size is < 1.
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
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "batch_size": batch_size,
            "num_kv_heads": num_kv_heads,
            "max_len": max_len,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {size!r}")
        shape = tuple(sizes.values())
        with torch.inference_mode(False):  # a cache made in inference mode may be written outside of it
            # Zeroed, not empty: a fresh cache is finite everywhere, so a debugging dump of it is too.
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device)
            self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.length_bounds = np.zeros(batch_size, dtype=np.int64)

    @property
    def num_layers(self) -> int:
        return self.k.shape[0]

    @property
    def batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def max_len(self) -> int:
        return self.k.shape[3]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """`(k_cache, v_cache)` of one layer, each `[batch, num_kv_heads, max_len, head_dim]`: views."""
        return self.k[index], self.v[index]

    def sequence(self, index: int) -> KVCache:
        """Sequence `index` alone, as a cache of batch size 1 on the same memory, lengths and bounds included.

        Raises:
            ValueError: `index` is not in `[0, batch_size)`.
        """
        if not 0 <= index < self.batch_size:
            raise ValueError(f"index: expected 0 <= index < batch_size = {self.batch_size}, got {index}")
        view = object.__new__(KVCache)
        view.k, view.v = self.k[:, index : index + 1], self.v[:, index : index + 1]
        view.lengths = self.lengths[index : index + 1]
        view.length_bounds = self.length_bounds[index : index + 1]
        return view

    def check_room(self, num_tokens: int) -> None:
        """Raise before anything is written if `num_tokens` more would pass `max_len` in any sequence.

        Raises:
            ValueError: naming the sequence, its length bound, `num_tokens` and `max_len`.
        """
        fullest = int(self.length_bounds.argmax())
        bound = int(self.length_bounds[fullest])
        if bound + num_tokens > self.max_len:
            raise ValueError(
                f"max_len: expected room for {num_tokens} more tokens in sequence {fullest}, "
                f"got {bound} of {self.max_len} slots taken"
            )

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write `k, v [batch, num_kv_heads, n, head_dim]` into slots `lengths[b] .. lengths[b] + n` of one layer.

        Nothing is committed: until `commit`, these slots are invisible.

        Raises:
            ValueError: the slots would pass `max_len` (nothing is written then), or shapes disagree.
        """
        self.check_room(k.shape[2])
        ops.append_kv(*self.layer(layer), k, v, self.lengths)

    def rotary_append(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], keep: int
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k, and `append` the first `keep` rows' rotated k and v, in one launch; returns `(q, k)` rotated.

        Raises:
            ValueError: as `append`, and `tidar_kernels.rotary_append`.
        """
        self.check_room(keep)
        return rotary_append(q, k, v, rotary, *self.layer(layer), self.lengths, keep)

    def commit(self, accepted: Tensor | int, at_most: int | None = None) -> None:
        """Advance the lengths: the first `accepted[b]` appended slots become context.

        Args:
            accepted: tokens to commit, int for all or an integer tensor `[batch]`, on the device.
            at_most: the most any sequence can have accepted; needed with a tensor, which is not read.

        Raises:
            ValueError: `at_most` is missing or negative, or would pass `max_len`; nothing is committed then.
        """
        if isinstance(accepted, int):
            at_most = accepted
        elif at_most is None:
            raise ValueError("at_most: expected an int beside a tensor of accepted counts, got None")
        if at_most < 0:
            name = "accepted" if isinstance(accepted, int) else "at_most"
            raise ValueError(f"{name}: expected >= 0 tokens, got {at_most}")
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
        # The layers as further sequences: one launch moves them all.
        k, v = (x.view(-1, *x.shape[2:]) for x in (self.k, self.v))
        ops.compact_kv(k, v, self.lengths.repeat(self.num_layers), path.repeat(self.num_layers, 1))

    def lengths_known(self, lengths: list[int]) -> None:
        """Tell the host's bounds the exact lengths, once they were read for another reason."""
        self.length_bounds[:] = lengths

    def reset(self) -> None:
        """Forget every committed token; the buffers stay."""
        self.lengths.zero_()
        self.length_bounds[:] = 0
