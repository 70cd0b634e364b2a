"""Sampling by `tidar-kernels generate`, with the shipped model; and the Python of docs/sampling.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.shell import PROMPT, Run
from tests.paths import REPOSITORY
from tidar_kernels import Decoder, cli
from tidar_kernels.cli import common, generate
from tidar_kernels.cli.sampling import Sampling
from tidar_kernels.models import load_shipped, save_checkpoint
from tidar_kernels.ops.verify import SamplingParams

ARGUMENTS = ("generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--device", "cpu", "--threads", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], one_thread: None) -> Run:
    """Run `generate` in this process: `(exit code, standard output, standard error)`."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([*ARGUMENTS, *(str(argument) for argument in arguments)])
        return code, *capsys.readouterr()

    return call


def report_of(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert (code, err) == (0, "")
    report: dict[str, Any] = json.loads(out)
    return report


def test_greedy_is_the_default(run: Run) -> None:
    report = report_of(run("--json"))
    plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    assert report["sampling"] == plain | {"rule": "coupled", "beta": 1.0}
    assert SamplingParams(**plain) == SamplingParams()


OPTIONS = {
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 0.97,
    "min_p": 0.001,
    "repetition_penalty": 1.1,
    "seed": 2**64 - 1,
}


@pytest.mark.parametrize("rule", ["coupled", "rejection", "point_mass"])
def test_every_option_reaches_the_decoder(run: Run, rule: str) -> None:
    options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", value)]
    report = report_of(run("--sampling", rule.replace("_", "-"), "--beta", 0.75, "--json", *options))
    assert report["sampling"] == OPTIONS | {"rule": rule, "beta": 0.75}
    model, tokenizer = load_shipped()
    decoder = Decoder(model, sampling=rule, beta=0.75)
    assert [report["tokens"]] == decoder.generate([tokenizer.encode(PROMPT)], 24, **OPTIONS).tokens


def test_each_option_has_an_effect(run: Run) -> None:
    def tokens(*options: Any) -> list[int]:
        found: list[int] = report_of(run("--temperature", 1.5, "--json", *options))["tokens"]
        return found

    plain, greedy = tokens(), report_of(run("--json"))["tokens"]
    assert plain == tokens()
    assert plain != greedy
    for change in (("--seed", 1), ("--top-p", 0.5), ("--min-p", 0.5), ("--repetition-penalty", 3), ("--beta", 0)):
        assert tokens(*change) != plain, change
    assert tokens("--top-k", 1) == greedy


def test_coupled_outputs_are_identical(run: Run) -> None:
    options = ("--temperature", 0.8, "--top-p", 0.95, "--seed", 3, "--compare")
    report = report_of(run(*options, "--json"))
    assert (report["identical"], report["promise"]) == (True, "tokens")
    assert report["modes"]["tidar"]["tokens"] == report["modes"]["autoregressive"]["tokens"]
    code, out, _ = run(*options)
    assert code == 0
    assert "; temperature 0.8, top-p 0.95, coupled, seed 3; cpu, " in out
    assert out.endswith("\noutputs identical: yes\n")


@pytest.mark.parametrize(
    ("options", "promise", "verdict"),
    [
        (
            ("--temperature", 1.2, "--sampling", "rejection"),
            "distribution",
            "same distribution: by the rejection rule; the tokens may differ, and are not compared",
        ),
        (
            ("--temperature", 1.2, "--sampling", "point-mass"),
            "distribution",
            "same distribution: by the point-mass rule; the tokens may differ, and are not compared",
        ),
        (
            ("--temperature", 1.2, "--beta", 0.5),
            "none",
            "outputs not compared: with --beta below 1 the diffusion logits have a say",
        ),
    ],
)
def test_outputs_that_differ_by_design_do_not_fail(
    run: Run, options: tuple[Any, ...], promise: str, verdict: str
) -> None:
    report = report_of(run(*options, "--compare", "--json"))
    assert (report["identical"], report["promise"]) == (False, promise)
    code, out, err = run(*options, "--compare")
    assert (code, err) == (0, "")
    assert out.endswith(f"\n{verdict}\n")
    assert "identical" not in out
    assert "first difference" not in out


@pytest.mark.parametrize("options", [("--temperature", 1.2), ("--sampling", "rejection")], ids=["coupled", "greedy"])
def test_outputs_that_must_not_differ_fail(run: Run, options: tuple[Any, ...], tampered: None) -> None:
    code, out, err = run(*options, "--compare")
    assert (code, err) == (1, "")
    assert out.endswith("first difference: new token 7\noutputs identical: no\n")


def test_settings_in_words() -> None:
    def words(rule: Any = "coupled", beta: float = 1.0, **changes: Any) -> str:
        greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
        return str(Sampling(greedy | changes, rule, beta))

    assert words() == words(top_k=3, seed=5, rule="rejection") == "greedy"
    assert words(repetition_penalty=1.2, beta=0.5) == "greedy, repetition-penalty 1.2, beta 0.5"
    assert words("point_mass", temperature=0.7, top_k=9) == "temperature 0.7, top-k 9, point-mass, seed 0"


BAD = [
    ("--temperature", ["-0.1", "nan", "inf", "warm", "1e-40"], "0, or a number in [1e-4, 1e4]"),
    ("--top-k", ["-1", "2.5", str(2**31)], "a 32-bit whole number >= 0"),
    ("--top-p", ["0", "1.01", "nan"], "a number in (0, 1]"),
    ("--min-p", ["-0.01", "1.01", "nan"], "a number in [0, 1]"),
    ("--repetition-penalty", ["0", "-1", "inf", "nan", "1e-300"], "a number in [1e-4, 1e4]"),
    ("--seed", ["x", "1.0", str(2**64), str(-(2**63) - 1)], "a 64-bit whole number"),
    ("--beta", ["-0.01", "1.01", "nan"], "a number in [0, 1]"),
]


@pytest.mark.parametrize(
    ("option", "value", "expected"), [(option, value, expected) for option, values, expected in BAD for value in values]
)
def test_values_out_of_range(run: Run, option: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(options: Any) -> None:
        raise AssertionError("expected no model to be loaded")

    monkeypatch.setattr(generate, "load_model", load)
    code, out, err = run(f"{option}={value}")
    assert (code, out) == (2, "")
    assert err == (
        f"tidar-kernels: error: {option}: expected {expected}, got '{value}' (see tidar-kernels generate --help)\n"
    )


def test_the_edges_are_in_range() -> None:
    parser = cli.build_parser()
    for option, values in {
        "--temperature": ["0", "1e-4", "1e4"],
        "--top-k": ["0", str(2**31 - 1)],
        "--top-p": ["1e-9", "1"],
        "--min-p": ["0", "1"],
        "--seed": [str(-(2**63)), str(2**64 - 1)],
        "--beta": ["0", "1"],
    }.items():
        for value in values:
            found = getattr(parser.parse_args(["generate", "--demo", option, value]), option[2:].replace("-", "_"))
            assert found == float(value) or found == int(value)
            if option != "--beta":
                SamplingParams(**{option[2:].replace("-", "_"): found})


def test_a_rule_that_there_is_not(run: Run) -> None:
    code, out, err = run("--sampling", "typical")
    assert (code, out) == (2, "")
    assert err.startswith("tidar-kernels: error: --sampling: invalid choice: 'typical'")


def test_a_bad_value_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from tidar_kernels import cli\n"
        "status = cli.main(['generate', '--demo', '--top-p', '2'])\n"
        "print(status, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, text=True, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("tidar-kernels: error: --top-p: ")


@pytest.mark.parametrize("mode", ["tidar", "autoregressive"])
def test_a_model_without_finite_logits_is_refused(run: Run, tmp_path: Path, mode: str) -> None:
    model, _ = load_shipped()
    with torch.no_grad():
        next(iter(model.parameters()))[ord("d")] = torch.nan
    save_checkpoint(model, tmp_path / "broken.safetensors")
    code, out, err = run("--checkpoint", tmp_path / "broken.safetensors", "--temperature", 0.8, "--mode", mode)
    assert (code, out) == (2, "")
    assert err == (
        "tidar-kernels: error: --checkpoint: expected a model with finite logits, got NaN or inf after 0 new tokens\n"
    )


def test_number() -> None:
    even = common.number(int, lambda value: value % 2 == 0, "an even number")
    assert even("-4") == -4
    for text in ("3", "4.0", ""):
        with pytest.raises(common.argparse.ArgumentTypeError, match=rf"^expected an even number, got '{text}'$"):
            even(text)


def test_the_pages_python_runs(one_thread: None) -> None:
    page = REPOSITORY / "docs" / "sampling.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert names["tidar"].tokens == names["ar"].tokens
    assert len(names["tidar"].tokens[0]) == 48
    assert names["cancelled"].finish_reason == "cancelled"
    assert 0 < len(names["cancelled"].tokens) < 64
    assert not names["decoder"].session.requests
    assert {len(tokens) for tokens in names["served"].values()} == {32}
    assert len({tuple(tokens) for tokens in names["served"].values()}) == 3


# Strategies.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--strategy", "isd", "--block-size", "3"],
        ["--strategy", "self-speculation", "--block-size", "3", "--temperature", "0.8"],
        ["--strategy", "tree", "--block-size", "3", "--temperature", "0.8"],
        ["--block-size", "4", "--levels", "1,3"],
        ["--block-size", "3", "--exact"],
    ],
    ids=" ".join,
)
def test_strategies_agree_with_autoregression(arguments: list[str], run: Run) -> None:
    code, output, _ = run("--max-new-tokens", "12", "--compare", "--json", *arguments)
    report = json.loads(output)
    assert code == 0
    assert report["identical"]
    drafts = report["drafts"]
    assert drafts["exact"] == ("--exact" in arguments)
    assert drafts["levels"] == ([1, 3] if "--levels" in arguments else None)
    assert drafts["strategy"] == (arguments[1].replace("-", "_") if "--strategy" in arguments else "tidar")


def test_levels_by_a_profile(run: Run) -> None:
    code, output, _ = run("--max-new-tokens", "12", "--compare", "--json", "--block-size", "3", "--levels", "auto")
    report = json.loads(output)
    assert (code, report["identical"]) == (0, True)
    assert report["drafts"]["levels"][0] == 1
    assert len(report["drafts"]["levels"]) <= report["block_size"] <= 3


def test_block_diffusion_promises_nothing(run: Run) -> None:
    arguments = ["--strategy", "block-diffusion", "--block-size", "4", "--max-new-tokens", "8", "--compare"]
    code, output, _ = run(*arguments)
    assert code == 0
    assert "outputs not compared: block diffusion decodes by the diffusion logits" in output
    assert "block diffusion, L = 4, threshold 0.9" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "2"], "--levels: expected auto, or ascending numbers from 1, as in 1,2,4, got '2'"),
        (["--levels", "1,x"], "--levels: expected auto, or ascending numbers from 1, as in 1,2,4, got '1,x'"),
        (["--levels", "1,9"], "--levels: expected ascending ints from 1 to at most 8, got [1, 9]"),
        (["--strategy", "tree", "--exact"], '--exact: expected False for strategy "tree", got True'),
        (
            ["--strategy", "tree", "--sampling", "rejection"],
            "--sampling: expected coupled for strategy \"tree\", got 'rejection'",
        ),
        (["--strategy", "isd", "--levels", "1,2"], "--levels: expected --strategy tidar beside it, got isd"),
        (["--strategy", "isd", "--block-size", "1"], "--block-size: expected >= 2, got 1"),
        (
            ["--strategy", "flare", "--beta", "0.5"],
            '--beta: expected 1 for strategies but "tidar" with all its blocks, got 0.5',
        ),
        (["--strategy", "medusa"], "--strategy: invalid choice: 'medusa'"),
    ],
)
def test_bad_strategies(arguments: list[str], message: str, run: Run) -> None:
    code, _, error = run(*arguments)
    assert code == 2
    assert message in error
