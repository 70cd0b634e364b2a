"""`tidar-kernels train-adapter`: an adapter that makes a model draft, and leaves what it says alone."""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from .checkpoints import add_model_arguments, add_prompt_arguments, load_model, quiet, read_prompts
from .common import (
    MAX_BLOCK_SIZE,
    MAX_THREADS,
    MAX_TOKENS,
    OK,
    PROGRAM,
    Terminal,
    UserError,
    add_device_argument,
    add_json_argument,
    any_path,
    number,
    print_json,
    user_errors,
    whole_number,
)

SUMMARY = "train a LoRA adapter that drafts for a model, whose own text stays what it is"

USAGE = "MODEL --out DIR [options]"

EPILOG = f"""\
The model is frozen and mask rows alone run the adapter, so decoding with it gives the
model's own text. Masks learn the model's own distribution (R-ISD), on a folder of text
(--data), or on what the model itself writes after the prompts: sampled once, kept in
DIR, and part of what --resume goes on with. DIR gets the adapter as PEFT writes it
(adapter_config.json, adapter_model.safetensors), training.json with the loss and what
drafting was worth before and after on prompts that it never saw, and state.pt.

An interrupted or killed run goes on with --resume, and ends with the same bytes.
`accelerate launch -m tidar_kernels train-adapter ..` trains on several processes.

examples:
  {PROGRAM} train-adapter ./SmolLM2-135M-Instruct --out runs/smol --steps 500
  {PROGRAM} train-adapter ./Qwen3-0.6B --out runs/qwen --data texts/ --strategy tidar --block-size 8
  {PROGRAM} train-adapter ./Qwen3-0.6B --out runs/qwen --data texts/ --resume
"""

_HELD_OUT = 8  # at most so many prompts, the last ones, are for measuring alone
_DOCUMENTS = "documents.json"
_SUFFIXES = (".txt", ".md", ".py", ".rst")
_MAX_TEXT = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--out", type=any_path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR, with the same options")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data", type=any_path, metavar="FOLDER", help=f"text to train on ({' '.join(_SUFFIXES)}); default its own"
    )
    add_prompt_arguments(text)
    text.add_argument(
        "--continuations",
        type=whole_number(1, 10**6),
        default=256,
        metavar="N",
        help="without --data: texts that the model writes, from the prompts in turn (default: 256)",
    )
    text.add_argument(
        "--max-new-tokens",
        type=whole_number(1, MAX_TOKENS),
        default=192,
        metavar="N",
        help="tokens of each, and of each prompt that drafting is measured on (default: 192)",
    )
    text.add_argument(
        "--temperature",
        type=number(float, lambda value: 0.0 <= value <= 100.0, "a number from 0 to 100"),
        default=1.0,
        metavar="T",
        help="of the texts that the model writes; 0 is greedy (default: 1.0)",
    )
    drafts = parser.add_argument_group("drafts")
    drafts.add_argument("--strategy", choices=("isd", "tidar"), default="isd", help="default: isd")
    drafts.add_argument(
        "--block-size", type=whole_number(2, MAX_BLOCK_SIZE), default=4, metavar="B", help="a step (default: 4)"
    )
    drafts.add_argument(
        "--mask-token-id",
        type=whole_number(0, 2**31 - 1),
        metavar="ID",
        help="token of mask rows; default the config's or tokenizer's, else its padding token",
    )
    drafts.add_argument("--rank", type=whole_number(1, 4096), default=32, metavar="R", help="default: 32")
    drafts.add_argument(
        "--alpha",
        type=number(float, lambda value: 0.0 < value <= 1e6, "a positive number <= 1e6"),
        metavar="A",
        help="default: twice the rank",
    )
    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--steps", type=whole_number(1, 10**8), default=500, metavar="N", help="default: 500")
    schedule.add_argument(
        "--batch-size", type=whole_number(1, 2**16), default=4, metavar="N", help="windows a step (default: 4)"
    )
    schedule.add_argument(
        "--seq-len", type=whole_number(2, 2**20), default=256, metavar="N", help="tokens of a window (default: 256)"
    )
    schedule.add_argument(
        "--lr",
        type=number(float, lambda value: 0.0 < value <= 1.0, "a number above 0, at most 1"),
        default=1e-3,
        metavar="LR",
        help="the highest learning rate (default: 1e-3)",
    )
    schedule.add_argument("--seed", type=whole_number(0, 2**31 - 1), default=0, metavar="S", help="default: 0")
    schedule.add_argument(
        "--save-every", type=whole_number(1, 10**8), default=50, metavar="N", help="steps (default: 50)"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--threads", type=whole_number(1, MAX_THREADS), metavar="N", help="CPU threads; default PyTorch's choice"
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    out: Path = options.out
    if not options.resume and os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: expected a new or an empty folder, or --resume, got {out}")
    texts = read_prompts(options.prompts)
    if len(texts) < 2:
        raise UserError(f"--prompts: expected at least 2, one of them to measure on, got {len(texts)}")
    files = _files(options.data)
    model, tokenizer = load_model(options.model, options.dtype, options.device)
    import torch

    from ..integrations.transformers.distillation import (
        FIGURES,
        STATE,
        AdapterTrainer,
        DistillationConfig,
        draft_figures,
        some_mask_token,
    )

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    terminal = Terminal(sys.stderr)
    rename = {"documents": "--data", "resume": "--resume", "mask_token_id": "--mask-token-id", "model": "MODEL"}
    with quiet(), user_errors(TypeError, ValueError, FileNotFoundError, rename=rename):
        mask = some_mask_token(model, tokenizer) if options.mask_token_id is None else options.mask_token_id
        if mask >= model.config.get_text_config(decoder=True).vocab_size:
            raise UserError(f"--mask-token-id: expected a token of the model, got {mask}")
        config = DistillationConfig(
            mask_token_id=mask,
            strategy=options.strategy,
            block_size=options.block_size,
            rank=options.rank,
            alpha=2.0 * options.rank if options.alpha is None else options.alpha,
            steps=options.steps,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            lr=options.lr,
            seed=options.seed,
        )
        held_out = [tokenizer(text)["input_ids"] for text in texts[-min(_HELD_OUT, len(texts) // 2) :]]
        trained_on = texts[: len(texts) - len(held_out)]
        documents = _documents(options, files, trained_on, model, tokenizer, terminal)
        # A run that was cut short before its first steps were saved has written some of its texts at most.
        resumed = options.resume and not (not files and not (out / STATE).exists())
        before = None if resumed else draft_figures(model, held_out, config, options.max_new_tokens)
        trainer = AdapterTrainer(model, documents, config, _accelerator())
        if resumed:
            trainer.resume(out)
        else:
            trainer.figures["before"] = before
        started, first = time.monotonic(), trainer.done

        def progress(done: int, loss: float) -> None:
            rate = (done - first) / max(time.monotonic() - started, 1e-9)
            left = (config.steps - done) / rate
            terminal.status(f"step {done}/{config.steps}  {loss:.3f} nats a mask row  {left:.0f} s left")

        trainer.run(out, options.save_every, progress)
        trainer.figures["after"] = draft_figures(model, held_out, config, options.max_new_tokens)
        trainer.save(out)
    terminal.status("")
    found = {"out": str(out), "steps": trainer.done, "loss": trainer.losses[-1], **trainer.figures}
    if options.json:
        print_json(found)
        return OK
    print(f"{out}: {trainer.done} steps, {trainer.losses[-1]:.3f} nats a mask row; figures in {out / FIGURES}")
    for when in ("before", "after"):
        figures = trainer.figures[when]
        shares = " ".join(f"{share:.2f}" for share in figures["acceptance"])
        print(f"{when:7}{figures['tokens_per_forward']:.2f} tokens a forward pass, drafts kept by position {shares}")
    return OK


def _files(folder: Path | None) -> list[Path]:
    """The files of text in a folder, in the order of their names.

    Raises:
        UserError: there is none, or there is too much.
    """
    if folder is None:
        return []
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"--data: expected a folder with text ({' '.join(_SUFFIXES)}), got none in {folder}")
    size = sum(path.stat().st_size for path in files)
    if size > _MAX_TEXT:
        raise UserError(f"--data: expected at most {_MAX_TEXT} bytes, got {size} in {folder}")
    return files


def _documents(
    options: argparse.Namespace, files: list[Path], texts: list[str], model: Any, tokenizer: Any, terminal: Terminal
) -> list[list[int]]:
    """Token ids to train on: of the files, or of the model's own continuations, which DIR then keeps."""
    import json

    from ..integrations.transformers.distillation import own_continuations
    from ..nn.files import replacing

    if files:
        return [tokenizer(path.read_text(encoding="utf-8-sig", errors="replace"))["input_ids"] for path in files]
    kept: Path = options.out / _DOCUMENTS
    known: list[list[int]] = []
    if options.resume:
        with user_errors(OSError, ValueError, otherwise=f"--resume: expected the texts of the run in {kept}"):
            known = json.loads(kept.read_text())
    prompts = [tokenizer(texts[index % len(texts)])["input_ids"] for index in range(options.continuations)]

    def keep(documents: list[list[int]]) -> None:
        terminal.status(f"{len(documents)} of {len(prompts)} texts written by the model")
        options.out.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as file:
            file.write(json.dumps(documents).encode())

    return own_continuations(
        model,
        prompts,
        options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        known=known,
        progress=keep,
    )


def _accelerator() -> Any:
    """Accelerate's, where it launched this process as one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    return import_module("accelerate").Accelerator()
