"""Checkpoints: one safetensors file with the weights, and the model's configuration as JSON in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ..nn.files import replacing
from ..nn.rotary import RotaryEmbedding
from ..patterns.arguments import check_device, check_dtype, check_path
from .transformer import Transformer, TransformerConfig

__all__ = ["load_checkpoint", "save_checkpoint"]

_CONFIG_KEY = "transformer_config"


def save_checkpoint(
    model: Transformer,
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model to `path`, atomically: an interrupted save leaves the old file.

    Args:
        metadata: further strings for the file's header.
        dtype: of the stored weights; default the model's own.

    Raises:
        ValueError: `metadata` uses the key of the configuration.
    """
    from safetensors.torch import save

    if not isinstance(model, Transformer):
        raise TypeError(f"model: expected a tidar_kernels.models.Transformer, got {type(model).__name__}")
    path = check_path("path", path)
    check_dtype("dtype", dtype)
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"metadata: expected a dict of strings, got {type(metadata).__name__}")
    metadata = dict(metadata or {})
    if _CONFIG_KEY in metadata:
        raise ValueError(f"metadata: expected keys other than {_CONFIG_KEY!r}, got {sorted(metadata)}")
    metadata[_CONFIG_KEY] = json.dumps(model.config.to_dict())
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in model.state_dict().items()}
    with replacing(path) as file:
        # Through bytes: safetensors' own file writer makes files that only their owner can read.
        file.write(save(tensors, metadata=metadata))


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model in `path`, in eval mode.

    Args:
        dtype: of the weights in memory; None keeps the stored one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, corrupted or not safetensors; it has no configuration or a bad one; a tensor is
            missing, unexpected or of the wrong shape.
    """
    from safetensors import SafetensorError, safe_open

    path = check_path("path", path)
    check_dtype("dtype", dtype)
    device = check_device("device", device)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a checkpoint file, got {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got {error}") from None
    config = _config(path, metadata)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        model = Transformer(config)
    model.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, device="cpu")
    expected = model.state_dict()
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{path}: expected the {len(expected)} tensors of its configuration, "
            f"got missing {missing or 'none'}, unexpected {unexpected or 'none'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: expected shape {list(expected[name].shape)} for {name}, got {list(tensor.shape)}"
            )
    # Weights are assigned, not cast as a module: the rotary frequencies stay float32 in a half-precision model.
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
    return model.to(device).eval()


def _config(path: Path, metadata: dict[str, str]) -> TransformerConfig:
    """The configuration in the header, or ValueError."""
    if _CONFIG_KEY not in metadata:
        raise ValueError(f"{path}: expected {_CONFIG_KEY!r} in its metadata, got {sorted(metadata) or 'no metadata'}")
    try:
        return TransformerConfig.from_dict(json.loads(metadata[_CONFIG_KEY]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a transformer configuration as JSON, got {error}") from None
