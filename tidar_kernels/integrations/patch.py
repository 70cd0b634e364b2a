"""`patch`: the attention of any PyTorch model through `TiDARAttention`, for models that are not transformers'.

    names = tk.patch(model, rope_theta=10_000.0)
    with tk.use_pattern(tk.patterns.tidar_training(seq_len, block_size)):
        hidden = model(tokens)

Weights are not copied: the new module owns the very projections of the old one, as `q_proj`, `k_proj`, `v_proj` and
`o_proj`, so that optimizers, and where they had these names state dictionaries, know them as before. What the old
module computed beside them (its rotation, its scale) is not read but checked: both modules run on random input, and
where they differ nothing is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import KVCache
from ..nn.attention import RotaryEmbedding, TiDARAttention
from ..patterns import Pattern
from ..patterns.arguments import check_int, check_number, check_strings
from .causal import causal

__all__ = ["PatchedAttention", "patch", "use_pattern"]

_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}

# What implementations call these numbers.
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_NUM_KV_HEADS = ("num_kv_heads", "num_key_value_heads", "n_kv_heads", "n_kv_head")
_HEAD_DIM = ("head_dim", "head_size")
_DROPOUT = ("dropout", "dropout_p", "attn_dropout", "attention_dropout")

# Of the self-check: positions enough for rotations to differ, scores large enough for that to show in the output.
_CHECK_ROWS, _CHECK_SCORES = 24, 2.0
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_ACTIVE: ContextVar[tuple[Pattern, KVCache | None] | None] = ContextVar("tidar_kernels.use_pattern", default=None)


@contextmanager
def use_pattern(pattern: Pattern, cache: KVCache | None = None) -> Iterator[None]:
    """While it lasts, patched modules attend by `pattern`, and with `cache` after its committed context.

    Outside they are causal. It holds for the running thread or task alone.

    Raises:
        TypeError: `pattern` is not a `Pattern`, or `cache` not a `KVCache`.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern: expected a tidar_kernels.Pattern, got {type(pattern).__name__}")
    if cache is not None and not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a tidar_kernels.KVCache, got {type(cache).__name__}")
    token = _ACTIVE.set((pattern, cache))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@lru_cache(maxsize=16)
def _rotary(head_dim: int, theta: float, device: torch.device) -> RotaryEmbedding:
    """One for all layers, and part of none: a model cast to half precision would take its frequencies along."""
    with torch.inference_mode(False):
        return RotaryEmbedding(head_dim, theta, device)


class PatchedAttention(TiDARAttention):
    """`TiDARAttention` in the place of another attention module, called with that one's arguments.

    Made by `patch`. `forward(x, ...)` attends by the pattern of `use_pattern`, causally without one. Further arguments
    are refused by name, unless they are None, their default, or were declared to be ignored.
    """

    def __init__(
        self,
        old: nn.Module,
        projections: Mapping[str, nn.Module],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_theta: float | None,
        layer_idx: int,
        ignore: Sequence[str],
    ) -> None:
        nn.Module.__init__(self)  # the projections are there already
        self.num_heads, self.num_kv_heads, self.head_dim, self.layer_idx = num_heads, num_kv_heads, head_dim, layer_idx
        for role, name in _NAMES.items():
            setattr(self, name, projections[role])
        for name in ("q_norm", "k_norm"):
            setattr(self, name, getattr(old, name, None))
        self.rope_theta = rope_theta
        self.train(old.training)
        self._signature = inspect.signature(old.forward)
        self._ignore = frozenset(ignore)
        self._outputs: int | None = None  # how many the old module returned, None for a bare tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`x [batch, rows, hidden_size]` -> what the old module returned: the output, or a tuple of it and None."""
        self._refuse_others(x, args, kwargs)
        pattern, cache = _ACTIVE.get() or (causal(x.shape[1]), None)
        if x.shape[1] != pattern.q_len:
            raise ValueError(f"x: expected {pattern.q_len} rows for {pattern.name}, got {x.shape[1]}")
        rotary = None
        if self.rope_theta is not None:
            positions = pattern.on(x.device)[2]
            positions = positions if cache is None else cache.lengths[:, None] + positions
            rotary = _rotary(self.head_dim, self.rope_theta, x.device)(positions, x.dtype)
        out = super().forward(x, pattern, rotary=rotary, cache=cache)
        return out if self._outputs is None else (out, *[None] * (self._outputs - 1))

    def _refuse_others(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise for an argument that says something: a mask that nobody reads would be dropped."""
        if not args and not kwargs:
            return
        bound = self._signature.bind(x, *args, **kwargs)
        bound.arguments.pop(next(iter(bound.arguments)))
        for name, value in bound.arguments.items():
            parameter = self._signature.parameters[name]
            several = dict(value) if parameter.kind is inspect.Parameter.VAR_KEYWORD else {name: value}
            for key, given in several.items():
                if given is not None and key not in self._ignore and given is not parameter.default:
                    raise ValueError(
                        f"{key}: expected None, for a patched module attends by use_pattern, got "
                        f"{type(given).__name__} (patch(..., ignore=[{key!r}]) if it says nothing that is not known)"
                    )


def patch(
    model: nn.Module,
    *,
    rope_theta: float | None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    names: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    call: Callable[[nn.Module, Tensor], Any] | None = None,
) -> list[str]:
    """Replace every attention module of `model` by a `TiDARAttention` over the same weights, once all were checked.

    An attention module is one that has the four projections of `names`; it projects, normalises the heads of q and k if
    it has `q_norm` and `k_norm`, rotates them by position, attends causally with scores scaled by `1/sqrt(head_dim)`,
    and projects. Each is compared with its replacement on random input. Whatever else a model does by position (learned
    position embeddings, say) remains its own affair: a pattern's positions are `pattern.positions`.

    Args:
        model: changed in place, and left as it is by any error.
        rope_theta: base of the rotary positions, in the half-split layout of Llama and Qwen; None for no rotation.
        num_heads, num_kv_heads, head_dim: default what a module's attributes (`num_heads`, `n_head`, `head_dim`, ..)
            and the shapes of its projections say.
        names: of the projections, default `{"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}`; or with one
            for all three, whose rows are those of q, then k, then v: `{"qkv": "qkv_proj", "o": "out_proj"}`. That one
            is copied into three.
        ignore: arguments of the modules' forward that say nothing which is not known: rotary tables, a causal mask.
        call: how the old module is called for the check, `call(module, x)`; default `module(x)`.

    Returns:
        Names of the replaced modules, in their order: that of the layers of a `KVCache`.

    Raises:
        TypeError: `model` is not a module, or `names` not of the four or two projections.
        ValueError: it has no attention module; one has parameters besides those that are mapped, does not tell its
            number of heads, cannot be called with `x` alone, or computes something else. The message names the module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if names is not None and not isinstance(names, Mapping):
        raise TypeError(f"names: expected a mapping, got {type(names).__name__}")
    ignore = check_strings("ignore", ignore)
    if call is not None and not callable(call):
        raise TypeError(f"call: expected a function, got {type(call).__name__}")
    if rope_theta is not None:
        rope_theta = check_number("rope_theta", rope_theta, 1.0)
    for name, size in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if size is not None:
            check_int(name, size, 1, 2**31)
    names = dict(_NAMES if names is None else names)
    if set(names) not in ({"q", "k", "v", "o"}, {"qkv", "o"}):
        raise TypeError(f"names: expected the keys q, k, v, o or qkv, o, got {', '.join(names)}")
    found = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if path and not isinstance(module, TiDARAttention)
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names.values())
    ]
    if not found:
        raise ValueError(f"model: expected modules with {', '.join(names.values())} in it, got {type(model).__name__}")
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    replacements: dict[str, PatchedAttention] = {}
    for layer_idx, (path, old) in enumerate(found):
        twice = [other for other, module in found[:layer_idx] if module is old]
        if twice:
            raise ValueError(f"model.{path}: expected an attention module of its own, got that of model.{twice[0]}")
        new = _replacement(f"model.{path}", old, names, sizes, rope_theta, layer_idx, ignore)
        _compare(f"model.{path}", old, new, call or (lambda module, x: module(x)))
        replacements[path] = new
    for path, new in replacements.items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return list(replacements)


def _replacement(
    where: str,
    old: nn.Module,
    names: dict[str, str],
    sizes: dict[str, int | None],
    rope_theta: float | None,
    layer_idx: int,
    ignore: Sequence[str],
) -> PatchedAttention:
    """The new module around the old one's projections; raises unless all of its parameters have a place there."""
    owned = (*names.values(), "q_norm", "k_norm")
    others = [name for name, _ in old.named_parameters() if name.split(".")[0] not in owned]
    if others:
        raise ValueError(
            f"{where}: expected no parameters besides those of {', '.join(owned)}, got {', '.join(others)}"
        )
    dropout = [getattr(old, name, 0.0) for name in _DROPOUT] + [m.p for m in old.modules() if isinstance(m, nn.Dropout)]
    if any(isinstance(p, (int, float)) and p > 0 for p in dropout):
        raise ValueError(f"{where}: expected no dropout, got {max(p for p in dropout if isinstance(p, (int, float)))}")
    heads, kv_heads, dim = _sizes(where, old, names, sizes)
    if "qkv" in names:
        fused = getattr(old, names["qkv"])
        q, k, v = _split(where, fused, [heads * dim, kv_heads * dim, kv_heads * dim])
        projections = {"q": q, "k": k, "v": v, "o": getattr(old, names["o"])}
    else:
        projections = {role: getattr(old, name) for role, name in names.items()}
    return PatchedAttention(
        old,
        projections,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rope_theta=rope_theta,
        layer_idx=layer_idx,
        ignore=ignore,
    )


def _sizes(where: str, old: nn.Module, names: dict[str, str], sizes: dict[str, int | None]) -> tuple[int, int, int]:
    """Heads, key/value heads and head size: as given, or as the module's attributes and shapes say."""

    def attribute(given: int | None, candidates: Sequence[str]) -> int | None:
        values = [given, *(getattr(old, name, None) for name in candidates)]
        return next((value for value in values if isinstance(value, int)), None)

    heads, kv_heads = attribute(sizes["num_heads"], _NUM_HEADS), attribute(sizes["num_kv_heads"], _NUM_KV_HEADS)
    dim = attribute(sizes["head_dim"], _HEAD_DIM)
    if "qkv" in names:
        rows = _rows(where, old, names["qkv"])
        kv_heads = heads if kv_heads is None else kv_heads
        if heads is None or kv_heads is None:
            raise ValueError(
                f"num_heads: expected it beside a fused projection, got no attribute of {where} that says it"
            )
        dim = rows // (heads + 2 * kv_heads) if dim is None else dim
        fits = rows == (heads + 2 * kv_heads) * dim
    else:
        q_rows, k_rows = _rows(where, old, names["q"]), _rows(where, old, names["k"])
        if dim is None and heads is None:
            raise ValueError(f"num_heads: expected it or head_dim, got no attribute of {where} that says either")
        dim = q_rows // int(heads or 1) if dim is None else dim
        heads = q_rows // max(dim, 1) if heads is None else heads
        kv_heads = k_rows // max(dim, 1) if kv_heads is None else kv_heads
        fits = q_rows == heads * dim and k_rows == kv_heads * dim == _rows(where, old, names["v"])
    if not fits or min(heads, kv_heads, dim) < 1 or heads % kv_heads:
        shapes = ", ".join(f"{n} of {_rows(where, old, n)} rows" for role, n in names.items() if role != "o")
        raise ValueError(f"{where}: expected {heads} heads, {kv_heads} kv_heads, head_dim {dim} to fit, got {shapes}")
    return heads, kv_heads, dim


def _rows(where: str, old: nn.Module, name: str) -> int:
    projection = getattr(old, name)
    rows = getattr(projection, "out_features", None)
    if not isinstance(rows, int):
        raise ValueError(f"{where}.{name}: expected a torch.nn.Linear, got {type(projection).__name__}")
    return rows


def _split(where: str, fused: nn.Linear, rows: list[int]) -> list[nn.Linear]:
    """A linear layer for each run of rows of `fused`; copies."""
    if not isinstance(fused, nn.Linear):
        raise ValueError(f"{where}: expected a fused torch.nn.Linear, got {type(fused).__name__}")
    weights = fused.weight.detach().split(rows)
    biases: Sequence[Tensor | None] = [None] * len(rows) if fused.bias is None else fused.bias.detach().split(rows)
    layers = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=fused.weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=fused.weight.requires_grad)
        layers.append(layer)
    return layers


@torch.no_grad()
def _compare(where: str, old: nn.Module, new: PatchedAttention, call: Callable[[nn.Module, Tensor], Any]) -> None:
    """Raise unless both modules agree on random input, causally, at positions 0 .. 23; `new` learns what `old` returns.

    The input is so large that scores are too. Beside random weights they are otherwise nearly 0, every row attends to
    all keys alike, and no rotation shows.
    """
    weight = new.o_proj.weight
    generator = torch.Generator().manual_seed(0)
    width = int(getattr(new.q_proj, "in_features", weight.shape[0]))
    x = torch.randn(2, _CHECK_ROWS, width, generator=generator, device="cpu").to(weight.device, weight.dtype)
    scores = float(new.q_proj(x).float().std() * new.k_proj(x).float().std())
    x *= (_CHECK_SCORES / max(scores, 1e-12)) ** 0.5
    training = old.training
    try:
        returned = call(old.eval(), x)
    except TypeError as wrong:
        raise ValueError(f"{where}: expected to be called as module(x) (or see call), got: {wrong}") from wrong
    finally:
        old.train(training)
    before = returned[0] if isinstance(returned, tuple) else returned
    with use_pattern(causal(_CHECK_ROWS)):
        after = new.eval()(x)
    new.train(training)
    if not isinstance(before, Tensor) or before.shape != after.shape:
        got = list(before.shape) if isinstance(before, Tensor) else type(before).__name__
        raise ValueError(f"{where}: expected an output of shape {list(after.shape)}, got {got}")
    error = float((after.double() - before.double()).norm() / before.double().norm().clamp(min=1e-30))
    if not error <= _TOLERANCE.get(weight.dtype, 1e-4):
        expected = (
            f"{new.num_heads} heads over {new.num_kv_heads}, rope_theta = {new.rope_theta}, "
            f"scale 1/sqrt({new.head_dim})"
        )
        raise ValueError(f"{where}: expected causal attention with {expected}, got outputs {error:.2g} apart by norm")
    new._outputs = len(returned) if isinstance(returned, tuple) else None
