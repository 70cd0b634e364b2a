"""Which drafts of a step stay, and the next ones, for the whole batch and on the device.

The rule is "coupled" (`tidar_kernels.ops.verify`): vLLM's noise is a function of seed, position and token alone, so its
own sampler says for each draft row which token autoregression takes there, and a draft stays while it is that token.
What is generated is what vLLM generates without drafts, whatever a request's temperature, filters and penalties are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from .settings import Settings

__all__ = ["TidarSampler"]


class _DraftRows(NamedTuple):
    """The draft rows of a batch, one request's after the other's; sizes are known on the host.

    Attributes:
        first: int64 `[requests + 1]` on the host, where each request's rows begin among them.
        counts: int64 `[requests]`, how many each request has: 1 after a prompt.
        rows: int64 `[draft rows]`, which of the batch's rows with logits they are.
        local: int32 `[draft rows]`, which of their request's.
        owner: int64 `[draft rows]`, the request's slot in the runner's state.
        dense: int64 `[requests, n]`, the draft rows by request; the last one again where there are fewer.
    """

    first: np.ndarray
    counts: Tensor
    rows: Tensor
    local: Tensor
    owner: Tensor
    dense: Tensor

    @classmethod
    def of(cls, batch: InputBatch, drafts: int) -> _DraftRows:
        device = batch.idx_mapping.device
        starts = batch.cu_num_logits_np[: batch.num_reqs + 1].astype(np.int64)
        counts = np.minimum(np.diff(starts), drafts)
        first = np.concatenate([[0], np.cumsum(counts)])
        local = np.arange(first[-1]) - np.repeat(first[:-1], counts)
        place = np.minimum(np.arange(drafts), counts[:, None] - 1)
        host = [counts, np.repeat(starts[:-1], counts) + local, local, np.repeat(batch.idx_mapping_np, counts)]
        sizes = [len(x) for x in host] + [place.size]
        flat = async_tensor_h2d(np.concatenate([*host, (first[:-1, None] + place).ravel()]), device=device)
        on_device = flat.split(sizes)
        return cls(first, on_device[0], on_device[1], on_device[2].int(), on_device[3], on_device[4].view(-1, drafts))


class TidarSampler:
    """In place of vLLM's sampler, which it calls; see the module.

    Args:
        base: vLLM's.
        model: with `compute_logits`, the lm_head.
        settings: of the checkpoint.
    """

    def __init__(self, base: Any, model: Any, settings: Settings) -> None:
        # Fused samplers draw noise of their own, which no two calls share.
        base.use_flashinfer = base.use_xpu_sampler = False
        self.base, self.model = base, model
        self.drafting, device = settings.drafting, base.req_states.device
        cold = self.drafting.sources[1] if self.drafting.cold is None else self.drafting.cold
        self._sources = torch.cat([self.drafting.sources, cold[None]]).to(device)
        # The scheduler knows no drafts, and gives a grammar's mask for the first row alone.
        self._one_token = torch.zeros(base.req_states.max_num_reqs, dtype=torch.bool, device=device)

    @property
    def penalties_state(self) -> Any:
        return self.base.penalties_state

    @property
    def sampling_states(self) -> Any:
        return self.base.sampling_states

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        self.base.add_request(req_idx, sampling_params)
        self._one_token[req_idx] = sampling_params.structured_outputs is not None

    def apply_staged_writes(self) -> None:
        self.base.apply_staged_writes()

    def __call__(self, hidden: Tensor, batch: InputBatch) -> SamplerOutput:
        """Judge a step's drafts and leave the next ones in the runner's state.

        Args:
            hidden: `[rows with logits, hidden]`; logits `[.., vocab]` where a request has a grammar.
        """
        state, drafts = self.base.req_states, self.drafting.drafts
        layout = _DraftRows.of(batch, drafts)
        logits = self._logits(hidden[layout.rows], batch)
        dims = self.base.get_logprobs_dims(batch.idx_mapping_np)
        at = batch.logits_indices[layout.rows]
        tokens, processed = self._sample(
            logits, batch, len(batch.idx_mapping_np), layout.owner, layout.local, batch.positions[at],
            batch.input_ids[at], return_logprobs=dims is not None,
        )  # fmt: skip
        judged = tokens[layout.dense]
        drafted = state.draft_tokens[batch.idx_mapping, : drafts - 1]
        present = torch.arange(1, drafts, device=tokens.device) < layout.counts[:, None]
        agree = (judged[:, :-1] == drafted) & present & ~self._one_token[batch.idx_mapping, None]
        accepted = 1 + agree.long().cumprod(dim=1).sum(dim=1)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            accepted.to(batch.seq_lens.dtype), batch.seq_lens, batch.cu_num_logits, batch.idx_mapping,
            state.prefill_len.gpu,
        )  # fmt: skip
        following = torch.full_like(drafted, -1)
        steps = int(np.count_nonzero(np.diff(batch.cu_num_logits_np[: batch.num_reqs + 1]) > 1))
        if steps:  # the runner puts them first
            following[:steps] = self._next_drafts(hidden, batch, steps, accepted[:steps], drafted[:steps])
        state.draft_tokens[:, : drafts - 1].index_copy_(0, batch.idx_mapping, following)
        scores = processed if self.base.logprobs_mode in PROCESSED_LOGPROBS_MODES else logits
        return SamplerOutput(
            sampled_token_ids=judged,
            logprobs_tensors=None if dims is None else self._logprobs(scores, tokens, layout, *dims),
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _next_drafts(self, hidden: Tensor, batch: InputBatch, steps: int, accepted: Tensor, drafted: Tensor) -> Tensor:
        """int64 `[steps, n - 1]`: a token of each mask row conditioned on the accepted drafts, -1 for none."""
        count = self.drafting.drafts - 1
        starts = batch.cu_num_logits[: steps + 1].long()
        last = starts[1:] - starts[:-1] - 1
        at = self._sources[torch.where(drafted[:, 0] < 0, count + 2, accepted)]
        rows = starts[:-1, None] + torch.minimum(at.clamp(min=0), last[:, None])
        # The noise of a token is that of the position before it. The accepted drafts end at first + accepted - 1, the
        # token after them is at the next position, and these follow it.
        first = batch.positions[batch.logits_indices[starts[:-1]]]
        positions = first[:, None] + accepted[:, None] + torch.arange(count, device=at.device)
        owner = batch.idx_mapping[:steps].repeat_interleave(count)  # kernels read it as contiguous
        alone = torch.zeros_like(owner, dtype=torch.int32)
        tokens, _ = self._sample(
            self._logits(hidden[rows.reshape(-1)], batch), batch, steps, owner, alone, positions.reshape(-1), alone
        )
        return torch.where((at >= 0) & (at <= last[:, None]), tokens.view(steps, count), -1)

    def _logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        if batch.has_structured_output_reqs:
            return hidden
        logits: Tensor = self.model.compute_logits(hidden)
        return logits

    def _sample(
        self,
        logits: Tensor,
        batch: InputBatch,
        requests: int,
        owner: Tensor,
        local: Tensor,
        positions: Tensor,
        input_ids: Tensor,
        return_logprobs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """vLLM's sampler on rows of the first `requests` requests: a token of each, and the logits it is drawn from."""
        result: tuple[Tensor, Tensor] = self.base.sample(
            logits,
            owner,
            batch.idx_mapping[:requests],
            batch.idx_mapping_np[:requests],
            positions,
            input_ids,
            local,
            batch.seq_lens_cpu_upper_bound.numpy()[:requests],
            return_logprobs=return_logprobs,
        )
        return result

    def _logprobs(
        self, scores: Tensor, tokens: Tensor, layout: _DraftRows, num_logprobs: int, most_token_ids: int
    ) -> LogprobsTensors:
        """Of every draft row; the scheduler takes as many of a request's as it got tokens."""
        return compute_topk_scores(
            scores,
            num_logprobs,
            tokens,
            layout.first.tolist(),
            logprob_token_ids_state=self.base.logprob_token_ids_state,
            expanded_idx_mapping=layout.owner,
            max_per_req_token_ids=most_token_ids,
            logits_mode=self.base.logprobs_mode in ("raw_logits", "processed_logits"),
        )
