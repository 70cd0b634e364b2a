"""LoRA on some rows of a frozen model (R-ISD, arXiv 2604.11035): the wrapped projection, its gate, PEFT adapters.

    add_gated_lora(model, rank=64, alpha=128)            # or load_peft_adapter(model, "folder")
    with lora_gate(gate):                                # [batch, rows] or [rows]: which rows the adapter applies to
        hidden = model(tokens, pattern)

The gate is said, never guessed from token ids: a model with adapters does not run without one.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import checks, gated_lora, row_invariant_linear

__all__ = ["GatedLoRA", "add_gated_lora", "load_peft_adapter", "lora_gate", "save_adapter"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


class _Gate(threading.local):
    """The open gate of a thread. Not a context variable: `torch.compile` cannot read those."""

    value: Tensor | bool | None = None


_gate = _Gate()


@contextmanager
def lora_gate(gate: Tensor | bool) -> Iterator[None]:
    """Inside, every `GatedLoRA` that this thread runs applies its adapter to the rows of this gate.

    Activations that are recomputed in the backward pass need it there too: for `torch.utils.checkpoint`,
    `context_fn=lambda: (nullcontext(), lora_gate(gate))`.

    Args:
        gate: bool or float, broadcast over the leading dimensions of every projection's input, `[batch, rows]` or
            `[rows]`; a float scales the adapter's term. True is all rows, False the base model.

    Raises:
        TypeError: neither a tensor nor a bool.
    """
    if not isinstance(gate, (Tensor, bool)):
        raise TypeError(f"gate: expected a torch.Tensor or a bool, got {type(gate).__name__}")
    outer, _gate.value = _gate.value, gate
    try:
        yield
    finally:
        _gate.value = outer


class GatedLoRA(nn.Module):
    """`W x + bias + s * ((m * (x A^T)) B^T)` around an `nn.Linear`, which is frozen; m is the gate of `lora_gate`.

    A starts as in LoRA (uniform), B at 0, so that a new adapter changes nothing. Rows with gate 0 have the bits of the
    base: of `torch.nn.functional.linear`, or of `row_invariant_linear`.

    Args:
        linear: the projection; kept as `base`.
        rank: of the adapter.
        alpha: s = alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        dtype: of A and B; default that of the weight. They are cast to the dtype of x where they are used.
        row_invariant: the base is `row_invariant_linear`, as it always is for exact rows (`tidar_kernels.exact`).

    Raises:
        TypeError: not an `nn.Linear` with a plain weight. ValueError: rank < 1, or alpha is not finite.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        *,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
        row_invariant: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        if tuple(weight.shape) != (linear.out_features, linear.in_features) or not weight.is_floating_point():
            raise TypeError(
                f"linear: expected a float weight of shape {[linear.out_features, linear.in_features]}, "
                f"got {weight.dtype} of shape {list(weight.shape)}"
            )
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha: expected a finite number, got {alpha}")
        self.base = linear.requires_grad_(False)
        self.rank, self.alpha, self.use_rslora, self.row_invariant = rank, alpha, use_rslora, row_invariant
        dtype = weight.dtype if dtype is None else dtype
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.train(linear.training)

    @property
    def scale(self) -> float:
        """s, the factor of the adapter's term."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, where models look for it."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features] -> [..., out_features]`.

        Raises:
            RuntimeError: no `lora_gate` is open.
        """
        gate = _gate.value
        if gate is None:
            raise RuntimeError("lora_gate: expected an open lora_gate(gate) around a model with GatedLoRA, got none")
        if gate is False:
            return row_invariant_linear(x, self.weight, self.bias) if self.row_invariant else self.base(x)
        rows = x.new_ones(()) if gate is True else gate
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        return gated_lora(x, self.weight, a, b, rows, self.scale, self.bias, row_invariant=self.row_invariant)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, use_rslora={self.use_rslora}"


def has_gated_lora(model: object) -> bool:
    """Whether any projection of the model is wrapped: it then runs inside `lora_gate` only."""
    return isinstance(model, nn.Module) and any(isinstance(module, GatedLoRA) for module in model.modules())


def _named(name: str, targets: Sequence[str] | str) -> bool:
    """Whether a module is meant by PEFT's `target_modules`: ends of names, or one regular expression for all of it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def add_gated_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str] = PROJECTIONS,
    *,
    use_rslora: bool = False,
    dtype: torch.dtype | None = None,
    row_invariant: bool = False,
) -> list[str]:
    """Freeze the model and wrap its projections in new adapters, the only parameters that then train.

    Args:
        model: changed in place.
        rank, alpha, use_rslora, dtype, row_invariant: of every `GatedLoRA`.
        targets: ends of module names; by default all projections of a Llama or Qwen layer.

    Returns:
        The names of the wrapped modules.

    Raises:
        TypeError: a target is not an `nn.Linear`. ValueError: a target names no module, or one that has an adapter.
            Nothing is changed then.
    """
    found: dict[str, nn.Linear] = {}
    modules = dict(model.named_modules())
    for target in targets:
        names = [name for name in modules if _named(name, (target,))]
        if not names:
            raise ValueError(f"targets: expected names of modules in the model, got {target!r}")
        for name in names:
            module = modules[name]
            if isinstance(module, GatedLoRA):
                raise ValueError(f"targets: expected modules without an adapter, got {name}")
            if not isinstance(module, nn.Linear):
                raise TypeError(f"targets: expected {name} to be an nn.Linear, got {type(module).__name__}")
            found[name] = module
    adapters = {
        name: GatedLoRA(module, rank, alpha, use_rslora=use_rslora, dtype=dtype, row_invariant=row_invariant)
        for name, module in found.items()
    }
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        _put(model, name, adapter)
    return list(adapters)


# What a PEFT configuration may hold that changes the function, and is not computed here: refused by name.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Initialisations that leave the base weights as they are; the others (PiSSA, OLoRA, ...) move a part of them into A, B.
_PLAIN_INIT = (None, True, False, "gaussian", "orthogonal", "eva")


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a PEFT adapter, or an error that names what is not supported."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a folder with {CONFIG}, got {folder}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: expected peft_type 'LORA', got {kind!r}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{path}: expected an adapter without {name}, got {config[name]!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: expected bias 'none', got {config['bias']!r}")
    if config.get("init_lora_weights") not in _PLAIN_INIT:
        raise ValueError(f"{path}: expected the base weights untouched, got {config['init_lora_weights']!r}")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(
            f"{path}: expected numbers r and lora_alpha, got {config.get('r')!r}, {config.get('lora_alpha')!r}"
        )
    return config


def _read_weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """`{module name: {"A": tensor, "B": tensor}}` of a PEFT adapter."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a folder with {WEIGHTS}, got {folder}")
    pairs: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                found = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
                if found is None:
                    raise ValueError(f"{path}: expected tensors {_PREFIX}<module>.lora_A|B.weight, got {key}")
                pairs.setdefault(found[1], {})[found[2]] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got {error}") from None
    if not pairs:
        raise ValueError(f"{path}: expected adapter tensors, got none")
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"{path}: expected lora_A and lora_B of {name}, got only lora_{next(iter(pair))}")
    return pairs


def _pattern(config: dict[str, Any], patterns: str, default: str, name: str) -> Any:
    """A module's own rank or alpha, by PEFT's rule: the first pattern that matches the end of its name."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            if not isinstance(value, (int, float)):
                raise ValueError(f"{CONFIG}: expected a number in {patterns} for {pattern!r}, got {value!r}")
            return value
    return config[default]


def _check_targets(model: nn.Module, config: dict[str, Any], pairs: dict[str, Any]) -> None:
    """Every module of this model that the adapter is meant for has tensors, else it is another model's adapter."""
    targets = config.get("target_modules")
    if not targets or config.get("layers_to_transform") or config.get("exclude_modules") or targets == "all-linear":
        return
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, GatedLoRA)) and _named(name, targets) and name not in pairs:
            raise ValueError(f"{WEIGHTS}: expected tensors for {name}, which target_modules names, got none")


def load_peft_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    row_invariant: bool = False,
) -> list[str]:
    """Put a LoRA adapter that PEFT saved around the projections it was trained for; freezes those projections.

    Reads `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, `use_rslora` and `target_modules`. Modules that are
    `GatedLoRA` already get the new adapter.

    Args:
        model: changed in place; its module names are those of the model that the adapter was trained on.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        dtype, row_invariant: of every `GatedLoRA`.

    Returns:
        The names of the wrapped modules.

    Raises:
        FileNotFoundError: one of the files is missing. ValueError: it is not a plain LoRA adapter (DoRA, biases,
            `modules_to_save`, `fan_in_fan_out`, ... are refused by name), or it does not fit the model: the message
            names the module, what was expected and what came. TypeError: a module is not an `nn.Linear`.
            Nothing is changed then.
    """
    folder = Path(path)
    config, pairs = _read_config(folder), _read_weights(folder)
    modules = dict(model.named_modules())
    found: dict[str, tuple[nn.Linear, int, float]] = {}
    for name, pair in pairs.items():
        if name not in modules:
            raise ValueError(f"{WEIGHTS}: expected modules of the model, got {name}")
        linear = modules[name]
        if isinstance(linear, GatedLoRA):
            linear = linear.base
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name}: expected an nn.Linear for an adapter, got {type(linear).__name__}")
        rank = _pattern(config, "rank_pattern", "r", name)
        for part, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
            checks.shape(f"{name}.lora_{part}", pair[part], shape)
        found[name] = (linear, rank, _pattern(config, "alpha_pattern", "lora_alpha", name))
    _check_targets(model, config, pairs)
    use_rslora = bool(config.get("use_rslora"))
    for name, (linear, rank, alpha) in found.items():
        with torch.random.fork_rng(devices=[]):  # loading must not move the caller's random stream
            adapter = GatedLoRA(linear, rank, alpha, use_rslora=use_rslora, dtype=dtype, row_invariant=row_invariant)
        with torch.no_grad():
            adapter.lora_a.copy_(pairs[name]["A"])
            adapter.lora_b.copy_(pairs[name]["B"])
        _put(model, name, adapter)
    return list(found)


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, base_model: str | None = None) -> None:
    """Write the adapters of a model as PEFT does, so that PEFT and `load_peft_adapter` read them.

    Args:
        model: holds the `GatedLoRA` modules; not changed.
        path: a folder, created if need be; each of the two files is replaced whole.
        base_model: name of the base model for the configuration.

    Raises:
        ValueError: no adapter in the model, or some with and some without `use_rslora`. OSError: it was not written.
    """
    from safetensors.torch import save

    adapters = {name: module for name, module in model.named_modules() if isinstance(module, GatedLoRA)}
    if not adapters:
        raise ValueError("model: expected GatedLoRA modules, got none")
    if len({module.use_rslora for module in adapters.values()}) != 1:
        raise ValueError("model: expected use_rslora alike in all adapters, got True and False")
    rank = Counter(module.rank for module in adapters.values()).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in adapters.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): m.rank for name, m in adapters.items() if m.rank != rank},
        "alpha_pattern": {re.escape(name): m.alpha for name, m in adapters.items() if m.alpha != alpha},
        "use_rslora": next(iter(adapters.values())).use_rslora,
        "target_modules": list(adapters),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {
        f"{_PREFIX}{name}.lora_{part}.weight": parameter.detach().cpu().contiguous()
        for name, module in adapters.items()
        for part, parameter in (("A", module.lora_a), ("B", module.lora_b))
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    _write(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """Replace a file whole: an interrupted save leaves the old one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
