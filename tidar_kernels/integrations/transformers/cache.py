"""A transformers cache on preallocated buffers: lengths on the device, and a rollback that only writes lengths.

`model.generate(.., past_key_values=TiDARCache(model.config, max_len=1024))` in ordinary use; `TiDARCache.from_kv` takes
over what a TiDAR decoder has committed. Every layer keeps all tokens, also one with a sliding window: windows are a
matter of masks, so that rows taken back never miss what had slid out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ...cache import KVCache
from ...patterns.arguments import check_int
from ...patterns.rows import ordinary

__all__ = ["TiDARCache", "TiDARCacheLayer"]

# Layers of a `DynamicCache` that hold keys and values; the last holds nothing, for layers that use those of another.
_PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


class TiDARCacheLayer(CacheLayerMixin):
    """One layer: K and V `[batch, kv_heads, max_len, head_dim]`, allocated with the first tokens.

    Under autocast, keys may be float32 beside values in half precision, which are then kept in float32 too, as
    `DynamicCache` does.

    Where gradients are wanted, tensors with them are kept beside the buffers and returned, as `DynamicCache` does.

    Attributes:
        keys, values: the buffers; slots past the length are stale. None before.
        lengths: int32 `[batch]` on the device, tokens held; all alike, as transformers counts one length for a batch.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    keys: Any  # tensors, once there are tokens
    values: Any
    lengths: Any

    def __init__(self, max_len: int) -> None:
        super().__init__()
        self.max_len = max_len
        self.lengths = None
        self._length = 0
        self._tracked: tuple[Tensor, Tensor] | None = None  # all K and V with their gradients, if any has one

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, also one made in inference mode, may be written outside of it."""
        for name, value in state.items():
            setattr(self, name, ordinary(value, value.device) if isinstance(value, Tensor) else value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        with torch.inference_mode(False):  # what is allocated while generating may be written anywhere
            dtypes = key_states.dtype, torch.promote_types(key_states.dtype, value_states.dtype)
            self.keys, self.values = (
                torch.zeros(*x.shape[:2], self.max_len, x.shape[3], dtype=dtype, device=x.device)
                for x, dtype in zip((key_states, value_states), dtypes, strict=True)
            )
            self.lengths = torch.zeros(len(key_states), dtype=torch.int32, device=key_states.device)
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, len(key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[batch, kv_heads, n, head_dim]`; returns all keys and values so far, as views of the buffers.

        Raises:
            ValueError: `max_len` would be passed, or shapes disagree; nothing is written then.
        """
        start, end = self._length, self._length + key_states.shape[2]
        if end > self.max_len:
            held = f"{start} of {self.max_len} taken"
            raise ValueError(f"max_len: expected room for {key_states.shape[2]} more tokens, got {held}")
        if not self._takes(key_states, value_states):
            self.lazy_initialization(key_states, value_states)
        for name, new, buffer in (("k", key_states, self.keys), ("v", value_states, self.values)):
            expected = [*buffer.shape[:2], end - start, buffer.shape[3]]
            if list(new.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected} like what is cached, got {list(new.shape)}")
        with torch.inference_mode(False), torch.no_grad():
            self.keys, self.values = (
                buffer.to(torch.promote_types(buffer.dtype, new.dtype))
                for buffer, new in ((self.keys, key_states), (self.values, value_states))
            )
        with torch.no_grad():
            self.keys[:, :, start:end] = key_states
            self.values[:, :, start:end] = value_states
        self.lengths += end - start
        self._length = end
        before = self._tracked
        if before is None:
            if not (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)):
                return self.keys[:, :, :end], self.values[:, :, :end]
            before = self.keys[:, :, :start].clone(), self.values[:, :, :start].clone()
        keys, values = before
        keys = torch.cat([keys, key_states.to(keys.device)], 2)
        values = torch.cat([values, value_states.to(values.device)], 2)
        self._tracked = keys, values
        return keys, values

    def _takes(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether the buffers are to be kept: while they hold tokens, or if they suit these."""
        if not self.is_initialized:
            return False
        return self._length > 0 or all(
            (*buffer.shape[:2], buffer.shape[3]) == (*new.shape[:2], new.shape[3])
            and (buffer.dtype, buffer.device) == (new.dtype, new.device)
            for buffer, new in ((self.keys, key_states), (self.values, value_states))
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens: a write to the lengths, nothing moves.

        A layer that was never written into (it uses the keys of another) stays as it is.

        Raises:
            ValueError: a positive number, or more tokens than are held.
        """
        if not self.is_initialized and tokens_to_remove <= 0:
            return
        if not -self._length <= tokens_to_remove <= 0:
            raise ValueError(f"tokens_to_remove: expected between {-self._length} and 0, got {tokens_to_remove}")
        self._length += tokens_to_remove
        if self.lengths is not None:
            self.lengths += tokens_to_remove
        self._track(lambda x: x[:, :, : self._length])

    def reset(self) -> None:
        self.crop(-self._length)
        self._tracked = None

    def _track(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._tracked is not None:
            self._tracked = change(self._tracked[0]), change(self._tracked[1])

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self.max_len

    def get_max_cache_shape(self) -> int:
        """`get_max_length` by its older name."""
        return self.max_len

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """`(keys, offset)` of the next mask, for so many rows; or for a tensor of their positions, as it once was."""
        rows = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self._length + rows, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what `beam_idx[b]` was; the buffers stay where they are, if as many sequences stay."""
        if self._length and len(beam_idx) != self.batch_size:
            self._select(beam_idx.to(self.device))
        elif self._length:
            for buffer in (self.keys, self.values):
                held = buffer[:, :, : self._length]
                held.copy_(held.index_select(0, beam_idx.to(held.device)))
            self._track(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select(indices)

    def _select(self, indices: Tensor) -> None:
        self.keys, self.values, self.lengths = self.keys[indices], self.values[indices], self.lengths[indices]
        self.batch_size = len(self.keys)
        self._track(lambda x: x[indices])


class TiDARCache(Cache):
    """`past_key_values` on preallocated buffers; see the module.

    Args:
        config: of the model.
        max_len: tokens per sequence.

    Raises:
        TypeError, ValueError: `max_len` is not an int >= 1; a model whose layers keep more than keys and values.
    """

    def __init__(self, config: Any, max_len: int) -> None:
        check_int("max_len", max_len, 1)
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config: expected that of a model of transformers, got {type(config).__name__}")
        others = sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers} - _PLAIN_LAYERS)
        if others:
            raise ValueError(
                f"config: expected layers that keep keys and values alone, got {config.model_type} with "
                f"{', '.join(others)}"
            )
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[TiDARCacheLayer(max_len) for _ in range(layers)])

    @classmethod
    def from_kv(cls, kv: KVCache, sequence: int | None = None) -> TiDARCache:
        """What a decoder has committed, on the same memory: ordinary generation goes on from there.

        The cache then holds all of the prompt and its new tokens, and `generate` wants one of its input that is not
        cached, whose logits choose the next: `cache.crop(-1)` before `generate(prompt + new tokens)`.

        Args:
            kv: such as `GenerationResult.cache`; read once for its lengths. It must not be decoded into any more.
            sequence: one sequence of it; None for all, which must then be of one length.

        Raises:
            TypeError: not a `KVCache`. ValueError: lengths differ.
        """
        if not isinstance(kv, KVCache):
            raise TypeError(f"kv: expected a tidar_kernels.KVCache, got {type(kv).__name__}")
        kv = kv if sequence is None else kv.sequence(sequence)
        lengths = kv.lengths.tolist()
        if len(set(lengths)) != 1:
            raise ValueError(f"kv: expected one length for all sequences, got {lengths}; choose one by `sequence`")
        cache = cls.__new__(cls)
        layers = [TiDARCacheLayer(kv.max_len) for _ in range(kv.num_layers)]
        for index, layer in enumerate(layers):
            layer.keys, layer.values = kv.layer(index)
            layer.lengths, layer._length = kv.lengths.clone(), lengths[0]
            layer.dtype, layer.device, layer.batch_size = kv.k.dtype, kv.k.device, kv.batch_size
            layer.is_initialized = True
        Cache.__init__(cache, layers=list(layers))
        return cache
