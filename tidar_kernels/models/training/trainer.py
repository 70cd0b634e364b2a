"""Train a small byte-level decoder with the TiDAR objective; `tidar-kernels train` is this from the shell.

One forward pass over `[x_0 .. x_{S-1} | M x S]` learns both jobs (arXiv 2511.08923, training): clean row i predicts
x_{i+1} causally, mask row p predicts x_p from the clean blocks before its own. Documents that share a window do not
see each other. Everything follows from the settings and the step number, so a resumed run repeats the uninterrupted one
bit for bit on the same machine, and on as many processes; on another number of them, but for rounding.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...distributed import shared_out
from ...nn.files import loading_state, replacing
from ...nn.files import read_state as read_saved
from ...nn.loss import TiDARLoss, tidar_loss
from ...patterns import tidar_training
from ...patterns.arguments import (
    check_device,
    check_instance,
    check_int,
    check_number,
    check_path,
    check_sequence,
)
from ..checkpoint import save_checkpoint
from ..tokenizer import MASK_ID, VOCAB_SIZE
from ..transformer import Transformer, TransformerConfig
from .config import STATE, TrainConfig
from .data import Corpus, document_lengths
from .parallel import Parallel, load_shards, load_whole_weights, place_optimiser_state
from .progress import Progress

__all__ = [
    "STATE",
    "WEIGHTS",
    "TrainConfig",
    "Trainer",
    "model_config",
    "read_state",
    "training_loss",
    "weights_sha256",
]

WEIGHTS = "model.safetensors"

_NEEDED: dict[str, Any] = {"config": dict, "corpus": str, "done": int, "seconds": (int, float), "curve": list}
_TENSORS: dict[str, Any] = {"model": dict, "optimisers": list}


def model_config(config: TrainConfig) -> TransformerConfig:
    """The shape of the model that a run trains.

    Raises:
        TypeError: `config` is none.
    """
    check_instance("config", config, TrainConfig)
    return TransformerConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        mask_token_id=MASK_ID,
        block_size=config.block_sizes[0],
    )


# One object per shape: a pattern keeps what is derived from it.
_training_pattern = functools.lru_cache(maxsize=64)(tidar_training)


def training_loss(
    model: Transformer,
    tokens: Tensor,
    block_size: int,
    alpha: float = 1.0,
    counts: Tensor | None = None,
    context: DeviceMesh | None = None,
) -> TiDARLoss:
    """The objective on `tokens` int64 `[batch, S]`: the model on `[tokens | M x S]`, then `tidar_loss`.

    Documents do not see each other: where a window holds more than one, all windows are packed into one sequence of
    documents, each with positions and blocks of its own. The processes of the mesh `context` have the same tokens, and
    share out their rows; the losses are those of `tidar_loss` with a `ContextParallel`.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """
    check_instance("model", model, Transformer)
    check_int("block_size", block_size, 1)
    lengths = document_lengths(tokens)
    if len(lengths) == len(tokens):
        pattern = _training_pattern(tokens.shape[1], block_size)
    else:
        tokens = tokens.reshape(1, -1)
        pattern = tidar_training(tokens.shape[1], block_size, lengths)
    doubled = torch.cat([tokens, torch.full_like(tokens, MASK_ID)], dim=1)
    rows: Any = pattern
    if context is not None:
        rows = shared_out(context, pattern)
        doubled = rows.shard(doubled, 1)
    hidden = model(doubled, rows)
    return tidar_loss(hidden, model.embed_tokens.weight, tokens, rows, alpha=alpha, counts=counts)


class _Objective(nn.Module):
    """`training_loss` as a module, for DDP and FSDP2 to wrap: within its forward pass the weights are whole."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> TiDARLoss:
        return training_loss(self.model, *args)


def _label_counts(tokens: Tensor) -> Tensor:
    """Clean rows and mask rows with a label in windows `[batch, S]`: the last token of a document predicts nothing."""
    return torch.tensor(
        [tokens.numel() - len(document_lengths(tokens)), tokens.numel()], dtype=torch.float32, device="cpu"
    )


def weights_sha256(model: Transformer) -> str:
    """Digest of a model's weights in float32, in their order, wherever they are and however they are stored.

    Raises:
        TypeError: it is no Transformer.
    """
    check_instance("model", model, Transformer)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Trainer:
    """A model, its optimisers and how far they are; `step` does one optimiser step.

    Attributes:
        done: steps done; `seconds` that they took.
        curve: `[CE_AR, CE_Diff]` of each, in nats a token.
        evaluations: what was measured on the way, kept with the state.
        init_sha256: digest of the weights that the run started from, None for random ones.
        saved: the step of the last checkpoint that this object wrote or was read from, if any.

    Args:
        init: weights to start from instead of random ones, a model of the shape that `config` says.
        device: "cpu", or a CUDA device, which takes the shares one after the other.
        parallel: this process is one of several, with shares of its own, which it takes one after the other.

    Raises:
        TypeError, ValueError: an argument is of another type, `init` is of another shape, the shares cannot be dealt to
            the processes, the corpus is shorter than a window, or the model does not fit into memory; before anything
            large is allocated.
    """

    config: TrainConfig
    corpus: Corpus
    done: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    init: InitVar[Transformer | None] = None
    device: str = "cpu"
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    init_sha256: str | None = None
    saved: int | None = None
    parallel: Parallel | None = None

    def __post_init__(self, init: Transformer | None) -> None:
        check_instance("config", self.config, TrainConfig)
        check_instance("corpus", self.corpus, Corpus)
        if init is not None:
            check_instance("init", init, Transformer)
        if self.parallel is not None:
            check_instance("parallel", self.parallel, Parallel)
        self.device = str(check_device("device", self.device))
        check_int("done", self.done, 0, 2**31)
        check_number("seconds", self.seconds, 0.0)
        check_sequence("curve", self.curve, "pairs of losses")
        check_sequence("evaluations", self.evaluations, "dicts")
        if len(self.corpus.tokens) < self.config.seq_len:
            raise ValueError(
                f"corpus: expected at least seq_len = {self.config.seq_len} tokens to train on, "
                f"got {len(self.corpus.tokens)}"
            )
        if self.parallel is not None:
            self.parallel.shares(self.config.shares)
        shape = model_config(self.config)
        _check_memory(shape.num_parameters, self.device)
        torch.manual_seed(self.config.seed)
        self.model = Transformer(shape)
        if init is not None:
            _check_shape(init.config, self.model.config)
            self.model.load_state_dict(init.state_dict())
            self.init_sha256 = weights_sha256(self.model)
        self.model.to(self.device)
        if self.parallel is not None:
            self._wrapped = self.parallel.wrap(_Objective(self.model), list(self.model.layers))
        self.parameters = list(self.model.parameters())
        layers = [p for name, p in self.model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
        rest = [p for name, p in self.model.named_parameters() if p.ndim != 2 or not name.startswith("layers.")]
        decay = self.config.weight_decay
        # 150 steps of 2,048 tokens, lr 3e-3, one seed: Muon 2.24 / 2.93 nats (AR / diffusion), AdamW 2.65 / 3.00.
        self.optimisers: tuple[torch.optim.Optimizer, ...]
        if self.config.optimizer == "muon":
            self.optimisers = (
                torch.optim.Muon(layers, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
            )
        else:
            groups = [{"params": layers, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
            self.optimisers = (torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),)
        self._map: Any = map
        if self.device == "cpu" and self.parallel is None:
            pool = ThreadPoolExecutor(self.config.workers, initializer=torch.set_num_threads, initargs=(1,))
            self._map = pool.map

    def batch(self, step: int) -> Tensor:
        """Token windows of a step, int64 `[sequences, S]`; they depend on the configuration and `step` alone.

        Raises:
            TypeError, ValueError: `step` is no int >= 0.
        """
        check_int("step", step, 0, 2**31)
        count, length = self.config.window(step)
        return self.corpus.windows(step * 2 * self.config.batch, count, length, self.config.seed)

    def _gradients(self, tokens: Tensor, block_size: int, counts: Tensor) -> tuple[tuple[Tensor, ...], float, float]:
        """Gradients of one share of a step, whose sums are divided by `counts`, and its `(CE_AR, CE_Diff)`."""
        device = self.model.embed_tokens.weight.device
        with torch.autocast(device.type, torch.bfloat16, self.config.precision == "bf16"):
            loss, ar, diff = training_loss(self.model, tokens.to(device), block_size, self.config.alpha, counts)
        return torch.autograd.grad(loss, self.parameters), ar.item(), diff.item()

    def _sum_gradients(self, parts: Sequence[Tensor], blocks: list[int], counts: Tensor) -> tuple[float, float]:
        """Gradients of a step, in every `grad`, and its `(CE_AR, CE_Diff)`; `counts` are the labels of each share."""
        ar = diff = 0.0
        total = [torch.zeros_like(parameter) for parameter in self.parameters]
        # Summed share by share, in their order: the same bits whichever worker is done first.
        weights = (counts / counts.sum(0).clamp(min=1)).tolist()
        means = [counts.mean(0)] * len(parts)
        shares = self._map(self._gradients, parts, blocks, means)
        for (ar_weight, diff_weight), (grads, share_ar, share_diff) in zip(weights, shares, strict=True):
            ar, diff = ar + share_ar * ar_weight, diff + share_diff * diff_weight
            for grad, part in zip(total, grads, strict=True):
                grad.add_(part, alpha=1 / len(parts))
        for parameter, grad in zip(self.parameters, total, strict=True):
            parameter.grad = grad
        return ar, diff

    def _exchange_gradients(
        self, parallel: Parallel, parts: Sequence[Tensor], blocks: list[int], counts: Tensor
    ) -> tuple[float, float]:
        """The same on several processes: each has some of the shares, and gradients are the mean over processes."""
        mine, means = parallel.shares(len(parts)), torch.zeros(2, device="cpu")
        for parameter in self.parameters:
            parameter.grad = None
        for share in mine:
            device = self.model.embed_tokens.weight.device
            with torch.autocast(device.type, torch.bfloat16, self.config.precision == "bf16"):
                loss, ar, diff = self._wrapped(
                    parts[share].to(device),
                    blocks[share],
                    self.config.alpha,
                    counts.sum(0) / parallel.world,
                    parallel.context,
                )
            with parallel.accumulating(self._wrapped, share == mine[-1]):
                loss.backward()
            means += torch.stack([ar, diff]).cpu() * counts[share] / counts.sum(0).clamp(min=1)
        of_all = parallel.sum(*means.tolist())  # processes of one context have the same means
        return of_all[0] / parallel.mesh.size(1), of_all[1] / parallel.mesh.size(1)

    def step(self) -> tuple[float, float]:
        """One optimiser step; returns its `(CE_AR, CE_Diff)` in nats a token, before the update.

        Raises:
            FloatingPointError: a loss is not finite; the weights are as they were.
        """
        start = time.monotonic()
        config = self.config
        parts = self.batch(self.done).chunk(config.shares)
        blocks = [config.block_size(self.done, share) for share in range(config.shares)]
        counts = torch.stack([_label_counts(part) for part in parts])
        if self.parallel is None:
            ar, diff = self._sum_gradients(parts, blocks, counts)
        else:
            ar, diff = self._exchange_gradients(self.parallel, parts, blocks, counts)
        if not math.isfinite(ar + diff):
            raise FloatingPointError(f"step {self.done + 1}: expected finite losses, got AR {ar}, diffusion {diff}")
        torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = config.lr_at(self.done)
            optimiser.step()
        self.done += 1
        self.seconds += time.monotonic() - start
        self.curve.append([round(ar, 4), round(diff, 4)])
        return ar, diff

    def save(self, folder: Path) -> None:
        """Write `state.pt`, from which `resume` goes on, and `model.safetensors`, which decodes; each atomically.

        Of several processes the first writes them, and each writes its part of weights and optimisers into a folder
        beside `state.pt`, which names that folder once it is complete.

        Raises:
            OSError: one could not be written, and is what it was before. TypeError: `folder` is no path.
        """
        folder = check_path("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "config": asdict(self.config),
            "corpus": self.corpus.sha256,
            "files": self.corpus.files.record(),
            "init": self.init_sha256,
            "done": self.done,
            "seconds": self.seconds,
            "curve": self.curve,
            "evaluations": self.evaluations,
        }
        if self.parallel is None:
            state["model"] = self.model.state_dict()
            state["optimisers"] = [optimiser.state_dict() for optimiser in self.optimisers]
        else:
            state["shards"] = self.parallel.save_shards(folder, self.done, self.model, self.optimisers)
        model = self.whole_model()
        if model is None:
            self.saved = self.done
            return
        # Through memory: torch's own file writer turns a full disk into a RuntimeError that no longer says so.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with replacing(folder / STATE) as file:
            file.write(buffer.getbuffer())
        self.saved = self.done
        if self.parallel is not None:
            self.parallel.keep_only(folder, state["shards"])
        save_checkpoint(model, folder / WEIGHTS, {"steps": str(self.done)}, dtype=torch.float16)

    def whole_model(self) -> Transformer | None:
        """The model with whole weights; of several processes, which all ask, the first has it and the others None."""
        if self.parallel is None:
            return self.model
        weights = self.parallel.whole_weights(self.model)
        if not self.parallel.is_first:
            return None
        whole = Transformer(self.model.config)
        whole.load_state_dict(weights)
        return whole

    @classmethod
    def resume(
        cls,
        folder: Path,
        corpus: Corpus,
        steps: int | None = None,
        device: str = "cpu",
        parallel: Parallel | None = None,
    ) -> Trainer:
        """The trainer that `save` wrote into `folder`, on whatever number of processes.

        Args:
            steps: another end of the schedule than it was started with, as long as neither has begun to decay.

        Raises:
            FileNotFoundError: there is no `state.pt`.
            ValueError: it is damaged, was trained on other text, or has begun to decay towards another end.
        """
        state = read_state(folder)
        if state["corpus"] != corpus.sha256:
            raise ValueError(f"resume: expected a corpus with sha256 {state['corpus']}, got {corpus.sha256}")
        config = TrainConfig.from_dict(state["config"])
        if steps is not None and steps != config.steps:
            stable = min(config.stable_steps, replace(config, steps=steps).stable_steps)
            if state["done"] > stable:
                raise ValueError(f"steps: expected {config.steps}, towards which the run decays, got {steps}")
            config = replace(config, steps=steps)
        trainer = cls(config, corpus, state["done"], state["seconds"], state["curve"], device=device, parallel=parallel)
        trainer.evaluations, trainer.init_sha256, trainer.saved = state["evaluations"], state["init"], state["done"]
        if "shards" in state:
            load_shards(folder / state["shards"], trainer.model, trainer.optimisers)
            return trainer
        with loading_state(folder / STATE):
            if parallel is None:
                trainer.model.load_state_dict(state["model"])
            else:
                load_whole_weights(trainer.model, state["model"])
            for optimiser, saved in zip(trainer.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(place_optimiser_state(saved, optimiser))
        return trainer

    def run(self, folder: Path, save_every: int = 200, steps: int | None = None) -> None:
        """Train to the end of the schedule, or for `steps` more steps; save on the way, at the end and on Ctrl-C.

        Ctrl-C waits for the step under way, for half a step could not be resumed. A second one does not wait, and then
        nothing is saved.

        Raises:
            KeyboardInterrupt: after Ctrl-C; `__cause__` is the OSError, if saving failed.
            OSError: a checkpoint could not be written; the one before is whole.
            FloatingPointError: a loss is not finite. TypeError, ValueError: an argument is of another type.
        """
        folder = check_path("folder", folder)
        check_int("save_every", save_every, 1)
        if steps is not None:
            check_int("steps", steps, 0)
        last = self.config.steps if steps is None else min(self.config.steps, self.done + steps)
        tokens = self.config.batch * self.config.seq_len
        quiet = self.parallel is not None and not self.parallel.is_first
        progress = Progress(self.config.steps, self.done, tokens, self.curve, io.StringIO() if quiet else None)
        with _interrupts() as interrupts:
            try:
                while self.done < last and not self._agreed(bool(interrupts)):
                    losses = self.step()
                    progress.update(self.done, *losses)
                    if self.done % save_every == 0 and self.done < last:
                        self.save(folder)
            finally:
                progress.close()
            try:
                self.save(folder)
            except OSError as error:
                if interrupts:
                    raise KeyboardInterrupt from error
                raise
            if self._agreed(bool(interrupts)):
                raise KeyboardInterrupt

    def _agreed(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.parallel is None else self.parallel.sum(flag)[0] > 0


def _check_shape(got: TransformerConfig, expected: TransformerConfig) -> None:
    """ValueError naming what differs; the block length is how a model is used, not its shape."""
    for name, value in expected.to_dict().items():
        if name != "block_size" and getattr(got, name) != value:
            raise ValueError(f"init: expected a model with {name} = {value}, got {getattr(got, name)}")


def _check_memory(num_parameters: int, device: str) -> None:
    """ValueError if weights, gradients and what the optimisers keep of them, all float32, are more than there is."""
    needed = 4 * 4 * num_parameters
    if torch.device(device).type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > there:
        raise ValueError(
            f"config: expected a model that fits into the {there / 2**30:.1f} GiB of {device}, "
            f"got {num_parameters:,} parameters, which take {needed / 2**30:.1f} GiB to train"
        )


def read_state(folder: Path) -> dict[str, Any]:
    """What `Trainer.save` wrote into `folder`, on the CPU.

    Raises:
        FileNotFoundError: there is no `state.pt`. ValueError: it is truncated, damaged or something else. TypeError:
            `folder` is no path.
    """
    path = check_path("folder", folder) / STATE
    state = read_saved(path, _NEEDED)
    if "shards" not in state:
        state = read_saved(path, _NEEDED | _TENSORS)
    # States of older versions lack these.
    return {"init": None, "files": None, "evaluations": [], **state}


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Inside, Ctrl-C is noted in the list instead of raised; a second one is raised."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    # Handlers belong to the main thread, and whoever set another one wants that.
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
