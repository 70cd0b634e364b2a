"""`generate` as transformers loads it from a folder, by this name; it is copied, so it names the package in full."""

from tidar_kernels.integrations.transformers.generation import generate

__all__ = ["generate"]
