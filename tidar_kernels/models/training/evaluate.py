"""What a trained model is worth on modules that it never saw: bits a byte, mask-row accuracy, tokens a forward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...decoding.decoder import ModelDecoder
from ...patterns import tidar_training
from ...patterns.arguments import check_instance, check_int, check_ints, check_sequence
from ..transformer import Transformer

__all__ = ["evaluate_block_lengths", "evaluate_briefly", "evaluate_decoding", "evaluate_likelihood", "held_out_prompts"]


def held_out_prompts(texts: dict[str, bytes], prompt_len: int = 256, per_module: int = 3) -> dict[str, list[bytes]]:
    """Prompts of `prompt_len` bytes at evenly spaced places of each text; texts shorter than a prompt give none.

    Raises:
        TypeError, ValueError: `texts` is no dict of bytes, or a number no int >= 1.
    """
    check_int("prompt_len", prompt_len, 1)
    check_int("per_module", per_module, 1, 2**16)
    prompts = {}
    _check_texts("texts", _mapping("texts", texts).values())
    for name, text in texts.items():
        room = len(text) - prompt_len
        if room >= 0:
            starts = [room * i // (per_module + 1) for i in range(1, per_module + 1)]
            prompts[name] = [text[start : start + prompt_len] for start in starts]
    return prompts


@torch.inference_mode()
def evaluate_likelihood(
    model: Transformer,
    texts: Iterable[bytes],
    seq_len: int = 512,
    block_size: int | None = None,
    max_windows: int | None = None,
) -> dict[str, Any]:
    """Scores of the training objective's two halves, over non-overlapping windows of `seq_len` bytes.

    Args:
        block_size: B; default what the model was trained with. `seq_len` must hold two blocks.
        max_windows: of more windows, so many evenly spaced ones are scored.

    Returns:
        `ar_bits_per_byte`, `diffusion_bits_per_byte`; `ar_accuracy`: how often the causal argmax is the next byte;
        `mask_row_accuracy`: for each of the B mask rows of a block, how often its argmax is the byte at its place when
        all bytes before the block are given (row 0 is one byte ahead of them, as the causal row is).

    Raises:
        TypeError, ValueError: an argument is of another type or out of range, the model has no block size or mask
            token, or no text fills a window.
    """
    check_instance("model", model, Transformer)
    texts = _check_texts("texts", texts)
    check_int("seq_len", seq_len, 1, 2**20)
    for name, number in (("block_size", block_size), ("max_windows", max_windows)):
        if number is not None:
            check_int(name, number, 1)
    block_size, mask_token_id = block_size or model.config.block_size, model.config.mask_token_id
    if block_size is None or mask_token_id is None:
        raise ValueError("model: expected a config with block_size and mask_token_id, got None")
    windows = [text[start : start + seq_len + 1] for text in texts for start in range(0, len(text) - seq_len, seq_len)]
    if not windows:
        raise ValueError(f"texts: expected at least one longer than seq_len = {seq_len} bytes, got none")
    windows = _evenly(windows, max_windows)
    pattern, device = tidar_training(seq_len, block_size), model.embed_tokens.weight.device
    # The first block's masks see nothing; decoding never asks for that, so it is left out of the row figures.
    rows = torch.arange(block_size, seq_len // block_size * block_size, device="cpu").view(-1, block_size)
    nats, hits = torch.zeros(2, dtype=torch.float64, device="cpu"), 0
    row_hits = torch.zeros(block_size, dtype=torch.int64, device="cpu")
    for window in windows:
        tokens = torch.tensor(list(window), device="cpu")
        doubled = torch.cat([tokens[:-1], torch.full((seq_len,), mask_token_id, device="cpu")])
        logits = model.logits(model(doubled[None].to(device), pattern))[0].float().cpu()
        labels = torch.cat([tokens[1:], tokens[:-1]])
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
        right: Tensor = logits.argmax(-1) == labels
        nats += loss.view(2, seq_len).sum(1)
        hits += int(right[:seq_len].sum())
        row_hits += right[seq_len:][rows].sum(0)
    total, blocks = len(windows) * seq_len, len(windows) * len(rows)
    ar, diffusion = (nats / total / math.log(2)).tolist()
    return {
        "bytes": total,
        "ar_bits_per_byte": ar,
        "diffusion_bits_per_byte": diffusion,
        "ar_accuracy": hits / total,
        "mask_row_accuracy": (row_hits / blocks).tolist(),
    }


def _check_texts(name: str, values: Any) -> list[bytes]:
    """`values` as a list, if they are bytes."""
    found = check_sequence(name, values, "bytes")
    for value in found:
        if not isinstance(value, bytes):
            raise TypeError(f"{name}: expected bytes, got {type(value).__name__}")
    return found


def _check_prompts(prompts: Any) -> list[bytes]:
    found = _check_texts("prompts", prompts)
    if not found or not all(found):
        raise ValueError(f"prompts: expected some, each of at least one byte, got {found!r}")
    return found


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
    return value


def _evenly(items: list[bytes], count: int | None) -> list[bytes]:
    """At most `count` of the items, evenly spaced."""
    if count is None or len(items) <= count:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def evaluate_briefly(
    model: Transformer,
    texts: dict[str, bytes],
    block_sizes: Sequence[int],
    seq_len: int,
    max_windows: int = 12,
    max_prompts: int = 6,
    max_new_tokens: int = 48,
) -> dict[str, Any]:
    """What a run wants to know of its model on the way, in seconds: samples of held-out texts at each block length.

    It draws no random number and changes no weight.

    Returns:
        `blocks`: for each of `block_sizes` what `evaluate_likelihood` returns, and `tokens_per_forward` of greedy
        decoding; `skipped`: in words, what the texts are too short for. Its figures are then missing.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """
    check_instance("model", model, Transformer)
    _check_texts("texts", _mapping("texts", texts).values())
    block_sizes = check_ints("block_sizes", block_sizes, 1)
    for name, number in (
        ("seq_len", seq_len), ("max_windows", max_windows), ("max_prompts", max_prompts),
        ("max_new_tokens", max_new_tokens),
    ):  # fmt: skip
        check_int(name, number, 1, 2**20)
    blocks: list[dict[str, Any]] = [{"block_size": block_size} for block_size in block_sizes]
    skipped = []
    if any(len(text) > seq_len for text in texts.values()):
        for row in blocks:
            row |= evaluate_likelihood(model, texts.values(), seq_len, row["block_size"], max_windows)
    else:
        skipped.append(f"bits a byte: no held-out text is longer than seq_len = {seq_len} bytes")
    prompt_len = min(seq_len, 128)
    groups = held_out_prompts(texts, prompt_len, per_module=1)
    if groups:
        prompts = _evenly([prompt for group in groups.values() for prompt in group], max_prompts)
        for row in blocks:
            decoder = ModelDecoder(model, row["block_size"])
            results = [decoder.generate([list(prompt)], max_new_tokens) for prompt in prompts]
            forwards = sum(result.forwards for result in results)
            row["tokens_per_forward"] = max_new_tokens * len(prompts) / forwards
    else:
        skipped.append(f"tokens a forward: no held-out text is as long as a prompt of {prompt_len} bytes")
    return {"blocks": blocks, "skipped": skipped}


def evaluate_block_lengths(
    model: Transformer, prompts: Sequence[bytes], block_sizes: Sequence[int], max_new_tokens: int = 128
) -> list[dict[str, Any]]:
    """Greedy decoding of every prompt, one at a time, at each block length, trained or not.

    Returns:
        For each of `block_sizes` its `tokens_per_forward`, and `identical`: whether every output is that of
        autoregressive decoding.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range, or there is no prompt.
    """
    check_instance("model", model, Transformer)
    prompts, block_sizes = _check_prompts(prompts), check_ints("block_sizes", block_sizes, 1)
    check_int("max_new_tokens", max_new_tokens, 1, 2**20)
    reference = [ModelDecoder(model, mode="autoregressive").generate([list(p)], max_new_tokens).tokens for p in prompts]
    rows = []
    for block_size in block_sizes:
        results = [ModelDecoder(model, block_size).generate([list(p)], max_new_tokens) for p in prompts]
        rows.append(
            {
                "block_size": block_size,
                "tokens_per_forward": max_new_tokens * len(prompts) / sum(result.forwards for result in results),
                "identical": [result.tokens for result in results] == reference,
            }
        )
    return rows


def evaluate_decoding(model: Transformer, prompts: dict[str, list[bytes]], max_new_tokens: int = 128) -> dict[str, Any]:
    """Greedy decoding of every prompt, one at a time, with drafts and without.

    Returns:
        For the two modes together `tokens`, `identical` (same output for every prompt) and `speedup`; TiDAR's
        `tokens_per_forward`, `accepted` (how many steps committed 1, 2, .. B tokens) and `tokens_per_forward_of` each
        text; `tokens_per_second` of each mode, decode steps only.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range, or there is no prompt.
    """
    check_instance("model", model, Transformer)
    check_int("max_new_tokens", max_new_tokens, 1, 2**20)
    for group in _mapping("prompts", prompts).values():
        _check_prompts(group)
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    decoders = {"tidar": ModelDecoder(model), "autoregressive": ModelDecoder(model, mode="autoregressive")}
    seconds = dict.fromkeys(decoders, 0.0)
    accepted = [0] * decoders["tidar"].block_size
    per_text: dict[str, float] = {}
    tokens, identical = 0, True
    for name, group in prompts.items():
        steps_of_text, tokens_of_text = 0, 0
        for prompt in group:
            results = {mode: d.generate([list(prompt)], max_new_tokens) for mode, d in decoders.items()}
            identical &= results["tidar"].tokens == results["autoregressive"].tokens
            for mode, result in results.items():
                seconds[mode] += result.seconds
            for count in results["tidar"].accepted[0]:
                accepted[count - 1] += 1
            steps_of_text += len(results["tidar"].accepted[0])
            tokens_of_text += len(results["tidar"].tokens[0])
        per_text[name] = tokens_of_text / steps_of_text
        tokens += tokens_of_text
    return {
        "prompts": sum(map(len, prompts.values())),
        "prompt_len": len(next(iter(prompts.values()))[0]),
        "max_new_tokens": max_new_tokens,
        "tokens": tokens,
        "identical": identical,
        "tokens_per_forward": tokens / sum(accepted),
        "tokens_per_forward_of": per_text,
        "accepted": accepted,
        "tokens_per_second": {mode: tokens / spent for mode, spent in seconds.items()},
        "speedup": seconds["autoregressive"] / seconds["tidar"],
    }
