"""A transformers model as the decoder wants it: `Decoder.from_transformers`."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import eq
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ... import patterns
from ...cache import KVCache
from ...nn.adapters import has_gated_lora, lora_gate
from ...patterns import Pattern
from .attention import NAME, LayerCalls, LayerKeys, LayerShape
from .loading import tidar_entry
from .logits import LogitShape

__all__ = ["DecoderConfig", "TransformersModel", "decoder_model"]


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder asks of a model's configuration.

    `num_kv_heads` and `head_dim` are the largest of any layer. `max_positions` is None for a model without such a
    bound, and `bounded_by` says in errors what sets it; `block_size` and `mask_token_id` are defaults, None if the
    model has none.
    """

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None = None
    bounded_by: str = ""
    block_size: int | None = None
    mask_token_id: int | None = None


class TransformersModel:
    """A causal language model of transformers as a `tidar_kernels.DecoderModel`.

    The model is switched to `attn_implementation="tidar"` and stays so, whatever it was loaded with. A few tokens are
    run both ways, as a prefill and a step after it, to be sure that every layer takes patterns and that these logits
    are the model's own; so they are again before a run if the model has changed (`check_ready`).

    Positions are bounded where the model has a table of them, and where its rotary table depends on the length
    (dynamic NTK, longrope): there, by the length up to which it does not.

    Args:
        model: with a language modelling head, in evaluation mode, on one device; or a PEFT model around one.
        block_size, mask_token_id: defaults for the decoder.

    Raises:
        TypeError: not a transformers model.
        ValueError: an encoder-decoder, a model in training mode or on several devices, layers that are not plain
            softmax attention, an embedding that does not fit the vocabulary, or a class that does not go through
            transformers' attention interface. The model is then as it was.
    """

    def __init__(self, model: Any, block_size: int | None = None, mask_token_id: int | None = None) -> None:
        self.model, self._given = _unwrapped(model), model
        before = [(config, config._attn_implementation) for config in _configs(self.model)]
        try:
            _check_kind(self.model)
            if any(implementation != NAME for _, implementation in before):
                self.model.set_attn_implementation(NAME)
                text = self.model.config.get_text_config(decoder=True)
                for config in self._attending():  # layers that were copied have configurations of their own
                    if type(config) is type(text):
                        config._attn_implementation = text._attn_implementation
            self.config = replace(self._look(), block_size=block_size, mask_token_id=mask_token_id)
            self._check_by_running()
        except BaseException:
            for config, implementation in before:  # a config sets those in it, which come later here
                config._attn_implementation = implementation
            raise
        self._state = list(_state(self.model))
        self._gated = has_gated_lora(self.model)

    def __call__(
        self, tokens: Tensor, pattern: Pattern, cache: KVCache | LayerCalls | LayerKeys | None = None
    ) -> Tensor:
        """Hidden states `[batch, q_len, hidden]` of `tokens [batch, q_len]`; see `DecoderModel`.

        Raises:
            ValueError: the model was switched to another attention implementation, or to training mode.
        """
        hidden: Tensor = self._run(tokens, pattern, cache).last_hidden_state
        return hidden

    def with_layers(
        self,
        tokens: Tensor,
        pattern: Pattern,
        cache: KVCache | LayerCalls | LayerKeys | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """The call, and what comes out of some layers, side by side: `[batch, q_len, len(layers) * hidden]`.

        They are transformers' `hidden_states[layer + 1]`: of the last layer, for most classes, after the final norm.

        Raises:
            ValueError: as the call, or the class does not hand these out (`check_layers`).
        """
        found = self._run(tokens, pattern, cache, output_hidden_states=[layer + 1 for layer in layers])
        states = getattr(found, "hidden_states", None) or ()
        if len(states) != self._text.num_hidden_layers + 1:
            raise ValueError(
                f"model: expected a class that hands out the hidden states of its layers, got {_name(self.model)}"
            )
        return found.last_hidden_state, torch.cat([states[layer + 1] for layer in layers], dim=-1)

    def check_layers(self, layers: Sequence[int], width: int) -> None:
        """Raise ValueError unless `with_layers` gives `width` features of each of these layers."""
        with torch.no_grad(), lora_gate(False):
            features = self.with_layers(self._few_tokens(), patterns.causal(_FEW), None, layers)[1]
        if features.shape[-1] != len(layers) * width:
            found = features.shape[-1] // len(layers)
            raise ValueError(f"model: expected hidden states of width {width}, got {found} of {_name(self.model)}")
        self._state = list(_state(self.model))  # transformers hooks the layers when it is first asked for these

    def _run(self, tokens: Tensor, pattern: Pattern, cache: Any, **more: Any) -> Any:
        """What the decoder under the lm_head gives."""
        if self._text._attn_implementation != NAME or self.model.training:
            self.check_ready()
        positions = pattern.on(tokens.device)[2].expand(len(tokens), -1)
        if isinstance(cache, KVCache):
            positions = cache.lengths[:, None] + positions
        if self._last_position is not None:
            positions = positions.clamp(max=self._last_position)
        return self._decoder(
            input_ids=tokens,
            position_ids=positions.long(),
            use_cache=False,
            tidar_pattern=pattern,
            tidar_cache=cache,
            **more,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The lm_head, and what the model does to its logits after it."""
        return self._shape(self._head(hidden))

    def parameters(self) -> Iterator[Any]:
        return self.model.parameters()

    def __getstate__(self) -> dict[str, Any]:
        """A copy's model is another one, which `check_ready` looks at."""
        return {**vars(self), "_state": []}

    def check_ready(self) -> None:
        """Raise if the model can no longer be decoded as it could; a decoder asks before each run.

        Nothing is run while modules, parameters, training flags, hooks and attention implementations are what they
        were. If some are not, the model is checked as when it was given.

        Raises:
            ValueError: as `TransformersModel`; another attention implementation, autocast, or another vocabulary or
                K/V than the decoder was made for.
        """
        _check_no_autocast(next(self.model.parameters()).device)
        _unwrapped(self._given)  # another adapter may be active
        state = list(_state(self.model))
        if len(state) == len(self._state) and all(map(eq, state, self._state)):
            return
        _check_kind(self.model)
        if has_gated_lora(self.model) != self._gated:
            raise ValueError(
                f"model: expected gated adapters {self._gated} as when the decoder was made, got {not self._gated}; "
                "make a new decoder"
            )
        config = self._look()
        for name, found in vars(config).items():
            expected = getattr(self.config, name)
            if name not in ("block_size", "mask_token_id") and found != expected:
                raise ValueError(
                    f"{name}: expected {expected} as when the decoder was made, got {found}; make a new decoder"
                )
        self._check_by_running()
        self._state = state

    def _look(self) -> DecoderConfig:
        """What there is to know of the model now; nothing of it is changed."""
        model = self.model
        text = self._text = model.config.get_text_config(decoder=True)
        self._decoder: Any = model.get_decoder()
        self._head: Any = model.get_output_embeddings()
        self._shape = LogitShape.of(text)
        others = sorted({str(config._attn_implementation) for config in (text, *self._attending())} - {NAME})
        if others:
            if not model._can_set_attn_implementation():
                raise ValueError(f"model: expected a class with transformers' attention interface, got {_name(model)}")
            expected = f'attn_implementation="{NAME}" in all layers of {_name(model)}'
            call = f'model.set_attn_implementation("{NAME}")'
            raise ValueError(f"model: expected {expected}, got {', '.join(others)}; call {call}")
        bound = _bound(self._decoder, text)
        self._last_position = None if bound is None else bound.last
        shapes = self._layer_shapes(text.num_hidden_layers)
        return DecoderConfig(
            vocab_size=text.vocab_size,
            num_layers=text.num_hidden_layers,
            num_kv_heads=max(shape.num_kv_heads for shape in shapes),
            head_dim=max(max(shape.head_dim, shape.head_dim_v) for shape in shapes),
            max_positions=None if bound is None else bound.positions,
            bounded_by="" if bound is None else f" ({bound.reason})",
        )

    def _attending(self) -> list[Any]:
        """The configurations of the layers that attend."""
        modules = self.model.get_decoder().modules()
        return [vars(m)["config"] for m in modules if "layer_idx" in vars(m) and "config" in vars(m)]

    def _layer_shapes(self, num_layers: int) -> list[LayerShape]:
        """What each layer calls attention with: once, by the pattern it is given."""
        noted, name = LayerCalls(), _name(self.model)
        if num_layers < 1:
            raise ValueError(f"model: expected at least one layer, got {name} with {num_layers}")
        with _refusing(self.model):
            self(self._few_tokens(), patterns.tidar_prefill(3, 2), noted)
        for layer in range(num_layers):
            if layer not in noted.calls:
                raise ValueError(
                    f"model: expected every layer's attention to take `tidar_pattern`, got {name}, "
                    f"whose layer {layer} does not"
                )
            if len(noted.calls[layer]) != 1:
                raise ValueError(
                    f"model: expected one call of attention in each layer, got {name}, "
                    f"whose layer {layer} makes {len(noted.calls[layer])}"
                )
        others = sorted(map(str, noted.calls.keys() - set(range(num_layers))))
        if others:
            raise ValueError(
                f"model: expected attention in layers 0 .. {num_layers - 1}, got {name}, which has it in layer "
                f"{', '.join(others)} too"
            )
        return [noted.calls[layer][0] for layer in range(num_layers)]

    def _few_tokens(self) -> Tensor:
        weight: Any = next(self.model.parameters())
        return torch.arange(_FEW, device=weight.device)[None] % self._text.vocab_size

    def _check_by_running(self) -> None:
        """A prefill and a step through a poisoned cache, against the model's own forward pass."""
        name, tokens = _name(self.model), self._few_tokens()
        weight: Any = next(self.model.parameters())
        cache = KVCache(
            num_layers=self.config.num_layers,
            batch_size=1,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            max_len=_FEW,
            dtype=weight.dtype,
            device=weight.device,
        )
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
        step = patterns.tidar_step(2)
        masks = tokens.new_full((1, step.q_len - 2), self._text.vocab_size - 1)
        with _refusing(self.model):
            first = self.logits(self(tokens, patterns.tidar_prefill(3, 2), cache)[:, :3])
            cache.commit(3)
            second = self.logits(self(torch.cat([tokens[:, 3:], masks], dim=1), step, cache)[:, :2])
            own = self.model(input_ids=tokens, use_cache=False).logits.float()
        if own.shape[-1] != self._text.vocab_size:
            raise ValueError(f"vocab_size: expected {self._text.vocab_size} logits of {name}, got {own.shape[-1]}")
        logits = torch.cat([first, second], dim=1).float()
        if not bool(own.isfinite().all()):
            bad = [path for path, weight in self.model.named_parameters() if not bool(weight.isfinite().all())]
            where = bad[0] if bad else "its logits"
            raise ValueError(f"model: expected finite logits, got {name} with NaN or inf in {where}")
        # Rounding stays far below, half precision's too; what computes something else, far above.
        is_precise = all(weight.dtype in (torch.float32, torch.float64) for weight in self.model.parameters())
        most = 2e-3 if is_precise and torch.get_float32_matmul_precision() == "highest" else 0.05
        for rows, reason in (
            (slice(3), ": it is more than its decoder and lm_head"),
            (slice(3, None), " after cached tokens: it keeps positions or state of its own"),
        ):
            error = float((logits - own)[:, rows].norm() / own[:, rows].norm())
            if not error <= most:
                raise ValueError(f"model: expected logits as {name} computes them, got {error:.3g} off{reason}")


# Tokens that the checks run: three as a prompt, two as drafts.
_FEW = 5


@contextmanager
def _refusing(model: Any) -> Iterator[None]:
    """Runs the model inside as it is without gated adapters, and says of any error that the model does not suit."""
    name = _name(model)
    with torch.no_grad(), lora_gate(False):  # gated adapters, if there are any, are not in question
        try:
            yield
        except Exception as refused:
            unknown = isinstance(refused, TypeError) and "unexpected keyword" in str(refused)
            what = "hands `tidar_pattern` on to its layers" if unknown else "attends by a pattern and a cache"
            reason = (str(refused).strip() or "nothing said").splitlines()[0]
            raise ValueError(
                f"model: expected a class that {what}, got {name}, which raised {type(refused).__name__}: {reason}"
            ) from refused


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration in a model, each before those in it; they name its attention implementations."""
    found: dict[int, Any] = {}
    pending = [model.config, *(own for module in model.modules() if (own := vars(module).get("config")) is not None)]
    while pending:
        config = pending.pop(0)
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            pending = [getattr(config, name, None) for name in config.sub_configs] + pending
    return list(found.values())


def _state(model: PreTrainedModel) -> Iterator[tuple[Any, ...]]:
    """What of a model decoding relies on, as cheap comparisons: the same while nobody has changed it."""
    plain = (int, float, str, type(None))
    for module in model.modules():
        own, kind = vars(module), type(module)
        implementation = getattr(own.get("config"), "_attn_implementation", None)
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        forward = kind, kind.forward, own.get("forward")
        yield weakref.ref(module), module.training, implementation, forward, hooks, str(own.get("rope_type"))
        if module is model or "layer_idx" in own:  # what the logits are scaled by; is_causal
            yield tuple(item for item in own.items() if isinstance(item[1], plain))
    yield tuple(item for item in vars(model.config.get_text_config(decoder=True)).items() if isinstance(item[1], plain))
    for parameter in model.parameters():  # the weights may change, but not what a cache is made for
        yield parameter.dtype, parameter.device, parameter.shape


class _Bound(NamedTuple):
    """How many positions a sequence may have, the last that a row may be given, and why."""

    positions: int
    last: int
    reason: str


def _bound(decoder: nn.Module, text: Any) -> _Bound | None:
    """The tightest bound of positions in a model, if there is one."""
    bounds = []
    for path, module in decoder.named_modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else ((None, kinds),):
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            numbers = module.config.rope_parameters
            numbers = numbers if layer_type is None else numbers[layer_type]
            is_dynamic = "dynamic" in kind
            length = int(module.original_max_seq_len if is_dynamic else numbers["original_max_position_embeddings"])
            # A dynamic table that has grown is taken back only below its original length.
            last = max(length - 2, 0) if is_dynamic else length - 1
            bounds.append(_Bound(length, last, f"{kind} rotary positions, which depend on the length beyond"))
        if isinstance(module, nn.Embedding) and _POSITIONS.search(path.rpartition(".")[2]):
            rows = module.num_embeddings - (getattr(module, "offset", 0) or 0)
            bounds.append(_Bound(rows, rows - 1, path))
    known = getattr(text, "max_position_embeddings", None)
    for path, buffer in decoder.named_buffers():
        if _POSITIONS.search(path.rpartition(".")[2]) and buffer.ndim > 1 and len(buffer) == known:
            bounds.append(_Bound(len(buffer), len(buffer) - 1, path))
    return min(bounds, default=None)


_POSITIONS = re.compile(r"pos|wpe")


def decoder_model(
    model: Any,
    tokenizer: Any = None,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    needs_mask: bool = True,
) -> TransformersModel:
    """`model` with its defaults for decoding: from the arguments, else the config's entry `tidar`, else the tokenizer.

    Raises:
        TypeError, ValueError: no mask token is to be found but `needs_mask`, the tokenizer knows more tokens than the
            model, or the model does not suit (`TransformersModel`).
    """
    config = _unwrapped(model).config
    entry = tidar_entry(config)
    block_size = entry.get("block_size") if block_size is None else block_size
    mask_token_id = entry.get("mask_token_id") if mask_token_id is None else mask_token_id
    mask_token_id = getattr(tokenizer, "mask_token_id", None) if mask_token_id is None else mask_token_id
    if needs_mask and mask_token_id is None:
        raise ValueError(
            "mask_token_id: expected a token id here, in the config's entry `tidar` (converted checkpoints have it), "
            "or as the tokenizer's mask token, got none"
        )
    vocab_size = config.get_text_config(decoder=True).vocab_size
    if tokenizer is not None and (isinstance(tokenizer, Tensor) or not hasattr(tokenizer, "__len__")):
        raise TypeError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer: expected at most the model's {vocab_size} tokens, got {len(tokenizer)}")
    return TransformersModel(model, block_size, mask_token_id)


def _name(model: Any) -> str:
    return type(model).__name__


def _unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model in wrappers of PEFT and `torch.compile`; adapters inside its layers stay there.

    Raises:
        TypeError: there is none. ValueError: a wrapper of PEFT gives the model more than tokens.
    """
    given = model
    while not isinstance(model, PreTrainedModel):
        adapters = getattr(model, "peft_config", None)
        active = getattr(model, "active_adapters", [])
        configs = [adapters.get(name) for name in active] if isinstance(adapters, dict) else []
        for config in (getattr(model, "active_peft_config", None), *configs):
            if getattr(config, "is_prompt_learning", False):
                raise ValueError("model: expected PEFT adapters inside its layers, got prompt learning")
            if getattr(config, "alora_invocation_tokens", None):
                raise ValueError("model: expected PEFT adapters for all tokens, got one from an invocation on (aLoRA)")
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        elif inner is None and adapters is not None:  # a tuner, or a model of several kinds of them
            inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module) or inner is model:
            raise TypeError(f"model: expected a transformers model, got {_name(given)}")
        model = inner
    return model


def _is_inert(module: nn.Module) -> bool:
    """Whether training mode is nothing to a module; layers that were just made (for a grown vocabulary) are in it."""
    return type(module) in _INERT or (isinstance(module, nn.Dropout) and module.p == 0.0)


_INERT = (nn.Linear, nn.Embedding, nn.Identity, nn.LayerNorm, nn.ModuleDict, nn.ModuleList, nn.ParameterDict)


def _check_kind(model: PreTrainedModel) -> None:
    """Raise for what is plainly no decoder of softmax attention layers, ready to decode."""
    text = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder-only model, got {_name(model)}")
    training = [path for path, module in model.named_modules() if module.training and not _is_inert(module)]
    if training:
        where = f" in {training[0]}" if training[0] else ""
        raise ValueError(f"model: expected evaluation mode, got training mode{where}; call model.eval()")
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None:
        raise ValueError(f"model: expected one with a language modelling head, got {_name(model)}")
    for what, module in (("embedding", embedding), ("lm_head", head)):
        rows = _rows(module)
        if rows is not None and rows != text.vocab_size:
            expected = f"{text.vocab_size} rows as in the config"
            raise ValueError(f"vocab_size: expected {expected}, got {rows} in the {what} of {_name(model)}")
    other = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(
            f"model: expected layers of full or sliding attention, got {_name(model)} with {', '.join(other)}"
        )
    devices = sorted({str(x.device) for x in model.parameters()})
    if len(devices) != 1 or devices[0] == "meta":
        raise ValueError(f"model: expected all parameters on one device, got {', '.join(devices)}")
    _check_no_autocast(devices[0])


def _rows(module: nn.Module) -> int | None:
    """How many tokens an embedding or a head has; None if it does not say, as a module around one may not."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.shape[0]
    rows = getattr(module, "out_features", getattr(module, "num_embeddings", None))  # packed weights have no rows
    return rows if isinstance(rows, int) else None


def _check_no_autocast(device: torch.device | str) -> None:
    kind = torch.device(device).type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        raise ValueError(f"model: expected no torch.autocast around decoding, got {dtype}; call model.to({dtype})")
