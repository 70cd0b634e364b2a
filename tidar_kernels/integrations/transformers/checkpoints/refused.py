"""Systems that are recognised, and cannot be decoded here; each says why."""

from __future__ import annotations

from typing import Any

from .system import Config, Refused, architecture

__all__ = ["REFUSED"]


class _Refused(Refused):
    """By the names of its classes and its model types, or by a key of its configuration."""

    def __init__(self, name: str, title: str, reason: str, *, names: tuple[str, ...] = (), key: str = "") -> None:
        self.name, self.title, self.reason = name, title, reason
        self._names, self._key = names, key

    def recognises(self, config: Config) -> bool:
        named = architecture(config) in self._names or config.get("model_type") in self._names
        return named or (self._key != "" and self._key in config)


class _Hybrid(Refused):
    """Trida, FLARE and other hybrids of attention and state-space layers, by the kinds of their layers."""

    name = "hybrid"
    title = "a hybrid of attention and state-space layers"
    reason = "the state of such layers cannot be taken back to the accepted tokens"

    def recognises(self, config: Config) -> bool:
        text: Any = config.get("text_config") or config
        kinds = set(text.get("layer_types") or ())
        return bool(kinds & {"linear_attention", "mamba", "mamba2", "conv", "recurrent"}) or any(
            key in text for key in ("hybrid_override_pattern", "linear_num_value_heads", "mamba_num_heads")
        )


REFUSED: tuple[Refused, ...] = (
    _Refused(
        "dflash",
        "a drafter of the DFlash family",
        "it drafts from the hidden states of its target's layers: read the target, with this as its drafter",
        names=("DFlashDraftModel",),
    ),
    _Refused(
        "dflash-like",
        "a drafter of the DFlash family",
        "it drafts by another rule than DFlash",
        names=("DFlash2DraftModel", "Qwen3DSparkModel", "DFlashDSparkDraftModel", "JetSpecDraftModel"),
        key="dflash_config",
    ),
    _Refused(
        "diffusion-gemma",
        "DiffusionGemma",
        "its canvas holds random tokens in the place of masks, and each pass takes the logits of the one before; "
        "transformers' own generate decodes it",
        names=("DiffusionGemmaForBlockDiffusion", "diffusion_gemma"),
    ),
    _Refused(
        "llada",
        "a diffusion model without blocks",
        "all its tokens see each other in every pass, so that there is nothing to cache",
        names=("LLaDAModelLM", "LLaDAMoEModelLM", "DreamModel", "Dream", "llada"),
    ),
    _Hybrid(),
)
