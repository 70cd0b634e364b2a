"""Train a gated adapter that makes the shipped model draft better, and leaves what it says alone (R-ISD).

    python -m tidar_kernels.models.training.adapter --out runs/adapter [--steps N] [--pattern isd|tidar]
    python -m tidar_kernels.models.training.adapter --ship runs/adapter

The base model is frozen and mask rows alone run the adapter, so that the output is the base model's whatever the
adapter holds. Mask rows are trained on the rows that they have when decoding: with `isd` a chain after the tokens they
have seen, with `tidar` a block that sees itself both ways. What they learn is not the text but what the base model
would say there, which is what verification will compare them with. Documents that share a window do not see each other.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...nn.adapters import PROJECTIONS, GatedLoRA, add_gated_lora, lora_gate, save_adapter
from ...nn.distillation import adapter_pattern, distillation_loss
from ...patterns import Role
from ..shipped import ADAPTER, FIGURES, load_shipped
from ..transformer import Transformer
from .data import Corpus, document_lengths
from .progress import Progress

__all__ = ["AdapterConfig", "main", "train"]

MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class AdapterConfig:
    """A run. Learning rate: linear warm-up over 2 % of the steps, then a cosine down to a tenth."""

    steps: int = 1200
    batch_size: int = 8
    seq_len: int = 256
    block_size: int = 8
    pattern: str = "isd"
    rank: int = 16
    alpha: float = 32.0
    lr: float = 1.5e-3
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Learning rate of step number `step`, counted from 0."""
        warm_up = max(1, self.steps // 50)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up))))


def train(model: Transformer, config: AdapterConfig, corpus: Corpus, progress: Progress | None = None) -> list[float]:
    """Train the model's adapters in place; returns the loss of every step, nats a mask row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        tokens = corpus.windows(step * config.batch_size, config.batch_size, config.seq_len, config.seed)
        loss = training_loss(model, tokens, config.pattern, config.block_size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress is not None:
            progress.update(step + 1, 0.0, losses[-1])
    model.eval()
    return losses


def training_loss(model: Transformer, tokens: Tensor, kind: str, block_size: int) -> Tensor:
    """`distillation_loss` of windows `tokens` int64 `[batch, S]`, whose documents do not see each other.

    Raises:
        ValueError: as `adapter_pattern`.
    """
    lengths = document_lengths(tokens)
    if len(lengths) == len(tokens):
        pattern = _adapter_pattern(kind, tokens.shape[1], block_size)
    else:  # one sequence of all windows' documents
        tokens = tokens.reshape(1, -1)
        pattern = adapter_pattern(kind, tokens.shape[1], block_size, lengths)
    is_mask = pattern.roles == int(Role.MASK)
    rows = tokens.repeat(1, 2).masked_fill(is_mask, int(model.config.mask_token_id or 0))
    with lora_gate(is_mask):
        hidden = model(rows, pattern)
    return distillation_loss(hidden, model.logits, pattern)


# One object per shape: a pattern keeps what is derived from it.
_adapter_pattern = functools.lru_cache(maxsize=8)(adapter_pattern)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tidar_kernels.models.training.adapter", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, help="train, and write the adapter and its figures into this folder")
    parser.add_argument("--ship", type=Path, help="take the adapter of this folder into the package")
    for name, value in asdict(AdapterConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    if (options.out is None) == (options.ship is None):
        parser.error("expected one of --out and --ship")
    if options.ship is not None:
        return _ship(options.ship)
    config = AdapterConfig(**{name: getattr(options, name) for name in asdict(AdapterConfig())})
    model, _ = load_shipped()
    torch.manual_seed(config.seed)
    add_gated_lora(model, config.rank, config.alpha, PROJECTIONS)
    corpus = Corpus()
    progress = Progress(config.steps, 0, config.batch_size * config.seq_len, [])
    started = time.monotonic()
    losses = train(model, config, corpus, progress)
    progress.close()
    for module in model.modules():
        if isinstance(module, GatedLoRA):
            module.lora_a.data, module.lora_b.data = module.lora_a.data.half(), module.lora_b.data.half()
    save_adapter(model, options.out, base_model="tidar_kernels.models.shipped")
    figures: dict[str, Any] = {
        "config": asdict(config),
        "seconds": round(time.monotonic() - started, 1),
        "tokens": config.steps * config.batch_size * config.seq_len,
        "corpus_sha256": corpus.sha256,
        "loss": [round(loss, 4) for loss in losses[:: max(1, len(losses) // 200)]],
    }
    (options.out / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _ship(run: Path) -> int:
    """Copy a finished run's adapter and figures into the package."""
    names = ("adapter_config.json", "adapter_model.safetensors", FIGURES)
    size = sum(os.path.getsize(run / name) for name in names)
    if size > MAX_BYTES:
        print(f"--ship: expected at most {MAX_BYTES} bytes, got {size}", file=sys.stderr)
        return 1
    ADAPTER.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(run / name, ADAPTER / name)
    print(f"{size} bytes in {ADAPTER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
