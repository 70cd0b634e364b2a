"""Free token slots: what a forward pass takes with more and more tokens in flight, at several prefixes.

As long as a pass is bound by reading weights and K/V, further tokens cost nothing: these slots are what drafts are put
in (TiDAR, arXiv 2511.08923, figure 1). Measured is the forward pass of a model with its cache, causal rows after the
prefix, and the lm_head on the last row alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from tidar_kernels import KVCache, patterns
from tidar_kernels.decoding.packed import packed_linear

from ..core.operands import OURS, Implementation, Operands, Prepared, workload
from .models import LARGE, SHIPPED, SMALL, fill, floor_of, model_of, packing

Pass = workload("Pass", model=str, tokens=int, context_len=int)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FEW_TOKENS = (1, 2, 4, 8, 20, 72, 272)  # of a step of 4, 8 and 16 drafts the last three


def _ladder(model: str, contexts: tuple[int, ...], tokens: tuple[int, ...] = TOKENS) -> list[Any]:
    return [Pass(model, count, context) for context in contexts for count in tokens]


def _pass(o: TokenSlots) -> Prepared:
    packed = packing(o.device, o.dtype)

    def run() -> Tensor:
        with nullcontext() if packed is None else packed_linear(packed):
            return o.model.logits(o.model(o.tokens, o.pattern, o.cache)[:, -1:])

    return Prepared(run)


class TokenSlots(Operands):
    """A forward pass of `tokens` rows after `context_len` committed tokens."""

    operator = "token_slots"
    workload = Pass
    implementations: ClassVar = {OURS: Implementation("tidar_kernels", _pass)}
    cpu = tuple(_ladder(SHIPPED, (128, 1024, 4096)))
    small = tuple(_ladder(SMALL, (512,), FEW_TOKENS))
    cuda = tuple(case for model in LARGE for case in _ladder(model, (512, 4096, 32768)))
    tiny = tuple(_ladder("tiny", (24,), (1, 8)))
    sets = 1  # weights are larger than any cache

    def make(self) -> None:
        case = self.case
        self.model = model_of(case.model, self.device, self.dtype)
        config = self.model.config
        self.pattern = patterns.causal(case.tokens)
        self.cache = KVCache(
            num_layers=config.num_layers,
            batch_size=1,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_len=case.context_len + case.tokens,
            dtype=self.dtype,
            device=self.device,
        )
        fill(self.cache, case.context_len)
        self.tokens = torch.randint(config.vocab_size, (1, case.tokens), device=self.device)

    def check(self, name: str, prepared: Prepared) -> float:
        if not bool(prepared.run().isfinite().all()):
            raise self.wrong(name, "finite logits, got others")
        return 0.0

    def floor(self, name: str = OURS) -> dict[str, float]:
        return floor_of(self.model.config, self.pattern, self.case.context_len, self.dtype, logits_rows=1)
