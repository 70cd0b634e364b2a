"""`verify`: the drafts of a step."""

from __future__ import annotations

from typing import ClassVar

import torch

import tidar_kernels as tk
from tidar_kernels.ops.verify import sampling_tensors

from ..core.operands import OURS, Expected, Implementation, Operands, workload
from .models import VOCABULARIES

Drafts = workload("Drafts", model=str, vocab_size=int, block_size=int, temperature=float, batch=1)


class Verify(Operands):
    """`block_size` drafts of each sequence."""

    operator = "verify"
    workload = Drafts
    implementations: ClassVar = {
        # Unchecked, as in a step: nothing is read back.
        OURS: Implementation(OURS, lambda o: lambda: tk.verify(o.logits, o.drafts, o.positions, o.params, check=False)),
        # The least that looks at every logit.
        "argmax": Implementation("argmax of the same logits", lambda o: lambda: o.logits.argmax(-1), ceiling=True),
    }
    cpu = tuple(Drafts(name, VOCABULARIES[name], 8, t) for name in ("shipped", "Qwen2.5-1.5B") for t in (0.0, 0.8))
    cuda = (
        *(Drafts("Qwen2.5-1.5B", VOCABULARIES["Qwen2.5-1.5B"], 16, t, batch) for batch in (1, 32) for t in (0.0, 0.8)),
        Drafts("Llama-3-8B", VOCABULARIES["Llama-3-8B"], 16, 0.0, 32),
    )
    tiny = (Drafts("tiny", 40, 4, 0.8),)

    def make(self) -> None:
        case = self.case
        self.logits = self.random(case.batch, case.block_size, case.vocab_size) * 3
        self.positions = torch.ones(case.batch, dtype=torch.int64, device=self.device)
        asked = [tk.SamplingParams(case.temperature, seed=b) for b in range(case.batch)]
        self.params = sampling_tensors(asked, self.device)
        picks = tk.sample(self.logits, self.positions, self.params, backend="eager")
        self.drafts = torch.cat([picks[:, :1], picks[:, :-1]], dim=1)
        # Sequence b rejects its draft number b, the first one, which none can, excepted.
        wrong = torch.arange(case.batch, device=self.device) % case.block_size
        rejects = wrong > 0
        self.drafts[rejects, wrong[rejects]] += 1
        self.drafts %= case.vocab_size

    def expected(self, name: str) -> list[Expected]:
        return [Expected(x) for x in tk.verify(self.logits, self.drafts, self.positions, self.params, backend="eager")]

    def floor(self, name: str = OURS) -> dict[str, float]:
        return {"rows": self.case.block_size, "bytes": float(self.logits.nbytes), "flops": 0.0}
