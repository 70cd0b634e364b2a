"""`verify`: the drafts of a step."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

import tidar_kernels as tk
from tidar_kernels.ops.verify import sampling_tensors

from ..core.operands import OURS, Expected, Implementation, Operands, workload
from .models import VOCABULARIES

Drafts = workload(
    "Drafts", model=str, vocab_size=int, block_size=int, temperature=float, batch=1,
    top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
)  # fmt: skip
# Options of sampling, each of which costs something of its own.
SHAPINGS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.95},
    {"top_k": 50, "top_p": 0.95},
    {"min_p": 0.05},
    {"top_p": 0.95, "repetition_penalty": 1.1},
)
LARGE = ("Llama-2-7B", "Qwen2.5-1.5B", "Gemma-3-4B")


class Verify(Operands):
    """`block_size` drafts of each sequence."""

    operator = "verify"
    workload = Drafts
    implementations: ClassVar = {
        # Unchecked, as in a step: nothing is read back.
        OURS: Implementation(OURS, lambda o: lambda: tk.verify(*o.given, seen=o.seen, check=False)),
        # The least that looks at every logit.
        "argmax": Implementation("argmax of the same logits", lambda o: lambda: o.logits.argmax(-1), ceiling=True),
    }
    cpu = (
        *(Drafts(name, VOCABULARIES[name], 8, t) for name in ("shipped", "Qwen2.5-1.5B") for t in (0.0, 0.8)),
        *(Drafts("Qwen2.5-1.5B", VOCABULARIES["Qwen2.5-1.5B"], 8, 0.8, **shaping) for shaping in SHAPINGS[1:]),
        *(Drafts(name, VOCABULARIES[name], 8, 0.8, top_p=0.95) for name in LARGE if name != "Qwen2.5-1.5B"),
    )
    cuda = (
        *(Drafts("Qwen2.5-1.5B", VOCABULARIES["Qwen2.5-1.5B"], 16, 0.0, batch) for batch in (1, 32)),
        Drafts("Llama-3-8B", VOCABULARIES["Llama-3-8B"], 16, 0.0, 32),
        *(Drafts(name, VOCABULARIES[name], 16, 0.8, **shaping) for name in LARGE for shaping in SHAPINGS),
        *(Drafts("Qwen2.5-1.5B", VOCABULARIES["Qwen2.5-1.5B"], 16, 0.8, 32, **shaping) for shaping in SHAPINGS[:2]),
    )
    tiny = (Drafts("tiny", 40, 4, 0.8),)

    def make(self) -> None:
        case = self.case
        self.logits = self.random(case.batch, case.block_size, case.vocab_size) * 3
        self.positions = torch.ones(case.batch, dtype=torch.int64, device=self.device)
        shaping = (case.temperature, case.top_k, case.top_p, case.min_p, case.repetition_penalty)
        asked = [tk.SamplingParams(*shaping, seed=b) for b in range(case.batch)]
        self.params = sampling_tensors(asked, self.device)
        self.seen = None
        if case.repetition_penalty != 1.0:
            self.seen = self.random(case.batch, case.vocab_size) > 2.0  # one token in 40
        self.drafts = torch.zeros(case.batch, case.block_size, dtype=torch.int64, device=self.device)
        seen = self.seen
        for i in range(case.block_size - 1):  # each draft is what its row takes, which has seen those before it
            if seen is not None:
                seen = seen.scatter(1, self.drafts[:, i : i + 1], True)
            row, at = self.logits[:, i : i + 1], self.positions + i
            self.drafts[:, i + 1] = tk.sample(row, at, self.params, seen=seen, backend="eager")[:, 0]
        # Sequence b rejects its draft number b, the first one, which none can, excepted.
        wrong = torch.arange(case.batch, device=self.device) % case.block_size
        rejects = wrong > 0
        self.drafts[rejects, wrong[rejects]] += 1
        self.drafts %= case.vocab_size
        self.given = (self.logits, self.drafts, self.positions, self.params)

    def expected(self, name: str) -> list[Expected]:
        return [Expected(x) for x in tk.verify(*self.given, seen=self.seen, backend="eager")]

    def floor(self, name: str = OURS) -> dict[str, float]:
        return {"rows": self.case.block_size, "bytes": float(self.logits.nbytes), "flops": 0.0}
