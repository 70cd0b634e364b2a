"""Turn a finished training run into what the package ships: weights, figures, the loss curve and `docs/model.md`.

    python -m tidar_kernels.models.training.publish --run runs/stdlib --docs docs

Without `--run` it draws the curve and writes the page again, from the figures that are shipped; `--measure` first
measures the shipped weights again, on a machine that should be idle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load_checkpoint, save_checkpoint
from ..shipped import FIGURES, FOLDER, WEIGHTS, shipped_figures
from .config import TrainConfig
from .data import HELD_OUT, SKIPPED_FOLDERS, Corpus, held_out_texts
from .evaluate import evaluate_block_lengths, evaluate_decoding, evaluate_likelihood, held_out_prompts
from .report import draw_curve, run_figures, write_figures
from .trainer import Trainer, weights_sha256

__all__ = ["document", "main", "measure", "measure_again", "publish"]

MAX_BYTES = 8_000_000
BLOCK_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def publish(run: Path, shipped: Path = FOLDER, notes: Sequence[str] = (), init: Path | None = None) -> dict[str, Any]:
    """Write the weights of a finished run and its figures into `shipped`; returns the figures.

    The weights are rounded to float16 first and measured as they will be loaded, in float32.

    Args:
        notes: what happened to this run that its configuration does not say; kept with the figures and documented.
        init: the weights that it started from, where its state is older than such records.

    Raises:
        FileNotFoundError: there is no run. ValueError: it is not finished, or its weights pass 8,000,000 bytes.
    """
    corpus = Corpus()
    trainer = Trainer.resume(run, corpus)
    config = trainer.config
    if trainer.done != config.steps:
        raise ValueError(f"run: expected all {config.steps} steps done, got {trainer.done}")
    weights = run / WEIGHTS
    save_checkpoint(trainer.model, weights, _header(config, corpus), dtype=torch.float16)
    size = weights.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"run: expected weights of at most {MAX_BYTES} bytes, got {size}")
    if init is not None:
        trainer.init_sha256 = weights_sha256(load_checkpoint(init))
    figures = {
        **run_figures(trainer),
        "file_bytes": size,
        "machine": {
            "cpu_cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": metadata.version("torch").partition("+")[0],
        },
        "notes": list(notes),
        "held_out": measure(weights, config.seq_len),
    }
    shipped.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, shipped / WEIGHTS)
    write_figures(figures, shipped / FIGURES)
    return figures


def measure(weights: Path, seq_len: int) -> dict[str, Any]:
    """Held-out figures of a weights file, loaded in float32; `load_average` says how busy the machine was before."""
    model, texts = load_checkpoint(weights), held_out_texts()
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    prompts = held_out_prompts(texts)
    return {
        "modules": list(texts),
        "likelihood": evaluate_likelihood(model, texts.values(), seq_len),
        "load_average": load,
        "decoding": evaluate_decoding(model, prompts),
        "block_lengths": evaluate_block_lengths(model, [group[0] for group in prompts.values()], BLOCK_LENGTHS),
    }


def measure_again(shipped: Path = FOLDER) -> None:
    """Replace the held-out figures in `shipped` by new ones of the same weights, as when decoding has become faster."""
    figures = json.loads((shipped / FIGURES).read_text(encoding="utf-8"))
    figures["held_out"] = measure(shipped / WEIGHTS, figures["training"]["seq_len"])
    write_figures(figures, shipped / FIGURES)


def _header(config: TrainConfig, corpus: Corpus) -> dict[str, str]:
    return {"objective": "tidar", "seed": str(config.seed), "steps": str(config.steps), "corpus_sha256": corpus.sha256}


_PAGE = """\
<!-- Generated from tidar_kernels/models/shipped/training.json by `python -m tidar_kernels.models.training.publish` -->

# The shipped model

A byte-level decoder of {parameters:,} parameters, trained {start} with the TiDAR objective on the Python standard
library's own sources. It is there to show the decoder at work on real text, on any machine, without a download: it
writes plausible Python, not correct Python.

```python
from tidar_kernels import Decoder
from tidar_kernels.models import load_shipped

model, tokenizer = load_shipped()
prompt = tokenizer.encode("class Queue:\\n    def put(self, item):\\n")
result = Decoder(model).generate([prompt], max_new_tokens=128)
print(tokenizer.decode(result.tokens[0]), result.tokens_per_forward)
```

## Shape

| | |
|---|---|
| layers x width | {model[num_layers]} x {model[hidden_size]}, SwiGLU {model[intermediate_size]} |
| heads | {model[num_heads]} query, {model[num_kv_heads]} key/value, of {model[head_dim]} |
| vocabulary | {model[vocab_size]}: the bytes, MASK and end of text; tied embedding |
| block length B | {model[block_size]} |
| file | `tidar_kernels/models/shipped/{weights}`, float16, {file_bytes:,} bytes |

## Training

![loss curve](images/loss_curve.png)

| | |
|---|---|
{facts}

Folders left out: {folders}. Modules held out by name, never trained on: {held_out}.

```
tidar-kernels train --out runs/stdlib{options}
python -m tidar_kernels.models.training.publish --run runs/stdlib --docs docs
```

{seeded}. An interrupted run goes on with `--resume` and repeats the
uninterrupted one bit for bit on the same machine, as long as the code is the same. Another Python version has other
sources, so other text.
{notes}
## Held-out figures

Measured on the shipped file, its weights cast to float32, over {likelihood[bytes]:,} bytes of the held-out modules.

| | causal rows | mask rows |
|---|---|---|
| bits a byte | {likelihood[ar_bits_per_byte]:.3f} | {likelihood[diffusion_bits_per_byte]:.3f} |
| argmax right | {likelihood[ar_accuracy]:.1%} | by row, below |

Greedy decoding of {decoding[prompts]} prompts of {decoding[prompt_len]} bytes, one at a time,
{decoding[max_new_tokens]} new bytes each:

| | TiDAR | autoregressive |
|---|---|---|
| tokens a forward | {decoding[tokens_per_forward]:.2f} | 1 |
| tokens a second | {tidar_speed:.0f} | {autoregressive_speed:.0f} |

TiDAR is {decoding[speedup]:.2f} x as fast as the autoregressive mode of the same code. Outputs identical: {identical}.
The two modes took turns on every prompt; load average of the machine before: {load}.

Mask row m of a block guesses the byte m places after the first unknown one. Beside its accuracy: the share of decode
steps that committed m + 1 tokens.

| m | argmax right, the true bytes before the block given | steps that committed m + 1 tokens |
|---|---|---|
{rows}

| held-out module | tokens a forward |
|---|---|
{texts}

At other block lengths, trained and not, one prompt of each module:

| B | tokens a forward | outputs identical to autoregressive ones |
|---|---|---|
{lengths}
"""


def document(figures: dict[str, Any]) -> str:
    """`docs/model.md` from the figures."""
    model, training, corpus = figures["model"], figures["training"], figures["corpus"]
    machine, likelihood = figures["machine"], figures["held_out"]["likelihood"]
    decoding, load = figures["held_out"]["decoding"], figures["held_out"]["load_average"]
    config = TrainConfig.from_dict(training)
    block, seq_len, stable = model["block_size"], config.seq_len, config.stable_steps
    init = figures.get("init")
    facts = {
        "first weights": f"of an earlier run, sha256 of their values `{init[:16]}...`" if init else "random",
        "objective": f"(alpha * mean CE_AR + mean CE_Diff) / (1 + alpha), alpha = {training['alpha']:g}; "
        "every token of the mask half is MASK",
        "text": f"{corpus['files']} files, {corpus['tokens']:,} tokens, of Python {machine['python']}; "
        f"sha256 of the token stream `{corpus['sha256'][:16]}...`",
        "steps": f"{training['steps']:,} of {training['batch'] * seq_len:,} clean tokens "
        f"({figures['tokens_seen']:,} in all), seed {training['seed']}",
        "sequences": f"S = {seq_len // 2} for {stable:,} steps, then {seq_len}",
        "block lengths": " and ".join(map(str, config.block_sizes)) + ", in turn" * (len(config.block_sizes) > 1),
        "optimiser": ("Muon on the layers' matrices, AdamW on the rest; " if config.optimizer == "muon" else "AdamW; ")
        + f"weight decay {training['weight_decay']:g} on matrices, gradient norm clipped at {training['grad_clip']:g}",
        "learning rate": f"{training['lr']:g} after {training['warmup']} steps of warm-up; "
        f"over the last {training['steps'] - stable:,} steps a cosine to {training['final_lr']:.0%} of it",
        "arithmetic": "bfloat16 autocast, float32 weights" if training["precision"] == "bf16" else "float32",
        "time": f"{figures['seconds'] / 60:.0f} minutes on {machine['cpu_cores']} CPU cores shared with other work, "
        f"torch {machine['torch']}",
    }
    steps = sum(decoding["accepted"])
    speed = decoding["tokens_per_second"]
    return _PAGE.format(
        weights=WEIGHTS,
        parameters=figures["parameters"],
        file_bytes=figures["file_bytes"],
        model=model,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        folders=", ".join(f"`{name}`" for name in sorted(SKIPPED_FOLDERS)),
        held_out=", ".join(f"`{name}`" for name in HELD_OUT),
        start="further" if init else "from scratch",
        seeded=f"The seed fixes {'' if init else 'the first weights and '}every window of text",
        options=" --init FIRST.safetensors" * bool(init) + _options(config),
        notes="".join(["\nOf this run:\n\n", *(f"- {note}\n" for note in notes)])
        if (notes := figures["notes"])
        else "",
        likelihood=likelihood,
        decoding=decoding,
        load="not recorded, other programs were running" if load is None else load,
        tidar_speed=speed["tidar"],
        autoregressive_speed=speed["autoregressive"],
        identical="yes" if decoding["identical"] else "no",
        rows="\n".join(
            f"| {m} | {accuracy:.1%} | {count / steps:.1%} |"
            for m, accuracy, count in zip(
                range(block), likelihood["mask_row_accuracy"], decoding["accepted"], strict=True
            )
        ),
        lengths="\n".join(
            f"| {row['block_size']} | {row['tokens_per_forward']:.2f} | {'yes' if row['identical'] else 'NO'} |"
            for row in figures["held_out"]["block_lengths"]
        ),
        texts="\n".join(f"| `{name}` | {rate:.2f} |" for name, rate in decoding["tokens_per_forward_of"].items()),
    )


def _options(config: TrainConfig) -> str:
    """The command line's options for what is not a default."""
    parts = []
    for entry in fields(config):
        value = getattr(config, entry.name)
        if value != entry.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            parts.append(f" --{entry.name.replace('_', '-')} {text}")
    return "".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Run from the shell; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tidar_kernels.models.training.publish", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--run", type=Path, help="folder that train wrote; without it, the figures are those shipped")
    parser.add_argument("--note", action="append", default=[], help="a remark on the run, for the page; repeatable")
    parser.add_argument("--init", type=Path, help="the weights that the run started from, if its state does not say")
    parser.add_argument("--docs", type=Path, required=True, help="folder of model.md and images/")
    parser.add_argument("--measure", action="store_true", help="measure the shipped weights again, without a run")
    options = parser.parse_args(argv)
    if options.run is not None and options.measure:
        parser.error("--measure: expected no --run beside it")
    if options.run is None and (options.init is not None or options.note):
        parser.error("--init, --note: expected --run beside them")
    if options.measure:
        measure_again()
    if options.run is not None:
        publish(options.run, notes=options.note, init=options.init)
    figures = shipped_figures()
    draw_curve(figures, options.docs / "images" / "loss_curve.png")
    (options.docs / "model.md").write_text(document(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
