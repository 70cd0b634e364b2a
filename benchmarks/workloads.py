"""What is measured: named tables of cases. A change to one raises `VERSION`, which every row carries.

Heads are those of known models: `(query heads, key/value heads, head dim)`. Qwen3-8B and Llama-3-8B have the same ones,
so attention is measured once for both; their vocabularies differ, which `verify` sees. A block size of 0 is
single-token decoding. Tables are in the order of measurement, what matters most first: a time limit cuts from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidar_kernels import Pattern, patterns

VERSION = 1
HEADS = {"Qwen2.5-1.5B": (12, 2, 128), "Qwen3-8B": (32, 8, 128), "Llama-3-8B": (32, 8, 128), "Qwen3-32B": (64, 8, 128)}
SAME_HEADS = {"Llama-3-8B": "Qwen3-8B"}
VOCABULARIES = {"shipped": 258, "Llama-3-8B": 128256, "Qwen2.5-1.5B": 151936}
BLOCK_SIZES = (0, 4, 8, 16)


@dataclass(frozen=True)
class Step:
    """`step_attention`: one layer of one step over `context_len` committed tokens."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_len: int
    batch: int = 1

    @property
    def pattern(self) -> Pattern:
        """The rows of the step."""
        return patterns.tidar_step(self.block_size) if self.block_size else patterns.causal(1)


@dataclass(frozen=True)
class Append:
    """`append_kv`: `new_tokens` of one layer behind `context_len` committed ones."""

    model: str
    num_kv_heads: int
    head_dim: int
    new_tokens: int
    context_len: int
    batch: int = 1


@dataclass(frozen=True)
class Compact:
    """`compact_kv`: every other of `nodes` nodes of one layer, behind `context_len` committed tokens."""

    model: str
    num_kv_heads: int
    head_dim: int
    nodes: int
    context_len: int
    batch: int = 1


@dataclass(frozen=True)
class RotaryAppend:
    """`rotary_append`: all rows of a step rotated, its drafts appended."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_len: int
    batch: int = 1


@dataclass(frozen=True)
class Verify:
    """`verify` of `block_size` drafts."""

    model: str
    vocab_size: int
    block_size: int
    temperature: float
    batch: int = 1


@dataclass(frozen=True)
class Projection:
    """A row-invariant projection, plain or with an adapter of `rank` on the mask rows."""

    num_rows: int
    in_features: int
    out_features: int
    rank: int


Case = Step | Append | Compact | RotaryAppend | Verify | Projection


def step(model: str, block_size: int, context_len: int, batch: int = 1) -> Step:
    """A step of a model by its name."""
    return Step(model, *HEADS[model], block_size, context_len, batch)


def append(model: str, new_tokens: int, context_len: int, batch: int) -> Append:
    return Append(model, *HEADS[model][1:], new_tokens, context_len, batch)


def compact(model: str, nodes: int, context_len: int, batch: int) -> Compact:
    return Compact(model, *HEADS[model][1:], nodes, context_len, batch)


def rotary_append(model: str, block_size: int, context_len: int, batch: int = 1) -> RotaryAppend:
    return RotaryAppend(model, *HEADS[model], block_size, context_len, batch)


def verify(model: str, temperature: float, block_size: int = 8, batch: int = 1) -> Verify:
    return Verify(model, VOCABULARIES[model], block_size, temperature, batch)


CPU: dict[str, list[Case]] = {
    "step_attention": [
        *(step("Qwen2.5-1.5B", block, context) for context in (512, 2048, 4096) for block in BLOCK_SIZES),
        *(step("Qwen3-8B", 8, context) for context in (512, 4096)),
    ],
    "append_kv": [*(append("Qwen2.5-1.5B", n, 1000, 1) for n in (4, 16)), append("Qwen3-8B", 8, 1000, 4)],
    "compact_kv": [compact("Qwen3-8B", 16, 1000, 4)],
    "rotary_append": [rotary_append("Qwen2.5-1.5B", block, 1000) for block in (4, 8, 16)],
    "verify": [verify(name, t) for name in ("shipped", "Qwen2.5-1.5B") for t in (0.0, 0.8)],
    "projection": [Projection(rows, 1536, 1536, 64) for rows in (1, 20, 72)],
}

# Keys and values of a layer: 4 KiB a token of Qwen3-8B. 16384 tokens are 64 MiB, eight sequences of 8192 are 256 MiB.
CUDA: dict[str, list[Case]] = {
    "step_attention": [
        *(step("Qwen3-8B", block, context) for context in (8192, 32768) for block in (16, 8, 4, 0)),
        *(step("Qwen3-8B", block, 8192, 8) for block in (16, 8, 4, 0)),
        *(step("Qwen2.5-1.5B", block, 8192) for block in (16, 8, 4, 0)),
        *(step("Qwen3-32B", block, 8192) for block in (16, 8, 4, 0)),
        *(step("Qwen3-8B", block, context) for context in (16384, 4096, 512) for block in (16, 8, 4, 0)),
        *(step("Qwen2.5-1.5B", block, context) for context in (32768, 512) for block in (16, 8, 4, 0)),
        *(step("Qwen3-32B", block, 32768) for block in (16, 8, 4, 0)),
    ],
    # From one sequence's drafts to a prefill chunk of many: what a launch costs, and what bandwidth it reaches.
    "append_kv": [
        *(append("Qwen3-8B", n, 4096, batch) for n, batch in ((8, 1), (16, 1), (16, 64), (512, 64))),
        append("Qwen2.5-1.5B", 16, 4096, 64),
    ],
    "compact_kv": [compact("Qwen3-8B", 16, 4096, batch) for batch in (1, 64)],
    "rotary_append": [
        *(rotary_append("Qwen3-8B", block, 4096, batch) for block, batch in ((4, 1), (8, 1), (16, 1), (16, 32))),
        rotary_append("Qwen3-32B", 16, 4096, 32),
    ],
    "verify": [
        *(verify("Qwen2.5-1.5B", t, 16, batch) for batch in (1, 32) for t in (0.0, 0.8)),
        verify("Llama-3-8B", 0.0, 16, 32),
    ],
    "projection": [Projection(rows, 4096, 4096, 64) for rows in (1, 20, 72, 272)],
}

# FlexAttention compiles anew for every case: seconds each. These alone have it on CUDA and on the CPU.
FLEX_CUDA = [
    *(step("Qwen3-8B", block, 8192) for block in (16, 8, 4)),
    step("Qwen3-8B", 16, 32768),
    step("Qwen3-32B", 16, 8192),
    step("Qwen3-8B", 0, 8192),
]
FLEX_CPU = [step("Qwen2.5-1.5B", block, 4096) for block in (4, 8)]

# A dry run: every operator once, at sizes that take no time.
TINY: dict[str, list[Case]] = {
    "step_attention": [Step("tiny", 4, 2, 16, 4, 40), Step("tiny", 4, 2, 16, 0, 40, 2)],
    "append_kv": [Append("tiny", 2, 16, 4, 40, 2)],
    "compact_kv": [Compact("tiny", 2, 16, 6, 40, 2)],
    "rotary_append": [RotaryAppend("tiny", 4, 2, 16, 4, 40)],
    "verify": [Verify("tiny", 40, 4, 0.8)],
    "projection": [Projection(20, 32, 48, 4)],
}
FLEX_TINY = [TINY["step_attention"][0]]
