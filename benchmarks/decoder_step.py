"""Whole decoder steps at the shapes of known models, random weights: latency does not depend on them.

Every step is one CUDA graph, the autoregressive one too. Beside it stands its floor: the weights and the K/V read once
at the measured bandwidth, or the multiplications at the measured rate, whichever takes longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tidar_kernels.decoding import strategies
from tidar_kernels.decoding.session import Session, Step
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.patterns import Pattern

from . import rates, record, row, timing

BLOCK_SIZES = (0, 4, 8, 16)  # 0: autoregressive
CONTEXTS = (512, 4096, 32768)


@dataclass(frozen=True)
class Asked:
    """What tells one row from the others."""

    model: str
    block_size: int
    context_len: int


@dataclass(frozen=True)
class Shape:
    """A model's shape, and the tokens a forward pass that TiDAR (arXiv 2511.08923) publishes for it, by block size."""

    name: str
    config: TransformerConfig
    published: dict[int, float]


def _shape(name: str, sizes: tuple[int, int, int, int, int], published: dict[int, float]) -> Shape:
    hidden, intermediate, layers, heads, kv_heads = sizes
    return Shape(name, TransformerConfig(151936, hidden, intermediate, layers, heads, kv_heads, 128), published)


SHAPES = (
    _shape("Qwen2.5-1.5B", (1536, 8960, 28, 12, 2), {8: 5.69, 16: 7.35}),
    _shape("Qwen3-8B", (4096, 12288, 36, 32, 8), {16: 8.36}),
)


def model_floor(
    config: TransformerConfig, pattern: Pattern, context: int, dtype: torch.dtype, *, batch: int = 1, logits_rows: int
) -> dict[str, float]:
    """Bytes and FLOPs that no forward pass over `pattern` can avoid: weights and K/V read once, and every product.

    `logits_rows` is how many rows of the whole batch the lm_head runs on.
    """
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    layers = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    intervals = int((pattern.lead[:, 1] - pattern.lead[:, 0] + pattern.own[:, 1] - pattern.own[:, 0]).sum())
    pairs = batch * (pattern.q_len * context + intervals)
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (context + pattern.q_len) * batch
    flops = 2.0 * layers * pattern.q_len * batch + 2.0 * head * logits_rows
    flops += 4.0 * pairs * config.head_dim * config.num_heads * config.num_layers
    return {"rows": pattern.q_len * batch, "bytes": float((layers + head + kv) * dtype.itemsize), "flops": flops}


def random_model(config: TransformerConfig, device: str, dtype: torch.dtype) -> Transformer:
    """A model of random weights, made where it is used."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Transformer(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)


def measure(
    model: Transformer,
    shape: Shape,
    asked: Asked,
    known: rates.Rates,
    timer: Callable[[Callable[[], Any]], dict[str, float]],
) -> dict[str, Any]:
    """The figures of one step."""
    weight, mask, context = model.embed_tokens.weight, shape.config.vocab_size - 1, asked.context_len
    strategy = strategies.tidar(asked.block_size) if asked.block_size else strategies.autoregressive()
    session = Session(model, Step(strategy, mask), 1, context + max(asked.block_size, 1))
    # No request runs: the step is the same, and commits nothing, so that every repetition is alike.
    session.cache.k.normal_()
    session.cache.v.normal_()
    session.cache.lengths.fill_(context)
    session.cache.lengths_known([context])
    with torch.inference_mode():
        measured = timer(session.replayed())
    # The lm_head: on the drafts, and on the chosen block without its first row.
    least = model_floor(shape.config, strategy.pattern, context, weight.dtype, logits_rows=2 * strategy.drafts - 1)
    line = {**least, **row.figures(measured, least), **record.clocks(weight.device.type)}
    return line | known.against({"dtype": str(weight.dtype).removeprefix("torch."), **line})


def steps(
    shape: Shape,
    block_sizes: Sequence[int],
    contexts: Sequence[int],
    known: rates.Rates,
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    timer: Callable[[Callable[[], Any]], dict[str, float]] = timing.time_stream,
    deadline: float = float("inf"),
    rows: record.Rows | None = None,
) -> Iterator[dict[str, Any]]:
    """One row a block size and context, the autoregressive step of each context first, which is measured in any case;
    others are left alone where `rows` has them. What fails has a row with the reason."""
    rows = row.Held() if rows is None else rows
    model = random_model(shape.config, device, dtype)
    for context in contexts:
        baseline = 0.0
        for block in block_sizes:
            if time.perf_counter() > deadline:
                return
            asked = Asked(shape.name, block, context)
            line = row.head("decoder_step", "tidar" if block else "autoregressive", device, dtype, vars(asked))
            if block and rows.has(line["command"]):
                continue
            rows.begin(line)
            try:
                line |= measure(model, shape, asked, known, timer)
            except Exception as failure:
                line["not_available"] = row.reason(failure)
            else:
                baseline = baseline or line["p50_us"]
                line["of_autoregressive"] = round(line["p50_us"] / baseline, 4)
                if block in shape.published:
                    line["projected_speedup"] = round(shape.published[block] * baseline / line["p50_us"], 3)
            rows.put(line)
            yield line
            if "not_available" in line:
                row.check_device(device)


def one(
    implementation: str, device: str, dtype: torch.dtype, fields: Sequence[str], known: rates.Rates
) -> list[dict[str, Any]]:
    """The row of a command line, `model= block_size= context_len=`; the autoregressive step is measured beside it."""
    asked = row.parse(Asked, fields)
    shapes = {shape.name: shape for shape in SHAPES}
    if asked.model not in shapes:
        raise ValueError(f"model: expected one of {', '.join(shapes)}, got {asked.model}")
    blocks = tuple(dict.fromkeys((0, asked.block_size)))
    timer = timing.time_stream if device == "cuda" else timing.time_cpu
    found = steps(shapes[asked.model], blocks, (asked.context_len,), known, device=device, dtype=dtype, timer=timer)
    return list(found)[-1:]


def describe(line: dict[str, Any]) -> str:
    """A row as a line."""
    if "not_available" in line:
        return f"{line['model']:14} B={line['block_size']:<3} P={line['context_len']:<6} {line['not_available']}"
    share = f"  {100 * line['of_floor']:5.1f} % of the floor" if "of_floor" in line else ""
    speedup = f"  projected {line['projected_speedup']:.2f} x" if "projected_speedup" in line else ""
    return (
        f"{line['model']:14} B={line['block_size']:<3} P={line['context_len']:<6} {line['p50_us']:9.1f} us"
        f"{share}  {line['of_autoregressive']:5.2f} x autoregressive{speedup}"
    )
