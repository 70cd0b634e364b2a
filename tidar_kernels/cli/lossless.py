"""`tidar-kernels lossless`: does speculation change a model's text, and if so, through which part of it?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .checkpoints import add_model_arguments, add_prompt_arguments, load_model, quiet, read_prompts
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
    number,
    print_json,
    table,
    user_errors,
    versions,
    whole_number,
)
from .strategy import STRATEGIES

if TYPE_CHECKING:
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

exit codes: 0 all texts equal, 1 some differ, 2 bad input

examples:
  {PROGRAM} lossless ./SmolLM2-135M-Instruct
  {PROGRAM} lossless ./SmolLM2-135M-Instruct --dtype bfloat16 --exact --strategy isd
  {PROGRAM} lossless ./Qwen3-0.6B --strategy prompt-lookup --prompts HumanEval.jsonl.gz --json
"""

_ASSISTED = ("prompt-lookup", "assistant")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    speculation = parser.add_argument_group("speculation")
    speculation.add_argument(
        "--strategy",
        choices=(*STRATEGIES, *_ASSISTED),
        default="tidar",
        help="how it drafts (default: tidar)",
    )
    speculation.add_argument(
        "--block-size",
        type=whole_number(1, MAX_BLOCK_SIZE),
        default=4,
        metavar="B",
        help="tokens drafted a step (default: 4)",
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
    texts = read_prompts(options.prompts)
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
    with quiet(), user_errors(TypeError, ValueError, rename={"model": "MODEL", "strategy": "--strategy"}):
        report = lossless(
            model,
            prompts,
            strategy=options.strategy.replace("-", "_"),
            block_size=options.block_size,
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


def _as_json(options: argparse.Namespace, report: LosslessReport) -> dict[str, Any]:
    names = ("model", "dtype", "strategy", "block_size", "exact", "max_new_tokens", "temperature", "seed")
    return {**{name: getattr(options, name) for name in names}, **report.as_json(), "versions": versions()}


def _lines(options: argparse.Namespace, report: LosslessReport, tokenizer: Any) -> list[str]:
    count = len(report.trajectories)
    lines = [
        f"{report.equal} of {count} texts equal, {report.equal_bits} of {count} in every bit too "
        f"({options.strategy}, {options.dtype}{', exact' if options.exact else ''}, {report.new_tokens} tokens)"
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


def _shown(token: int, tokenizer: Any) -> str:
    return repr(tokenizer.decode([token])) if token >= 0 else "the end"
