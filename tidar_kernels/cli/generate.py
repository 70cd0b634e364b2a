"""`tidar-kernels generate`: decode a prompt, streaming the text, and say what it took."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .checkpoints import DTYPES
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
    one_line,
    print_json,
    table,
    user_errors,
    versions,
    whole_number,
)
from .loading import Loaded, load_model
from .memory import check_memory, step_bytes
from .sampling import Sampling, add_sampling_arguments
from .strategy import Drafts, add_strategy_arguments

if TYPE_CHECKING:
    from ..decoding.decoder import GenerationResult, Mode
    from ..decoding.strategies import Strategy
    from ..patterns import Pattern

SUMMARY = "decode a prompt, several tokens per forward pass"

USAGE = "(--prompt TEXT | --prompt-file PATH | --demo) [options]"

EPILOG = f"""\
By default decoding is greedy, but for --demo, and --mode tidar gives what --mode
autoregressive gives, token for token. At --temperature above 0 the coupled rule still
does, for each --seed; the two others keep to its distribution, and --beta below 1 to
neither.
--compare runs both modes, and checks outputs that must be identical. Figures count
decode steps only, after a warm-up; the prompt's forward pass is reported apart.

examples:
  {PROGRAM} generate --demo
  {PROGRAM} generate --prompt 'def mean(values):' --checkpoint ./SmolLM2 --adapter runs/smol --compare
  {PROGRAM} generate --prompt 'def mean(values):' --max-new-tokens 64
  {PROGRAM} generate --prompt-file module.py --compare --threads 2
  {PROGRAM} generate --demo --temperature 0.8 --top-p 0.95 --seed 7
  head -c 500 module.py | {PROGRAM} generate --prompt-file - --json
"""

# A prompt has a token a byte; this is far more than memory has room for beside a model, but a device never ends.
_MAX_PROMPT_BYTES = 2**24

# The demo's prompt: the beginning of a module that the shipped model was not trained on.
DEMO_MODULE = "graphlib.py"
DEMO_BYTES = 256

# Enough steps of either mode that allocations, masks and compiled kernels are there before a clock runs.
_WARM_UP_TOKENS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("prompt").add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    source.add_argument(
        "--prompt-file", type=any_path, metavar="PATH", help="a file of UTF-8 text, or - for standard input"
    )
    source.add_argument(
        "--demo", action="store_true", help="the beginning of a module that the shipped model has never seen"
    )

    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--max-new-tokens",
        type=whole_number(1, MAX_TOKENS),
        default=256,
        metavar="N",
        help="tokens to decode (default: 256)",
    )
    decoding.add_argument(
        "--block-size",
        type=whole_number(1, MAX_BLOCK_SIZE),
        metavar="B",
        help="tokens drafted a step; default what the model was trained with (no effect on autoregressive decoding)",
    )
    decoding.add_argument(
        "--mode",
        choices=("tidar", "autoregressive"),
        default="tidar",
        help="how the streamed text is decoded (default: tidar)",
    )
    decoding.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="decode in the other mode too, compare outputs and speed; exit with 1 if outputs differ that must not "
        "(default: only with --demo)",
    )
    add_strategy_arguments(decoding)
    add_sampling_arguments(parser.add_argument_group("sampling"))

    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint",
        type=any_path,
        metavar="PATH",
        help="a safetensors checkpoint of a byte-level model, or the folder of a transformers model with its tokenizer "
        "(docs/checkpoints.md); default the shipped model",
    )
    model.add_argument(
        "--dtype", choices=DTYPES, help="of the weights that are read from a folder (default: the checkpoint's)"
    )
    model.add_argument(
        "--adapter",
        type=any_path,
        metavar="FOLDER",
        help="a LoRA adapter as PEFT saves it, for drafting alone: the output stays the model's own; shipped is the "
        "one for the shipped model",
    )
    model.add_argument(
        "--drafter",
        type=any_path,
        metavar="FOLDER",
        help="a DFlash drafter trained for --checkpoint FOLDER: it drafts, and the output stays the model's own",
    )
    model.add_argument(
        "--mask-token-id",
        type=whole_number(0, 2**31 - 1),
        metavar="ID",
        help="token of a folder's mask rows; default what it or the adapter says",
    )
    add_device_argument(model)
    model.add_argument(
        "--threads", type=whole_number(1, MAX_THREADS), metavar="N", help="CPU threads; default PyTorch's choice"
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--show-steps",
        action=argparse.BooleanOptionalAction,
        help="mark what each forward pass accepted: alternating colours on a terminal, | elsewhere "
        "(default: only with --demo on a terminal)",
    )
    add_json_argument(output)


def run(options: argparse.Namespace) -> int:
    drafts = Drafts.of(options)
    given = None if options.demo else _read_prompt(options)
    import_torch()
    import torch

    text, source = given or _demo_prompt()
    compare = options.demo if options.compare is None else options.compare
    terminal = Terminal()
    show_steps = (options.demo and terminal.colour) if options.show_steps is None else options.show_steps

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = load_model(options)
    model, device = loaded.model, loaded.device
    prompt = _Prompt(text, source, loaded.encode(text))
    if not prompt.tokens:
        raise UserError(f"prompt: expected at least one token of the checkpoint's tokenizer, got none from {source}")
    other: Mode = "autoregressive" if options.mode == "tidar" else "tidar"
    modes: list[Mode] = [options.mode, other] if compare else [options.mode]
    sampling, strategy = Sampling.of(options), None
    if "tidar" in modes:
        strategy = loaded.strategy
        if strategy is not None and drafts.levels is not None:
            if strategy.name != "tidar":
                raise UserError(f"--levels: expected a checkpoint that drafts by tidar, got {strategy.label}")
            options.block_size = options.block_size or strategy.drafts
            strategy = None
        block_size = options.block_size or (model.config.block_size if strategy is None else strategy.drafts)
        if block_size is None:
            raise UserError("--block-size: expected one, for the checkpoint does not say what it was trained with")
        if block_size > MAX_BLOCK_SIZE:
            raise UserError(f"--checkpoint: expected a block size <= {MAX_BLOCK_SIZE} in it, got {block_size}")
        if strategy is None:
            strategy = drafts.strategy(model.config, block_size)
        else:
            drafts = replace(drafts, name=strategy.name)
        _check_memory(loaded, prompt, options.max_new_tokens, len(modes), strategy)
        if drafts.levels == "auto":
            drafts, block_size = drafts.settled(model, prompt.tokens, block_size)
            strategy = drafts.strategy(model.config, block_size)
        sampling = replace(sampling, equals_autoregression=strategy.equals_autoregression)
    else:
        _check_memory(loaded, prompt, options.max_new_tokens, len(modes))
    tasks = [_Task(loaded, prompt, mode, strategy, options.max_new_tokens, sampling, options.exact) for mode in modes]
    for task in tasks:
        task.warm_up()

    if options.json:
        passes = [task.run() for task in tasks]
    else:
        _print_prompt(terminal, prompt, options.demo, terminal.colour and show_steps)
        passes = [tasks[0].run(_Printer(terminal, show_steps)), *(t.run(_Progress(terminal, t)) for t in tasks[1:])]

    identical = all(one.tokens == passes[0].tokens for one in passes)
    setting = {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    if options.json:
        report = _as_json(passes, identical, prompt, options, sampling, setting)
        print_json(report | {"drafts": drafts.as_json()})
    else:
        _print_report(terminal, passes, identical, sampling, setting)
    return OK if identical or sampling.promise != "tokens" else FAILED


@dataclass(frozen=True)
class _Prompt:
    text: str
    source: str
    tokens: list[int]


def _read_prompt(options: argparse.Namespace) -> tuple[str, str]:
    """The prompt and where it comes from; anything wrong with it shows before PyTorch is loaded."""
    if options.prompt is not None:
        option, source, raw = "--prompt", "--prompt", os.fsencode(options.prompt)
    else:
        option, from_file = "--prompt-file", str(options.prompt_file) != "-"
        source = str(options.prompt_file) if from_file else "standard input"
        if not from_file and sys.stdin is None:
            raise UserError(f"{option}: expected an open standard input, got none")
        try:
            with open(options.prompt_file, "rb") if from_file else nullcontext(sys.stdin.buffer) as file:
                raw = file.read(_MAX_PROMPT_BYTES + 1).removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            raise UserError(
                f"{option}: expected a readable file, got {source} ({error.strerror or one_line(error)})"
            ) from error
    if len(raw) > _MAX_PROMPT_BYTES:
        raise UserError(f"{option}: expected at most {_MAX_PROMPT_BYTES} bytes, got more from {source}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: expected UTF-8 text, got {source} ({error})") from error
    if not text:
        raise UserError(f"prompt: expected at least one character, got none from {source}")
    return text, source


def _demo_prompt() -> tuple[str, str]:
    """The first lines of a held-out module of this interpreter's standard library."""
    from ..models.training.data import held_out_texts, stdlib_folder

    texts = held_out_texts()
    if not texts:
        raise UserError(f"--demo: expected the standard library's sources in {stdlib_folder()}, got none")
    name = DEMO_MODULE if DEMO_MODULE in texts else sorted(texts)[0]
    text = texts[name][:DEMO_BYTES]
    text = text[: text.rfind(b"\n") + 1] or text
    return text.decode("utf-8", errors="ignore"), f"the first {len(text)} bytes of {name}, held out of training"


def _check_memory(
    loaded: Loaded, prompt: _Prompt, max_new_tokens: int, modes: int, strategy: Strategy | None = None
) -> None:
    """Raise UserError unless the caches of all modes and a step fit into memory; before anything is allocated."""
    from ..models import TransformerConfig

    config: Any = loaded.model.config
    weight = next(loaded.model.parameters())
    tokens = len(prompt.tokens) + max_new_tokens + (strategy.slots if strategy else 1)
    caches = modes * tokens * 2 * config.num_layers * config.num_kv_heads * config.head_dim * weight.element_size()
    message = f"--max-new-tokens: expected a cache that fits into memory, got {max_new_tokens} tokens"
    check_memory(caches, weight.device, message)
    if strategy is None or not isinstance(config, TransformerConfig):
        return
    pattern: Pattern | None = getattr(strategy, "pattern", None)
    rows = strategy.drafts if pattern is None else pattern.q_len
    message = f"--block-size: expected a step that fits into memory, got one of {rows:,} rows"
    check_memory(caches + step_bytes(config, rows, weight), weight.device, message)


@dataclass(frozen=True)
class _Pass:
    """A finished generation in one mode."""

    mode: Mode
    block_size: int
    text: str
    result: GenerationResult
    title: str

    @property
    def tokens(self) -> list[int]:
        return self.result.tokens[0]

    def figures(self) -> dict[str, Any]:
        """What `--json` says about one mode."""
        result = self.result
        return {
            "mode": self.mode,
            "block_size": self.block_size,
            "text": self.text,
            "tokens": self.tokens,
            "forwards": result.forwards,
            "tokens_per_forward": result.tokens_per_forward,
            "tokens_per_second": result.tokens_per_second,
            "seconds": result.seconds,
            "accepted": result.accepted[0],
            "prefill_forwards": result.prefill_forwards,
            "prefill_seconds": result.prefill_seconds,
        }


class _Watcher:
    """Follows a generation: `step` sees the text that a forward pass added, `finish` the end of it."""

    def step(self, text: str, num_tokens: int) -> None: ...

    def finish(self) -> None: ...


class _Task:
    """One prompt to decode in one mode."""

    def __init__(
        self,
        loaded: Loaded,
        prompt: _Prompt,
        mode: Mode,
        strategy: Strategy | None,
        max_new_tokens: int,
        sampling: Sampling,
        exact: bool,
    ) -> None:
        from ..decoding.decoder import ModelDecoder
        from ..decoding.strategies import autoregressive

        self.loaded = loaded
        self.mode, self.prompt, self.max_new_tokens = mode, prompt, max_new_tokens
        self.title = autoregressive().label if strategy is None or mode == "autoregressive" else strategy.label
        self.parameters = sampling.parameters
        with user_errors(ValueError, rename={name: f"--{name}" for name in ("sampling", "beta", "exact")}):
            self.decoder = ModelDecoder(
                loaded.model,
                mask_token_id=loaded.mask_token_id,
                mode=mode,
                strategy=strategy or "tidar",
                sampling=sampling.rule,
                beta=sampling.beta,
                adapted=loaded.adapted,
                exact=exact,
            )
        self.stop_tokens = loaded.stop_tokens

    def warm_up(self) -> None:
        tokens = min(_WARM_UP_TOKENS, self.max_new_tokens)
        self._check(self.decoder.generate([self.prompt.tokens], tokens, **self.parameters))

    def run(self, watcher: _Watcher | None = None) -> _Pass:
        watcher = watcher or _Watcher()
        decoded = self.loaded.stream()
        stream = self.decoder.stream(
            [self.prompt.tokens], self.max_new_tokens, stop_tokens=self.stop_tokens, **self.parameters
        )
        parts = []
        try:
            for _, tokens in stream:
                parts.append(decoded.push(tokens))
                watcher.step(parts[-1], len(tokens))
            parts.append(decoded.finish())
            watcher.step(parts[-1], 0)
        finally:
            watcher.finish()
        self._check(stream.result)
        return _Pass(self.mode, self.decoder.block_size, "".join(parts), stream.result, self.title)

    @staticmethod
    def _check(result: GenerationResult) -> None:
        """Logits that no token can be taken of end a request early."""
        if result.finish_reasons[0] == "error":
            raise UserError(
                f"--checkpoint: expected a model with finite logits, got NaN or inf after {len(result.tokens[0])} "
                "new tokens"
            )


class _Printer(_Watcher):
    """Writes the text as it comes."""

    def __init__(self, terminal: Terminal, show_steps: bool) -> None:
        self.terminal, self.show_steps = terminal, show_steps
        self.steps = 0
        self.last = ""

    def step(self, text: str, num_tokens: int) -> None:
        if not text:
            return
        style: Callable[[str], str] = str
        if self.show_steps and self.terminal.colour:
            style = self.terminal.cyan if self.steps % 2 else self.terminal.bold
        elif self.show_steps and self.steps and num_tokens:
            text = f"|{text}"
        self.terminal.write(style(self.terminal.safe(text)))
        self.steps += 1
        self.last = text[-1]

    def finish(self) -> None:
        if self.last != "\n":
            self.terminal.write("\n")


class _Progress(_Watcher):
    """A line that counts, for the mode whose text is not shown."""

    def __init__(self, terminal: Terminal, task: _Task) -> None:
        self.terminal, self.task = terminal, task
        self.tokens = 0

    def step(self, text: str, num_tokens: int) -> None:
        self.tokens += num_tokens
        self.terminal.status(f"{self.task.title}: {self.tokens} of {self.task.max_new_tokens} tokens")

    def finish(self) -> None:
        self.terminal.status("")


def _print_prompt(terminal: Terminal, prompt: _Prompt, demo: bool, show_steps: bool) -> None:
    """The prompt, dimmed, before its continuation: on a terminal, and where the user did not choose it."""
    if demo:
        print(terminal.dim(f"[prompt: {prompt.source}]"))
    if demo or terminal.live:
        terminal.write(terminal.dim(terminal.safe(prompt.text)))
    if demo:
        print(terminal.dim("[decoded, a new colour with every forward pass]" if show_steps else "[decoded]"))


def _print_report(
    terminal: Terminal, passes: list[_Pass], identical: bool, sampling: Sampling, setting: dict[str, Any]
) -> None:
    rows = [("mode", "new tokens", "forwards", "tokens/forward", "tokens/s", "seconds")]
    for one in passes:
        result = one.result
        rows.append(
            (
                one.title,
                f"{len(one.tokens)}",
                f"{result.forwards}",
                f"{result.tokens_per_forward:.2f}",
                f"{result.tokens_per_second:.1f}",
                f"{result.seconds:.3f}",
            )
        )
    head, *body = table(rows, "<>>>>>")
    print()
    print(terminal.bold(head))
    print("\n".join(body))
    print()
    prefill = ", ".join(f"{one.result.prefill_seconds:.3f} s" for one in passes)
    threads = setting["threads"]
    where = f"{setting['gpu'] or setting['device']}, {threads} CPU thread{'s' * (threads > 1)}, {setting['dtype']}"
    print(terminal.dim(f"decode steps only, after a warm-up; prefill apart: {prefill}; {sampling}; {where}"))
    if len(passes) > 1:
        tidar, autoregressive = sorted(passes, key=lambda one: one.mode, reverse=True)
        ratio = tidar.result.tokens_per_second / autoregressive.result.tokens_per_second
        print(f"{tidar.title.split(',')[0]} decodes {ratio:.2f} x the tokens/s of autoregressive decoding")
        if sampling.promise != "tokens":
            print(sampling.verdict(tidar.title.split(",")[0]))
            return
        if not identical:
            pairs = enumerate(zip(tidar.tokens, autoregressive.tokens, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(one.tokens) for one in passes))
            print(f"first difference: new token {first}")
        print(f"outputs identical: {terminal.green('yes') if identical else terminal.red('no')}")


def _as_json(
    passes: list[_Pass],
    identical: bool,
    prompt: _Prompt,
    options: argparse.Namespace,
    sampling: Sampling,
    setting: dict[str, Any],
) -> dict[str, Any]:
    """The figures of the asked mode at the top, and of each mode under `modes` when two are compared."""
    report = passes[0].figures()
    if len(passes) > 1:
        report["modes"] = {one.mode: one.figures() for one in passes}
        report["identical"] = identical
        report["promise"] = sampling.promise
    report["prompt"] = {"source": prompt.source, "text": prompt.text, "tokens": len(prompt.tokens)}
    report["sampling"] = sampling.as_json()
    report["checkpoint"] = str(options.checkpoint or "shipped")
    return report | setting | {"versions": versions()}
