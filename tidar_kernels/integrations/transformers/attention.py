"""`attn_implementation="tidar"`: the attention of transformers models through these operators.

Ordinary use behaves as under `"sdpa"`, and no mask is ever dropped. Which path a call takes:

    call                                                  what runs
    `tidar_pattern`                                       `tidar_kernels.attention`, cut to the layer's window
    `tidar_pattern`, a `ContextParallel`                  its `attention`, the same over the keys of several ranks
    `tidar_pattern`, `tidar_cache`                        `tidar_kernels.append_kv`, then `step_attention`
    a cache of continuous batching                        `tidar_kernels.step_attention` on its pages (`continuous.py`)
    no mask, causal, as many keys as rows                 `tidar_kernels.attention`, plainly causal
    no mask, causal, more keys (unfilled static cache)    the same, on the first keys
    no mask, one row, inference (a growing cache)         `tidar_kernels.step_attention`, all keys but the last cached
    no mask otherwise (encoders, cross-attention, ..)     transformers' "sdpa"
    a 4-D mask: padding, packed, window, beam, static     transformers' "sdpa"
    `torch.compile` without a pattern                     transformers' "sdpa"
    any of the last three with softcap or sinks           `masked_attention` below

The mask of a model is made here too (`tidar_mask`). Where nobody gave one, it is a `StructureMask`: built only if a
layer asks for it, so that a `tidar_pattern`, which stands in its place, costs no mask of sequence length squared.

With a pattern, keys and values may differ in width (multi-head latent attention): the narrower one is padded with
zeros, which changes no score and no output. A cache may be larger than a layer's K and V, which then take its first
heads and columns: layers need not be alike.

A pattern is compiled with the model it is given to. Cutting it to a window reads it, which a graph cannot: for
`fullgraph=True` on a model with windows, call `pattern.windowed(window)` once before.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ... import ops
from ...cache import KVCache
from ...distributed import ContextParallel
from ...ops.attention import reference
from ...patterns import Pattern
from ..causal import causal
from . import continuous

__all__ = [
    "LayerCalls",
    "LayerKeys",
    "StructureMask",
    "append_kept",
    "masked_attention",
    "register",
    "tidar_attention_forward",
    "tidar_mask",
]

NAME = "tidar"

# Arguments of attention functions that change what a layer computes: the last two are keys that sparse layers choose,
# which they put into the mask of "eager" and "sdpa" alone.
_NOT_HONOURED = (
    "output_attentions", "head_mask", "layer_head_mask", "position_bias", "cache", "indices", "block_indices",
)  # fmt: skip


class StructureMask:
    """The mask that a model's own structure asks for, nobody having given another: causal, packed, windowed.

    Args:
        options: what `sdpa_mask` of transformers builds it from.

    Attributes:
        window: the sliding window (or chunk) in it; None for none.
        ndim: 4, as that of the mask it stands for.
    """

    ndim = 4

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._dense: Tensor | None = None
        self.window: int | None = options.get("local_size")

    def dense(self) -> Tensor:
        """The mask as booleans, `[batch, 1, rows, keys]`, True where a key is seen; built once."""
        if self._dense is not None:
            return self._dense
        dense: Any = sdpa_mask(**self._options)
        if not torch.compiler.is_compiling():  # a graph builds it again, and the compiler shares the copies
            self._dense = dense
        return dense

    def to(self, *args: Any, **kwargs: Any) -> StructureMask:
        """Itself: it is moved once it is built."""
        return self

    # A model that looks into its mask, rather than hand it on, finds the tensor: by attribute, in PyTorch's functions,
    # and by the operators below.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        whole = all(isinstance(p, slice) and p.start in (None, 0) and p.stop is None and p.step is None for p in parts)
        return self if whole else self.dense()[index]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(_dense, args), **{name: _dense(value) for name, value in (kwargs or {}).items()})


def _dense(value: Any) -> Any:
    """`value` with the tensor in place of every `StructureMask`, in lists and tuples too."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_dense, value))
    return value.dense() if isinstance(value, StructureMask) else value


def _forwarded(name: str) -> Callable[..., Any]:
    def operator(self: StructureMask, *args: Any) -> Any:
        return getattr(self.dense(), name)(*map(_dense, args))

    return operator


_BINARY = ("add", "sub", "mul", "truediv", "and", "or", "xor")
for _name in (
    *(f"__{side}{operation}__" for operation in _BINARY for side in ("", "r")),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__len__", "__iter__", "__invert__", "__neg__", "__bool__"),
):
    setattr(StructureMask, _name, _forwarded(_name))
StructureMask.__hash__ = object.__hash__  # type: ignore[method-assign]


class LayerShape(NamedTuple):
    """What a layer calls attention with: heads of K and V, width of K, width of V."""

    num_kv_heads: int
    head_dim: int
    head_dim_v: int


class LayerKeys:
    """In place of `tidar_cache`: keys and values of tokens that are run once, without gradients, for rows run later.

    The first pass leaves its keys and values here, layer by layer. In every pass after it they stand before its own:
    the pattern's keys are those of the first pass, then those of the rows.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Tensor, Tensor]] = {}

    def before(self, layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer's rows attend to; the first of a layer are kept."""
        if layer not in self._kept:
            self._kept[layer] = key.detach(), value.detach()
            return key, value
        k_before, v_before = self._kept[layer]
        return torch.cat([k_before, key], dim=2), torch.cat([v_before, value], dim=2)


class LayerCalls:
    """In place of `tidar_cache`: notes how often each layer calls attention, and with what; nothing is cached.

    Attributes:
        calls: for each layer index, the shapes of its calls.
    """

    def __init__(self) -> None:
        self.calls: defaultdict[Any, list[LayerShape]] = defaultdict(list)


def tidar_mask(
    batch_size: int, *, kv_length: int, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | StructureMask | None:
    """The mask function of `"tidar"`, with the arguments of transformers' `sdpa_mask`.

    Returns:
        None where plain causal (or, for encoders, full) attention is meant; a `StructureMask` where the model's own
        structure asks for more and nothing is cached; else booleans `[batch, 1, rows, keys]`.

    Raises:
        ValueError: `attention_mask` has neither 2 nor 4 dimensions.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        shape = list(attention_mask.shape)
        raise ValueError(f"attention_mask: expected 2 dimensions, or 4 for a mask ready to use, got shape {shape}")
    options.update(batch_size=batch_size, kv_length=kv_length, attention_mask=attention_mask)
    rows = options["q_length"] if "q_length" in options else options["cache_position"].shape[0]
    nothing_cached = not isinstance(options.get("q_offset", 0), Tensor) and kv_length == rows
    if attention_mask is not None or not nothing_cached or options.get("allow_is_bidirectional_skip", False):
        mask: Tensor | None = sdpa_mask(**options)
        return mask
    window = options.get("local_size")
    if options.get("allow_is_causal_skip", True) and (window is None or kv_length < window):
        return None
    return StructureMask({**options, "allow_is_causal_skip": False})


def tidar_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | StructureMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tidar_pattern: Pattern | ContextParallel | None = None,
    tidar_cache: KVCache | LayerCalls | LayerKeys | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of `"tidar"`, called by every attention layer of a model; see the module for the paths.

    Args:
        query: `[batch, heads, rows, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim]`, those of a transformers cache included.
        attention_mask: `[batch, 1 or heads, rows, keys]`, boolean (True: seen) or added to the scores.
        scaling: of the scores; default `1 / sqrt(head_dim)`.
        sliding_window: of the layer. Ordinary calls have it in the mask; patterns are windowed by it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: `[heads]`, attention sinks: a logit a head in the softmax's denominator.
        tidar_pattern: which rows see what, in place of a mask: `model(.., position_ids=.., tidar_pattern=pattern)`.
            With a `ContextParallel`, everything is that of this rank's rows.
        tidar_cache: with a pattern, the context; the pattern's causal rows are written after it, not committed. Or a
            `LayerCalls`, which takes notes, or `LayerKeys`, which keeps the keys of a pass for the next.

    Returns:
        `([batch, rows, heads, head_dim of value], None)`, contiguous.

    Raises:
        TypeError, ValueError: dropout, attention weights, head masks, position biases and layers that choose their keys
            (DeepSeek-V3.2), which this cannot do; a mask or a transformers cache beside a pattern; masks of a wrong
            shape.
    """
    if isinstance(kwargs.get("cache"), continuous.PagedAttentionCache):
        numbers: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
        numbers["sliding_window"] = sliding_window
        return continuous.attend(module, query, key, value, **numbers, **kwargs), None
    if dropout > 0.0:
        raise ValueError(f'dropout: expected 0 under attn_implementation="tidar", got {dropout}')
    for name in _NOT_HONOURED:
        given = kwargs.pop(name, None)
        if given is not None and given is not False:
            raise ValueError(f'{name}: expected none under attn_implementation="tidar", got {type(given).__name__}')
    if tidar_pattern is None and tidar_cache is not None:
        raise ValueError("tidar_pattern: expected a Pattern beside tidar_cache, got None")
    query, key, value = _as_autocast(query, key, value)
    if tidar_pattern is not None:
        if isinstance(tidar_cache, LayerKeys):
            key, value = tidar_cache.before(getattr(module, "layer_idx", None), key, value)
            tidar_cache = None
        pattern = _layer_pattern(tidar_pattern, key, attention_mask, sliding_window)
        if isinstance(tidar_cache, LayerCalls):
            layer = getattr(module, "layer_idx", None)
            tidar_cache.calls[layer].append(LayerShape(key.shape[1], key.shape[3], value.shape[3]))
            tidar_cache = None
        scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        width = value.shape[-1]
        query, key, value = _as_wide(query, key, value)
        numbers = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
        if isinstance(pattern, ContextParallel):
            if tidar_cache is not None:
                raise TypeError(
                    "tidar_pattern: expected a tidar_kernels.Pattern beside tidar_cache, got ContextParallel"
                )
            out = pattern.attention(query, key, value, **numbers)
        elif tidar_cache is None:
            out = ops.attention(query, key, value, pattern, **numbers)
        else:
            index = _layer_index(module, tidar_cache)
            k_cache, v_cache, options = append_kept(tidar_cache, index, key, value, pattern.kept_len)
            lengths = tidar_cache.context_lengths
            out = ops.step_attention(query, key, value, k_cache, v_cache, lengths, pattern, **numbers, **options)
        return _as_rows(out[..., :width]), None

    mask = attention_mask.dense() if isinstance(attention_mask, StructureMask) else attention_mask
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None:
        _check_mask(mask, query, key)
    if is_causal and getattr(module, "layer_idx", 0) == 0:
        _warn_of_leaks(kwargs.get("position_ids"), mask, query.shape[2], key.shape[2])
    if mask is None and _kernels_take(query, key, value):
        rows, keys = query.shape[2], key.shape[2]
        if is_causal and rows <= keys and (rows > 1 or keys == 1):
            pattern = causal(rows)
            out = ops.attention(
                query, key[:, :, :rows], value[:, :, :rows], pattern, scaling, softcap=softcap, sinks=s_aux
            )
            return _as_rows(out), None
        if rows == 1 and keys > 1 and not torch.is_grad_enabled():
            lengths = torch.full(query.shape[:1], keys - 1, dtype=torch.int32, device=query.device)
            out = ops.step_attention(
                query, key[:, :, -1:], value[:, :, -1:], key[:, :, :-1], value[:, :, :-1], lengths, causal(1), scaling,
                softcap=softcap, sinks=s_aux,
            )  # fmt: skip
            return _as_rows(out), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=0.0, scaling=scaling, **kwargs)
    return masked_attention(query, key, value, mask, scaling, softcap, s_aux, is_causal), None


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Plain PyTorch attention with all that layers ask for: any mask, softcap and sinks at once.

    Args and result are those of `tidar_attention_forward`; without a mask, several rows are causal by `is_causal`.
    A row that sees no key is 0.
    """
    rows, keys, kv_heads = query.shape[2], key.shape[2], key.shape[1]
    if mask is None:
        mask = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril() if is_causal and rows > 1 else mask
    mask = mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))
    return _as_rows(reference.masked_attention(query, key, value, mask, scaling, softcap, sinks)[0])


def _as_rows(out: Tensor) -> Tensor:
    """`[batch, heads, rows, head_dim]` -> `[batch, rows, heads, head_dim]`, contiguous as that of "sdpa" is."""
    return out.transpose(1, 2).contiguous()


def _as_autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """Under autocast a layer may bring float32 keys and half-precision values: all as autocast wants them."""
    device = operands[0].device.type
    if len({x.dtype for x in operands}) == 1 or not torch.is_autocast_enabled(device):
        return operands
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in operands)


def _as_wide(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All as wide as the widest, padded with zeros: the scores and the first columns of the output stay."""
    width = max(key.shape[-1], value.shape[-1])
    if query.shape[-1] == value.shape[-1]:
        return query, key, value
    query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    return query, key, value


def append_kept(
    cache: KVCache, layer: int, key: Tensor, value: Tensor, keep: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Write the first `keep` keys and values after a layer's committed ones.

    Returns:
        `(k_cache, v_cache, options)` of it, as `step_attention` takes them.
    """
    heads, width = key.shape[1], key.shape[3]
    k_cache, v_cache = (buffer[:, :heads, :, :width] for buffer in cache.layer(layer))
    options = {name: x[:, :heads] if x.ndim == 3 else x for name, x in cache.options(layer).items()}  # scales by slot
    cache.check_room(keep)
    # A backward pass ends at `step_attention`, which has no gradient, and says so.
    key, value = (x[:, :, :keep].detach() for x in (key, value))
    ops.append_kv(k_cache, v_cache, key, value, cache.lengths, **options)
    return k_cache, v_cache, options


def _warn_of_leaks(positions: Any, mask: Tensor | None, rows: int, keys: int) -> None:
    """Warn if positions start again, as those of packed documents do, where the mask lets a row see the row before.

    transformers keeps packed documents apart only if no mask is given: one of all ones says that they see each other.
    Rows and keys of padding (which do not see themselves) are no documents.
    """
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[-1] != rows or rows != keys:
        return
    if rows == 1 or torch.compiler.is_compiling() or (positions.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    leaks = positions[:, 1:] <= positions[:, :-1]
    if mask is not None and mask.shape[-2:] == (rows, keys):
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        earlier, own = seen.diagonal(-1, -2, -1), seen.diagonal(0, -2, -1)[..., 1:]
        leaks = leaks & (earlier & own).any(1)
    if bool(leaks.any()):
        warnings.warn(
            "attention_mask: expected None beside position_ids that start again, for a mask of ones lets packed "
            "documents see each other",
            stacklevel=2,
        )


def _kernels_take(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the operators take these operands. Compiled graphs leave ordinary attention to PyTorch: a pattern is
    made for one length, and a graph may be for all. So do float32 heads wider than 256, which some chips have no
    backward kernels for."""
    return (
        not torch.compiler.is_compiling()
        and query.device.type in ("cpu", "cuda")
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= (256 if query.dtype == torch.float32 else 512)
    )


def _check_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    expected = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_mask: expected booleans, or floats to add, got {mask.dtype}")
    if mask.ndim != 4:
        raise ValueError(f"attention_mask: expected 4 dimensions, got shape {list(mask.shape)}")
    if any(size not in (1, full) for size, full in zip(mask.shape, expected, strict=True)):
        raise ValueError(f"attention_mask: expected {list(expected)} or 1 in each dimension, got {list(mask.shape)}")


def _layer_pattern(
    pattern: Pattern | ContextParallel,
    key: Tensor,
    mask: Tensor | StructureMask | None,
    sliding_window: int | None,
) -> Pattern | ContextParallel:
    """`pattern` cut to the layer's window, once it is sure that nothing else was asked for."""
    if not isinstance(pattern, (Pattern, ContextParallel)):
        raise TypeError(f"tidar_pattern: expected a tidar_kernels.Pattern, got {type(pattern).__name__}")
    if isinstance(mask, StructureMask):
        # The window in the model's mask and the layer's own must agree: a chunk, or a window that the layer does not
        # know of, would be lost.
        if mask.window is not None and mask.window != sliding_window:
            raise ValueError(f"sliding_window: expected {mask.window} as in the layer's mask, got {sliding_window}")
    elif mask is not None:
        raise ValueError(
            f"attention_mask: expected None beside tidar_pattern, which says what is seen, got shape {list(mask.shape)}"
        )
    if isinstance(pattern, ContextParallel):
        keys, name = len(pattern.keys), pattern.local.name
    else:
        keys, name = pattern.kv_len, pattern.name
    if key.shape[2] != keys:
        raise ValueError(
            f"past_key_values: expected none beside tidar_pattern, and {keys} keys for {name}, got {key.shape[2]} keys"
        )
    return pattern if sliding_window is None else pattern.windowed(sliding_window)


def _layer_index(module: nn.Module, cache: KVCache) -> int:
    if not isinstance(cache, KVCache):
        raise TypeError(f"tidar_cache: expected a tidar_kernels.KVCache, got {type(cache).__name__}")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int) or not 0 <= layer < cache.num_layers:
        raise ValueError(f"layer_idx: expected an int in [0, {cache.num_layers}), got {layer!r}")
    return layer


def register() -> None:
    """Make `attn_implementation="tidar"` known to transformers: attention, masks and continuous batching. Importing the
    package does."""
    continuous.accept(NAME)
    AttentionInterface.register(NAME, tidar_attention_forward)
    AttentionMaskInterface.register(NAME, tidar_mask)
