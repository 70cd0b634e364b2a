"""The model that `tidar-kernels generate` decodes with: a byte-level checkpoint, or the folder of a transformers model.

With it comes what its text needs, so that nothing after it asks which of the two it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .checkpoints import quiet
from .common import UserError, resolve_device, user_errors

if TYPE_CHECKING:
    import torch

    from ..decoding.session import DecoderModel
    from ..decoding.strategies import Strategy
    from ..models import Transformer
    from ..models.tokenizer import StreamDecoder


@dataclass(frozen=True)
class Loaded:
    """A model with what its text needs; `strategy` is what a folder's model or adapter was trained for, if it says."""

    model: DecoderModel
    device: torch.device
    encode: Callable[[str], list[int]]
    stream: Callable[[], StreamDecoder | TextStream]
    mask_token_id: int
    stop_tokens: tuple[int, ...]
    strategy: Strategy | None = None
    adapted: bool | None = None


def load_model(options: argparse.Namespace) -> Loaded:
    """The model to decode with, on its device."""
    if options.checkpoint is not None and options.checkpoint.is_dir():
        return _load_folder(options)
    for option in ("drafter", "dtype", "mask_token_id"):
        if getattr(options, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise UserError(f"{name}: expected beside --checkpoint FOLDER, got {getattr(options, option)}")
    from ..models import ByteTokenizer, load_checkpoint, load_shipped
    from ..models.tokenizer import EOS_ID, MASK_ID, VOCAB_SIZE

    device = resolve_device(options.device)
    with user_errors(
        Exception, rename={"path": "--checkpoint"}, otherwise="--checkpoint: expected a checkpoint that can be read"
    ):
        if options.checkpoint is None:
            model, _ = load_shipped(device=device)
        else:
            model = load_checkpoint(options.checkpoint, device=device)
    if options.adapter is not None:
        _add_adapter(model, options)
    if model.config.vocab_size != VOCAB_SIZE:
        raise UserError(
            f"--checkpoint: expected a byte-level model of {VOCAB_SIZE} tokens, got {model.config.vocab_size} tokens"
        )
    mask, tokenizer = model.config.mask_token_id, ByteTokenizer()
    return Loaded(model, device, tokenizer.encode, tokenizer.stream, MASK_ID if mask is None else mask, (EOS_ID,))


def _load_folder(options: argparse.Namespace) -> Loaded:
    """A transformers model and its tokenizer, as `Decoder.from_transformers` reads and recognises them."""
    import torch

    from ..decoding.strategies import Strategy

    device = resolve_device(options.device)
    rename = {
        "model": "--checkpoint", "model_path": "--checkpoint", "path": "--adapter", "block_size": "--block-size",
        "strategy": "--strategy", "mask_token_id": "--mask-token-id", "drafter": "--drafter", "adapter": "--adapter",
    }  # fmt: skip
    with (
        quiet(),
        user_errors(Exception, rename=rename, otherwise="--checkpoint: expected a checkpoint that can be read"),
    ):
        from ..integrations.transformers.checkpoints import prepared
        from ..integrations.transformers.loading import read_tokenizer
        from ..nn.adapters import has_gated_lora

        tokenizer = read_tokenizer(str(options.checkpoint))
        if tokenizer is None:
            raise ValueError(f"--checkpoint: expected a tokenizer in the folder, got none in {options.checkpoint}")
        found = prepared(
            str(options.checkpoint),
            tokenizer,
            block_size=options.block_size,
            strategy=None if options.strategy is None else options.strategy.replace("-", "_"),
            mask_token_id=options.mask_token_id,
            autoregressive=options.mode == "autoregressive" and not options.compare,
            adapter=True if options.adapter is None else options.adapter,
            drafter=options.drafter,
            dtype="auto" if options.dtype is None else getattr(torch, options.dtype),
            device=device,
        )
        model = found.model.model
        mask = found.model.config.mask_token_id
        ends = model.generation_config.eos_token_id
        return Loaded(
            found.model,
            device,
            lambda text: list(tokenizer(text)["input_ids"]),
            lambda: TextStream(tokenizer),
            0 if mask is None else mask,  # of none, nothing drafts
            tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
            found.strategy if isinstance(found.strategy, Strategy) else None,
            has_gated_lora(model),
        )


class TextStream:
    """Tokens of a transformers tokenizer in, text out: as much as no later token can change."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._tokens, self._given = tokenizer, list[int](), ""

    def push(self, tokens: Iterable[int]) -> str:
        """The text that `tokens` complete."""
        self._tokens += tokens
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # A character of several tokens is U+FFFD until it is whole.
        return "" if text.endswith("\ufffd") else self._new(text)

    def finish(self) -> str:
        """What is left."""
        return self._new(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _new(self, text: str) -> str:
        new, self._given = text[len(self._given) :], text
        return new


def _add_adapter(model: Transformer, options: argparse.Namespace) -> None:
    from ..models import load_shipped_adapter
    from ..nn.adapters import load_peft_adapter

    with user_errors(
        Exception, rename={"path": "--adapter"}, otherwise="--adapter: expected an adapter that can be read"
    ):
        if str(options.adapter) == "shipped":
            load_shipped_adapter(model)
        else:
            load_peft_adapter(model, options.adapter)
