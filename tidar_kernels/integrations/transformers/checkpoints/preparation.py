"""From a checkpoint, or a model that is loaded already, to what `Decoder` takes; and what was found and chosen."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ....decoding.strategies import DFlash, DraftedModel, Strategy, StrategyName, by_name
from ....patterns.arguments import check_device, check_int, check_path
from ..distillation import FIGURES
from ..loading import check_name, load, read_tokenizer
from ..model import TransformersModel, decoder_model
from .dflash import read_drafter
from .reading import add_adapter, by_system_name, config_of, read_checkpoint, recognised_system
from .system import Config, System

__all__ = ["Drafts", "Prepared", "Recognised", "drafts_of", "load_any", "prepared"]

_log = logging.getLogger(__name__)

# R-ISD trains an adapter for masks on a base model that has none (I-DLM, arXiv 2604.11035): one of Qwen3's free ids.
_RISD_MASK = 151669
_RISD_STRIDE = 4


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint was found to be, and how it is decoded; its `str` is one line.

    Attributes:
        system: the title of the system, or "transformers" for an ordinary model.
        model: the class that it was read into.
        strategy: the label of the strategy; "autoregressive" in that mode.
        mask_token_id: None without masks.
        adapter: the folder of its gated adapter, None if it has none.
        beta: below 1 where the diffusion logits have a say.
        drafter: the folder or the class of the drafter beside it, None if it has none.
    """

    system: str
    model: str
    strategy: str
    mask_token_id: int | None = None
    adapter: str | None = None
    beta: float = 1.0
    drafter: str | None = None

    def __str__(self) -> str:
        said = [f"{self.system} as {self.model}", self.strategy]
        said += [] if self.mask_token_id is None else [f"mask token {self.mask_token_id}"]
        said += [] if self.adapter is None else [f"adapter {Path(self.adapter).name}"]
        said += [] if self.beta == 1.0 else [f"beta {self.beta:g}"]
        said += [] if self.drafter is None else [f"drafter {Path(self.drafter).name}"]
        return ", ".join(said)


@dataclass(frozen=True)
class Drafts:
    """How a checkpoint drafts, before its weights are read.

    Attributes:
        system: None for an ordinary model.
        adapter: the folder of its gated adapter, None if it has none.
        strategy: or its name, where `Decoder` knows enough.
        mask_token_id: None if neither the configuration nor an adapter says.
    """

    system: System | None
    adapter: Path | None
    strategy: Any
    mask_token_id: int | None

    def add_adapter(self, model: Any) -> None:
        """Put the adapter, if there is one, into the model; errors as `reading.add_adapter`."""
        if self.adapter is not None:
            add_adapter(model, self.adapter, self.system)


@dataclass(frozen=True)
class Prepared:
    """The arguments of a `Decoder`; `recognised` is None for a model that was loaded by the caller."""

    model: TransformersModel | DraftedModel
    strategy: Strategy | StrategyName
    block_size: int | None
    mask_token_id: int | None
    beta: float | None = None
    recognised: Recognised | None = None


def prepared(
    model: Any,
    tokenizer: Any = None,
    *,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    strategy: Any = None,
    stride: int | None = None,
    beta: float | None = None,
    autoregressive: bool = False,
    system: str | None = None,
    adapter: str | os.PathLike[str] | bool = True,
    drafter: Any = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> Prepared:
    """What `Decoder.from_transformers` makes a decoder of; its arguments and errors are described there."""
    if drafter is not None:
        _check_beside_drafter(strategy, stride, autoregressive, adapter)
    is_plain = autoregressive or drafter is not None  # the model itself drafts nothing
    given_mask = mask_token_id
    if not isinstance(model, (str, os.PathLike)):
        for name, value, default in (("system", system, None), ("adapter", adapter, True), ("device", device, None)):
            if value is not default:
                raise ValueError(f"{name}: expected with a path alone, got {value!r} beside a model")
        found = decoder_model(model, tokenizer, block_size, mask_token_id, needs_mask=not is_plain)
        if drafter is not None:
            return _drafted(found, drafter, block_size, mask_token_id, strategy)
        return Prepared(found, "tidar" if strategy is None else strategy, block_size, mask_token_id)

    if not isinstance(adapter, bool):
        check_path("adapter", adapter)
    if device is not None:
        device = check_device("device", device)
    source = os.fspath(model)
    config = config_of(check_name(source))
    drafts = drafts_of(
        source,
        tokenizer,
        config,
        block_size=block_size,
        mask_token_id=mask_token_id,
        strategy=strategy,
        stride=stride,
        autoregressive=is_plain,
        system=system,
        adapter=adapter if drafter is None else False,
    )
    found_system, chosen, mask_token_id = drafts.system, drafts.strategy, drafts.mask_token_id
    if found_system is None:
        read, own_tokenizer = load(source, dtype, needs_tokenizer=False)
    else:
        read, own_tokenizer = read_checkpoint(source, found_system, config, dtype), None
    tokenizer = tokenizer if tokenizer is not None else own_tokenizer
    if not is_plain:
        block_size = chosen.drafts if isinstance(chosen, Strategy) else block_size
    drafts.add_adapter(read)
    if device is not None:
        read = read.to(device)
    found = decoder_model(read, tokenizer, block_size, mask_token_id, needs_mask=not is_plain)
    ready = Prepared(found, chosen, block_size, mask_token_id)
    mask_token_id = found.config.mask_token_id
    if drafter is not None:
        ready = _drafted(found, drafter, block_size, given_mask, strategy)
        chosen, mask_token_id = ready.strategy, ready.mask_token_id
    if beta is None and found_system is not None and isinstance(chosen, Strategy) and chosen.takes_beta:
        beta = found_system.beta(config)
    label = "autoregressive" if autoregressive else chosen.label if isinstance(chosen, Strategy) else str(chosen)
    recognised = Recognised(
        system="transformers" if found_system is None else found_system.title,
        model=type(read).__name__,
        strategy=label,
        mask_token_id=None if autoregressive else mask_token_id,
        adapter=None if drafts.adapter is None else str(drafts.adapter),
        beta=1.0 if beta is None else beta,
        drafter=None if drafter is None else _name(drafter),
    )
    _log.info("%s: %s", source, recognised)
    return replace(ready, beta=beta, recognised=recognised)


def _check_beside_drafter(strategy: Any, stride: Any, autoregressive: bool, adapter: Any) -> None:
    """Raise ValueError for what does not go with a drafter, which alone drafts."""
    if autoregressive:
        raise ValueError("drafter: expected none where nothing is drafted, got one")
    if strategy is not None and not isinstance(strategy, DFlash):
        raise ValueError(f"strategy: expected a strategies.DFlash, or none, beside a drafter, got {strategy!r}")
    for name, value in (("stride", stride), ("adapter", None if isinstance(adapter, bool) else adapter)):
        if value is not None:
            raise ValueError(f"{name}: expected none beside a drafter, got {value}")


def _drafted(
    target: TransformersModel, drafter: Any, block_size: int | None, mask_token_id: int | None, strategy: DFlash | None
) -> Prepared:
    """A target and its drafter, which is read if it is a path."""
    if isinstance(drafter, (str, os.PathLike)):
        drafter = read_drafter(drafter, target, mask_token_id)
    model = DraftedModel(target, drafter)
    if strategy is None:
        size = model.config.block_size if block_size is None else block_size
        strategy = DFlash(check_int("block_size", size, 2))
    mask_token_id = model.config.mask_token_id if mask_token_id is None else mask_token_id
    return Prepared(model, strategy, strategy.drafts if block_size is None else block_size, mask_token_id)


def _name(drafter: Any) -> str:
    return str(drafter) if isinstance(drafter, (str, os.PathLike)) else type(drafter).__name__


def drafts_of(
    source: str,
    tokenizer: Any,
    config: Config,
    *,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    strategy: Any = None,
    stride: int | None = None,
    autoregressive: bool = False,
    system: str | None = None,
    adapter: str | os.PathLike[str] | bool = True,
) -> Drafts:
    """How the checkpoint in `source` with this configuration drafts; what is given wins over what it says.

    Raises:
        ValueError: its system cannot be decoded, or it says no mask token or block size that is needed.
    """
    found_system = recognised_system(config) if system is None else by_system_name(system)
    folder = _adapter_folder(source, found_system, adapter)
    trained = {} if folder is None else _training_of(folder)
    is_risd = found_system is None and folder is not None and not trained
    if found_system is not None and mask_token_id is None:
        mask_token_id = found_system.mask_token_id(config)
        if mask_token_id is None:
            tokenizer = read_tokenizer(source) if tokenizer is None else tokenizer
            mask_token_id = getattr(tokenizer, "mask_token_id", None)
        if mask_token_id is None and not autoregressive:
            raise ValueError(
                f"mask_token_id: expected a token id here, in config.json of {found_system.title} or as its "
                "tokenizer's mask token, got none"
            )
    if is_risd and mask_token_id is None and config.get("vocab_size", 0) > _RISD_MASK:
        mask_token_id = _RISD_MASK
    mask_token_id = trained.get("mask_token_id") if mask_token_id is None else mask_token_id
    chosen: Any = strategy if strategy is not None else found_system.strategies[0] if found_system else None
    if chosen is None:
        chosen = trained.get("strategy", "isd" if is_risd else "tidar")
    if not autoregressive and isinstance(chosen, str):
        size = block_size if stride is None else stride
        if trained:
            chosen = by_name(chosen, trained["block_size"] if size is None else size)
        else:
            chosen = _strategy(chosen, found_system, config, size, is_risd)
    return Drafts(found_system, folder, chosen, mask_token_id)


def load_any(source: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """`(model, tokenizer)` of an ordinary model or of a system's checkpoint, without its adapter.

    Raises:
        ValueError: there is no tokenizer; or as `prepared` and `load`, as other errors.
    """
    config = config_of(check_name(source))
    system = recognised_system(config)
    if system is None:
        return load(source, dtype)
    tokenizer = read_tokenizer(source)
    if tokenizer is None:
        raise ValueError(f"model: expected a tokenizer in the checkpoint of {system.title}, got none that can be read")
    return read_checkpoint(source, system, config, dtype), tokenizer


def _adapter_folder(source: str, system: System | None, adapter: str | os.PathLike[str] | bool) -> Path | None:
    if not isinstance(adapter, bool):
        return Path(adapter)
    if not adapter or system is None or system.adapter is None:
        return None
    folder = Path(source) / system.adapter
    return folder if folder.is_dir() else None


def _training_of(folder: Path) -> dict[str, Any]:
    """How the masks of an adapter were trained, if `tidar-kernels train-adapter` wrote it: strategy, block size, token.

    Its masks predict the token at their position, where published adapters of R-ISD predict the one after it.
    """
    try:
        config = json.loads((folder / FIGURES).read_text(encoding="utf-8"))["config"]
        found = {name: config[name] for name in ("strategy", "block_size", "mask_token_id")}
    except (OSError, ValueError, KeyError, TypeError):  # another program's file, or none
        return {}
    return found


def _strategy(name: Any, system: System | None, config: Config, size: int | None, is_risd: bool) -> Strategy | Any:
    """The strategy of a name with the options of a system; the name itself where `Decoder` knows enough."""
    if is_risd:
        return by_name(name, _RISD_STRIDE if size is None else size, shifted=True)
    if system is None:
        return name
    if size is None:
        size = system.block_size(config, name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"block_size: expected one here or in config.json of {system.title}, an int >= 1, got {size!r}"
            )
    return system.strategy(name, check_int("block_size", size, 1))
