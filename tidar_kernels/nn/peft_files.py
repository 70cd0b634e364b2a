"""The two files of a LoRA adapter as PEFT writes them. What is not supported is refused by name when they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import read_json, replacing

__all__ = ["CONFIG", "WEIGHTS", "number_of", "read_config", "read_weights", "write"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What a PEFT configuration may hold that changes the function, and is not computed here: refused by name.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Initialisations that leave the base weights as they are; the others (PiSSA, OLoRA, ...) move a part of them into A, B.
_PLAIN_INIT = (None, True, False, "gaussian", "orthogonal", "eva")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a PEFT adapter, or an error that names what is not supported."""
    path = folder / CONFIG
    config = read_json("path", path)
    if str(config.get("peft_type")).upper() != "LORA":
        raise ValueError(f"{path}: expected peft_type 'LORA', got {config.get('peft_type')!r}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{path}: expected an adapter without {name}, got {config[name]!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: expected bias 'none', got {config['bias']!r}")
    if config.get("init_lora_weights") not in _PLAIN_INIT:
        raise ValueError(f"{path}: expected the base weights untouched, got {config['init_lora_weights']!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{path}: expected an object as {name}, got {config[name]!r}")
        for pattern in config.get(name) or ():
            _check_pattern(path, name, _ending(pattern))
    targets = config.get("target_modules")
    if isinstance(targets, str):
        _check_pattern(path, "target_modules", targets)
    elif targets is not None and not (isinstance(targets, list) and all(isinstance(one, str) for one in targets)):
        raise ValueError(f"{path}: expected names of modules or a pattern as target_modules, got {targets!r}")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(
            f"{path}: expected numbers r and lora_alpha, got {config.get('r')!r}, {config.get('lora_alpha')!r}"
        )
    return config


def _ending(pattern: str) -> str:
    """What PEFT matches module names with, for a pattern of their ends."""
    return rf"(.*\.)?({pattern})$"


def _check_pattern(path: Path, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: expected a regular expression in {name}, got {pattern!r} ({error})") from None


def read_weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """`{module name: {"A": tensor, "B": tensor}}` of a PEFT adapter."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a folder with {WEIGHTS}, got {folder}")
    pairs: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                found = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
                if found is None:
                    raise ValueError(f"{path}: expected tensors {_PREFIX}<module>.lora_A|B.weight, got {key}")
                pairs.setdefault(found[1], {})[found[2]] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got {error}") from None
    if not pairs:
        raise ValueError(f"{path}: expected adapter tensors, got none")
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"{path}: expected lora_A and lora_B of {name}, got only lora_{next(iter(pair))}")
    return pairs


def number_of(config: dict[str, Any], patterns: str, default: str, name: str) -> Any:
    """A module's own rank or alpha, by PEFT's rule: the first pattern that matches the end of its name."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(_ending(pattern), name):
            if not isinstance(value, (int, float)):
                raise ValueError(f"{CONFIG}: expected a number in {patterns} for {pattern!r}, got {value!r}")
            return value
    return config[default]


def write(folder: Path, config: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Write the adapter `{module name: (A, B)}`; `folder` is created if need be, each file replaced whole.

    Raises:
        OSError: it was not written.
    """
    from safetensors.torch import save

    tensors = {
        f"{_PREFIX}{name}.lora_{part}.weight": tensor.detach().cpu().contiguous()
        for name, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    with replacing(folder / CONFIG) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
