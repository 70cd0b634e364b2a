"""Which transformers models run on these kernels, and how exactly: tiny random models of the real classes.

    python -m tests.integrations.transformers.compatibility --out benchmarks/results

For each model: logits and gradients under "tidar" against "eager", with left, right and no padding and over the doubled
training sequence; greedy generation against transformers' own; TiDAR decoding against both. The tests assert the same.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.core import record
from tidar_kernels import Decoder, patterns
from tidar_kernels.integrations.transformers.attention import NAME as OURS
from tidar_kernels.testing import Measure, ParityError, budget

VOCAB_SIZE, WINDOW, BLOCK_SIZE, NEW_TOKENS = 96, 8, 4, 64
MASK_TOKEN_ID = VOCAB_SIZE - 1
PADDINGS = ("none", "left", "right")

# Weights far larger than usual: attention is then peaked, and a wrong mask or position does not go unnoticed.
_TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Model:
    """A model class of transformers, its tiny configuration, and what about its attention is special.

    `baseline` is what generation is compared with: transformers' "sdpa", or "eager" where the class has no other.
    """

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    special: str = ""
    baseline: str = "sdpa"
    config: str = ""

    def build(self, seed: int = 0) -> Any:
        """A random model in evaluation mode, float32, `attn_implementation="eager"`."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config or f"{self.family}Config")(**{**_TINY, **self.options})
        config._attn_implementation, config._experts_implementation = "eager", "eager"
        model = getattr(transformers, f"{self.family}ForCausalLM")(config).eval()
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        return model


MODELS = (
    Model("Llama", "Llama"),
    Model("Mistral", "Mistral", {"sliding_window": WINDOW}, "window"),
    Model("Qwen2", "Qwen2", {**_ALTERNATING, "use_sliding_window": True}, "alternating windows"),
    Model("Qwen3", "Qwen3", {"head_dim": 16}),
    Model("Qwen3-MoE", "Qwen3Moe", {"head_dim": 16, **_EXPERTS}, "experts"),
    Model("Phi-3", "Phi3", {"sliding_window": WINDOW}, "window"),
    Model(
        "Gemma 2",
        "Gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0, **_ALTERNATING},
        "softcap, alternating windows",
        "eager",
    ),
    Model(
        "Gemma 3",
        "Gemma3",
        {"head_dim": 32, "query_pre_attn_scalar": 32, **_ALTERNATING},
        "alternating windows",
        config="Gemma3TextConfig",
    ),
    Model("OLMo 2", "Olmo2"),
    Model(
        "SmolLM3",
        "SmolLM3",
        {"no_rope_layers": [1, 0], "use_sliding_window": True, **_ALTERNATING},
        "layers without positions, alternating windows",
    ),
    Model(
        "GPT-OSS",
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_ALTERNATING},
        "sinks, experts, alternating windows",
        "eager",
    ),
)


def padded_inputs(padding: str) -> dict[str, Tensor]:
    """`input_ids [3, 21]` and, but for "none", an `attention_mask` that hides 0, 5 and 13 of them on one side."""
    ids = torch.randint(1, MASK_TOKEN_ID, (3, 21), generator=torch.Generator().manual_seed(1))
    if padding == "none":
        return {"input_ids": ids}
    hidden = torch.tensor([[0], [5], [13]])
    place = torch.arange(21)
    mask = place >= hidden if padding == "left" else place < 21 - hidden
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def training_inputs() -> tuple[dict[str, Tensor], patterns.Pattern]:
    """A doubled training sequence, `input_ids [2, 2 * 18]` with its positions, and its pattern."""
    ids = torch.randint(1, MASK_TOKEN_ID, (2, 18), generator=torch.Generator().manual_seed(2))
    pattern = patterns.tidar_training(18, BLOCK_SIZE)
    masks = torch.full_like(ids, MASK_TOKEN_ID)
    positions = pattern.positions.long()[None].expand(2, -1)
    return {"input_ids": torch.cat([ids, masks], dim=1), "position_ids": positions}, pattern


def _eager_masks(model: Any, visible: Tensor, position: Tensor) -> Any:
    """`visible [batch, rows, keys]` as the 4-D masks that "eager" adds, one for each kind of layer the model has.

    `position [keys]` is for windows. Not the least float64: "eager" takes its softmax in float32, where that is -inf,
    and rows of padding would be NaN.
    """
    near = visible & (position[:, None] - position < WINDOW)
    dtype, least = next(model.parameters()).dtype, torch.finfo(torch.float32).min
    full, sliding = (torch.zeros(x.shape, dtype=dtype).masked_fill(~x, least)[:, None] for x in (visible, near))
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None and len(set(kinds)) > 1:
        return {"full_attention": full, "sliding_attention": sliding}
    return full if getattr(model.config, "sliding_window", None) is None else sliding


def _run(model: Any, inputs: dict[str, Any], real: Tensor) -> tuple[Tensor, Tensor]:
    """Logits where `real [batch, rows]`, and all gradients of a random loss on them, each as one vector."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits[real]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    (logits * weights).sum().backward()
    grads = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return logits.detach().flatten(), torch.cat(grads)


def parity(model: Any) -> Iterator[tuple[str, Measure, Measure]]:
    """`(inputs, logits, gradients)`: how far "tidar" is from "eager" in float64, by the budget rule.

    Raises:
        ParityError: over budget.
    """
    exact = copy.deepcopy(model).double()
    for padding in PADDINGS:
        inputs = padded_inputs(padding)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        visible = real[:, None] & torch.ones(21, 21, dtype=torch.bool).tril()
        yield _compare(model, exact, f"{padding} padding", inputs, inputs, visible, real)
    inputs, pattern = training_inputs()
    visible, real = pattern.dense()[None], torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    yield _compare(
        model,
        exact,
        "training",
        {**inputs, "tidar_pattern": pattern},
        {**inputs, "attention_mask": _eager_masks(model, visible, pattern.positions)},
        visible,
        real,
        pattern.positions,
    )


def _compare(
    model: Any,
    exact: Any,
    name: str,
    inputs: dict[str, Any],
    eager_inputs: dict[str, Any],
    visible: Tensor,
    real: Tensor,
    position: Tensor | None = None,
) -> tuple[str, Measure, Measure]:
    """One line of `parity`: `inputs` under "tidar", `eager_inputs` under "eager", `visible` in float64."""
    given = {key: value for key, value in eager_inputs.items() if key in ("input_ids", "position_ids")}
    position = torch.arange(visible.shape[-1]) if position is None else position
    exact.set_attn_implementation("eager")
    true = _run(exact, {**given, "attention_mask": _eager_masks(exact, visible, position)}, real)
    model.set_attn_implementation("eager")
    eager = _run(model, eager_inputs, real)
    model.set_attn_implementation(OURS)
    own = _run(model, inputs, real)
    logits, grads = (
        budget(own[i], true[i], eager[i], f"{what}, {name}") for i, what in enumerate(("logits", "gradients"))
    )
    return name, logits, grads


def with_few_tokens(model: Any) -> Any:
    """The same model with six tokens that it mostly chooses: random drafts are then often right."""
    with torch.no_grad():
        model.get_output_embeddings().weight[6:] *= 0.05
    return model


def ragged_prompts() -> list[list[int]]:
    """Three prompts of different lengths."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, MASK_TOKEN_ID, (n,), generator=generator).tolist() for n in (5, 11, 14)]


def generated(model: Any, implementation: str, padding: str, **options: Any) -> Tensor:
    """Greedy tokens of `model.generate`, `[3, 21 + NEW_TOKENS]`."""
    model.set_attn_implementation(implementation)
    tokens: Tensor = model.generate(
        **padded_inputs(padding), **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    )
    return tokens


def decoded(model: Any, **options: Any) -> Any:
    """The ragged batch through `Decoder.from_transformers`; in `options` those of `generate` too."""
    sampling = {name: options.pop(name) for name in ("temperature", "seed") if name in options}
    if options.get("mode") != "autoregressive":
        options = {"block_size": BLOCK_SIZE, "mask_token_id": MASK_TOKEN_ID, **options}
    return Decoder.from_transformers(model, **options).generate(ragged_prompts(), NEW_TOKENS, **sampling)


def generate_is_equal(model: Any, baseline: str) -> bool:
    """Greedy generation under "tidar", with and without left padding, gives the tokens of `baseline`."""
    return all(
        torch.equal(generated(model, OURS, padding), generated(model, baseline, padding))
        for padding in ("none", "left")
    )


def decode_is_equal(model: Any, baseline: str) -> tuple[bool, float]:
    """Whether TiDAR decoding gives the tokens of `model.generate`, and sampled those of autoregressive decoding; and
    its greedy tokens a forward pass."""
    result = decoded(model)
    model.set_attn_implementation(baseline)
    same = True
    for prompt, tokens in zip(ragged_prompts(), result.tokens, strict=True):
        own = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        same &= own[0, len(prompt) :].tolist() == tokens
    sampled = [decoded(model, mode=mode, temperature=0.8, seed=5).tokens for mode in ("tidar", "autoregressive")]
    return same and sampled[0] == sampled[1], result.tokens_per_forward


def row(model: Model) -> dict[str, Any]:
    """What the table says of one model."""
    found: dict[str, Any] = {"model": model.name, "class": f"{model.family}ForCausalLM", "special": model.special}
    found["baseline"] = model.baseline
    try:
        measures = list(parity(model.build()))
    except ParityError as error:
        found["failure"] = str(error)
        measures = []
    for what, index in (("forward", 0), ("backward", 1)):
        found[f"{what}_parity"] = bool(measures)
        found[f"{what}_error"] = max((float(f"{pair[index].error:.2g}") for _, *pair in measures), default=None)
    tiny = with_few_tokens(model.build())
    found["generate_equal"] = generate_is_equal(tiny, model.baseline)
    found["decode_equal"], per_forward = decode_is_equal(tiny, model.baseline)
    found["tokens_per_forward"] = round(per_forward, 3)
    return found


CHECKS = ("forward_parity", "backward_parity", "generate_equal", "decode_equal")


def main(arguments: list[str] | None = None, report: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.integrations.transformers.compatibility", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    options = parser.parse_args(arguments)
    rows = []
    for model in MODELS:
        rows.append(row(model))
        report(f"{model.name}: {', '.join(f'{check} {rows[-1][check]}' for check in CHECKS)}")
    extra = {"transformers": transformers.__version__}
    record.add(options.out, "compatibility", "cpu", [{**r, **extra} for r in rows])
    return int(not all(r[check] for r in rows for check in CHECKS))


if __name__ == "__main__":
    sys.exit(main())
