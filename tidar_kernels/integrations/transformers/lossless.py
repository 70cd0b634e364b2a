"""Does speculation change a model's text? Both ways decoded, compared token by token, and the cause found bit by bit.

    report = lossless(model, prompts, strategy="tidar", block_size=8, max_new_tokens=64)
    report.equal, len(report.trajectories)
    report.trajectories[3].divergence      # index 17, token 284 for 318, margin 0.0021, first bits: layers.0 q_proj

Speculation is exact in theory: a token is kept if it is the one that the model would have said. In floating point the
model itself says something else when it runs several rows at once, for sums are taken in another order; where two
tokens are nearly tied that is a different text. What remains equal, where it first was not, and through which part of
the model, is what this reports. It takes the strategies of this package and transformers' own assisted generation.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ...decoding.decoder import Mode, ModelDecoder
from ...decoding.prompts import as_prompts
from ...decoding.strategies.base import check_ready
from ...nn.adapters import load_peft_adapter, lora_gate
from ...patterns.arguments import check_int, check_path
from .loading import tidar_entry
from .model import decoder_model
from .trace import Difference, Trace

__all__ = ["ASSISTED", "Divergence", "LosslessReport", "Trajectory", "lossless"]

ASSISTED = ("prompt_lookup", "assistant")  # transformers' own speculation


@dataclass(frozen=True)
class Divergence:
    """Where two runs of a prompt part.

    Attributes:
        index: of the first new token that differs, from 0; where one run ended earlier, its length.
        expected, got: the token of autoregressive decoding and that of speculation; -1 where a run had ended.
        margin: by how much the model prefers `expected`, in logits (autoregressive forward pass in the model's dtype).
        stage, module, position: where bits first differ, see `tidar_kernels.integrations.transformers.trace`. Stage
            "sampler": the logits are equal, or greedily their largest is the expected token, but another was taken.
    """

    index: int
    expected: int
    got: int
    margin: float
    stage: str
    module: str = ""
    position: int = -1


@dataclass(frozen=True)
class Trajectory:
    """One prompt: how many new tokens speculation gave, where it diverged, and where bits did, if they did at all."""

    tokens: int
    divergence: Divergence | None
    first_bits: Difference | None


@dataclass
class LosslessReport:
    """What `lossless` found.

    Attributes:
        trajectories: of each prompt.
        forwards: forward passes of speculation; `new_tokens` are those of all prompts.
        stages: `{stage: (rows, depending)}`: rows that were run by themselves and among the others of their forward
            pass, and how many of them had other bits then.
    """

    trajectories: list[Trajectory] = field(default_factory=list)
    forwards: int = 0
    new_tokens: int = 0
    stages: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def equal(self) -> int:
        """How many trajectories are equal."""
        return sum(each.divergence is None for each in self.trajectories)

    @property
    def equal_bits(self) -> int:
        """How many are equal in every bit of every module, too."""
        return sum(each.first_bits is None for each in self.trajectories)

    def as_json(self) -> dict[str, Any]:
        """As plain data: counts first, then trajectories."""
        return {
            "prompts": len(self.trajectories),
            "equal": self.equal,
            "equal_bits": self.equal_bits,
            "new_tokens": self.new_tokens,
            "forwards": self.forwards,
            "stages": {name: {"rows": rows, "depending": found} for name, (rows, found) in self.stages.items()},
            "trajectories": [asdict(_plain(each)) for each in self.trajectories],
        }


@dataclass(frozen=True)
class _Plain:
    tokens: int
    divergence: Divergence | None
    first_bits: dict[str, Any] | None


def _plain(trajectory: Trajectory) -> _Plain:
    bits = trajectory.first_bits
    return _Plain(trajectory.tokens, trajectory.divergence, None if bits is None else bits._asdict())


# Decodes one prompt, and has its trace begin once the model has been checked; gives new tokens and forward passes.
Run = Callable[[list[int], Trace], tuple[list[int], int]]


def lossless(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    strategy: Any = "tidar",
    block_size: int = 8,
    mask_token_id: int | None = None,
    exact: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    assistant: Any = None,
    adapter: str | os.PathLike[str] | Callable[[Any], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> LosslessReport:
    """Decode every prompt autoregressively and by speculation, and report where and why they differ.

    Args:
        model: a causal language model of transformers, in evaluation mode. Its attention implementation is afterwards
            what it was.
        prompts: token ids, each >= 1 long.
        strategy: as for `Decoder`, compared with autoregressive decoding by this package's kernels; "prompt_lookup" or
            "assistant", compared with `model.generate` in the attention implementation that the model has.
        block_size: drafts a step.
        mask_token_id: of mask rows; default the config's entry `tidar`, else the last id: what is drafted does not
            change what comes out, so any will do.
        exact: both runs with exact rows, see `tidar_kernels.decoding.exact`.
        max_new_tokens: of each prompt; an end token of the generation config ends it earlier.
        temperature, seed: sampling by the coupled rule; greedy by default.
        assistant: the drafting model of strategy "assistant".
        adapter: a folder with a gated adapter that drafts, as PEFT saves it, or a function that puts one into a model.
            Autoregressive decoding is of the model before it has the adapter, which it keeps afterwards.
        progress: called with the number of prompts done.

    Raises:
        TypeError, ValueError: an argument does not fit, the strategy cannot be exact, or the model or the adapter does
            not suit. FileNotFoundError: there is no adapter.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    prompts = as_prompts("prompts", prompts, model.config.get_text_config(decoder=True).vocab_size)
    check_int("max_new_tokens", max_new_tokens, 1, 2**20)
    check_int("block_size", block_size, 1)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function, got {type(progress).__name__}")
    if (assistant is None) == (strategy == "assistant"):
        raise ValueError(f'assistant: expected a model with strategy "assistant" alone, got {type(assistant).__name__}')
    if adapter is not None and not callable(adapter):
        check_path("adapter", adapter)
    if adapter is not None and strategy in ASSISTED:
        raise ValueError(f"adapter: expected none with {strategy!r}, which is transformers' own, got {adapter}")
    before = model.config._attn_implementation
    report, rows, depending = LosslessReport(), Counter[str](), Counter[str]()
    mask_token_id = _some_mask(model) if mask_token_id is None else mask_token_id
    options: dict[str, Any] = {"mode": "tidar", "exact": exact, "strategy": strategy, "mask_token_id": mask_token_id}
    options["block_size"] = block_size if isinstance(strategy, str) else None
    try:
        if strategy in ASSISTED:
            if exact or temperature:
                raise ValueError(f"strategy: expected no exact rows and temperature 0 with {strategy!r}, got others")
            one = _generating(model, max_new_tokens)
            numbers = {"prompt_lookup_num_tokens": block_size} if assistant is None else {}
            other = _generating(model, max_new_tokens, assistant, **numbers)
        else:
            one, other = (
                _decoding(model, max_new_tokens, temperature, seed, **each)
                for each in ({"mode": "autoregressive", "exact": exact}, options)
            )
        wanted = []
        for prompt in prompts:
            with torch.no_grad(), Trace(model) as plain:
                wanted.append((one(prompt, plain)[0], plain))
        if adapter is not None:
            # Only now: what an adapter does to rows that it should leave alone would be in both texts otherwise.
            _ = adapter(model) if callable(adapter) else load_peft_adapter(model, adapter)
            other = _decoding(model, max_new_tokens, temperature, seed, **options)
        for index, (prompt, (expected, plain)) in enumerate(zip(prompts, wanted, strict=True)):
            with torch.no_grad(), Trace(model, alone_from=len(prompt)) as drafting:
                got, forwards = other(prompt, drafting)
            report.trajectories.append(_compared(model, prompt, expected, got, plain, drafting, not temperature))
            report.forwards += forwards
            report.new_tokens += len(got)
            rows.update(drafting.rows)
            depending.update(drafting.depending)
            if progress is not None:
                progress(index + 1)
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    report.stages = {stage: (count, depending[stage]) for stage, count in sorted(rows.items())}
    return report


def _some_mask(model: Any) -> int:
    entry = tidar_entry(model.config)
    return entry.get("mask_token_id", int(model.config.get_text_config(decoder=True).vocab_size - 1))


def _decoding(
    model: Any,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    mode: Mode,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    **options: Any,
) -> Run:
    found = decoder_model(model, None, block_size, mask_token_id, needs_mask=mode == "tidar")
    decoder = ModelDecoder(found, block_size, mask_token_id, mode=mode, cuda_graph=False, **options)
    stops = _stop_tokens(model)

    def run(prompt: list[int], trace: Trace) -> tuple[list[int], int]:
        check_ready(decoder.model)  # the hooks of a trace are news to it
        trace.clear()
        result = decoder.generate(prompt, max_new_tokens, temperature=temperature, seed=seed, stop_tokens=stops)
        return result.tokens[0], result.forwards

    return run


def _generating(model: Any, max_new_tokens: int, assistant: Any = None, **numbers: int) -> Run:
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, max_new_tokens=max_new_tokens, max_length=None, temperature=None, top_p=None)
    config.update(top_k=None, repetition_penalty=1.0, **numbers)
    extra = {} if assistant is None else {"assistant_model": assistant}
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    def run(prompt: list[int], trace: Trace) -> tuple[list[int], int]:
        nonlocal calls
        calls = 0
        ids = torch.tensor([prompt], device=model.device)
        handle = model.get_decoder().register_forward_hook(count)
        try:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **extra)
        finally:
            handle.remove()
        return out[0, len(prompt) :].tolist(), calls

    return run


def _stop_tokens(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _compared(
    model: Any, prompt: list[int], expected: list[int], got: list[int], plain: Trace, drafting: Trace, greedy: bool
) -> Trajectory:
    shared = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    if shared is None and len(expected) != len(got):
        shared = min(len(expected), len(got))
    # The token at `shared` was chosen after the one before it: bits count up to there.
    common = prompt + expected[: len(expected) - 1 if shared is None else shared]
    bits = plain.first_difference(drafting, common)
    if shared is None:
        return Trajectory(len(got), None, bits)
    theirs, ours = (sequence[shared] if shared < len(sequence) else -1 for sequence in (expected, got))
    # Greedily, logits that still prefer the right token acquit the model, even if rounding touched them.
    is_sampler = bits is None or (greedy and drafting.preferred(common) == theirs)
    cause = Difference(-1, "", "sampler") if bits is None or is_sampler else bits
    margin = _margin(model, common, theirs, ours)
    divergence = Divergence(shared, theirs, ours, margin, cause.stage, cause.module, cause.position)
    return Trajectory(len(got), divergence, bits)


def _margin(model: Any, tokens: list[int], expected: int, got: int) -> float:
    """By how much the model prefers one token to another after `tokens`; 0 where one of them is none."""
    if min(expected, got) < 0:
        return 0.0
    with torch.no_grad(), lora_gate(False):
        ids = torch.tensor([tokens], device=model.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    return float(logits[expected] - logits[got])
