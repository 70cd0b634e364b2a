"""An autoregressive model made ready for TiDAR: a mask token, and a configuration entry that says how it is used.

    config.json: "tidar": {"block_size": 8, "mask_token_id": 151669}

The result stays an ordinary transformers checkpoint: nothing in it needs this package, and until it is trained its
greedy text is what it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...patterns.arguments import check_int, check_path
from .loading import load, tidar_entry

__all__ = ["MASK_TOKEN", "Conversion", "add_mask_token", "convert"]

MASK_TOKEN = "<|mask|>"


@dataclass(frozen=True)
class Conversion:
    """What `convert` made: where it lies, and what decoding and training ask for.

    Attributes:
        added: the tokenizer did not have the token before.
        vocab_size: rows of the embedding.
    """

    path: str
    model: str
    block_size: int
    mask_token: str
    mask_token_id: int
    added: bool
    vocab_size: int
    parameters: int


def add_mask_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token: str | None = None,
    *,
    block_size: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> int:
    """Give a model and its tokenizer a mask token, in place; saving them keeps it.

    A token that the tokenizer does not know gets the first free id and, in the embedding and the lm_head, the mean of
    the rows that the tokenizer's tokens have: an input in the middle of those known, and a logit that is never the
    largest. A special token that it knows (a reserved one, say) keeps its id and its rows. The embedding grows only if
    it has no spare row. `config.tidar` then holds `mask_token_id`, and `block_size` if given.

    Args:
        model: with an input embedding; the lm_head may be tied to it, untied, or have a bias. Before LoRA wraps it.
        tokenizer: the model's.
        token: default the tokenizer's own mask token, or `"<|mask|>"` if it has none.
        block_size: B, for the configuration entry.
        pad_to_multiple_of: of the embedding's rows, if it grows; the further rows are set to the mean too.

    Returns:
        The id of the mask token.

    Raises:
        TypeError: `model` is not a transformers model, `tokenizer` not a transformers tokenizer.
        ValueError: the tokenizer has ids beyond the model's embedding, or the token has another use already: it is
            ordinary text, or ends or begins texts. Nothing is changed then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")
    tidar_entry(model.config)  # raises before anything is changed
    if block_size is not None:
        check_int("block_size", block_size, 1)
    if pad_to_multiple_of is not None:
        check_int("pad_to_multiple_of", pad_to_multiple_of, 1)
    if token is not None and not isinstance(token, str):
        raise TypeError(f"token: expected text, got {type(token).__name__}")
    token = token or tokenizer.mask_token or MASK_TOKEN
    vocabulary = tokenizer.get_vocab()
    rows, used = _num_rows(model), max(vocabulary.values()) + 1
    if used > rows:
        raise ValueError(
            f"tokenizer: expected ids below the {rows} rows of the model's embedding, got up to {used - 1}"
        )
    known = token in vocabulary
    if known:
        _check_free(tokenizer, token)
    tokenizer.add_special_tokens({"mask_token": token})
    mask_id = tokenizer.get_vocab()[token]
    if mask_id >= rows:
        model.resize_token_embeddings(mask_id + 1, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    if not known:
        for weight in _vocabulary_weights(model):
            fresh = [mask_id, *range(rows, weight.shape[0])]
            with torch.no_grad():
                weight[fresh] = weight[:used].mean(0, dtype=torch.float32).to(weight.dtype)
    entry = dict(getattr(model.config, "tidar", None) or {})
    model.config.tidar = entry | {"mask_token_id": mask_id} | ({"block_size": block_size} if block_size else {})
    return mask_id


def _num_rows(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _check_free(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Raise if a token of the tokenizer is in use."""
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token"):
        if getattr(tokenizer, name, None) == token:
            raise ValueError(f"token: expected one without another use, got {token!r}, the tokenizer's {name}")
    if token not in tokenizer.get_added_vocab() and token not in tokenizer.all_special_tokens:
        raise ValueError(f"token: expected a special token or a new one, got {token!r}, which is ordinary text")


def _vocabulary_weights(model: PreTrainedModel) -> Iterator[Tensor]:
    """What has a row for every token: the embedding, and an untied lm_head's weight and bias."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    yield embedding.weight
    if head is not None and head.weight is not embedding.weight:
        yield head.weight
    if getattr(head, "bias", None) is not None:
        yield head.bias


def convert(
    model_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    block_size: int,
    mask_token: str | None = None,
    pad_to_multiple_of: int | None = None,
) -> Conversion:
    """Make an autoregressive checkpoint ready for TiDAR: `add_mask_token`, saved as safetensors with its tokenizer.

    Args:
        model_path: a folder, or a name on the Hub, of a causal language model and its tokenizer; see `loading.load`.
        out_path: a folder that does not exist yet, or is empty. It appears complete or not at all.
        block_size: B, to train and decode with.
        mask_token, pad_to_multiple_of: see `add_mask_token`.

    Raises:
        FileExistsError: there is something at `out_path`; before anything is read or written.
        TypeError, ValueError: an argument does not fit, or the checkpoint lacks weights or has those of other shapes.
        OSError: the checkpoint cannot be read, or the new one not be written.
    """
    check_int("block_size", block_size, 1)
    check_path("model_path", model_path)
    target = check_path("out_path", out_path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"out_path: expected a new or an empty folder, got {target}")
    model, tokenizer = load(model_path)
    known = len(tokenizer)
    mask_id = add_mask_token(model, tokenizer, mask_token, block_size=block_size, pad_to_multiple_of=pad_to_multiple_of)
    with _appearing(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Conversion(
        path=str(target),
        model=type(model).__name__,
        block_size=block_size,
        mask_token=str(tokenizer.mask_token),
        mask_token_id=mask_id,
        added=len(tokenizer) > known,
        vocab_size=_num_rows(model),
        parameters=model.num_parameters(),
    )


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` at the end of the block, or vanishes if that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        yield folder
        if target.is_dir():
            target.rmdir()
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
