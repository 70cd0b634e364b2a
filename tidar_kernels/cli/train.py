"""`tidar-kernels train`: train the package's own decoder on a folder of text, and say what it has learnt."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.training.config import STATE, TrainConfig, read_toml
from .common import (
    FAILED,
    INTERRUPTED,
    OK,
    PROGRAM,
    UserError,
    add_device_argument,
    add_json_argument,
    any_path,
    import_torch,
    number,
    one_line,
    resolve_device,
    table,
    user_errors,
    versions,
    whole_number,
    whole_numbers,
)
from .memory import check_memory, step_bytes, training_bytes

if TYPE_CHECKING:
    import torch

    from ..models.training.parallel import Parallel
    from ..models.training.trainer import Trainer

SUMMARY = "train the package's own byte-level decoder on a folder of text"

USAGE = "--out DIR [options]"

EPILOG = f"""\
Without --data it trains on the Python standard library, a few modules held out.
DIR gets state.pt, from which --resume goes on bit for bit; model.safetensors, for
{PROGRAM} generate --checkpoint; figures.json and loss_curve.png.
Ctrl-C finishes the step, saves, and exits with 130; a second one does not wait.

examples:
  {PROGRAM} train --out runs/stdlib --steps 300 --batch 4
  {PROGRAM} train --out runs/stdlib --resume
  {PROGRAM} train --print-config --lr 0.002 > run.toml
  {PROGRAM} train --out runs/notes --config run.toml --data notes --suffix .md
  torchrun --nproc-per-node 4 -m tidar_kernels train --out runs/four --context-parallel 2
"""

_MAX_STEPS = 2**31 - 1

# Arguments of the package whose errors are about an option.
_OPTION_OF = {
    "folder": "--data",
    "context_parallel": "--context-parallel",
    "corpus": "--data",
    "held_out": "--held-out",
    "init": "--init",
    "path": "--init",
    "resume": "--resume",
    "steps": "--steps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=any_path, metavar="DIR", help="where everything is written")
    begin = run.add_mutually_exclusive_group()
    begin.add_argument(
        "--resume", action="store_true", help="go on from DIR/state.pt; of the settings below, only --steps may change"
    )
    begin.add_argument("--overwrite", action="store_true", help="start again, although DIR has a state.pt")
    begin.add_argument(
        "--print-config", action="store_true", help="print the settings as TOML, for --config, and do nothing else"
    )
    run.add_argument(
        "--save-every",
        type=whole_number(1, _MAX_STEPS),
        default=200,
        metavar="N",
        help="steps between checkpoints (default: 200)",
    )
    run.add_argument(
        "--eval-every",
        type=whole_number(0, _MAX_STEPS),
        default=500,
        metavar="N",
        help="steps between evaluations on the held-out files; 0: only at the end, where there always is one "
        "(default: 500)",
    )
    add_device_argument(run)
    add_json_argument(run)

    several = parser.add_argument_group("several processes (torchrun)")
    several.add_argument(
        "--context-parallel",
        type=whole_number(1, 2**16),
        default=1,
        metavar="N",
        help="processes that share out the rows of each sequence; the others share out a step's sequences (default: 1)",
    )
    several.add_argument(
        "--fsdp",
        action="store_true",
        help="shard weights, gradients and optimisers over all processes (FSDP2); default whole in each (DDP)",
    )

    text = parser.add_argument_group("text")
    text.add_argument(
        "--data", type=any_path, metavar="FOLDER", help="train on its files; default the standard library"
    )
    text.add_argument(
        "--suffix", action="append", type=_suffix, metavar=".EXT", help="of these files; repeatable (default: .py)"
    )
    text.add_argument(
        "--held-out",
        action="append",
        metavar="NAME",
        help="a file never trained on, relative to FOLDER; repeatable (default: about 1 in 20, by a hash of the name)",
    )

    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "--config", type=any_path, metavar="FILE.toml", help="settings; the options below win over it"
    )
    settings.add_argument(
        "--init", type=any_path, metavar="FILE.safetensors", help="weights to start from, of the same shape"
    )
    for entry in fields(TrainConfig):
        _add_setting(settings, entry)


def _add_setting(parser: argparse._ActionsContainer, entry: Field[Any]) -> None:
    """One option for one setting; absent from the namespace unless given."""
    of, kind = entry.metadata, type(entry.default)
    options: dict[str, Any] = {"choices": of["choices"]}
    if kind is tuple:
        options = {"type": whole_numbers, "metavar": "N,N"}
    elif kind is int:
        options = {"type": whole_number(of["low"], of["high"]), "metavar": "N"}
    elif kind is float:  # `TrainConfig` knows the range
        options = {"type": number(float, lambda value: True, "a number"), "metavar": "X"}
    parser.add_argument(
        f"--{entry.name.replace('_', '-')}",
        default=argparse.SUPPRESS,
        help=f"{entry.metadata['help']} (default: {_shown(entry.default)})",
        **options,
    )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def _suffix(text: str) -> str:
    if not text.strip("."):
        raise argparse.ArgumentTypeError(f"expected how names end, like .txt, got {text!r}")
    return text if text.startswith(".") else f".{text}"


def run(options: argparse.Namespace) -> int:
    given = {entry.name: getattr(options, entry.name) for entry in fields(TrainConfig) if hasattr(options, entry.name)}
    if options.data is None and (options.suffix or options.held_out):
        raise UserError("--suffix, --held-out: expected --data beside them, got none")
    if options.resume:
        _only_what_resumes(options, given)
        config = None
    else:
        config = _settings(options.config, given)
        if options.print_config:
            print(config.to_toml(), end="")
            return OK
    _check_out(options)

    import_torch()
    launched = _launched(options)
    device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}" if launched and _on_gpus(options) else options.device)
    with _parallel(options, device) if launched else nullcontext() as parallel:
        trainer, held_out = _trainer(options, config, given.get("steps"), device, parallel)
        with _folder(options.out):
            return _train(trainer, held_out, options)


def _launched(options: argparse.Namespace) -> bool:
    """Whether this process is one of several that `torchrun`, or something like it, has started."""
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return True
    if options.fsdp or options.context_parallel > 1:
        option = "--fsdp" if options.fsdp else "--context-parallel"
        raise UserError(f"{option}: expected processes started by torchrun, got one process without")
    return False


def _on_gpus(options: argparse.Namespace) -> bool:
    """Whether every process takes the GPU of its number."""
    import torch

    return options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())


@contextmanager
def _parallel(options: argparse.Namespace, device: torch.device) -> Iterator[Parallel]:
    """This process among those that train together, till the end of the block."""
    import torch
    import torch.distributed as dist

    from ..models.training.parallel import Parallel

    if device.type == "cuda":
        torch.cuda.set_device(device)
    with user_errors(ValueError, rename=_OPTION_OF):
        parallel = Parallel.launched(str(device), options.context_parallel, options.fsdp)
    try:
        yield parallel
    finally:
        dist.destroy_process_group()


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """The folder `path`, made if need be; what was made goes again, if nothing was written into it inside."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise UserError(f"--out: expected a folder to write into, got {path} (not writable)")
        yield
    except OSError as error:
        if path.is_dir():
            raise
        raise UserError(f"--out: expected a folder to write into, got {path} ({error.strerror})") from error
    finally:
        with suppress(OSError):  # one that has something in it stays, and those above it
            for folder in missing:
                folder.rmdir()


def _settings(file: Path | None, given: dict[str, Any]) -> TrainConfig:
    """Defaults, then the file, then the options; an error names where the setting came from."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = read_toml(file)
        except OSError as error:
            raise UserError(f"--config: expected a readable file, got {file} ({error.strerror})") from error
        except ValueError as error:
            raise UserError(f"--config{one_line(error).removeprefix('path')}") from error
    origin = {name: f"{file}: {name}" for name in values} | {name: f"--{name.replace('_', '-')}" for name in given}
    with user_errors(TypeError, ValueError, rename=origin):
        return TrainConfig.from_dict({**values, **given})


def _only_what_resumes(options: argparse.Namespace, given: dict[str, Any]) -> None:
    names = [name for name in ("config", "init") if getattr(options, name) is not None]
    names += [name for name in given if name != "steps"]
    if names:
        option = f"--{names[0].replace('_', '-')}"
        raise UserError(f"--resume: expected no setting but --steps beside it, got {option}")


def _check_out(options: argparse.Namespace) -> None:
    """Nothing of an earlier run is lost unless `--overwrite` says so."""
    if options.out is None:
        raise UserError(f"--out: expected a folder, got none (see {PROGRAM} train --help)")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out: expected a folder, got the file {options.out}")
    state = options.out / STATE
    if options.resume and not state.is_file():
        raise UserError(f"--resume: expected {state}, got no such file")
    if state.exists() and not (options.resume or options.overwrite):
        raise UserError(
            f"--out: expected a folder without a run, got {state}; --resume goes on, --overwrite starts again"
        )


def _trainer(
    options: argparse.Namespace,
    config: TrainConfig | None,
    steps: int | None,
    device: torch.device,
    parallel: Parallel | None,
) -> tuple[Trainer, dict[str, bytes]]:
    """A new trainer, or without `config` the one that was saved; and the held-out texts.

    Raises:
        UserError: a file is missing or damaged, or what is asked for does not fit the text, the weights or the memory.
    """
    import torch

    from ..models import load_checkpoint
    from ..models.training.data import Corpus, TextFiles, folder_files, stdlib_files
    from ..models.training.trainer import Trainer, read_state

    init, state = None, {}
    if options.init is not None:
        with user_errors(Exception, rename=_OPTION_OF, otherwise="--init: expected a checkpoint that can be read"):
            init = load_checkpoint(options.init)
    damaged = f"--resume: expected the whole state of a training run, got {options.out / STATE}"
    if config is None:
        with user_errors(Exception, rename=_OPTION_OF, otherwise=damaged):
            state = read_state(options.out)
            _check_memory(TrainConfig.from_dict(state["config"]), device)
    else:
        _check_memory(config, device)
    with user_errors(Exception, rename=_OPTION_OF, otherwise="--data: expected files that can be read"):
        if options.data is not None:
            files = folder_files(options.data, options.suffix or (".py",), options.held_out or ())
        else:  # a run goes on with its own files, unless they have moved
            files = stdlib_files() if config else TextFiles.from_record(state["files"])
        size = sum((files.folder / name).stat().st_size for name in (*files.training, *files.held_out))
        # Bytes, then one int64 and one int16 each.
        check_memory(11 * size, torch.device("cpu"), f"--data: expected files that fit into memory, got {size:,} bytes")
        corpus, held_out = Corpus(files), files.held_out_texts()
    if config is None:
        with user_errors(Exception, rename=_OPTION_OF, otherwise=damaged):
            return Trainer.resume(options.out, corpus, steps, str(device), parallel), held_out
    with user_errors(ValueError, rename=_OPTION_OF):
        return Trainer(config, corpus, init=init, device=str(device), parallel=parallel), held_out


def _check_memory(config: TrainConfig, device: torch.device) -> None:
    """Raise UserError unless a step of the run fits into memory, and a decode step of its evaluations."""
    import torch

    from ..models.training.trainer import model_config
    from ..patterns import tidar_step

    model = model_config(config)
    rows = 2 * config.seq_len * (config.batch // config.shares)
    sizes = f"batch {config.batch}, seq_len {config.seq_len} and {model.num_parameters:,} parameters"
    workers = config.workers if device.type == "cpu" else 1
    needed = training_bytes(model, rows, workers)
    check_memory(needed, device, f"settings: expected a step that fits into memory, got {sizes}")
    longest = max(config.block_sizes)
    needed += step_bytes(model, tidar_step(longest).q_len, torch.empty(0, device=device))
    check_memory(needed, device, f"--block-sizes: expected steps that fit into memory, got {longest}")


def _train(trainer: Trainer, held_out: dict[str, bytes], options: argparse.Namespace) -> int:
    """Train, evaluate and report; what is for people goes to standard error where a program reads the rest."""
    silent = trainer.parallel is not None and not trainer.parallel.is_first
    say = partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    if silent:
        say = partial(print, file=io.StringIO())
    try:
        say(_heading(trainer))
        while True:
            until = options.eval_every - trainer.done % options.eval_every if options.eval_every else None
            trainer.run(options.out, options.save_every, until)
            files = _evaluate(trainer, held_out, options.out, say)
            if trainer.done == trainer.config.steps:
                break
    except KeyboardInterrupt as interrupt:
        if not silent:
            print(_stopped(trainer, options.out, interrupt), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{options.out}: {one_line(error)}; {_kept(trainer, options.out)}") from error
    except FloatingPointError as error:
        print(f"{PROGRAM}: error: {one_line(error)}; {_kept(trainer, options.out)}", file=sys.stderr)
        return FAILED
    except RuntimeError as error:
        if trainer.parallel is None:
            raise
        print(
            f"{PROGRAM}: error: a process was lost ({one_line(error)}); {_kept(trainer, options.out)}", file=sys.stderr
        )
        return FAILED
    if silent:
        return OK
    report = _report(trainer, files)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(f"{report['steps']} steps, {report['seconds']:.0f} s, {report['tokens_per_second']:.0f} tokens/s")
        print(f"in {options.out}: {', '.join(Path(path).name for path in files.values() if path)}")
    return OK


def _heading(trainer: Trainer) -> str:
    corpus = trainer.corpus
    parameters = sum(p.numel() for p in trainer.parameters)
    held_out = len(corpus.files.held_out)
    where = trainer.device
    if trainer.parallel is not None:
        data, context = trainer.parallel.mesh.shape
        kind = "FSDP2" if trainer.parallel.sharded else "DDP"
        where = f"{where}, {data * context} processes (data {data} x context {context}, {kind})"
    return (
        f"{parameters:,} parameters on {where}; {corpus.num_files} files of {len(corpus.tokens):,} tokens in "
        f"{corpus.files.folder}, {held_out} more held out; step {trainer.done} of {trainer.config.steps}"
    )


def _evaluate(
    trainer: Trainer, held_out: dict[str, bytes], out: Path, say: Callable[[str], None]
) -> dict[str, str | None]:
    """Evaluate, print a table, write figures and curve; the paths of what the run has written.

    Of several processes the first does; the others give it their parts of the weights.
    """
    from ..models.training.report import CURVE, FIGURES, draw_curve, evaluate_run, run_figures, write_figures
    from ..models.training.trainer import WEIGHTS

    model = trainer.whole_model()
    if model is None:
        return {}
    evaluation = evaluate_run(trainer, held_out, model)
    for line in _evaluation_lines(evaluation):
        say(line)
    figures = {
        **run_figures(trainer),
        "data": trainer.corpus.files.record(),
        "evaluations": trainer.evaluations,
        "device": trainer.device,
        "versions": versions(),
    }
    write_figures(figures, out / FIGURES)
    curve: str | None = str(out / CURVE)
    try:
        draw_curve(figures, out / CURVE)
    except ImportError:
        curve = None
        if trainer.done == trainer.config.steps:
            say(f"{CURVE}: not drawn, for matplotlib is not installed")
    written = {"state": STATE, "weights": WEIGHTS, "figures": FIGURES}
    return {name: str(out / file) for name, file in written.items()} | {"curve": curve}


def _evaluation_lines(evaluation: dict[str, Any]) -> list[str]:
    """A table with a line for each block length, as far as there was text for it."""
    rows = [("B", "bits/byte AR", "diffusion", "AR right", "tokens/forward", "mask rows right, %")]
    for block in evaluation["blocks"]:
        measured = "ar_accuracy" in block
        rows.append(
            (
                f"{block['block_size']}",
                f"{block['ar_bits_per_byte']:.3f}" if measured else "-",
                f"{block['diffusion_bits_per_byte']:.3f}" if measured else "-",
                f"{block['ar_accuracy']:.1%}" if measured else "-",
                f"{block['tokens_per_forward']:.2f}" if "tokens_per_forward" in block else "-",
                " ".join(f"{100 * share:.0f}" for share in block["mask_row_accuracy"]) if measured else "-",
            )
        )
    lines = [f"held out, step {evaluation['step']}:", *(f"  {line}" for line in table(rows, ">>>>><"))]
    return lines + [f"  not measured, {reason}" for reason in evaluation["skipped"]]


def _stopped(trainer: Trainer, out: Path, interrupt: KeyboardInterrupt) -> str:
    why = f"; not saved ({one_line(interrupt.__cause__)})" if interrupt.__cause__ else ""
    return f"stopped after step {trainer.done} of {trainer.config.steps}{why}; {_kept(trainer, out)}"


def _kept(trainer: Trainer, out: Path) -> str:
    """What is on the disk, and how to go on from there."""
    if trainer.saved is None:
        return "there is no checkpoint of this run"
    return f"step {trainer.saved} is saved, {shlex.join([PROGRAM, 'train', '--out', str(out), '--resume'])} goes on"


def _report(trainer: Trainer, files: dict[str, str | None]) -> dict[str, Any]:
    """What `--json` prints at the end."""
    ar, diffusion = trainer.curve[-1]
    tokens = trainer.done * trainer.config.batch * trainer.config.seq_len
    return {
        "steps": trainer.done,
        "seconds": trainer.seconds,
        "tokens_per_second": tokens / trainer.seconds,
        "losses": {"autoregressive": ar, "diffusion": diffusion},
        "evaluation": trainer.evaluations[-1],
        "files": files,
        "device": trainer.device,
        "versions": versions(),
    }
