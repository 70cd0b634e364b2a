"""Gated adapters on a whole model: new ones, those that PEFT trained, and files that PEFT reads.

add_gated_lora(model, rank=64, alpha=128)            # or load_peft_adapter(model, "folder")
with lora_gate(gate):                                # [batch, rows] or [rows]: which rows the adapter applies to
    hidden = model(tokens, pattern)
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..ops import checks
from ..patterns.arguments import check_path, check_strings
from .gated_lora import GatedLoRA, check_adapter, check_base, has_gated_lora, kind_of, lora_gate
from .peft_files import CONFIG, WEIGHTS, number_of, read_config, read_weights, write

__all__ = [
    "CONFIG",
    "PROJECTIONS",
    "WEIGHTS",
    "GatedLoRA",
    "add_gated_lora",
    "has_gated_lora",
    "load_peft_adapter",
    "lora_gate",
    "save_adapter",
]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _named(name: str, targets: Sequence[str] | str) -> bool:
    """Whether a module is meant by PEFT's `target_modules`: ends of names, or one regular expression for all of it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _check_place(model: nn.Module, name: str) -> None:
    """Raise if what stands at `name` is not always called: in evaluation mode this layer reads the weights instead."""
    if isinstance(_parent(model, name), nn.TransformerEncoderLayer):
        raise TypeError(f"{name}: expected a module that is called, got that of nn.TransformerEncoderLayer")


def _put(model: nn.Module, adapters: dict[nn.Module, GatedLoRA]) -> None:
    """Put every adapter in the place of its module, under all names that the module has."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in adapters:
            setattr(_parent(model, name), name.rpartition(".")[2], adapters[module])


def add_gated_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str] = PROJECTIONS,
    *,
    use_rslora: bool = False,
    dtype: torch.dtype | None = None,
    row_invariant: bool = False,
) -> list[str]:
    """Freeze the model and wrap its projections in new adapters, the only parameters that then train.

    Args:
        model: changed in place.
        rank, alpha, use_rslora, dtype, row_invariant: of every `GatedLoRA`.
        targets: ends of module names; by default all projections of a Llama or Qwen layer.

    Returns:
        The names of the wrapped modules.

    Raises:
        TypeError: a target is not an `nn.Linear`, or one that `GatedLoRA` refuses, by name. ValueError: no targets, or
            a target names no module, or one that has an adapter. Nothing is changed then.
    """
    _check_module(model)
    targets = check_strings("targets", targets)
    if not targets:
        raise ValueError("targets: expected one or more names of modules, got none")
    found: dict[str, nn.Linear] = {}
    modules = dict(model.named_modules())
    for target in targets:
        names = [name for name in modules if _named(name, (target,))]
        if not names:
            raise ValueError(f"targets: expected names of modules in the model, got {target!r}")
        for name in names:
            module = modules[name]
            if isinstance(module, GatedLoRA) or isinstance(_parent(model, name), GatedLoRA):
                raise ValueError(f"targets: expected modules without an adapter, got {name}")
            if not isinstance(module, nn.Linear):
                raise TypeError(f"targets: expected {name} to be an nn.Linear, got {kind_of(module)}")
            check_base(name, module, row_invariant)
            _check_place(model, name)
            found[name] = module
    check_adapter(rank, alpha, dtype)
    options: dict[str, Any] = {"use_rslora": use_rslora, "dtype": dtype, "row_invariant": row_invariant}
    adapters: dict[nn.Module, GatedLoRA] = {
        module: GatedLoRA(module, rank, alpha, **options) for module in found.values()
    }
    model.requires_grad_(False)
    _put(model, adapters)
    return list(found)


def _check_targets(model: nn.Module, config: dict[str, Any], pairs: dict[str, Any]) -> None:
    """Every module of this model that the adapter is meant for has tensors, else it is another model's adapter."""
    targets = config.get("target_modules")
    if not targets or config.get("layers_to_transform") or config.get("exclude_modules") or targets == "all-linear":
        return
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, GatedLoRA)) and _named(name, targets) and name not in pairs:
            raise ValueError(f"{WEIGHTS}: expected tensors for {name}, which target_modules names, got none")


def load_peft_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    row_invariant: bool = False,
    rename: Callable[[str], str] = lambda name: name,
) -> list[str]:
    """Put a LoRA adapter that PEFT saved around the projections it was trained for; freezes those projections.

    Reads `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, `use_rslora` and `target_modules`. Modules that are
    `GatedLoRA` already get the new adapter.

    Args:
        model: changed in place; its module names are those of the model that the adapter was trained on.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        dtype, row_invariant: of every `GatedLoRA`.
        rename: from a module's name where the adapter was trained to its name in this model.

    Returns:
        The names of the wrapped modules.

    Raises:
        FileNotFoundError: one of the files is missing. ValueError: it is not a plain LoRA adapter (DoRA, biases,
            `modules_to_save`, `fan_in_fan_out`, ... are refused by name), or it does not fit the model: the message
            names the module, what was expected and what came. TypeError: a module is not an `nn.Linear`.
            Nothing is changed then.
    """
    _check_module(model)
    folder = check_path("path", path)
    config, pairs = read_config(folder), {rename(name): pair for name, pair in read_weights(folder).items()}
    modules = dict(model.named_modules())
    found: dict[str, tuple[nn.Linear, int, float]] = {}
    for name, pair in pairs.items():
        if name not in modules:
            raise ValueError(f"{WEIGHTS}: expected modules of the model, got {name}")
        module = modules[name]
        linear: Any = module.base if isinstance(module, GatedLoRA) else module
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name}: expected an nn.Linear for an adapter, got {kind_of(linear)}")
        check_base(name, linear, row_invariant)
        _check_place(model, name)
        rank, alpha = (
            number_of(config, f"{kind}_pattern", default, name)
            for kind, default in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        check_adapter(rank, alpha, dtype)
        for part, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
            checks.shape(f"{name}.lora_{part}", pair[part], shape)
        found[name] = (linear, rank, alpha)
    _check_targets(model, config, pairs)
    options: dict[str, Any] = {"dtype": dtype, "row_invariant": row_invariant}
    adapters: dict[nn.Module, GatedLoRA] = {}
    for name, (linear, rank, alpha) in found.items():
        with torch.random.fork_rng(devices=[]):  # loading must not move the caller's random stream
            adapter = GatedLoRA(linear, rank, alpha, use_rslora=bool(config.get("use_rslora")), **options)
        with torch.no_grad():
            adapter.lora_a.copy_(pairs[name]["A"])
            adapter.lora_b.copy_(pairs[name]["B"])
        adapters[modules[name]] = adapter
    _put(model, adapters)
    return list(found)


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, base_model: str | None = None) -> None:
    """Write the adapters of a model as PEFT does, so that PEFT and `load_peft_adapter` read them.

    Args:
        model: holds the `GatedLoRA` modules; not changed.
        path: a folder, created if need be; each of the two files is replaced whole.
        base_model: name of the base model for the configuration.

    Raises:
        ValueError: no adapter in the model, or some with and some without `use_rslora`. OSError: it was not written.
    """
    _check_module(model)
    folder = check_path("path", path)
    if base_model is not None and not isinstance(base_model, str):
        raise TypeError(f"base_model: expected a name, got {type(base_model).__name__}")
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, GatedLoRA)}
    if not adapters:
        raise ValueError("model: expected GatedLoRA modules, got none")
    if len({module.use_rslora for module in adapters.values()}) != 1:
        raise ValueError("model: expected use_rslora alike in all adapters, got True and False")
    rank = Counter(module.rank for module in adapters.values()).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in adapters.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): m.rank for name, m in adapters.items() if m.rank != rank},
        "alpha_pattern": {re.escape(name): m.alpha for name, m in adapters.items() if m.alpha != alpha},
        "use_rslora": next(iter(adapters.values())).use_rslora,
        "target_modules": list(adapters),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write(folder, config, {name: (module.lora_a, module.lora_b) for name, module in adapters.items()})
