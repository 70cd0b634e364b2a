"""The tables of docs/transformers.md, from what the two tools in tests/integrations/transformers/ recorded."""

from __future__ import annotations

from sections import Section
from sections.measured import parts


def models_table() -> str:
    """A line for each model: what about its attention is special, the two errors, and the two equalities."""
    found = []
    for result in parts("compatibility", "cpu"):
        lines = [
            "| model | attention | logits | gradients | `generate` | TiDAR decoding |",
            "| :--- | :--- | ---: | ---: | :---: | :---: |",
        ]
        lines += [
            f"| {row['model']} | {row['special'] or 'causal'} | {_error(row, 'forward')} | {_error(row, 'backward')} "
            f"| {'equal' if row['generate_equal'] else 'NO'}{'' if row['baseline'] == 'sdpa' else ' (eager)'} "
            f"| {'equal' if row['decode_equal'] else 'NO'}, {row['tokens_per_forward']:.2f} a forward |"
            for row in result["rows"]
        ]
        versions = result["versions"]
        software = f"transformers {result['rows'][0]['transformers']}, PyTorch {versions['torch']}"
        found.append("\n".join(lines) + f"\n\n{software}, {result['date']}, {result['machine']['device']}.")
    return "\n\n".join(found)


def _error(row: dict[str, object], which: str) -> str:
    return f"{row[f'{which}_error']:.0e}" if row[f"{which}_parity"] else "NO"


def own_tests_table() -> str:
    """transformers' own tests of two models, as they are and on these kernels."""
    found = []
    for result in parts("own_tests", "cpu"):
        kept = {(row["transformers"], row["tests"], row["class"], row["implementation"]): row for row in result["rows"]}
        releases = [key for key in dict.fromkeys(key[:2] for key in kept) if key[1] != "slow"]
        runs = [(name, run) for name in ("LlamaModelTest", "Qwen3ModelTest") for run in ("sdpa", "tidar")]

        def cell(row: dict[str, int]) -> str:
            return f"{row['passed']} / {row['failed']} / {row['skipped']}"

        lines = [
            '| transformers | tests | Llama, as they are | Llama, `"tidar"` | Qwen3, as they are | Qwen3, `"tidar"` |',
            "| :--- | :--- | ---: | ---: | ---: | ---: |",
            *(f"| {' | '.join([*key, *(cell(kept[(*key, *run)]) for run in runs)])} |" for key in releases),
        ]
        ran = [kept[(*key, name, "tidar")]["on_kernels"] for key in releases for name, run in runs[::2]]
        said = f'Of the passed tests of a class, {min(ran)} to {max(ran)} ran attention of `"tidar"`; '
        said += 'the others make a model `"eager"`, or run none.'
        for version, label in dict.fromkeys(key[:2] for key in kept if key[1] == "slow"):
            passed = ", ".join(str(kept[(version, label, *run)]["passed"]) for run in runs)
            said += " With `RUN_SLOW=1`, the tests of `torch.compile`, `torch.export` and `generate` against "
            said += f'`"eager"`, of {version}: {passed} pass, in the order of the columns.'
        found.append("\n".join(lines) + f"\n\n{said} PyTorch {result['versions']['torch']}, {result['date']}.")
    return "\n\n".join(found)


SECTIONS: dict[str, Section] = {"transformers-models": models_table, "transformers-own-tests": own_tests_table}
