"""From a folder, or a name on the Hub, to its model; which system it is of is said by config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ....nn.adapters import load_peft_adapter
from ..loading import check_weights_dtype
from .fast_dllm import FastDLLM
from .llada2 import LLaDA2
from .nemotron import NemotronLabsDiffusion
from .refused import REFUSED
from .sdar import IDLM, SDAR
from .system import Config, Refused, System, architecture
from .tidar_lm import TiDARLM

__all__ = [
    "SYSTEMS",
    "add_adapter",
    "by_system_name",
    "checked",
    "config_of",
    "read_checkpoint",
    "recognised_system",
]

SYSTEMS: tuple[System, ...] = (NemotronLabsDiffusion(), TiDARLM(), IDLM(), SDAR(), FastDLLM(), LLaDA2())

# Buffers that older code saved, which layers compute for themselves.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.bias$")


def config_of(source: str) -> dict[str, Any]:
    """The content of a checkpoint's config.json; empty if it has none, as a folder with one GGUF file."""
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        return {}
    found: dict[str, Any] = PreTrainedConfig.get_config_dict(source)[0]
    return found


def recognised_system(config: Config) -> System | None:
    """The system that a configuration is of; None for an ordinary model.

    Raises:
        TypeError: it is no mapping. ValueError: it is of a system that cannot be decoded here, or of a class that
            transformers does not have.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a mapping, as config.json has it, got {type(config).__name__}")
    for system in SYSTEMS:
        if system.recognises(config):
            return system
    for refused in REFUSED:
        if refused.recognises(config):
            raise _refusal(refused, config)
    kind = config.get("model_type")
    if config.get("auto_map") and kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model: expected a class that transformers has, got {architecture(config) or kind}, whose code comes with "
            "its checkpoint and is not run"
        )
    return None


def by_system_name(name: str) -> System:
    """The system of that name.

    Raises:
        ValueError: there is none, or it cannot be decoded here.
    """
    for system in SYSTEMS:
        if system.name == name:
            return system
    for refused in REFUSED:
        if refused.name == name:
            raise _refusal(refused, {})
    known = ", ".join(system.name for system in SYSTEMS)
    raise ValueError(f"system: expected one of {known}, got {name!r}")


def _refusal(refused: Refused, config: Config) -> ValueError:
    name = architecture(config) or config.get("model_type") or refused.name
    return ValueError(
        f"model: expected a checkpoint that can be decoded, got {name}, {refused.title}: {refused.reason}"
    )


def read_checkpoint(
    source: str, system: System, config: Config, dtype: torch.dtype | str = "auto", name: str = "model"
) -> Any:
    """The model of a system's checkpoint, in evaluation mode, in the class of transformers whose layers are equal.

    `name` is that of the argument in errors.

    Raises:
        ValueError: tensors are missing, left over or of other shapes than its configuration says, or the configuration
            asks for what these layers do not have. OSError: it cannot be read.
    """
    check_weights_dtype("dtype", dtype)
    own = system.built_in(config)
    try:
        read: Any = (system.layers or AutoModelForCausalLM).from_pretrained(
            source, config=own, dtype=dtype, key_mapping=dict(system.renames) or None, output_loading_info=True
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{name}: expected weights of the shapes that config.json of {system.title} says, got others"
        ) from error
    model, loaded = read
    return checked(model.eval(), loaded, system.title, name)


def checked(model: Any, loaded: dict[str, Any], title: str, name: str = "model") -> Any:
    """The model, if its checkpoint had all of its tensors and no others."""
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ValueError(f"{name}: expected all weights of {title}, got none for {_few(missing)}")
    beyond = sorted(key for key in loaded["unexpected_keys"] if not _COMPUTED.search(key))
    if beyond:
        raise ValueError(
            f"{name}: expected the weights of {type(model).__name__} alone for {title}, got {_few(beyond)}"
        )
    return model


def _few(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def add_adapter(model: nn.Module, folder: str | Path, system: System | None) -> None:
    """Put a gated adapter into a model that was read into another class than the adapter was trained on.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `load_peft_adapter`.
    """
    renames = () if system is None else system.renames

    def renamed(name: str) -> str:
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        return name

    load_peft_adapter(model, folder, rename=renamed)
