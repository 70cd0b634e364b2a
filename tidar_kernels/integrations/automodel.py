"""NeMo Automodel: its recipe for diffusion language models (`recipes/dllm`) trains TiDAR and I-DLM with these kernels.

    torchrun --nproc-per-node 8 -m tidar_kernels.integrations.automodel --config recipe.yaml

is Automodel's own `recipes/dllm/train_ft.py` with two more modes (`dllm.mode` in the recipe):

- `tidar`: clean tokens and their masks, `[clean | masks]` (TiDAR, arXiv 2511.08923); `dllm.block_size`,
  `dllm.ar_loss_alpha` (1.0).
- `tidar_idlm`: what its `idlm` trains, by the same loss and settings, without a dense mask.

The examples of a batch are documents of one row without padding, logits of whole sequences never exist, and both modes
share the rows of their sequences out over the ranks of `cp_size` (context parallelism).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from nemo_automodel.components.distributed.utils import get_sync_ctx
from nemo_automodel.recipes.dllm.strategy import DLLM_STRATEGIES, DLLMStrategy, IDLMStrategy
from torch import Tensor, nn

from ..nn.loss import label_counts
from ..patterns import Pattern, check_int, idlm_training
from .transformers.collator import IGNORE_INDEX, TiDARCollator, batch_pattern
from .transformers.training import causal_lm_of, pattern_loss

__all__ = ["TiDARIDLMStrategy", "TiDARStrategy", "main", "register"]

_ROWS = "_tidar_rows"  # of a batch: what `pattern_loss` wants, made before the step


class _Microbatch(NamedTuple):
    """The loss `scale * (alpha * CE_clean + CE_masked) / (1 + alpha)` of some rows.

    Attributes:
        rows: tokens, positions and labels as for `pattern_loss`, and the pattern.
        counts: what the sums over clean and over mask rows are divided by.
    """

    rows: tuple[Tensor, Tensor, Tensor, Pattern]
    counts: tuple[int, int]
    alpha: float
    scale: float


class _Strategy(DLLMStrategy):
    """What the two modes share: `pattern_loss` of the rows of a batch, inside Automodel's step."""

    def setup_extra(self, recipe: Any) -> None:
        """Have the model attend by these kernels.

        Raises:
            TypeError: it is no causal language model that transformers' attention interface reaches.
            ValueError: it is split into pipeline stages, or the mask token is missing or not in its vocabulary.
        """
        if len(recipe.model_parts) != 1:
            raise ValueError(f"distributed.pp_size: expected one stage, got {len(recipe.model_parts)}")
        model = causal_lm_of(recipe.model_parts[0])
        vocab_size, mask = model.config.get_text_config().vocab_size, recipe.mask_token_id
        if mask is None or not 0 <= int(mask) < vocab_size:
            raise ValueError(f"dllm.mask_token_id: expected a token below vocab_size = {vocab_size}, got {mask}")
        model.set_attn_implementation("tidar")

    def prepare_batch(self, batch: Any, noisy_input_ids: Tensor, noise_mask: Tensor, clean_input_ids: Tensor) -> Any:
        """Part of Automodel's interface that these modes never come to: `forward_backward` makes its own rows."""
        return batch

    def _microbatch(
        self, recipe: Any, batch: dict[str, Any], num_diffusion_tokens: int, num_ar_tokens: int
    ) -> _Microbatch:
        """What to compute of a batch; the numbers of tokens are those of all ranks and microbatches."""
        raise NotImplementedError

    def forward_backward(
        self,
        recipe: Any,
        idx: int,
        batch: dict[str, Any],
        *,
        loss_buffer: list[Tensor],
        num_diffusion_tokens: int,
        num_ar_tokens: int | None = None,
        num_batches: int,
        is_train: bool = True,
    ) -> None:
        """Both passes of one microbatch, the `idx`-th of `num_batches`."""
        rows, counts, alpha, scale = self._microbatch(recipe, batch, num_diffusion_tokens, num_ar_tokens or 0)
        model, device = recipe.model_parts[0], recipe.dist_env.device
        *tensors, pattern = rows
        tokens, positions, labels = (tensor.to(device) for tensor in tensors)
        mesh = recipe.device_mesh["cp"] if recipe.device_mesh and recipe.device_mesh["cp"].size() > 1 else None
        dtype = getattr(recipe.distributed_config, "autocast_dtype", None)
        sync: Any = nullcontext()
        if is_train:
            defer = getattr(recipe.distributed_config, "defer_fsdp_grad_sync", True)
            sync = get_sync_ctx(model, idx == num_batches - 1, defer_fsdp_grad_sync=defer)
        fp8 = nullcontext() if recipe.te_fp8 is None else recipe.te_fp8.maybe_te_autocast()
        divisors = torch.tensor([float(count) for count in counts], device=tokens.device)
        with sync, fp8, torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype is not None):
            parts = pattern_loss(model, tokens, positions, labels, pattern, alpha, counts=divisors, cp=mesh)
            loss = parts.loss * scale
            loss_buffer.append(loss.detach().clone())
            # Automodel adds up these shares over all batches and ranks; the ranks of a context have the same mean.
            own = label_counts(labels, pattern)[1] / max(counts[1], 1) / recipe._get_cp_group_size()
            recipe._dllm_loss_buffer.append(parts.diffusion * own)
            if is_train:
                (loss * recipe._get_dp_group_size(include_cp=True)).backward()


class TiDARStrategy(_Strategy):
    """`dllm.mode: tidar`: both means of the TiDAR loss, each over all rows of its kind in the accumulated step."""

    def __init__(self) -> None:
        self.block_size, self.alpha = 1, 1.0

    @property
    def normalization_mode(self) -> str:
        """Mask rows are divided by the number of mask rows."""
        return "noise"

    def create_loss_fn(self, dllm_cfg: Any) -> nn.Module:
        """Read the settings; the loss itself is computed at the model's lm_head."""
        self.block_size = check_int("dllm.block_size", dllm_cfg.get("block_size", None), 1)
        self.alpha = float(dllm_cfg.get("ar_loss_alpha", 1.0))
        return nn.Identity()

    def apply_corruption(self, input_ids: Tensor, loss_mask: Tensor, mask_token_id: int, **_: Any) -> Any:
        """Nothing is drawn: every supervised token is predicted from its mask."""
        return input_ids, loss_mask.bool(), torch.ones_like(input_ids, dtype=torch.float32)

    def pre_step(self, recipe: Any, batches: list[dict[str, Any]]) -> tuple[int, int]:
        """Collate the batches; how many mask rows and clean rows have a label."""
        collate = TiDARCollator(self.block_size, int(recipe.mask_token_id))
        masked = clean = 0
        for batch in batches:
            supervised = batch["loss_mask"].bool() & batch["attention_mask"].bool()
            labels = torch.where(supervised, batch["input_ids"], IGNORE_INDEX)
            names = ("input_ids", "labels", "attention_mask")
            examples = zip(batch["input_ids"], labels, batch["attention_mask"], strict=True)
            collated = collate([dict(zip(names, example, strict=True)) for example in examples])
            pattern = batch_pattern(collated)
            batch[_ROWS] = (collated["input_ids"], collated["position_ids"], collated["labels"], pattern)
            own = label_counts(collated["labels"], pattern)
            clean, masked = clean + int(own[0]), masked + int(own[1])
        return masked, clean

    def _microbatch(
        self, recipe: Any, batch: dict[str, Any], num_diffusion_tokens: int, num_ar_tokens: int
    ) -> _Microbatch:
        return _Microbatch(batch.pop(_ROWS), (num_ar_tokens, num_diffusion_tokens), self.alpha, 1.0)


class TiDARIDLMStrategy(_Strategy, IDLMStrategy):
    """`dllm.mode: tidar_idlm`: Automodel's `idlm`, `CE_noisy + clean_loss_weight * CE_clean`, by these kernels."""

    def create_loss_fn(self, dllm_cfg: Any) -> nn.Module:
        """Read the settings of `idlm`.

        Raises:
            ValueError: one of them is `auto_balance_clean_loss`, which needs both means before the loss.
        """
        if dllm_cfg.get("auto_balance_clean_loss", False):
            raise ValueError("dllm.auto_balance_clean_loss: expected false (use clean_loss_weight), got true")
        loss: nn.Module = super().create_loss_fn(dllm_cfg)
        return loss

    def _microbatch(
        self, recipe: Any, batch: dict[str, Any], num_diffusion_tokens: int, num_ar_tokens: int
    ) -> _Microbatch:
        """Both kinds of rows are divided by the supervised tokens."""
        alpha = float(recipe.dllm_loss_fn.clean_loss_weight)
        return _Microbatch(self._rows(batch), (num_diffusion_tokens, num_diffusion_tokens), alpha, 1.0 + alpha)

    def _rows(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Pattern]:
        """`[x_t | x_0]`, positions and labels of the batch's examples, documents of one row, and their pattern."""
        valid = batch["attention_mask"].bool()
        lengths = valid.sum(1)
        if not torch.equal(valid, torch.arange(valid.shape[1], device=valid.device) < lengths[:, None]):
            raise ValueError("attention_mask: expected padding at the ends of examples only, got some before a token")
        clean, noisy = batch["_clean_input_ids"][valid], batch["_noisy_input_ids"][valid]
        labels = torch.where(batch["_noise_mask"][valid], clean, IGNORE_INDEX)
        pattern = idlm_training(len(clean), self.block_size, [n for n in lengths.tolist() if n])
        positions = pattern.positions.to(clean.device, torch.int64)
        return torch.cat([noisy, clean])[None], positions[None], labels[None], pattern


def register() -> None:
    """Add the modes to Automodel's registry; may be called more than once."""
    DLLM_STRATEGIES.update({"tidar": TiDARStrategy, "tidar_idlm": TiDARIDLMStrategy})


def main() -> None:
    """Automodel's recipe, of the configuration that the command line names, with the modes of this module."""
    from nemo_automodel.recipes.dllm.train_ft import main as train

    register()
    train()


if __name__ == "__main__":
    main()
