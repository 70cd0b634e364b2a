"""Tokenised examples -> one doubled training sequence, `[clean tokens | masks]` (TiDAR, arXiv 2511.08923, training).

Every example is a document of its own: the documents of a batch lie one after another in a single row, none sees
another's tokens, and none is padded. What a batch costs is what its documents cost, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...patterns import Pattern, tidar_training
from ...patterns.arguments import check_int, check_sequence

__all__ = ["IGNORE_INDEX", "TiDARCollator", "batch_pattern", "pack"]

# The label that counts for nothing, in PyTorch as in transformers.
IGNORE_INDEX = -100

TooLong = Literal["error", "truncate", "split"]


class _Document(NamedTuple):
    """Tokens that see each other: int64 `[n]`, their labels, and how many at the start are a prompt."""

    tokens: Tensor
    labels: Tensor
    prompt: int


@lru_cache(maxsize=64)
def _pattern(block_size: int, documents: tuple[int, ...], prompts: tuple[int, ...]) -> Pattern:
    return tidar_training(sum(documents), block_size, documents, prompts)


def batch_pattern(batch: Mapping[str, Any]) -> Pattern:
    """The pattern of a collated batch. Batches with the same lengths share one, and with it the copy on the device.

    Raises:
        TypeError, ValueError: the batch does not come from a `TiDARCollator`.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a batch of TiDARCollator, got {type(batch).__name__}")
    missing = [key for key in ("block_size", "document_lengths", "prompt_lengths") if key not in batch]
    if missing:
        raise ValueError(f"batch: expected a batch of TiDARCollator, got one without {', '.join(missing)}")
    return _pattern(int(batch["block_size"]), tuple(batch["document_lengths"]), tuple(batch["prompt_lengths"]))


@dataclass(frozen=True)
class TiDARCollator:
    """Collate tokenised examples into a doubled training sequence.

    An example is a mapping with `input_ids`, ints or an int tensor `[n]`, and optionally:

    - `prompt_length`: its first tokens are a prompt, seen by all and predicted by none; they have no mask rows.
    - `labels`: the `input_ids`, or -100 for tokens that are not to be predicted. Unless there is a `prompt_length`, the
      -100 at the start are the prompt.
    - `attention_mask`: zeros at either end are padding, which is taken off.
    - `document_lengths`, `prompt_lengths`: it is a pack of several documents, see `pack`.

    Documents without a token to predict are left out.

    Args:
        block_size: B.
        mask_token_id: the token of mask rows; may not occur in an example.
        seq_len: most tokens of an example; default any number.
        too_long: a longer example is an "error" (the default), or loses its end ("truncate"), or becomes several
            documents ("split").
        pad_to_multiple_of: fill clean rows and mask rows up to a multiple of this with rows that predict nothing and
            are seen by none, so that compiled code meets few shapes; default no padding.

    Raises:
        TypeError, ValueError: an argument, or an example of a batch, does not fit; or no token of a batch is to be
            predicted.
    """

    block_size: int
    mask_token_id: int
    seq_len: int | None = None
    too_long: TooLong = "error"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size, 1)
        if self.mask_token_id is None:
            raise TypeError("mask_token_id: expected an int, got None (add_mask_token gives a model and tokenizer one)")
        check_int("mask_token_id", self.mask_token_id, 0)
        if self.pad_to_multiple_of is not None:
            check_int("pad_to_multiple_of", self.pad_to_multiple_of, 1)
        _check_limit(self.seq_len, self.too_long)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Returns:
            `input_ids` and `position_ids` int64 `[1, rows]`; `labels` int64 `[1, S]`, the clean tokens or -100; and on
            the host, for `batch_pattern`, `block_size`, `document_lengths` and `prompt_lengths`: plain ints, so that
            moving a batch to a device and handing it between processes leaves them as they are.
        """
        examples = check_sequence("examples", examples, "examples")
        documents = [
            document
            for index, example in enumerate(examples)
            for document in _documents(example, f"examples[{index}]", self.seq_len, self.too_long)
        ]
        if not documents:
            raise ValueError(f"examples: expected a token to predict, got none in {len(examples)} examples")
        if self.pad_to_multiple_of is not None:
            documents += self._padding(documents, self.pad_to_multiple_of)
        tokens = torch.cat([document.tokens for document in documents])
        lengths, prompts = tuple(len(d.tokens) for d in documents), tuple(d.prompt for d in documents)
        labels = torch.cat([document.labels for document in documents])
        if bool((tokens[labels != IGNORE_INDEX] == self.mask_token_id).any()):
            raise ValueError(f"examples: expected text without the mask token {self.mask_token_id}, got it to predict")
        pattern = _pattern(self.block_size, lengths, prompts)
        masks = tokens.new_full((pattern.q_len - len(tokens),), self.mask_token_id)
        return {
            "input_ids": torch.cat([tokens, masks])[None],
            "position_ids": pattern.positions.to(torch.int64)[None],
            "labels": labels[None],
            "block_size": self.block_size,
            "document_lengths": lengths,
            "prompt_lengths": prompts,
        }

    def _padding(self, documents: list[_Document], multiple: int) -> list[_Document]:
        """One more document, whose prompt part fills up the clean rows beyond what the mask rows need; or none."""
        clean = -sum(len(document.tokens) for document in documents) % multiple
        masks = -sum(len(document.tokens) - document.prompt for document in documents) % multiple
        clean += multiple if masks > clean else 0
        filler = torch.full((clean,), self.mask_token_id, device="cpu")
        return [_Document(filler, torch.full_like(filler, IGNORE_INDEX), clean - masks)] if clean else []


def pack(
    examples: Iterable[Mapping[str, Any]], seq_len: int, too_long: TooLong = "error"
) -> Iterator[dict[str, list[int]]]:
    """Join examples, in their order, into packs of at most `seq_len` tokens: a dataset for `TiDARCollator`.

    A pack holds whole documents and is not filled up, for the collator pads nothing: short packs cost less.

    Args:
        examples: as for `TiDARCollator`.
        seq_len: most tokens of a pack, >= 1.
        too_long: what becomes of an example that is longer: "error", "truncate" or "split".

    Raises:
        TypeError, ValueError: an argument or an example does not fit; of examples, once it is their turn.
    """
    if not isinstance(examples, Iterable) or isinstance(examples, (str, bytes, Mapping, torch.Tensor)):
        raise TypeError(f"examples: expected examples one after another, got {type(examples).__name__}")
    check_int("seq_len", seq_len, 1)
    _check_limit(seq_len, too_long)
    return _packs(examples, seq_len, too_long)


def _packs(examples: Iterable[Mapping[str, Any]], seq_len: int, too_long: TooLong) -> Iterator[dict[str, list[int]]]:
    waiting: list[_Document] = []
    for index, example in enumerate(examples):
        for document in _documents(example, f"examples[{index}]", seq_len, too_long):
            if sum(len(d.tokens) for d in waiting) + len(document.tokens) > seq_len:
                yield _as_example(waiting)
                waiting = []
            waiting.append(document)
    if waiting:
        yield _as_example(waiting)


def _as_example(documents: list[_Document]) -> dict[str, list[int]]:
    return {
        "input_ids": torch.cat([document.tokens for document in documents]).tolist(),
        "labels": torch.cat([document.labels for document in documents]).tolist(),
        "document_lengths": [len(document.tokens) for document in documents],
        "prompt_lengths": [document.prompt for document in documents],
    }


def _check_limit(seq_len: int | None, too_long: str) -> None:
    if seq_len is not None:
        check_int("seq_len", seq_len, 1)
    if too_long not in ("error", "truncate", "split"):
        raise ValueError(f'too_long: expected "error", "truncate" or "split", got {too_long!r}')


def _documents(example: Mapping[str, Any], name: str, seq_len: int | None, too_long: TooLong) -> Iterator[_Document]:
    """The documents of an example that have something to predict, each at most `seq_len` tokens long."""
    for tokens, labels, prompt in _whole_documents(example, name):
        limit = len(tokens) if seq_len is None else seq_len
        if len(tokens) > limit and too_long == "error":
            raise ValueError(
                f"{name}: expected at most seq_len = {seq_len} tokens, got {len(tokens)} "
                '(too_long="truncate" cuts them off, too_long="split" makes several documents of them)'
            )
        ends = limit if too_long == "truncate" else len(tokens)
        for start in range(0, ends, limit):
            piece = slice(start, min(start + limit, len(tokens)))
            kept = labels[piece]
            if bool((kept != IGNORE_INDEX).any()):
                yield _Document(tokens[piece], kept, min(max(prompt - start, 0), len(kept)))


def _whole_documents(example: Mapping[str, Any], name: str) -> Iterator[_Document]:
    """The documents that an example says it has, checked."""
    if not isinstance(example, Mapping):
        raise TypeError(f"{name}: expected a mapping with input_ids, got {type(example).__name__}")
    tokens = _ints(example, "input_ids", name)
    if tokens is None:
        raise ValueError(f"{name}: expected input_ids, got {', '.join(map(str, example)) or 'nothing'}")
    labels = _ints(example, "labels", name, like=tokens)
    mask = _ints(example, "attention_mask", name, like=tokens)
    if mask is not None:
        seen = mask.nonzero().flatten()
        if len(seen) and int(seen[-1] - seen[0]) + 1 != len(seen):
            raise ValueError(f"{name}.attention_mask: expected zeros at the ends only, got some between ones")
        tokens, labels = tokens[seen], None if labels is None else labels[seen]
    if not len(tokens):
        raise ValueError(f"{name}: expected at least one token, got none")
    if labels is not None:
        wrong = ((labels != tokens) & (labels != IGNORE_INDEX)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"{name}.labels: expected input_ids, not shifted, or {IGNORE_INDEX}, "
                f"got {int(labels[at])} for token {int(tokens[at])} at {at}"
            )

    lengths = list(example.get("document_lengths") or [len(tokens)])
    if sum(check_int(f"{name}.document_lengths", int(n), 1) for n in lengths) != len(tokens):
        raise ValueError(f"{name}.document_lengths: expected a sum of {len(tokens)} tokens, got {sum(lengths)}")
    prompts = example.get("prompt_lengths")
    if prompts is None and example.get("prompt_length") is not None:
        prompts = [example["prompt_length"]]
    if prompts is not None and len(prompts) != len(lengths):
        raise ValueError(
            f"{name}.prompt_lengths: expected one for each of {len(lengths)} documents, got {len(prompts)}"
        )
    start = 0
    for index, length in enumerate(lengths):
        own = slice(start, start + length)
        wanted = tokens[own].clone() if labels is None else labels[own].clone()
        if prompts is None:
            predicted = (wanted != IGNORE_INDEX).nonzero()
            prompt = int(predicted[0]) if len(predicted) else length
        else:
            prompt = check_int(f"{name}.prompt_length", int(prompts[index]), 0)
            if prompt > length:
                raise ValueError(f"{name}.prompt_length: expected at most its {length} tokens, got {prompt}")
            wanted[:prompt] = IGNORE_INDEX
        yield _Document(tokens[own], wanted, prompt)
        start += length


def _ints(example: Mapping[str, Any], key: str, name: str, like: Tensor | None = None) -> Tensor | None:
    """Entry `key` as an int64 tensor `[n]`, as long as `like`; None if the example has none."""
    if example.get(key) is None:
        return None
    value = torch.as_tensor(example[key], device="cpu")
    if value.ndim != 1 or (value.numel() and value.is_floating_point()):
        raise TypeError(
            f"{name}.{key}: expected a list of ints or an int tensor [n], got {value.dtype} {list(value.shape)}"
        )
    if like is not None and len(value) != len(like):
        raise ValueError(f"{name}.{key}: expected {len(like)} entries like input_ids, got {len(value)}")
    return value.to("cpu", torch.int64)
