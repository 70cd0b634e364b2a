"""The arguments of vLLM's engine for a TiDAR checkpoint: what a user would otherwise have to know."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ...decoding.strategies import StrategyName
from ...nn.files import read_json
from ...patterns.arguments import check_int, check_ints, check_path
from .plugin import ARCHITECTURES, BACKEND, check_version
from .settings import Settings

__all__ = ["engine_options"]

_LEAST_BATCHED_TOKENS = 2048  # vLLM's own default on small GPUs; below it prefill chunks get short


def engine_options(
    folder: str | os.PathLike[str],
    strategy: StrategyName | None = None,
    *,
    block_size: int | None = None,
    levels: Sequence[int] | None = None,
    mask_token_id: int | None = None,
    max_num_seqs: int = 16,
    **engine: Any,
) -> dict[str, Any]:
    """The keyword arguments of `vllm.LLM` (and of `vllm.EngineArgs`) that serve a checkpoint with a strategy.

    Args:
        folder: a transformers checkpoint, of an architecture in `ARCHITECTURES`. Its config.json has an entry `tidar`
            (see `Settings`; `tidar-kernels convert` writes it), or `block_size` and `mask_token_id` are given.
        strategy: "tidar", "isd" or "flare"; default the checkpoint's own, "tidar" if it has none.
        block_size, levels, mask_token_id: instead of the checkpoint's.
        max_num_seqs: requests that run at once. A step schedules T rows for each of them (72 at block size 8), hence a
            default below vLLM's: several tokens a step pay where few requests run at once.
        engine: further arguments of the engine; they win over those that this function chooses. Its `block_size`, the
            slots of a cache page, has the name of ours: set it on the result.

    Returns:
        A dict with, beside `engine`:
        `hf_overrides`: our class of the model, and the entry `tidar` as it is to be decoded;
        `diffusion_config`: T - 1 rows beside the last token ride as vLLM's speculative tokens;
        `scheduler_cls`: the scheduler that leaves drafts on the device (vLLM's own choice but on CPUs);
        `max_num_batched_tokens`: room for a whole step of every request. With less, steps are cut: what is generated
        stays the same, with fewer drafts;
        `attention_backend`: ours, for strategies that stock attention cannot run; CPUs have it without being told;
        `logits_processors`: refuses, per request, what a step cannot do.

    Raises:
        ImportError: no vLLM is installed. OSError: no readable config.json.
        TypeError, ValueError: a version of vLLM that was not tried, an architecture or an entry that does not fit.
    """
    check_version()
    check_int("max_num_seqs", max_num_seqs, 1)
    config = read_json("folder", check_path("folder", folder) / "config.json")
    names = config.get("architectures")
    name: Any = names[0] if isinstance(names, list) and names else "none"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"folder: expected an architecture among {', '.join(ARCHITECTURES)}, got {name}")
    chosen = {"strategy": strategy, "block_size": block_size, "mask_token_id": mask_token_id}
    entry = config.get("tidar") or {}
    if not isinstance(entry, Mapping):
        raise ValueError(f"folder: expected an entry tidar with settings in its config.json, got {entry!r}")
    entry = dict(entry)
    if strategy not in (None, entry.get("strategy", "tidar")):
        entry = {key: value for key, value in entry.items() if key not in ("levels", "bidirectional")}
    entry |= {key: value for key, value in chosen.items() if value is not None}
    if levels is not None:
        entry["levels"] = check_ints("levels", levels, 1)
    settings = Settings.of(entry)
    vocab_size = config.get("vocab_size")
    if type(vocab_size) is int and settings.mask_token_id >= vocab_size:
        raise ValueError(f"mask_token_id: expected < {vocab_size}, the vocabulary, got {settings.mask_token_id}")
    overrides = dict(engine.pop("hf_overrides", None) or {})
    options: dict[str, Any] = {
        "model": os.fspath(folder),
        "hf_overrides": {"architectures": [ARCHITECTURES[name]], "tidar": settings.entry()} | overrides,
        "diffusion_config": {"canvas_length": settings.rows - 1},
        "scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler",
        "logits_processors": [f"{__package__}.requests:Refusals", *(engine.pop("logits_processors", None) or [])],
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(max_num_seqs * settings.rows, _LEAST_BATCHED_TOKENS),
    }
    if not settings.causal:
        options["attention_backend"] = BACKEND[0]
    return options | engine
