"""`tidar-kernels lossless`: does speculation change a model's text, and if so, through which part of it?"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .checkpoints import add_model_arguments, add_prompt_arguments, load_model, quiet, read_prompts, reading
from .common import (
    FAILED,
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
    import_torch,
    number,
    print_json,
    table,
    user_errors,
    versions,
    whole_number,
)
from .strategy import STRATEGIES

if TYPE_CHECKING:
    from ..integrations.transformers.checkpoints.preparation import Drafts
    from ..integrations.transformers.lossless import LosslessReport

SUMMARY = "check whether speculation changes a model's text, and find the cause bit by bit"

USAGE = "MODEL [options]"

EPILOG = f"""\
Every prompt is decoded autoregressively and by speculation, and the two texts are
compared token by token. Where they differ, the report says at which token, by how
much the model prefers its own, and in which module bits first differ: attention,
a projection, a norm, the lm_head, or, with equal logits, the sampler. It also counts
in which modules a row's bits depend on the rows beside it (one row against many).

Strategies of this package are compared with its own autoregressive decoding;
prompt-lookup and assistant are transformers' own, compared with model.generate.
The model need not be trained for drafting: drafts never change what comes out.
With --adapter the model drafts with it, and the text to compare with is that of the
model without.

exit codes: 0 all texts equal, 1 some differ, 2 bad input

examples:
  {PROGRAM} lossless ./SmolLM2-135M-Instruct
  {PROGRAM} lossless ./SmolLM2-135M-Instruct --adapter runs/smol
  {PROGRAM} lossless ./SmolLM2-135M-Instruct --dtype bfloat16 --exact --strategy isd
  {PROGRAM} lossless ./Qwen3-0.6B --strategy prompt-lookup --prompts HumanEval.jsonl.gz --json
"""

_ASSISTED = ("prompt-lookup", "assistant")
_BLOCK_SIZE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    speculation = parser.add_argument_group("speculation")
    speculation.add_argument(
        "--strategy",
        choices=(*STRATEGIES, *_ASSISTED),
        help="how it drafts (default: as --adapter was trained to, else tidar)",
    )
    speculation.add_argument(
        "--block-size",
        type=whole_number(1, MAX_BLOCK_SIZE),
        metavar="B",
        help=f"tokens drafted a step (default: as --adapter was trained to, else {_BLOCK_SIZE})",
    )
    speculation.add_argument(
        "--adapter",
        type=any_path,
        metavar="DIR",
        help="a LoRA adapter as PEFT saves it, for drafting alone (train-adapter writes one)",
    )
    speculation.add_argument("--assistant", metavar="MODEL", help="the drafting model of --strategy assistant")
    speculation.add_argument("--exact", action="store_true", help="both ways with exact rows")
    texts = parser.add_argument_group("texts")
    add_prompt_arguments(texts)
    texts.add_argument(
        "--max-new-tokens",
        type=whole_number(1, MAX_TOKENS),
        default=64,
        metavar="N",
        help="tokens of each prompt (default: 64)",
    )
    texts.add_argument(
        "--temperature",
        type=number(float, lambda value: 0.0 <= value <= 100.0, "a number from 0 to 100"),
        default=0.0,
        metavar="T",
        help="sample by the coupled rule, a seed a prompt (default: 0, greedy)",
    )
    texts.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="S", help="default: 0")
    add_device_argument(parser)
    parser.add_argument(
        "--threads", type=whole_number(1, MAX_THREADS), metavar="N", help="CPU threads; default PyTorch's choice"
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    if (options.strategy == "assistant") != (options.assistant is not None):
        raise UserError(f"--assistant: expected with --strategy assistant alone, got {options.assistant}")
    if options.adapter is not None and options.strategy in _ASSISTED:
        raise UserError(f"--adapter: expected a strategy of this package beside it, got {options.strategy}")
    texts = read_prompts(options.prompts)
    drafts = None if options.adapter is None else _drafts(options)
    model, tokenizer = load_model(options.model, options.dtype, options.device)
    assistant = None
    if options.assistant is not None:
        assistant, _ = load_model(options.assistant, options.dtype, options.device)
    import torch

    from ..integrations.transformers.lossless import lossless

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    if not all(prompts):
        raise UserError(f"--prompts: expected a token at least in each, got none in prompt {prompts.index([]) + 1}")
    terminal = Terminal()
    options.strategy, options.block_size = options.strategy or "tidar", options.block_size or _BLOCK_SIZE
    strategy, mask_token_id = options.strategy.replace("-", "_"), None
    if drafts is not None:
        strategy, mask_token_id = drafts.strategy, drafts.mask_token_id
        options.strategy, options.block_size = strategy.name.replace("_", "-"), strategy.drafts
    rename = {"model": "MODEL", "strategy": "--strategy", "path": "--adapter"}
    unknown = "" if drafts is None else "--adapter: expected an adapter that can be read"
    with quiet(), user_errors(TypeError, ValueError, OSError, rename=rename, otherwise=unknown):
        report = lossless(
            model,
            prompts,
            strategy=strategy,
            block_size=options.block_size,
            mask_token_id=mask_token_id,
            adapter=None if drafts is None else drafts.add_adapter,
            exact=options.exact,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            assistant=assistant,
            progress=lambda done: terminal.status(f"{done} of {len(prompts)} prompts"),
        )
    terminal.status("")
    found = _as_json(options, report)
    if options.json:
        print_json(found)
    else:
        print("\n".join(_lines(options, report, tokenizer)))
    return OK if report.equal == len(prompts) else FAILED


def _drafts(options: argparse.Namespace) -> Drafts:
    """How the model drafts with the adapter."""
    import_torch()
    from ..decoding.strategies import Strategy, by_name
    from ..nn.peft_files import read_config

    unreadable = "--adapter: expected an adapter that can be read"
    with user_errors(Exception, rename={"path": "--adapter"}, otherwise=unreadable):
        read_config(options.adapter)  # before anything is decoded
    with reading():
        from ..integrations.transformers.checkpoints.preparation import drafts_of
        from ..integrations.transformers.checkpoints.reading import config_of

        found = drafts_of(
            options.model,
            None,
            config_of(options.model),
            adapter=options.adapter,
            strategy=None if options.strategy is None else options.strategy.replace("-", "_"),
            block_size=options.block_size,
        )
    if isinstance(found.strategy, Strategy):
        return found
    return replace(found, strategy=by_name(found.strategy, options.block_size or _BLOCK_SIZE))


def _as_json(options: argparse.Namespace, report: LosslessReport) -> dict[str, Any]:
    names = ("model", "dtype", "strategy", "block_size", "exact", "max_new_tokens", "temperature", "seed")
    adapter = None if options.adapter is None else str(options.adapter)
    return {
        **{name: getattr(options, name) for name in names},
        "adapter": adapter,
        **report.as_json(),
        "versions": versions(),
    }


def _lines(options: argparse.Namespace, report: LosslessReport, tokenizer: Any) -> list[str]:
    count = len(report.trajectories)
    said = f"{options.strategy}, B = {options.block_size}, {options.dtype}{', exact' if options.exact else ''}"
    said += "" if options.adapter is None else f", adapter {options.adapter}"
    lines = [
        f"{report.equal} of {count} texts equal, {report.equal_bits} of {count} in every bit too "
        f"({said}, {report.new_tokens} tokens in {report.forwards} forward passes)"
    ]
    differing = [(i + 1, each.divergence) for i, each in enumerate(report.trajectories) if each.divergence is not None]
    if differing:
        rows = [["prompt", "token", "expected", "got", "margin", "first bits at", "stage"]]
        rows += [
            [
                str(prompt),
                str(found.index),
                *(
                    repr(tokenizer.decode([token])) if token >= 0 else "the end"
                    for token in (found.expected, found.got)
                ),
                f"{found.margin:.2g}",
                f"{found.position} {found.module}" if found.module else "-",
                found.stage,
            ]
            for prompt, found in differing
        ]
        lines += ["", *table(rows, ">><<><<")]
    elif report.equal_bits < count:
        bits = next(each.first_bits for each in report.trajectories if each.first_bits is not None)
        lines.append(f"first bits that differ: {bits.stage}, position {bits.position}, {bits.module}")
    if report.stages:
        rows = [["stage", "rows", "other bits among others than alone"]]
        rows += [[stage, str(rows_run), str(found)] for stage, (rows_run, found) in report.stages.items()]
        lines += ["", *table(rows, "<>>")]
    return lines
