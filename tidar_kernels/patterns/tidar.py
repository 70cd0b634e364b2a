"""TiDAR (arXiv 2511.08923): the first draft beside a prompt, the decode step, and the doubled training sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import check_int, check_ints
from .pattern import Pattern
from .rows import Role, check_documents, intervals

__all__ = ["tidar_prefill", "tidar_step", "tidar_training"]


def tidar_prefill(prompt_len: int, block_size: int) -> Pattern:
    """Prompt and first draft in one forward pass: `[prompt (n) | M x B]` (TiDAR, "prefill").

    Prompt rows are causal and blind to the masks; mask rows, at positions n..n+B-1, see the whole prompt and each
    other. With a cached context the same pattern is the last chunk of a chunked prefill.

    Raises:
        TypeError, ValueError: `prompt_len` or `block_size` is not an int >= 1.
    """
    n, block = check_int("prompt_len", prompt_len, 1), check_int("block_size", block_size, 1)
    row = torch.arange(n + block, device="cpu")
    is_mask = row >= n
    zero = torch.zeros_like(row)
    return Pattern(
        lead=intervals(zero, (row + 1).clamp(max=n), row >= 0),
        own=intervals(zero + n, zero + n + block, is_mask),
        positions=row.to(torch.int32),
        kv_len=n + block,
        roles=torch.where(is_mask, int(Role.MASK), int(Role.CLEAN)).to(torch.int8),
        name=f"tidar_prefill(prompt_len={n}, block_size={block})",
    )


def tidar_step(block_size: int, bidirectional: bool = True, levels: Sequence[int] | None = None) -> Pattern:
    """One TiDAR decode step: `[d_0 .. d_{B-1} | block 1 | ... | block B]`, B + B*B rows (arXiv 2511.08923).

    With g = q // B and m = q % B: draft row m (g = 0) sees drafts `[0, m]`; row m of block g sees the first g
    drafts, on whose acceptance it is conditioned, and its own block. There is no block 0: the first draft is
    always accepted.

    Args:
        block_size: B, tokens drafted and verified a step.
        bidirectional: mask rows see their whole block (the paper); False for checkpoints trained with causal blocks.
        levels: numbers of accepted drafts that get a block, ascending; the first is 1, for that many are always
            accepted. Default 1..B. Block g is then conditioned on `levels[g - 1]` drafts.

    Raises:
        TypeError, ValueError: `block_size` is not an int >= 1, `bidirectional` is not a bool, or `levels` are not
            ascending ints from 1 to at most B.
    """
    block = check_int("block_size", block_size, 1)
    if not isinstance(bidirectional, bool):
        raise TypeError(f"bidirectional: expected a bool, got {type(bidirectional).__name__}")
    chosen = list(range(1, block + 1)) if levels is None else check_ints("levels", levels, 1)
    if chosen[:1] != [1] or chosen != sorted(set(chosen)) or chosen[-1] > block:
        raise ValueError(f"levels: expected ascending ints from 1 to at most {block}, got {chosen}")
    row = torch.arange(block + len(chosen) * block, device="cpu")
    g, m = row // block, row % block
    level = torch.tensor([0, *chosen], device="cpu")[g]
    is_mask = g >= 1
    options = f"{'' if bidirectional else ', bidirectional=False'}{'' if levels is None else f', levels={chosen}'}"
    return Pattern(
        lead=intervals(torch.zeros_like(row), torch.where(is_mask, level, m + 1), row >= 0),
        own=intervals(g * block, g * block + (block if bidirectional else m + 1), is_mask),
        positions=(level + m).to(torch.int32),
        kv_len=row.numel(),
        roles=torch.where(is_mask, int(Role.MASK), int(Role.DRAFT)).to(torch.int8),
        name=f"tidar_step(block_size={block}{options})",
    )


def tidar_training(
    seq_len: int,
    block_size: int,
    document_lengths: Sequence[int] | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Pattern:
    """The doubled training sequence `[x_0 .. x_{S-1} | masks]` (TiDAR, "training"): S clean rows, then a mask row each.

    Clean rows are causal and never see masks. The mask rows of block b see strictly earlier clean blocks, `[0, b*B)`,
    and their own block: a mask row that saw its own block's clean tokens would read its labels. Clean row i predicts
    token i + 1, the mask row at p predicts token p.

    With `document_lengths` the sequence holds documents that do not see each other; blocks and positions restart at
    each. The first `prompt_lengths[i]` tokens of document i have no mask row and are not predicted: its blocks cover
    the response and see the whole prompt. Then row j of the mask half stands for the j-th token not in a prompt.

    Args:
        seq_len: S, clean tokens.
        block_size: B.
        document_lengths: tokens of each document, S in all; default one document.
        prompt_lengths: of each document; default all 0.

    Raises:
        TypeError, ValueError: `seq_len`, `block_size` or a document's length is not an int >= 1, the lengths do not
            sum to `seq_len`, a prompt length is not an int between 0 and its document's length, or there are not as
            many prompts as documents.
    """
    s, block = check_int("seq_len", seq_len, 1), check_int("block_size", block_size, 1)
    lengths = check_documents(s, document_lengths)
    prompts = [0] * len(lengths) if prompt_lengths is None else check_ints("prompt_lengths", prompt_lengths, 0)
    if len(prompts) != len(lengths):
        raise ValueError(f"prompt_lengths: expected one for each of {len(lengths)} documents, got {len(prompts)}")
    for length, prompt in zip(lengths.tolist(), prompts, strict=True):
        if prompt > length:
            raise ValueError(f"prompt_lengths: expected <= the document's length {length}, got {prompt}")

    document = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    token = torch.arange(s, device="cpu")
    first = (lengths.cumsum(0) - lengths)[document]
    # The index in the response, negative in the prompt.
    response = token - first - torch.tensor(prompts, device="cpu")[document]
    masked = response >= 0
    mask_row = s + masked.cumsum(0) - 1  # of a token that is not in a prompt
    block_start = (token - response % block)[masked]
    block_len = torch.minimum(block_start + block, (first + lengths[document])[masked]) - block_start
    own_start = mask_row[block_start]
    is_mask = torch.arange(s + len(block_start), device="cpu") >= s
    lead_lo, lead_hi = torch.cat([first, first[masked]]), torch.cat([token + 1, block_start])
    own_lo, own_hi = torch.cat([token, own_start]), torch.cat([token, own_start + block_len])
    follows = torch.cat([(document[1:] == document[:-1]) & masked[1:], torch.zeros(1, dtype=torch.bool, device="cpu")])
    options = "" if document_lengths is None else f", {len(lengths)} documents"
    return Pattern(
        lead=intervals(lead_lo, lead_hi, lead_lo < lead_hi),
        own=intervals(own_lo, own_hi, is_mask),
        positions=torch.cat([token - first, (token - first)[masked]]).to(torch.int32),
        kv_len=len(is_mask),
        roles=torch.where(is_mask, int(Role.MASK), int(Role.CLEAN)).to(torch.int8),
        predicts=torch.cat([torch.where(follows, token + 1, -1), token[masked]]).to(torch.int32),
        name=f"tidar_training(seq_len={s}, block_size={block}{options})",
    )
