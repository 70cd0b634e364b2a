"""Train a small byte-level decoder with the TiDAR objective on the standard library's sources.

    python -m tidar_kernels.models.train --out runs/stdlib

One forward pass over `[x_0 .. x_{S-1} | M x S]` learns both jobs (arXiv 2511.08923, training): clean row i predicts
x_{i+1} causally, mask row p predicts x_p from the clean blocks before its own. Everything follows from the seed and
the step number, so a resumed run repeats the uninterrupted one bit for bit on the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patterns import tidar_training
from .checkpoint import save_checkpoint
from .data import Corpus
from .tokenizer import MASK_ID, VOCAB_SIZE
from .transformer import Transformer, TransformerConfig

__all__ = ["TrainConfig", "Trainer", "main", "tidar_loss"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults are those of the shipped model.

    Attributes:
        steps: optimiser steps in all.
        batch: sequences of `seq_len` tokens in a step.
        seq_len: S, clean tokens of a sequence.
        warmup: steps in which the learning rate rises to `lr`; then it stays there.
        decay: share of the steps, at the end, in which it falls along a cosine to `final_lr * lr`. Before these,
            every sequence is cut in two halves of `seq_len // 2`: the same tokens with less attention. So two runs
            that differ in `steps` are the same run until the shorter one decays.
        alpha: weight of the autoregressive loss against the diffusion loss.
        lr: peak learning rate of both optimisers, Muon for the layers' matrices and AdamW for the rest.
        precision: "bf16" runs the forward pass under autocast (float32 weights); "fp32" does not.
        workers: threads that share a step by sequences, one core each. They meet once a step, where threads inside
            each operator would meet thousands of times and stall whenever one core is busy with something else.
    """

    steps: int = 3600
    batch: int = 6
    seq_len: int = 512
    block_size: int = 8
    alpha: float = 1.0
    lr: float = 4e-3
    final_lr: float = 0.05
    warmup: int = 60
    decay: float = 0.3
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "bf16"
    workers: int = 2
    hidden_size: int = 192
    intermediate_size: int = 640
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seq_len", "block_size", "warmup", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if self.batch % self.workers:
            raise ValueError(f"batch: expected a multiple of workers = {self.workers}, got {self.batch}")
        if self.seq_len % 2:
            raise ValueError(f"seq_len: expected an even number, which is halved at the start, got {self.seq_len}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a share in (0, 1], got {self.decay}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f'precision: expected "bf16" or "fp32", got {self.precision!r}')

    def model(self) -> TransformerConfig:
        """The shape of the model that this run trains."""
        return TransformerConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            mask_token_id=MASK_ID,
            block_size=self.block_size,
        )

    @property
    def stable_steps(self) -> int:
        """Steps before the decay."""
        return self.steps - math.ceil(self.decay * self.steps)

    def window(self, step: int) -> tuple[int, int]:
        """`(sequences, clean tokens of each)` of a step."""
        if step < self.stable_steps:
            return 2 * self.batch, self.seq_len // 2
        return self.batch, self.seq_len

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, cosine decay."""
        progress = max(0, step - self.stable_steps) / (self.steps - self.stable_steps)
        decayed = self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * min(1.0, (step + 1) / self.warmup) * decayed


# One object per shape: a pattern keeps what is derived from it.
_training_pattern = functools.lru_cache(maxsize=16)(tidar_training)


def tidar_loss(
    model: Transformer, tokens: Tensor, block_size: int, mask_token_id: int, alpha: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The TiDAR objective, `(alpha * mean CE_AR + mean CE_Diff) / (1 + alpha)`.

    Args:
        tokens: int64 `[batch, S + 1]`; the last column is only a label.

    Returns:
        `(loss, CE_AR, CE_Diff)`, scalars in nats a token.
    """
    seq_len = tokens.shape[1] - 1
    clean = tokens[:, :-1]
    doubled = torch.cat([clean, torch.full_like(clean, mask_token_id)], dim=1)
    hidden = model(doubled, _training_pattern(seq_len, block_size))
    logits = model.logits(hidden).float()
    ar = F.cross_entropy(logits[:, :seq_len].flatten(0, 1), tokens[:, 1:].flatten())
    diff = F.cross_entropy(logits[:, seq_len:].flatten(0, 1), clean.flatten())
    return (alpha * ar + diff) / (1 + alpha), ar, diff


@dataclass
class Trainer:
    """A model, its optimiser and how far they are; `step` does one optimiser step."""

    config: TrainConfig
    corpus: Corpus
    done: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self.model = Transformer(self.config.model())
        self.parameters = list(self.model.parameters())
        layers = [p for name, p in self.model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
        rest = [p for name, p in self.model.named_parameters() if p.ndim != 2 or not name.startswith("layers.")]
        # 150 steps of 2,048 tokens, lr 3e-3, one seed: Muon 2.24 / 2.93 nats (AR / diffusion), AdamW 2.65 / 3.00.
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(layers, weight_decay=self.config.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        )
        self._pool = ThreadPoolExecutor(self.config.workers, initializer=torch.set_num_threads, initargs=(1,))

    def batch(self, step: int) -> Tensor:
        """Token windows of a step, int64 `[sequences, S + 1]`; they depend on the configuration and `step` alone."""
        count, length = self.config.window(step)
        return self.corpus.windows(step * 2 * self.config.batch, count, length + 1, self.config.seed)

    def _gradients(self, tokens: Tensor) -> tuple[tuple[Tensor, ...], float, float]:
        """Gradients of one worker's share of a step, and its `(CE_AR, CE_Diff)`."""
        autocast: Any = contextlib.nullcontext()
        if self.config.precision == "bf16":
            autocast = torch.autocast("cpu", torch.bfloat16)
        with autocast:
            loss, ar, diff = tidar_loss(self.model, tokens, self.config.block_size, MASK_ID, self.config.alpha)
        return torch.autograd.grad(loss, self.parameters), ar.item(), diff.item()

    def step(self) -> tuple[float, float]:
        """One optimiser step; returns its `(CE_AR, CE_Diff)` in nats a token, before the update."""
        start = time.monotonic()
        shares = list(self._pool.map(self._gradients, self.batch(self.done).chunk(self.config.workers)))
        for parameter, *grads in zip(self.parameters, *(grads for grads, _, _ in shares), strict=True):
            parameter.grad = torch.stack(grads).mean(0)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.config.lr_at(self.done)
            optimiser.step()
        self.done += 1
        self.seconds += time.monotonic() - start
        ar = sum(share[1] for share in shares) / len(shares)
        diff = sum(share[2] for share in shares) / len(shares)
        self.curve.append([round(ar, 4), round(diff, 4)])
        return ar, diff

    def save(self, folder: Path) -> None:
        """Write `state.pt`, from which `resume` goes on, and `model.safetensors`, which decodes; each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "config": asdict(self.config),
            "corpus": self.corpus.sha256,
            "done": self.done,
            "seconds": self.seconds,
            "curve": self.curve,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        temporary = folder / f"state.pt.{os.getpid()}"
        torch.save(state, temporary)
        os.replace(temporary, folder / "state.pt")
        save_checkpoint(self.model, folder / "model.safetensors", {"steps": str(self.done)}, dtype=torch.float16)

    @classmethod
    def resume(cls, folder: Path, corpus: Corpus, steps: int | None = None) -> Trainer:
        """The trainer that `save` wrote into `folder`.

        Args:
            steps: another end of the schedule than it was started with, as long as neither has begun to decay.

        Raises:
            FileNotFoundError: there is no `state.pt`.
            ValueError: it was trained on other text, or has begun to decay towards another end.
        """
        state = torch.load(folder / "state.pt", weights_only=True)
        if state["corpus"] != corpus.sha256:
            raise ValueError(f"resume: expected a corpus with sha256 {state['corpus']}, got {corpus.sha256}")
        config = TrainConfig(**state["config"])
        if steps is not None and steps != config.steps:
            stable = min(config.stable_steps, replace(config, steps=steps).stable_steps)
            if state["done"] > stable:
                raise ValueError(f"steps: expected {config.steps}, towards which the run decays, got {steps}")
            config = replace(config, steps=steps)
        trainer = cls(config, corpus, state["done"], state["seconds"], state["curve"])
        trainer.model.load_state_dict(state["model"])
        for optimiser, saved in zip(trainer.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        return trainer

    def run(self, folder: Path, save_every: int = 200, steps: int | None = None) -> None:
        """Train to the end of the schedule (or for `steps` more steps), saving on the way and on Ctrl-C."""
        last = self.config.steps if steps is None else min(self.config.steps, self.done + steps)
        progress = _Progress(self)
        try:
            while self.done < last:
                progress.update(*self.step())
                if self.done % save_every == 0 and self.done < last:
                    self.save(folder)
        finally:
            progress.close()
            self.save(folder)


class _Progress:
    """One line, rewritten in place on a terminal and written every 50 steps into a log."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.first, self.start = trainer, trainer.done, time.monotonic()
        self.average: dict[str, float] = {}
        self.terminal = sys.stderr.isatty()

    def update(self, ar: float, diff: float) -> None:
        for name, loss in (("AR", ar), ("diffusion", diff)):
            self.average[name] = 0.95 * self.average.get(name, loss) + 0.05 * loss
        done, config = self.trainer.done, self.trainer.config
        if not (self.terminal or done % 50 == 0 or done == config.steps):
            return
        rate = (done - self.first) / max(time.monotonic() - self.start, 1e-9)
        left = (config.steps - done) / rate
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in self.average.items())
        line = (
            f"step {done}/{config.steps}  {losses} nats/byte  "
            f"{rate * config.batch * config.seq_len:.0f} tokens/s  {left / 60:.0f} min left"
        )
        start, end = ("\r", "\x1b[K") if self.terminal else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module: one option for every field of `TrainConfig`, and where to write."""
    parser = argparse.ArgumentParser(
        prog="python -m tidar_kernels.models.train", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for state.pt and model.safetensors")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from state.pt in --out; of the options below, only --steps may change",
    )
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="(200)")
    for entry in fields(TrainConfig):
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=type(entry.default),
            default=argparse.SUPPRESS,
            help=f"({entry.default})",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run from the shell; returns the exit code."""
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    out, resume, save_every = options.pop("out"), options.pop("resume"), options.pop("save_every")
    if resume and options.keys() - {"steps"}:
        parser.error(f"--resume: expected no option but --steps beside it, got {sorted(options.keys() - {'steps'})}")
    corpus = Corpus()
    try:
        if resume:
            trainer = Trainer.resume(out, corpus, options.get("steps"))
        else:
            trainer = Trainer(TrainConfig(**options), corpus)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parameters = sum(p.numel() for p in trainer.parameters)
    print(f"{parameters} parameters, {corpus.num_files} files, {len(corpus.tokens)} tokens", file=sys.stderr)
    try:
        trainer.run(out, save_every)
    except KeyboardInterrupt:
        print(f"stopped after step {trainer.done}; --resume goes on", file=sys.stderr)
        return 130
    print(json.dumps({"steps": trainer.done, "seconds": round(trainer.seconds, 1), "last": trainer.curve[-1]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
