"""A step in vLLM's runner.

vLLM schedules, for a request that decodes, its last token and T - 1 "speculative" tokens. Here they are the T rows of a
strategy's step (`tidar_kernels.decoding.strategies.base`):

    vLLM       [last token | speculative 1 .. T - 1]
    a step     [d_0 | d_1 .. d_{n-1} | mask rows]

Drafts lie in vLLM's own buffer of draft tokens, -1 where one is missing. Four things are then different from vLLM's
own way with them, and each has one place:

    before the pass   mask rows get the mask token and their positions       `TidarModelState.prepare_inputs`
    the cache         mask rows get the slot -1: their K/V is never stored   `TidarModelState.prepare_attn`
    attention         a row sees intervals of the rows in flight             `backend`, `attention`
    after the pass    which drafts stay, and the next ones                   `sampler`

The runner and the scheduler then take back the rows that did not stay, as they do for any speculative tokens. A prompt
has no mask rows: the request's first step has one draft, d_0. The scheduler may cut a step (a token budget, the end of
the context): then its last rows are missing, and what they would have drafted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from .attention import Rows
from .backend import takes_rows
from .sampler import TidarSampler
from .settings import Settings

__all__ = ["TidarModelState"]


class _Tables(NamedTuple):
    """Of the strategy's pattern, one entry a row of a step, on the device."""

    positions: Tensor
    lead: Tensor
    own: Tensor


class _RowsOfBatch(ModelSpecificAttnMetadata):
    """Hands what rows see to the attention backends that ask for it."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        return {"rows": self.rows} if takes_rows(attn_metadata_builder) else {}


class TidarModelState(DefaultModelState):
    """What the runner asks about a model whose steps have mask rows; see the module."""

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.settings = Settings.of(self.model_config.hf_config.tidar)
        pattern = self.settings.drafting.pattern
        self._drafts = self.settings.drafting.drafts
        self._tables = _Tables(*(x.to(device, torch.int64) for x in (pattern.positions, pattern.lead, pattern.own)))
        self._draft_tokens: Tensor | None = None

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        self._draft_tokens = sampler.req_states.draft_tokens
        return TidarSampler(sampler, self.model, self.settings), None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        # A request that is new, or comes back after a preemption, may be given a whole step at once.
        if self._draft_tokens is not None:
            self._draft_tokens[req_index] = -1

    def prepare_inputs(self, input_batch: InputBatch, req_states: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        # A grammar's mask is put on logits of every row, by the runner.
        self.model.hold_logits = not input_batch.has_structured_output_reqs
        at = self._row_in_step(input_batch)
        tokens = input_batch.input_ids[: input_batch.num_tokens]
        tokens.masked_fill_((at >= self._drafts) | (tokens < 0), self.settings.mask_token_id)
        if not self.settings.causal:
            # Rows come in order, so a row's position is its request's first one and its place; in a step, its own.
            in_step = at.clamp(min=0)
            shift = torch.where(at >= 0, self._tables.positions[in_step] - in_step, 0)
            input_batch.positions[: input_batch.num_tokens].add_(shift)
        return inputs

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: Any,
        block_tables: Any,
        slot_mappings: Any,
        *others: Any,
        **more: Any,
    ) -> dict[str, Any]:
        if self.settings.causal:
            return super().prepare_attn(input_batch, cudagraph_mode, block_tables, slot_mappings, *others, **more)
        count = input_batch.num_tokens
        at = self._row_in_step(input_batch)
        slot_mappings[:, :count].masked_fill_(at >= self._drafts, -1)
        metadata = _RowsOfBatch(self._visible(input_batch, at))
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            *others,
            **more,
            model_specific_attn_metadata=metadata,
        )

    def _row_in_step(self, batch: InputBatch) -> Tensor:
        """int64 `[tokens]`: which row of its step a token is; negative for the prompt's tokens before it."""
        requests, queries = batch.num_reqs, batch.num_scheduled_tokens
        starts = batch.query_start_loc_np[1 : requests + 1] - np.diff(batch.cu_num_logits_np[: requests + 1])
        at = np.arange(batch.num_tokens, dtype=np.int64) - np.repeat(starts, queries)
        return async_tensor_h2d(at, device=self.device)

    def _visible(self, batch: InputBatch, at: Tensor) -> Rows:
        """What each token's row sees of the tokens of its request that are in flight."""
        starts = np.repeat(batch.query_start_loc_np[: batch.num_reqs], batch.num_scheduled_tokens).astype(np.int64)
        place = torch.arange(batch.num_tokens, device=self.device) - async_tensor_h2d(starts, device=self.device)
        in_step, first = at.clamp(min=0), place - at  # first: the place of the step's row 0
        lead = torch.where(at >= 0, first + self._tables.lead[in_step, 1], place + 1)
        own = torch.where((at >= 0)[:, None], first[:, None] + self._tables.own[in_step], 0)
        return Rows(lead.int(), own.int())
