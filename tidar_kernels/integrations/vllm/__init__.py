"""vLLM serves TiDAR: a plug-in that vLLM finds by itself, and the engine arguments it needs.

    from vllm import LLM
    from tidar_kernels.integrations.vllm import engine_options

    llm = LLM(**engine_options("./Qwen3-0.6B-tidar"))

Nothing of vLLM is imported until it is used, and nothing of vLLM is replaced: a model is served by this package only
under the architecture names that `engine_options` gives. How a step travels through vLLM is told in `state`.
"""

from __future__ import annotations

from .options import engine_options
from .plugin import SUPPORTED, check_version, register

__all__ = ["SUPPORTED", "check_version", "engine_options", "register"]
