"""`exact=True` in bfloat16 over a thousand tokens: texts and committed bits against one token at a time, and its cost.

    python -m benchmarks.decoding.exactness [MODEL --title "SmolLM2-135M-Instruct"] [--tokens 1000] [--out DIR]

Without MODEL, a model of random weights with the widths of Qwen3-0.6B, of four layers and a small vocabulary. Sampled,
so that every logit counts. The cost of a pass is processor time, with `exact` over without, of batches of 1 and of 8
requests. A part of the results file; docs/exact.md shows it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import record
from tidar_kernels import Decoder
from tidar_kernels.cache import KVCache
from tidar_kernels.decoding.strategies import StrategyName

STRATEGIES: dict[StrategyName, int] = {"tidar": 4, "isd": 4}
RANDOM = "random weights, widths of Qwen3-0.6B"
_COST_TOKENS, _WITHOUT_TOKENS = 12, 100
PROMPT = [1 + 7 * token % 251 for token in range(40)]


def random_model(seed: int = 0) -> Any:
    """A Qwen3 of four layers: 1,024 wide, 16 heads over 8, 128 each, as Qwen3-0.6B has them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=8192, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: Any = Qwen3ForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def decoder(model: Any, strategy: StrategyName | None, exact: bool) -> Decoder:
    if strategy is None:
        return Decoder.from_transformers(model, mode="autoregressive", exact=exact)
    return Decoder.from_transformers(
        model, strategy=strategy, block_size=STRATEGIES[strategy], mask_token_id=2, exact=exact
    )


def sample(model: Any, strategy: StrategyName | None, exact: bool, prompts: list[list[int]], tokens: int) -> Any:
    return decoder(model, strategy, exact).generate(prompts, tokens, temperature=0.8, seed=3)


def same_bits(found: KVCache, expected: KVCache, length: int) -> bool:
    """Whether the keys and values of the first `length` tokens are equal in every bit."""
    pairs = ((found.k, expected.k), (found.v, expected.v))
    return all(
        torch.equal(a[..., :length, :].view(torch.int16), b[..., :length, :].view(torch.int16)) for a, b in pairs
    )


def seconds_a_pass(model: Any, strategy: StrategyName | None, exact: bool, batch: int) -> float:
    """Processor time of a pass after the prompt's."""
    prompts = [PROMPT] * batch
    sample(model, strategy, exact, prompts, 2)
    times = []
    for tokens in (1, _COST_TOKENS):
        started = time.process_time()
        result = sample(model, strategy, exact, prompts, tokens)
        times.append((time.process_time() - started, result.forwards))
    (first, few), (second, many) = times
    return (second - first) / (many - few)


def without(model: Any, strategy: StrategyName | None, expected: list[int]) -> list[int]:
    """`[tokens, of them before the first that differs]` where rows are not exact."""
    found = sample(model, strategy, False, [PROMPT], len(expected)).tokens[0]
    same = [a == b for a, b in zip(found, expected, strict=True)]
    return [len(expected), [*same, False].index(False)]


def measure(model: Any, title: str, tokens: int) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, one for each strategy and one token at a time first; then, row by row, with the cost."""
    expected, length = sample(model, None, True, [PROMPT], tokens), len(PROMPT) + tokens - 1
    rows: list[dict[str, Any]] = []
    for strategy in (None, *STRATEGIES):
        found = expected if strategy is None else sample(model, strategy, True, [PROMPT], tokens)
        rows.append(
            {
                "model": title,
                "strategy": strategy or "autoregressive",
                "block_size": 1 if strategy is None else STRATEGIES[strategy],
                "tokens": tokens,
                "equal": sum(a == b for a, b in zip(found.tokens[0], expected.tokens[0], strict=True)),
                "equal_bits": same_bits(found.cache, expected.cache, length),
                "equal_without": without(model, strategy, expected.tokens[0][:_WITHOUT_TOKENS]),
            }
        )
        yield rows
    for row, strategy in zip(rows, (None, *STRATEGIES), strict=True):
        row["cost"] = {
            str(batch): round(
                seconds_a_pass(model, strategy, True, batch) / seconds_a_pass(model, strategy, False, batch), 2
            )
            for batch in (1, 8)
        }
        yield rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoding.exactness", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", nargs="?", help="a folder, or a name on the Hub; default random weights")
    parser.add_argument("--title", default=RANDOM, help="what the page calls the model")
    parser.add_argument("--tokens", type=int, default=1000, metavar="N", help="to decode; default 1000")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    options = parser.parse_args(arguments)
    if options.model is None:
        model = random_model()
    else:
        from tidar_kernels.integrations.transformers import loading

        model, _ = loading.load(options.model, torch.bfloat16)
    said = "" if options.model is None else f' MODEL --title "{options.title}"'
    command = f"python -m benchmarks.decoding.exactness{said} --tokens {options.tokens}"
    part = "exactness" if options.model is None else "exactness_model"
    for rows in measure(model, options.title, options.tokens):  # what there is stays, if the run is cut short
        print(rows[-1], file=sys.stderr, flush=True)
        record.add(options.out, part, "cpu", [row | {"command": command} for row in rows])
    return 0 if all(row["equal"] == row["tokens"] and row["equal_bits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
