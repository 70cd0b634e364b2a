"""`tidar_kernels.Decoder`: the decoder that also opens models and checkpoints of transformers."""

from __future__ import annotations

import os
from typing import Any, Literal

from ..decoding.decoder import Mode, ModelDecoder
from ..decoding.strategies import Strategy, StrategyName

__all__ = ["Decoder"]


class Decoder(ModelDecoder):
    __doc__ = ModelDecoder.__doc__

    # Which system a checkpoint is of and how it is decoded, from `from_transformers` with a path.
    recognised: Any = None

    def __repr__(self) -> str:
        return super().__repr__() if self.recognised is None else f"{type(self).__name__}({self.recognised})"

    @classmethod
    def from_transformers(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        block_size: int | Literal["auto"] | None = None,
        mask_token_id: int | None = None,
        strategy: StrategyName | Strategy | None = None,
        mode: Mode = "tidar",
        system: str | None = None,
        adapter: str | os.PathLike[str] | bool = True,
        drafter: Any = None,
        dtype: Any = "auto",
        device: Any = None,
        **options: Any,
    ) -> Decoder:
        """A decoder of a transformers model; it is switched to `attn_implementation="tidar"` and stays so.

        From a path, the checkpoint's configuration says which system it is of (Nemotron-Labs-Diffusion, I-DLM, SDAR,
        ..; docs/checkpoints.md), and so its mask token, block size, adapter and the strategy that its authors use; what
        is given here wins. `decoder.recognised`, its `repr` and a line of logging say what was found and chosen. No
        code of a checkpoint is run.

        Args:
            model: a folder or a name on the Hub; or a causal language model in evaluation mode, see
                `tidar_kernels.integrations.transformers`.
            tokenizer: checked against the model's vocabulary; its mask token is the last resort for one.
            block_size, mask_token_id: default those in the config's entry `tidar`, which converted checkpoints have.
            strategy: default "tidar", or that of the system.
            mode, options: as for `Decoder`.
            system: of a checkpoint whose configuration does not say which it is, "i-dlm" for example.
            adapter: a folder with a gated adapter for drafting (R-ISD), as PEFT saves it; True for the one that the
                system keeps in its checkpoint, if it is there, False for none.
            drafter: a DFlash drafter that was trained for this model: a folder or a name on the Hub, or a
                `strategies.Drafter`. It drafts, its mask token and block size are the defaults, and the output is that
                of the model without it.
            dtype, device: of the weights that are read; default those of the checkpoint, on the CPU.

        Raises:
            TypeError, ValueError: the model does not suit, there is no mask token, or as for `Decoder`; a checkpoint is
                of a system that cannot be decoded, or lacks tensors, by name.
            FileNotFoundError, OSError: there is no checkpoint or no adapter, or it cannot be read.
        """
        from .transformers.checkpoints import prepared  # needs transformers

        found = prepared(
            model,
            tokenizer,
            block_size=None if block_size == "auto" else block_size,
            mask_token_id=mask_token_id,
            strategy=strategy,
            stride=options.get("stride"),
            beta=options.get("beta"),
            autoregressive=mode == "autoregressive",
            system=system,
            adapter=adapter,
            drafter=drafter,
            dtype=dtype,
            device=device,
        )
        if isinstance(found.strategy, Strategy):
            options.pop("stride", None)
        if found.beta is not None:
            options["beta"] = found.beta
        size = block_size if block_size == "auto" else found.block_size
        decoder = cls(found.model, size, found.mask_token_id, mode=mode, strategy=found.strategy, **options)
        decoder.recognised = found.recognised
        return decoder
