"""What a training run leaves beside its weights: figures as JSON and the loss curve as a PNG."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...nn.files import replacing
from ..transformer import Transformer
from .config import TrainConfig
from .evaluate import evaluate_briefly
from .trainer import Trainer

__all__ = ["CURVE", "FIGURES", "draw_curve", "evaluate_run", "run_figures", "write_figures"]

FIGURES = "figures.json"
CURVE = "loss_curve.png"
_CURVE_POINTS = 150


def evaluate_run(trainer: Trainer, texts: dict[str, bytes], model: Transformer | None = None) -> dict[str, Any]:
    """`evaluate_briefly` on held-out texts, with its `step`; kept in `trainer.evaluations`.

    Args:
        model: the trainer's with whole weights (`Trainer.whole_model`); default the trainer's own.
    """
    start = time.monotonic()
    config = trainer.config
    figures = evaluate_briefly(model or trainer.model, texts, config.block_sizes, config.seq_len)
    evaluation = {"step": trainer.done, "seconds": time.monotonic() - start, **figures}
    before = [one for one in trainer.evaluations if one["step"] < trainer.done]
    trainer.evaluations = [*before, evaluation]
    return evaluation


def run_figures(trainer: Trainer) -> dict[str, Any]:
    """Settings, text, loss curve and cost of a run so far. `curve` is `[last step, mean CE_AR, mean CE_Diff]`."""
    config, corpus = trainer.config, trainer.corpus
    return {
        "model": trainer.model.config.to_dict(),
        "parameters": sum(p.numel() for p in trainer.parameters),
        "training": asdict(config),
        "init": trainer.init_sha256,
        "corpus": {"files": corpus.num_files, "tokens": len(corpus.tokens), "sha256": corpus.sha256},
        "steps": trainer.done,
        "tokens_seen": trainer.done * config.batch * config.seq_len,
        "seconds": round(trainer.seconds, 1),
        "curve": _thin(trainer.curve),
    }


def write_figures(figures: dict[str, Any], path: Path) -> None:
    """The figures as JSON, atomically, rounded to what measurements carry."""
    with replacing(path) as file:
        file.write((json.dumps(_rounded(figures), indent=1) + "\n").encode())


def _thin(curve: Sequence[Sequence[float]]) -> list[list[float]]:
    """`[last step, mean CE_AR, mean CE_Diff]` over at most `_CURVE_POINTS` equal stretches of the run."""
    stretch = max(1, -(-len(curve) // _CURVE_POINTS))
    points = []
    for start in range(0, len(curve), stretch):
        part = curve[start : start + stretch]
        points.append([start + len(part), *(sum(losses) / len(part) for losses in zip(*part, strict=True))])
    return points


def _rounded(value: Any) -> Any:
    """Floats to 5 significant digits: what the measurements can carry, and a file that reads well."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def draw_curve(figures: dict[str, Any], path: Path) -> None:
    """The loss curve as a PNG, with the evaluations on the way if there are any; needs matplotlib."""
    from matplotlib.figure import Figure

    steps, ar, diffusion = zip(*figures["curve"], strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, diffusion, color="#d1603d", label="diffusion: mask rows, own byte")
    axes.plot(steps, ar, color="#2f6690", label="autoregressive: clean rows, next byte")
    for name, color in (("diffusion", "#d1603d"), ("ar", "#2f6690")):
        held_out = [
            (one["step"], one["blocks"][0][f"{name}_bits_per_byte"] * math.log(2))
            for one in figures.get("evaluations", [])
            if f"{name}_bits_per_byte" in one["blocks"][0]
        ]
        if held_out:
            label = "held-out sample" if name == "ar" else None
            axes.plot(*zip(*held_out, strict=True), "o", ms=4, color=color, label=label)
    training = figures["training"]
    decay = TrainConfig.from_dict(training).stable_steps
    if 0 < decay < steps[-1]:
        axes.axvline(decay, color="0.7", lw=0.8, ls="--")
        axes.annotate(
            f"S = {training['seq_len'] // 2} → {training['seq_len']}, learning rate decays",
            (decay, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            color="0.4",
        )
    axes.set(xlabel="step", ylabel="cross-entropy, nats a byte", ylim=(0, None), xlim=(0, steps[-1]))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
