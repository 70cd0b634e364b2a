"""A causal language model and its tokenizer from a folder: safetensors, or one GGUF file."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ...patterns.arguments import FLOAT_DTYPES, check_path

__all__ = ["check_name", "check_source", "check_weights_dtype", "load", "read_tokenizer", "tidar_entry"]

_MAX_LAYERS = 10_000


def load(
    model_path: str | os.PathLike[str], dtype: torch.dtype | str = "auto", needs_tokenizer: bool = True
) -> tuple[Any, Any]:
    """`(model, tokenizer)`, the model in evaluation mode.

    Args:
        model_path: a folder, or a name on the Hub. A folder with one `.gguf` file and no configuration is read with the
            package `gguf`, its weights dequantised.
        dtype: of the weights; "auto" is that of the checkpoint.
        needs_tokenizer: without, the tokenizer is None if there is none.

    Raises:
        FileNotFoundError: neither a folder nor a name. ValueError: weights are missing, or have other shapes than the
            configuration says. OSError: the checkpoint cannot be read. ImportError: `gguf` is needed and missing.
    """
    check_weights_dtype("dtype", dtype)
    source = check_source(model_path)
    file = _gguf_file(source)
    options: dict[str, Any] = {} if file is None else {"gguf_file": file}
    tokenizer = AutoTokenizer.from_pretrained(source, **options) if needs_tokenizer or file else read_tokenizer(source)
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            "model_path: expected weights of the shapes that its configuration says, got others"
        ) from error
    model, loaded = read
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ValueError(
            f"model_path: expected all weights of {type(model).__name__}, got none for {', '.join(missing)}"
        )
    if file is not None:  # its weights are ordinary ones now, and can be saved as such
        model.hf_quantizer = None
        del model.config.quantization_config
    return model.eval(), tokenizer


def read_tokenizer(source: str) -> Any:
    """The tokenizer of a checkpoint; None if it has none that can be read without code of its own."""
    if os.path.isdir(source) and not any(
        os.path.isfile(os.path.join(source, name)) for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (ValueError, OSError, KeyError):  # of a model type that transformers does not know, or with code of its own
        with suppress(ValueError, OSError, KeyError):
            return PreTrainedTokenizerFast.from_pretrained(source)
    return None


def check_name(model_path: str | os.PathLike[str], name: str = "model_path") -> str:
    """`model_path` as a str, if it is a folder or looks like a name on the Hub; nothing is read.

    `name` is that of the argument in errors.

    Raises:
        FileNotFoundError: it is neither. TypeError, ValueError: it is no path.
    """
    source = os.fspath(check_path(name, model_path))
    if not os.path.isdir(source) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise FileNotFoundError(f"{name}: expected a folder or a name on the Hub, got {source}")
    return source


def check_weights_dtype(name: str, value: Any) -> None:
    """Raise a TypeError unless this is a dtype that weights are read in: "auto", a float dtype, or its name."""
    if isinstance(value, str):
        value = None if value == "auto" else getattr(torch, value, value)
    if value is not None and value not in FLOAT_DTYPES:
        raise TypeError(f'{name}: expected "auto" or a float dtype that computes, got {value!r}')


def check_source(model_path: str | os.PathLike[str]) -> str:
    """`model_path` as transformers takes it.

    Raises:
        FileNotFoundError: neither a folder nor a name on the Hub. ValueError: more layers than anything can hold.
    """
    source = check_name(model_path)
    if _gguf_file(source) is None:
        config = AutoConfig.from_pretrained(source).get_text_config()
        layers = getattr(config, "num_hidden_layers", 0)
        if not isinstance(layers, int) or layers > _MAX_LAYERS:  # a module each, even before any weight is read
            raise ValueError(
                f"model_path: expected num_hidden_layers <= {_MAX_LAYERS} in its configuration, got {layers}"
            )
    return source


def _gguf_file(source: str) -> str | None:
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = sorted(each.name for each in folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def tidar_entry(config: Any) -> dict[str, int]:
    """A configuration's entry `tidar`: `block_size`, `mask_token_id`, those that it has.

    Raises:
        ValueError: it is no object, or one of them no int.
    """
    entry = getattr(config, "tidar", None)
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        raise ValueError(f"tidar: expected an object in the model's configuration, got {type(entry).__name__}")
    known = {name: entry[name] for name in ("block_size", "mask_token_id") if entry.get(name) is not None}
    for name, value in known.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"tidar: expected an int as {name} in the model's configuration, got {value!r}")
    return known
