"""Every strategy against `model.generate` on prompts of a file, greedily: texts equal, tokens a forward, acceptance.

    python -m benchmarks.decoding.human_eval MODEL --title NAME --prompts HumanEval.jsonl.gz [--adapter DIR] [--out DIR]

`generate` decodes a batch with padding, the package the same batch without. A text that differs is asked for once more
by itself, where there is no padding. A run that was cut short goes on where it stopped: what a batch gave is kept in
`OUT/human-eval-*.jsonl`, under a name made of the prompts and the weights. docs/lossless.md shows both parts: without
an adapter, and with one.

An adapter drafts with the block size and the mask token that it was trained with. One that was trained for ISD serves
TiDAR steps of causal blocks too, whose mask rows see the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import record
from tidar_kernels import Decoder
from tidar_kernels.cli.checkpoints import read_prompts
from tidar_kernels.decoding import strategies
from tidar_kernels.decoding.strategies import Strategy, by_name
from tidar_kernels.integrations.transformers import loading
from tidar_kernels.integrations.transformers.distillation import FIGURES
from tidar_kernels.nn.adapters import load_peft_adapter, lora_gate

# The step of each strategy, small enough that rows cost little beside weights.
STRATEGIES = {"isd": 4, "self_speculation": 4, "tree": 4, "tidar": 2}
HUMAN_EVAL = "HumanEval"
Tokens = list[list[int]]


def reference(model: Any, stop: list[int], new_tokens: int, **options: Any) -> Callable[[Tokens], Tokens]:
    """`model.generate`, with these `options`, on prompts of any lengths: the new tokens of each, up to its end."""

    def run(prompts: Tokens) -> Tokens:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with lora_gate(False):  # the model without what was trained for drafting
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
            )
        return [ended(row, stop) for row in out[:, longest:].tolist()]

    return run


def stop_tokens(model: Any) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


def ended(tokens: list[int], stop: list[int]) -> list[int]:
    """`tokens` up to the first that ends a text, without it."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in stop), len(tokens))]


def kept(path: Path, batches: list[Tokens], compute: Callable[[Tokens], dict[str, Any]]) -> list[dict[str, Any]]:
    """What `compute` gives for each batch; from the file `path` what is there already."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for index in range(len(done), len(batches)):
        done.append(compute(batches[index]))
        with path.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{path.stem}: {index + 1} of {len(batches)} batches", file=sys.stderr, flush=True)
    return done


def measure(decoder: Decoder, stop: list[int], new_tokens: int) -> Callable[[Tokens], dict[str, Any]]:
    """`prompts -> {"texts", "accepted"}` of a decoder: its texts, and of every step how many tokens it gave."""

    def compute(prompts: Tokens) -> dict[str, Any]:
        result = decoder.generate(prompts, new_tokens, stop_tokens=stop)
        return {"texts": [ended(tokens, stop) for tokens in result.tokens], "accepted": result.accepted}

    return compute


def row(name: str, block_size: int, found: list[dict[str, Any]], equal: int) -> dict[str, Any]:
    steps = [count for each in found for sequence in each["accepted"] for count in sequence]
    return {
        "strategy": name,
        "block_size": block_size,
        "prompts": sum(len(each["texts"]) for each in found),
        "equal": equal,
        "tokens": sum(len(text) for each in found for text in each["texts"]),
        "tokens_per_forward": round(sum(steps) / len(steps), 4),
        "acceptance": [round(sum(n > draft for n in steps) / len(steps), 4) for draft in range(1, block_size)],
    }


def command(options: argparse.Namespace, strategy: str, kind: str) -> str:
    """The command line that measures one row again; MODEL, FILE and DIR stand for the reader's own paths."""
    of_the_row = ["--strategies", strategy] if options.adapter is None else ["--adapter", "DIR"]
    limit = [] if options.limit is None else ["--limit", str(options.limit)]
    sizes = ["--max-new-tokens", str(options.max_new_tokens), "--batch-size", str(options.batch_size)]
    texts = "--prompts FILE" if kind == HUMAN_EVAL else "--chat FILE"
    start = ["python -m benchmarks.decoding.human_eval MODEL --title", options.title, texts]
    return " ".join([*start, *of_the_row, *limit, *sizes])


def fingerprint(model: Any) -> int:
    """A checksum of a model's weights, its adapters included."""
    found = 0
    for name, weight in sorted(model.state_dict().items()):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), found)
    return found


def chosen(options: argparse.Namespace, tokenizer: Any) -> tuple[dict[str, Strategy], int, dict[str, Any]]:
    """`({label: strategy}, mask token, what is recorded of the adapter's training)`."""
    if options.adapter is None:
        mask = min(2, len(tokenizer) - 1)
        return {name: by_name(name, STRATEGIES[name]) for name in options.strategies}, mask, {}
    training = json.loads((options.adapter / FIGURES).read_text())
    name, size = training["config"]["strategy"], training["config"]["block_size"]
    found = {f"{name}, adapter": by_name(name, size)}
    if name == "isd":
        found["tidar, causal blocks, adapter"] = strategies.tidar(size, bidirectional=False)
    return found, training["config"]["mask_token_id"], {"training": training}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoding.human_eval", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("--title", required=True, help="what the page calls the model")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="as `tidar-kernels lossless` has it")
    parser.add_argument("--chat", type=Path, metavar="FILE", help="the same, put in the tokenizer's chat template")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="of `tidar-kernels train-adapter`")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="NAME")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of each prompt; default 64")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at once; default 16")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    options = parser.parse_args(arguments)
    if options.prompts is None and options.chat is None:
        parser.error("one of --prompts and --chat is needed")
    model, tokenizer = loading.load(options.model, torch.float32)
    sets: dict[str, list[str]] = {}
    if options.prompts is not None:
        sets[HUMAN_EVAL] = read_prompts(options.prompts)[: options.limit]
    if options.chat is not None:
        template: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        sets["chat"] = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}], **template)
            for text in read_prompts(options.chat)[: options.limit]
        ]
    stop = stop_tokens(model)
    options.out.mkdir(parents=True, exist_ok=True)
    generate = reference(model, stop, options.max_new_tokens)
    drafting, mask, more = chosen(options, tokenizer)
    rows, files, weights = [], [], fingerprint(model)
    said = {
        kind: json.dumps([options.title, texts, options.max_new_tokens, options.batch_size])
        for kind, texts in sets.items()
    }

    def path(kind: str, name: str) -> Path:
        files.append(options.out / f"human-eval-{zlib.crc32(said[kind].encode(), weights):08x}-{name}.jsonl")
        return files[-1]

    batches: dict[str, list[Tokens]] = {}
    expected: dict[str, list[dict[str, Any]]] = {}
    for kind, texts in sets.items():
        prompts: Tokens = [tokenizer(text)["input_ids"] for text in texts]
        batches[kind] = [prompts[at : at + options.batch_size] for at in range(0, len(prompts), options.batch_size)]
        expected[kind] = kept(path(kind, "generate"), batches[kind], lambda batch: {"texts": generate(batch)})
    if options.adapter is not None:
        load_peft_adapter(model, options.adapter)
        weights = fingerprint(model)
    for label, strategy in drafting.items():
        decoder = Decoder.from_transformers(model, mask_token_id=mask, strategy=strategy)
        for kind in sets:
            found = kept(path(kind, label), batches[kind], measure(decoder, stop, options.max_new_tokens))
            equal = 0
            for batch, got, want in zip(batches[kind], found, expected[kind], strict=True):
                for prompt, text, other in zip(batch, got["texts"], want["texts"], strict=True):
                    equal += text == other or text == generate([prompt])[0]
            said_of_row = {"model": options.title, "kind": kind, "max_new_tokens": options.max_new_tokens}
            said_of_row["command"] = command(options, label, kind)
            rows.append(row(label, strategy.drafts, found, equal) | said_of_row)
            print(f"{label}, {kind}: {equal} equal, {rows[-1]['tokens_per_forward']} tokens a forward pass", flush=True)
    rows[0] |= more
    part = "human_eval" if options.adapter is None else "human_eval_adapter"
    record.add(options.out, part, "cpu", rows)
    for file in files:
        file.unlink()
    return 0 if all(each["equal"] == each["prompts"] for each in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
