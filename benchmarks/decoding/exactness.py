"""`exact=True` in bfloat16 over a thousand tokens: texts and committed bits against one token at a time, and its cost.

    python -m benchmarks.decoding.exactness [MODEL --title "SmolLM2-135M-Instruct"] [--tokens 1000 | --cost]
        [--only STRATEGY] [--out DIR]

Without MODEL, a model of random weights with the widths of Qwen3-0.6B, of four layers and a small vocabulary. Sampled,
so that every logit counts. With `--cost`, processor time of a pass instead, of batches of 1 and of 8 requests: plain
and exact passes take turns, so that both see the same machine, and each turn gives a ratio of its own.

Parts of the results file; a row measured anew replaces the one that the same command measured. docs/exact.md shows
them. A run that was cut short need not decode the text to compare with again: `OUT/exactness-*.pt` has it till the end.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.core import record
from tidar_kernels import Decoder
from tidar_kernels.cache import KVCache
from tidar_kernels.decoding.strategies import StrategyName

from .human_eval import fingerprint

STRATEGIES: dict[StrategyName, int] = {"tidar": 4, "isd": 4}
AUTOREGRESSIVE = "autoregressive"
RANDOM = "random weights, widths of Qwen3-0.6B"
BATCHES = (1, 8)
_COST_TOKENS, _COST_TURNS, _WITHOUT_TOKENS = 12, 5, 100
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
    times = []
    for tokens in (1, _COST_TOKENS):
        started = time.process_time()
        result = sample(model, strategy, exact, [PROMPT] * batch, tokens)
        times.append((time.process_time() - started, result.forwards))
    (first, few), (second, many) = times
    return (second - first) / (many - few)


def cost(model: Any, title: str, strategy: StrategyName | None, batch: int) -> dict[str, Any]:
    """The row of a strategy's passes: medians over turns, in ms, and exact over plain of each turn, in order."""
    for exact in (False, True):
        sample(model, strategy, exact, [PROMPT] * batch, 2)
    turns = [
        tuple(seconds_a_pass(model, strategy, exact, batch) for exact in (False, True)) for _ in range(_COST_TURNS)
    ]
    plain, exact = (round(1e3 * statistics.median(times), 2) for times in zip(*turns, strict=True))
    ratios = sorted(round(exact / plain, 3) for plain, exact in turns)
    return {**named(title, strategy), "batch": batch, "plain_ms": plain, "exact_ms": exact, "ratios": ratios}


def named(title: str, strategy: StrategyName | None) -> dict[str, Any]:
    block_size = 1 if strategy is None else STRATEGIES[strategy]
    return {"model": title, "strategy": strategy or AUTOREGRESSIVE, "block_size": block_size}


def without(model: Any, strategy: StrategyName | None, expected: list[int]) -> list[int]:
    """`[tokens, of them before the first that differs]` where rows are not exact."""
    found = sample(model, strategy, False, [PROMPT], len(expected)).tokens[0]
    same = [a == b for a, b in zip(found, expected, strict=True)]
    return [len(expected), [*same, False].index(False)]


def reference(model: Any, tokens: int, path: Path) -> Any:
    """The exact text, decoded one token at a time, with its keys and values; from the file `path` if it is there."""
    if path.exists():
        kept = torch.load(path)
        return SimpleNamespace(tokens=kept["tokens"], cache=SimpleNamespace(k=kept["k"], v=kept["v"]))
    found = sample(model, None, True, [PROMPT], tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"tokens": found.tokens, "k": found.cache.k, "v": found.cache.v}, path)
    return found


def measure(model: Any, title: str, tokens: int, strategy: StrategyName | None, expected: Any) -> dict[str, Any]:
    """The row of a strategy (None: one token at a time); `expected` is exact, a token at a time."""
    found = expected if strategy is None else sample(model, strategy, True, [PROMPT], tokens)
    return {
        **named(title, strategy),
        "tokens": tokens,
        "equal": sum(a == b for a, b in zip(found.tokens[0], expected.tokens[0], strict=True)),
        "equal_bits": same_bits(found.cache, expected.cache, len(PROMPT) + tokens - 1),
        "equal_without": without(model, strategy, expected.tokens[0][:_WITHOUT_TOKENS]),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoding.exactness", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", nargs="?", help="a folder, or a name on the Hub; default random weights")
    parser.add_argument("--title", default=RANDOM, help="what the page calls the model")
    parser.add_argument("--tokens", type=int, default=1000, metavar="N", help="to decode; default 1000")
    parser.add_argument("--cost", action="store_true", help="time passes instead")
    parser.add_argument("--only", choices=(AUTOREGRESSIVE, *STRATEGIES), help="this row alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    options = parser.parse_args(arguments)
    if options.model is None:
        model = random_model()
    else:
        from tidar_kernels.integrations.transformers import loading

        model, _ = loading.load(options.model, torch.bfloat16)
    said = "" if options.model is None else f' MODEL --title "{options.title}"'
    command = f"python -m benchmarks.decoding.exactness{said}"
    chosen = [name for name in (None, *STRATEGIES) if options.only in (None, name or AUTOREGRESSIVE)]
    if options.cost:
        rows = record.Rows(options.out, "exactness_cost", "cpu", resume=True)
        for strategy, batch in itertools.product(chosen, BATCHES):
            row = cost(model, options.title, strategy, batch)
            row["command"] = f"{command} --cost --only {row['strategy']}  # batch {batch}"
            rows.put(row)
            print(row, file=sys.stderr, flush=True)
        return 0
    part = "exactness" if options.model is None else "exactness_model"
    rows = record.Rows(options.out, part, "cpu", resume=True)
    text = options.out / f"exactness-{fingerprint(model):08x}-{options.tokens}.pt"
    expected = reference(model, options.tokens, text)
    failed = False
    for strategy in chosen:  # what there is stays, if the run is cut short
        row = measure(model, options.title, options.tokens, strategy, expected)
        row["command"] = f"{command} --tokens {options.tokens} --only {row['strategy']}"
        rows.put(row)
        print(row, file=sys.stderr, flush=True)
        failed |= row["equal"] < row["tokens"] or not row["equal_bits"]
    text.unlink()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
