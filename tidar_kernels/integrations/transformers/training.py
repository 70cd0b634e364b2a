"""Training a transformers model with the TiDAR objective: a loss for any loop, and a `Trainer`.

The loss is computed inside the model's own forward pass, at the place of its lm_head, from all hidden states in chunks.
So whatever wraps the model and acts when it is called (DDP, FSDP2, LoRA, autocast, checkpointing) acts here as it does
on any forward pass, the weights of the lm_head are whole when they are read, and `[rows, vocab]` logits never exist.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer

from ...distributed import ContextParallel, shared_out
from ...distributed.collectives import all_reduced
from ...nn.loss import TiDARLoss, label_counts, tidar_loss
from ...patterns import Pattern
from ...patterns.arguments import check_int
from .collator import IGNORE_INDEX, TiDARCollator, batch_pattern
from .logits import LogitShape

__all__ = ["TiDARTrainer", "causal_lm_of", "compute_loss", "count_labels", "pattern_loss"]

# Models whose forward pass was seen to shape logits as `LogitShape` does.
_CHECKED: WeakSet[nn.Module] = WeakSet()


def count_labels(batch: Mapping[str, Any]) -> Tensor:
    """How many clean rows and mask rows of a batch have a label: float32 `[2]`, on the batch's device.

    Their sum over the batches of an accumulated step (and over devices) is the `counts` of `compute_loss`.

    Raises:
        ValueError: the batch does not come from a `TiDARCollator`.
    """
    pattern = batch_pattern(batch)
    return label_counts(batch["labels"], pattern, ignore_index=IGNORE_INDEX)


# Its bookkeeping is not for a graph; the forward pass in it is compiled all the same.
@torch.compiler.disable(recursive=False)
def compute_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    alpha: float = 1.0,
    *,
    counts: Tensor | None = None,
    chunk_size: int = 1024,
    cp: DeviceMesh | None = None,
) -> TiDARLoss:
    """`(alpha * mean CE_AR + mean CE_Diff) / (1 + alpha)` of a batch (TiDAR, arXiv 2511.08923, training objective).

    Args:
        model: a causal language model of transformers with `attn_implementation="tidar"`, or what PEFT, Accelerate,
            DDP, FSDP or `torch.compile` made of one.
        batch: from `TiDARCollator`, on the model's device.
        alpha: weight of the autoregressive mean, >= 0.
        counts: `[2]`, what the sums of the two kinds are divided by: with the summed `count_labels` of the batches of
            an accumulated step, their losses add up to that of one large batch. Default this batch's own.
        chunk_size: rows whose logits exist at a time.
        cp: ranks that have the same batch and share out its rows (`ContextParallel`), a mesh of one dimension. The loss
            is then the share of this rank's rows, and the shares add up to the loss; so do the gradients. (A wrapper
            that averages gradients over n ranks wants `counts` divided by n.) What the model itself adds is of this
            rank's rows.

    Returns:
        `loss`, differentiable, with what the model itself adds (the balance of a router, if its configuration asks);
        `autoregressive` and `diffusion`, the means of this batch, detached.

    Raises:
        TypeError: there is no such model in `model`.
        ValueError: it has another attention implementation, which would ignore the pattern; the batch is not from the
            collator, or has tokens outside the vocabulary; or the model's forward pass shapes logits or computes its
            loss in a way that is not known here.
    """
    if cp is not None and not isinstance(cp, DeviceMesh):
        raise TypeError(f"cp: expected a DeviceMesh, got {type(cp).__name__}")
    pattern = torch.compiler.disable(batch_pattern)(batch)
    return pattern_loss(
        *(model, batch["input_ids"], batch["position_ids"], batch["labels"], pattern, alpha),
        counts=counts,
        chunk_size=chunk_size,
        cp=cp,
    )


@torch.compiler.disable(recursive=False)
def pattern_loss(
    model: nn.Module,
    tokens: Tensor,
    positions: Tensor,
    labels: Tensor,
    pattern: Pattern,
    alpha: float = 1.0,
    *,
    counts: Tensor | None = None,
    chunk_size: int = 1024,
    cp: DeviceMesh | None = None,
) -> TiDARLoss:
    """`compute_loss` of any training pattern: `tidar_loss` of what the rows predict, in the model's forward pass.

    Args:
        model, alpha, counts, chunk_size, cp: as for `compute_loss`.
        tokens, positions: int64 `[batch, pattern.q_len]`, of the rows.
        labels: int64 `[batch, S]`, the clean tokens or -100.
        pattern: a training pattern.

    Raises:
        TypeError, ValueError: as `compute_loss` does.
    """
    causal_lm = causal_lm_of(model)
    implementation = causal_lm.config._attn_implementation
    if implementation != "tidar":
        raise ValueError(f'model: expected attn_implementation="tidar", got {implementation!r}')
    first, on_host = causal_lm not in _CHECKED, tokens.device.type == "cpu"
    compiling = torch.compiler.is_compiling()
    if (first or on_host) and not compiling:  # elsewhere reading it would wait for the device
        vocab_size, highest = causal_lm.config.get_text_config().vocab_size, int(tokens.max())
        if highest >= vocab_size:
            raise ValueError(
                f"batch: expected tokens below the model's vocab_size = {vocab_size}, got {highest} "
                "(add_mask_token makes room for the mask token)"
            )
    rows: Pattern | ContextParallel = pattern
    if cp is not None:
        rows = shared = torch.compiler.disable(shared_out)(cp, pattern)
        tokens, positions = shared.shard(tokens, 1), shared.shard(positions, 1)
    objective = _Objective(causal_lm, labels, rows, alpha, counts, chunk_size)
    with objective.in_place():
        outputs = model(input_ids=tokens, position_ids=positions, labels=labels, use_cache=False, tidar_pattern=rows)
    if objective.result is None or not objective.asked:
        raise ValueError(
            f"model: expected a forward pass that calls lm_head and then loss_function, as causal language models of "
            f"transformers do, got {type(causal_lm).__name__}"
        )
    if first and not compiling:
        objective.check(outputs.logits)
        _CHECKED.add(causal_lm)
    return TiDARLoss(outputs.loss, objective.result.autoregressive, objective.result.diffusion)


def causal_lm_of(model: Any) -> PreTrainedModel:
    """The causal language model inside whatever wraps it.

    Raises:
        TypeError: there is none.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise TypeError(f"model: expected a causal language model of transformers, got {type(model).__name__}")


class _Active(threading.local):
    """The objective of a thread's forward pass. Not a context variable: `torch.compile` cannot read those."""

    objective: _Objective | None = None


_active = _Active()
_lock = threading.Lock()
_forwards: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # models in whose forward passes a loss is computed


class _Objective:
    """The loss of one forward pass of `causal_lm`, standing in for its lm_head and its loss function.

    It stands there for its own thread alone: others that run the model meanwhile, with an objective or without, find
    what is theirs.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        labels: Tensor,
        pattern: Any,
        alpha: float,
        counts: Tensor | None,
        chunk_size: int,
    ) -> None:
        self.causal_lm, self.labels, self.pattern = causal_lm, labels, pattern
        self.options: dict[str, Any] = {"alpha": alpha, "counts": counts, "chunk_size": chunk_size}
        self.head: nn.Module = causal_lm.get_output_embeddings()
        self.shape = LogitShape.of(causal_lm.config.get_text_config())
        self.result: TiDARLoss | None = None
        self.asked = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts, the lm_head gives this thread no logits but the loss, which the loss function hands out."""
        with _lock:
            users = _forwards.get(self.causal_lm, 0)
            if not users:
                _put(self.head, "forward", _at_head(self.head.forward))
                _put(self.causal_lm, "_loss_function", _at_loss(self.causal_lm.loss_function))
            _forwards[self.causal_lm] = users + 1
        outer, _active.objective = _active.objective, self
        try:
            yield
        finally:
            _active.objective = outer
            with _lock:
                _forwards[self.causal_lm] -= 1
                if not _forwards[self.causal_lm]:
                    _take_back(self.head, "forward")
                    _take_back(self.causal_lm, "_loss_function")

    def at_head(self, forward: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """In the lm_head's place: the loss of all rows. What the model makes of these logits, `check` looks at."""
        weight = self._weight(forward)
        if weight is not None:
            hidden = hidden.to(weight.dtype)
        self.result = tidar_loss(
            hidden,
            (lambda rows: self.shape(forward(rows))) if weight is None else weight,
            self.labels,
            self.pattern,
            ignore_index=IGNORE_INDEX,
            **self.options,
        )
        return self._probe(hidden)

    def _weight(self, forward: Any) -> Tensor | None:
        """The lm_head's weight, if rows times that are the logits; None for a head that is more than a weight."""
        head: Any = self.head
        plain = isinstance(head, nn.Linear) and getattr(head, "bias", None) is None and self.shape.is_plain
        own_forward = forward == nn.Linear.forward.__get__(head)  # neither a subclass's nor a wrapper's
        if not (plain and own_forward and head.weight.is_floating_point()):
            return None
        weight: Tensor = head.weight
        return weight

    @staticmethod
    def _probe(like: Tensor) -> Tensor:
        """Logits of no meaning, `[1, 1, 64]`, over the range that real ones have."""
        return torch.linspace(-100.0, 100.0, 64, dtype=like.dtype, device=like.device)[None, None]

    def at_loss(self) -> Tensor:
        """In the loss function's place: the loss that was computed at the lm_head."""
        self.asked = True
        if self.result is None:
            name = type(self.causal_lm).__name__
            raise ValueError(f"model: expected a forward pass that calls lm_head, got {name}, whose does not")
        return self.result.loss

    def check(self, logits: Tensor) -> None:
        """Raise unless the model's own code did to the probe what `LogitShape` does."""
        expected = self.shape(self._probe(logits))
        if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=2e-2):
            raise ValueError(
                f"model: expected logits of the lm_head as its configuration scales and softcaps them, "
                f"got {type(self.causal_lm).__name__}, which shapes them otherwise"
            )


def _at_head(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of an lm_head, and for threads with an objective that."""

    def routed(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        objective = _active.objective
        return forward(hidden, *args, **kwargs) if objective is None else objective.at_head(forward, hidden)

    return routed


def _at_loss(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a model's own loss, and for threads with an objective that."""

    def routed(*args: Any, **kwargs: Any) -> Any:
        objective = _active.objective
        return function(*args, **kwargs) if objective is None else objective.at_loss()

    return routed


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute until `_take_back`, which knows what the module itself had there."""
    value.before = vars(module).get(name)
    setattr(module, name, value)


def _take_back(module: nn.Module, name: str) -> None:
    before = vars(module)[name].before
    if before is None:
        delattr(module, name)
    else:
        setattr(module, name, before)


def _averages(model: nn.Module) -> bool:
    """Whether `model`, or what `torch.compile` made of it, averages gradients over processes (DDP)."""
    return any(isinstance(module, DistributedDataParallel) for module in (model, getattr(model, "_orig_mod", None)))


class TiDARTrainer(Trainer):
    """`transformers.Trainer` with the TiDAR objective; all of its options, callbacks and checkpoints work as they do.

    An accumulated step, on any number of devices, has the loss of one large batch: each of the two means is over all
    of its rows of that kind (with `average_tokens_across_devices`, the default). What is logged is that loss;
    `evaluate` gives the mean over batches, and hands the two means of every batch to `compute_metrics` as predictions.

    Args:
        model, args, ...: those of `transformers.Trainer`; `data_collator` is a `TiDARCollator`.
        alpha: weight of the autoregressive mean, >= 0.
        chunk_size: rows whose logits exist at a time.
        context_parallel: how many processes have the same batches and share out the rows of each (`ContextParallel`).
            Accelerate has context and sequence parallelism of its own (`ParallelismConfig(cp_size=.., sp_size=..)`),
            which know plain causal attention only: this is in their place.

    Raises:
        TypeError: `data_collator` is not a `TiDARCollator`.
        ValueError: the mask token is outside the model's vocabulary, `label_smoothing_factor` or `compute_loss_func`
            asks for another loss, several GPUs would share this process (launch one process a GPU instead),
            `context_parallel` does not divide the number of processes, Accelerate is to share out rows or heads, or
            `accelerator_config` is to slice batches or to leave some processes without one; `train`: gradients would
            not be averaged over the processes.
    """

    # The loss is divided by the labels of the whole accumulated step, so the trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, alpha: float = 1.0, chunk_size: int = 1024, context_parallel: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.alpha, self.chunk_size = alpha, chunk_size
        self._context = self._shared_batches(check_int("context_parallel", context_parallel, 1))
        self._deal_examples()
        collator = self.data_collator
        if not isinstance(collator, TiDARCollator):
            raise TypeError(f"data_collator: expected a TiDARCollator, got {type(collator).__name__}")
        vocab_size = causal_lm_of(self.model).config.get_text_config().vocab_size
        if collator.mask_token_id >= vocab_size:
            raise ValueError(
                f"data_collator: expected a mask_token_id below the model's vocab_size = {vocab_size}, "
                f"got {collator.mask_token_id} (add_mask_token makes room for it)"
            )
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError("args: expected no label_smoothing_factor and no compute_loss_func beside the TiDAR loss")
        if self.args.n_gpu > 1:
            raise ValueError(f"args: expected one GPU a process (torchrun, accelerate launch), got {self.args.n_gpu}")
        # The collator takes what it knows; the model's signature, by which columns are dropped, knows no prompt_length.
        self.args.remove_unused_columns = False
        # Every batch has labels; of a wrapped model the trainer may not see that it takes them.
        self.label_names = ["labels"]
        # Older trainers read in this whether the loss is scaled already.
        self.model_accepts_loss_kwargs = True

    def _shared_batches(self, ranks: int) -> DeviceMesh | None:
        """The mesh of the processes that have this one's batches, which data loaders get to know; None for one alone.

        Raises:
            ValueError: `ranks` does not divide the number of processes, or Accelerate has other plans for them.
        """
        configuration = getattr(self.accelerator, "parallelism_config", None)
        for option in ("cp_size", "sp_size"):  # both share out rows, for plain causal attention; older ones have no sp
            size = getattr(configuration, option, 1)
            if size > 1:
                raise ValueError(
                    f"args.parallelism_config: expected {option} = 1 (context_parallel is in its place), got {size}"
                )
        if ranks == 1:
            return None
        if configuration is not None and configuration.tp_size > 1:
            raise ValueError(f"context_parallel: expected 1 beside tensor parallelism, got {ranks}")
        if not hasattr(self.accelerator, "_prepare_device_mesh"):
            raise ValueError("context_parallel: expected an accelerate whose loaders take a mesh, got an older one")
        processes = self.accelerator.num_processes
        if processes % ranks:
            raise ValueError(f"context_parallel: expected a divisor of {processes} processes, got {ranks}")
        mesh = init_device_mesh(
            self.args.device.type, (processes // ranks, ranks), mesh_dim_names=("dp_replicate", "cp")
        )
        # What data loaders are dealt by, and nothing else.
        self.accelerator._prepare_device_mesh = lambda: mesh
        return mesh["cp"]

    def _deal_examples(self) -> None:
        """Have every process read a stream by itself and keep its share of the examples.

        By default the first process would read it all and slice collated batches, which are one row of many documents.

        Raises:
            ValueError: batches are to be sliced, or the processes to have different numbers of them.
        """
        loaders = self.accelerator.dataloader_config
        if self.accelerator.num_processes == 1:
            return
        if loaders.dispatch_batches:
            raise ValueError(
                "args.accelerator_config: expected dispatch_batches = False (each process reads the data), got True"
            )
        if not loaders.even_batches:
            raise ValueError(
                "args.accelerator_config: expected even_batches = True (a process without a batch is waited for), "
                "got False"
            )
        loaders.dispatch_batches = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer.train`, whatever was evaluated before.

        Accelerate marks a model that it prepares to be evaluated, and never wraps one with that mark: each process
        would train for itself. So what was prepared, by this trainer or by another, is prepared again.
        """
        model: Any = self.model
        if not _averages(self.model_wrapped) and self._is_data_parallel():
            self.model_wrapped = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            for module in model.modules():
                vars(module).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """`transformers.Trainer.training_step` of a model whose gradients are averaged over the processes."""
        if not _averages(model) and self._is_data_parallel():
            raise ValueError(
                f"model: expected one whose gradients are averaged over {self.accelerator.num_processes} processes, "
                f"got {type(model).__name__}, which Accelerate has not wrapped"
            )
        return super().training_step(model, *args, **kwargs)

    def _is_data_parallel(self) -> bool:
        """Whether DDP is to average gradients: several processes, and nobody has sharded the weights."""
        model: Any = self.model
        return self.accelerator.distributed_type.value.startswith("MULTI_") and not any(
            isinstance(parameter, DTensor) for parameter in model.parameters()
        )

    def get_cp_size(self) -> int:
        """How many processes share a batch: `transformers.Trainer` counts batches and steps by it."""
        return 1 if self._context is None else self._context.size()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step, and how many clean and mask rows with a label they have, over all devices: `[2]`."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        counts = torch.stack([count_labels(batch) for batch in batches]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0) / self.get_cp_size()
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; `num_items_in_batch` are the counts of `get_batch_samples`."""
        training = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.shape == (2,)
        counts = num_items_in_batch if isinstance(num_items_in_batch, Tensor) and training else None
        parts = compute_loss(model, inputs, self.alpha, counts=counts, chunk_size=self.chunk_size, cp=self._context)
        loss = parts.loss
        if counts is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, this sums them
        elif self._context is not None and torch.is_grad_enabled():
            loss = loss * self._context.size()  # a batch's shares are to be summed, batches to be averaged
        elif self._context is not None:
            loss = all_reduced(loss, self._context.get_group().group_name)
        if not return_outputs:
            return loss
        return loss, {"loss": loss, "autoregressive": parts.autoregressive[None], "diffusion": parts.diffusion[None]}
