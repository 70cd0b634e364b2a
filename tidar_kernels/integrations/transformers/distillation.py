"""A gated adapter that makes any supported model draft, and leaves what it says alone: R-ISD (arXiv 2604.11035).

    config = DistillationConfig(mask_token_id=7, strategy="isd", block_size=4)
    trainer = AdapterTrainer(model, documents, config)
    trainer.run(folder)                              # a PEFT adapter; trainer.resume(folder) goes on with it

The model is frozen, and mask rows alone run the adapter, so the output stays the model's own, byte for byte the same
text with `exact`. What the masks learn is the model's own distribution, on a text or on its own continuations
(`own_continuations`). `draft_figures` measures what it is worth on prompts that were held out.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...decoding.decoder import ModelDecoder
from ...nn.adapters import PROJECTIONS, GatedLoRA, add_gated_lora, lora_gate, save_adapter
from ...nn.distillation import adapter_pattern, clean_then_masks, distillation_loss
from ...nn.files import loading_state, replacing
from ...nn.files import read_state as read_saved
from ...ops import checks
from ...patterns.arguments import check_int, check_path
from .attention import LayerKeys
from .loading import tidar_entry
from .model import TransformersModel, decoder_model

__all__ = ["AdapterTrainer", "DistillationConfig", "draft_figures", "own_continuations", "some_mask_token"]

STATE, FIGURES = "state.pt", "training.json"
_KINDS: dict[str, Any] = {
    "config": dict, "done": int, "losses": list, "figures": dict, "weights": list, "optimiser": dict
}  # fmt: skip


@dataclass(frozen=True)
class DistillationConfig:
    """A run. The learning rate rises over the first 2 % of the steps, then falls as a cosine to a tenth.

    Attributes:
        mask_token_id: the token of mask rows.
        strategy: "isd" or "tidar", whose rows the masks are trained on.
        block_size: drafts a step.
        rank, alpha: of the adapter.
        steps, batch_size, seq_len: optimiser steps, windows a step (of all processes together), tokens a window.
        lr: the highest learning rate.
        seed: of the adapter's first weights and of the order of the windows.

    Raises:
        TypeError, ValueError: a number is not one that fits.
    """

    mask_token_id: int
    strategy: Literal["isd", "tidar"] = "isd"
    block_size: int = 4
    rank: int = 16
    alpha: float = 32.0
    steps: int = 1000
    batch_size: int = 4
    seq_len: int = 256
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in ("isd", "tidar"):
            raise ValueError(f'strategy: expected "isd" or "tidar", got {self.strategy!r}')
        for name in ("block_size", "seq_len"):
            check_int(name, getattr(self, name), 2)
        for name in ("rank", "steps", "batch_size"):
            check_int(name, getattr(self, name), 1)
        for name in ("mask_token_id", "seed"):
            check_int(name, getattr(self, name), 0)
        if not (isinstance(self.lr, (int, float)) and 0 < self.lr < math.inf):
            raise ValueError(f"lr: expected a positive number, got {self.lr}")

    def lr_at(self, step: int) -> float:
        """Learning rate of step number `step`, counted from 0."""
        warm_up = max(1, self.steps // 50)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up))))


class _Objective(nn.Module):
    """The model and its loss as one module: what data parallelism wraps, so that a forward pass is the whole loss."""

    def __init__(self, model: Any, config: DistillationConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self._rows = TransformersModel(model, config.block_size, config.mask_token_id)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        config = self.config
        if len(lengths) == len(tokens):
            pattern = adapter_pattern(config.strategy, tokens.shape[1], config.block_size)
        else:  # one sequence of all windows' documents
            tokens = tokens.reshape(1, -1)
            pattern = adapter_pattern(config.strategy, tokens.shape[1], config.block_size, lengths)
        whole, clean, masks = clean_then_masks(pattern)
        keys = LayerKeys()
        with torch.no_grad(), lora_gate(False):  # nothing that is trained has a say in the rows of tokens
            known = self._rows(tokens, clean, keys)
        with lora_gate(True):
            guessed = self._rows(torch.full_like(tokens, config.mask_token_id), masks, keys)
            return distillation_loss(torch.cat([known, guessed], dim=1), self._rows.logits, whole)


class _Windows:
    """Windows of documents laid end to end; which ones a step takes follows from the seed and its number alone."""

    def __init__(self, documents: Sequence[Sequence[int]], seq_len: int) -> None:
        kept = [torch.tensor(document, dtype=torch.int64, device="cpu") for document in documents if len(document)]
        self.tokens = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64, device="cpu")
        if len(self.tokens) < seq_len:
            raise ValueError(f"documents: expected at least seq_len = {seq_len} tokens, got {len(self.tokens)}")
        self.ends = torch.tensor([len(document) for document in kept], device="cpu").cumsum(0)
        self.seq_len = seq_len

    def of(self, step: int, count: int, seed: int) -> tuple[Tensor, list[int]]:
        """`(tokens [count, seq_len], lengths of their documents one after the other)`; a window ends a document."""
        generator = torch.Generator(device="cpu").manual_seed(seed * 1_000_003 + step)
        last = len(self.tokens) - self.seq_len
        starts = torch.randint(last + 1, (count,), generator=generator, device="cpu").tolist()
        lengths = []
        for start in starts:
            stop = start + self.seq_len
            inside = self.ends[(self.ends > start) & (self.ends < stop)]
            edges = torch.cat([torch.tensor([start], device="cpu"), inside, torch.tensor([stop], device="cpu")])
            lengths += edges.diff().tolist()
        return torch.stack([self.tokens[start : start + self.seq_len] for start in starts]), lengths


@dataclass
class AdapterTrainer:
    """Trains an adapter that it puts on the model. Under Accelerate (`accelerate launch`), on all of its processes.

    Args:
        model: a causal language model of transformers, in evaluation mode; its projections are wrapped in place and
            frozen, and its attention is switched to "tidar".
        documents: token ids of each document to train on; they do not see each other.
        config: the run.
        accelerator: an `accelerate.Accelerator`, for several processes.

    Attributes:
        done: steps done. losses: of each, nats a mask row.
        figures: what else is written beside the adapter.

    Raises:
        TypeError, ValueError: the model has adapters already or does not suit, or there is less text than a window.
    """

    model: Any
    documents: Sequence[Sequence[int]]
    config: DistillationConfig
    accelerator: Any = None
    done: int = 0
    losses: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._windows = _Windows(self.documents, self.config.seq_len)
        self._processes = 1 if self.accelerator is None else self.accelerator.num_processes
        if self.config.batch_size % self._processes:
            raise ValueError(
                f"batch_size: expected a multiple of {self._processes} processes, got {self.config.batch_size}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            add_gated_lora(self.model, self.config.rank, self.config.alpha, PROJECTIONS, dtype=torch.float32)
        self._adapters = [module for module in self.model.modules() if isinstance(module, GatedLoRA)]
        self._trained = [weight for module in self._adapters for weight in (module.lora_a, module.lora_b)]
        self._optimiser = torch.optim.AdamW(self._trained, betas=(0.9, 0.95), weight_decay=0.0)
        self._objective: Any = _Objective(self.model, self.config)
        if self._processes > 1:
            self._objective, self._optimiser = self.accelerator.prepare(self._objective, self._optimiser)

    def step(self) -> float:
        """One optimiser step; returns its loss before the update, nats a mask row.

        Raises:
            FloatingPointError: the loss is not finite; the adapter is as it was.
        """
        config, own = self.config, self.config.batch_size // self._processes
        first = 0 if self.accelerator is None else self.accelerator.process_index
        tokens, lengths = self._windows.of(self.done * self._processes + first, own, config.seed)
        loss = self._objective(tokens.to(self._trained[0].device), lengths)
        value = loss.detach() if self._processes == 1 else self.accelerator.reduce(loss.detach(), "mean")
        if not math.isfinite(float(value)):
            raise FloatingPointError(f"step {self.done + 1}: expected a finite loss, got {float(value)}")
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward() if self._processes == 1 else self.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        for group in self._optimiser.param_groups:
            group["lr"] = config.lr_at(self.done)
        self._optimiser.step()
        self.done += 1
        self.losses.append(round(float(value), 5))
        return self.losses[-1]

    def run(self, folder: Path, save_every: int = 100, progress: Callable[[int, float], None] | None = None) -> None:
        """Train to the end of the schedule; saves on the way, at the end, and when it is interrupted.

        Raises:
            OSError: a file could not be written; the ones before are whole. FloatingPointError: as `step`.
        """
        started = time.monotonic()
        before = float(self.figures.get("seconds", 0.0))
        try:
            while self.done < self.config.steps:
                loss = self.step()
                self.figures["seconds"] = round(before + time.monotonic() - started, 1)
                if progress is not None:
                    progress(self.done, loss)
                if self.done % save_every == 0 and self.done < self.config.steps:
                    self.save(folder)
        finally:
            self.save(folder)

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT does, `training.json`, and `state.pt`, from which `resume` goes on.

        Each file is replaced whole, the state last. Of several processes, the first writes.

        Raises:
            OSError: one could not be written, and is what it was before.
        """
        if self.accelerator is not None and not self.accelerator.is_main_process:
            return
        buffer = io.BytesIO()
        state = {
            "config": asdict(self.config),
            "done": self.done,
            "losses": self.losses,
            "figures": self.figures,
            "weights": [weight.detach().cpu() for weight in self._trained],
            "optimiser": self._optimiser.state_dict(),
        }
        torch.save(state, buffer)
        save_adapter(self.model, folder, base_model=getattr(self.model.config, "_name_or_path", None) or None)
        tokens = self.done * self.config.batch_size * self.config.seq_len
        record = {"config": asdict(self.config), "tokens": tokens, **self.figures, "loss": self.losses}
        for name, content in ((FIGURES, (json.dumps(record, indent=1) + "\n").encode()), (STATE, buffer.getvalue())):
            with replacing(folder / name) as file:
                file.write(content)

    def resume(self, folder: Path) -> None:
        """Go on where `save` left off.

        Raises:
            FileNotFoundError: there is no state. ValueError: it is damaged, or of another run.
        """
        state = read_state(folder)
        if state["config"] != asdict(self.config):
            other = [name for name, value in asdict(self.config).items() if state["config"].get(name) != value]
            raise ValueError(f"resume: expected the run of {folder}, got another {', '.join(other)}")
        with loading_state(folder / STATE), torch.no_grad():
            pairs = list(zip(self._trained, state["weights"], strict=True))
            for weight, saved in pairs:  # before anything is changed
                checks.shape("weights", saved, tuple(weight.shape))
            self._optimiser.load_state_dict(state["optimiser"])
            for weight, saved in pairs:
                weight.copy_(saved)
        self.done, self.losses, self.figures = state["done"], state["losses"], state["figures"]


def read_state(folder: Path) -> dict[str, Any]:
    """What `AdapterTrainer.save` wrote into `folder`.

    Raises:
        FileNotFoundError: there is no state. ValueError: it is truncated, damaged or something else.
    """
    return read_saved(check_path("folder", folder) / STATE, _KINDS)


def some_mask_token(model: Any, tokenizer: Any = None) -> int:
    """A token for mask rows: the config's entry `tidar`, the tokenizer's mask token, its padding or end, the last id.

    Whether a row is a mask row is said by the step, never read off its token, so any token will do.
    """
    entry = tidar_entry(model.config)
    names = ("mask_token_id", "pad_token_id", "eos_token_id")
    candidates = [entry.get("mask_token_id"), *(getattr(tokenizer, name, None) for name in names)]
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    return int(next((token for token in candidates if token is not None), vocab_size - 1))


def own_continuations(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    known: Sequence[list[int]] = (),
    progress: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Each prompt and what the model itself goes on with, sampled: text on which drafts will be judged.

    Args:
        model: without adapters yet. prompts: token ids, each >= 1 long; a prompt may stand there several times, and is
            then continued with other seeds.
        max_new_tokens: of each; an end token ends it earlier.
        temperature: 0 for greedy texts.
        known: what a run of the same arguments gave to `progress` before it was interrupted; it goes on after that.
        progress: called after each batch with all texts so far.

    Raises:
        TypeError, ValueError: as `Decoder.generate`.
    """
    decoder = ModelDecoder(decoder_model(model, needs_mask=False), mode="autoregressive")
    end = model.generation_config.eos_token_id
    stops = [] if end is None else [end] if isinstance(end, int) else list(end)
    found = list(known)
    for start in range(len(found), len(prompts), batch_size):
        part = [list(prompt) for prompt in prompts[start : start + batch_size]]
        tokens = decoder.generate(
            part, max_new_tokens, temperature=temperature, seed=seed + start, stop_tokens=stops
        ).tokens
        found += [prompt + new for prompt, new in zip(part, tokens, strict=True)]
        if progress is not None:
            progress(found)
    return found


def draft_figures(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: DistillationConfig,
    max_new_tokens: int,
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """What drafting is worth on these prompts, greedily.

    Returns:
        `tokens_per_forward`, and `acceptance`: of draft 1, 2, .. of a step (draft 0 is always kept) the share of steps
        that kept it; `steps` and `tokens`.
    """
    block_size, mask_token_id = config.block_size, config.mask_token_id
    decoder = ModelDecoder(
        decoder_model(model, None, block_size, mask_token_id), block_size, mask_token_id, strategy=config.strategy
    )
    accepted: list[int] = []
    for index, prompt in enumerate(prompts):
        accepted += decoder.generate(list(prompt), max_new_tokens).accepted[0]
        if progress is not None:
            progress(index + 1)
    steps = max(1, len(accepted))
    kept = [sum(count > draft for count in accepted) / steps for draft in range(1, config.block_size)]
    return {
        "tokens_per_forward": round(sum(accepted) / steps, 4),
        "acceptance": [round(share, 4) for share in kept],
        "steps": len(accepted),
        "tokens": sum(accepted),
    }
