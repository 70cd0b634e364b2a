"""No input of the command ends in a traceback or a signal: every option of every subcommand, read off the parsers.

A command is either refused, with one line on standard error, exit code 2 and nothing written, or its work would begin.
That is where it is stopped here.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.shell import in_a_shell, refused
from tidar_kernels import cli
from tidar_kernels.cli import common, doctor, generate, memory, sampling, strategy, train
from tidar_kernels.cli.common import any_path
from tidar_kernels.decoding.strategies import StrategyName
from tidar_kernels.models import Transformer, TransformerConfig, load_checkpoint
from tidar_kernels.ops.verify import RULES

NUMBERS = ["-1", "0", "100000000000000000000", str(10**23), "nan", "inf", "1e400", "", "abc", " 7", "７", "0x10"]
NUMBERS += ["1_000", "1.5", "9" * 5000, "2147483648", "1000000000", "100000", "1,", ",", "1,1"]
TEXTS = [
    "\udcff",
    "x" * 100_000,
    "@file",
    "-",
    "--",
    "\n",
    "é\u2028",
    "%s %(prog)s {0}",
    "cuda:99999999999999",
    "cuda:256",
]
TEXTS += ["cuda:０", ".."]
TINY = {
    "steps": 6,
    "batch": 2,
    "seq_len": 16,
    "block_sizes": [4, 2],
    "warmup": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
}
CONTENTS = {
    "empty": b"",
    "garbage": bytes(range(256)) * 20,
    "list": b"[]",
    "null": b"null",
    "string": b'"x"',
    "number": b"3",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep_toml": b"a = " + b"[" * 100_000,
    "huge": b"steps = 1e400\nseed = 0x" + b"f" * 5000,
    "header": struct.pack("<Q", 2**63 - 1) + b"{}",
}


def parsers() -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Every subcommand's parser, and its subcommands', by the words that lead to it."""
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}

    def walk(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
        below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for action in below:
            for name, child in action.choices.items():
                walk(child, (*words, name))
        if not below:
            found[words] = parser

    walk(cli.build_parser(), ())
    return found


PARSERS = parsers()
OPTIONS = [
    pytest.param(words, action, id=" ".join([*words, (action.option_strings or [action.dest])[-1]]))
    for words, parser in PARSERS.items()
    for action in parser._actions
    if action.nargs != 0
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files and folders of every bad kind."""
    folder = tmp_path_factory.mktemp("inputs")
    names = ["missing", "loop", "no/such/folder.png", "x" * 300, "folder.png"]
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
        (folder / f"{name}_folder").mkdir()
        for inside in ("state.pt", "config.json", "tokenizer.json", "adapter_config.json", "model.safetensors", "a.py"):
            (folder / f"{name}_folder" / inside).write_bytes(content)
        names += [name, f"{name}_folder", f"{name}/below"]
    (folder / "loop").symlink_to("loop")
    (folder / "folder.png").mkdir()
    devices = ("/dev/full", "/dev/null", "/dev/zero", "/proc/self/mem", "/dev/full/x.png", "/proc/x/y.png")
    return [str(folder), *(str(folder / name) for name in names), *(d for d in devices if Path("/dev/zero").exists())]


class Begun(Exception):
    """The command's work would begin here."""


@pytest.fixture
def begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Call the command; True where its work would begin or is done, else the line that refuses it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    threads = torch.get_num_threads()

    def begin(*_: Any, **__: Any) -> None:
        raise Begun

    for module, name in ((train, "_train"), (doctor, "check_model"), (cli.bench, "run")):
        monkeypatch.setattr(module, name, begin)
    monkeypatch.setattr(generate._Task, "warm_up", begin)
    monkeypatch.setattr(strategy.Drafts, "settled", begin)
    parser = cli.build_parser()
    monkeypatch.setattr(cli, "build_parser", lambda: parser)

    def call(*arguments: object) -> str | bool:
        before = sorted(tmp_path.rglob("*"))
        try:
            code = cli.main([str(argument) for argument in arguments])
        except Begun:
            code = 0
        out, err = capsys.readouterr()
        written = sorted(tmp_path.rglob("*"))
        if code == 0:
            return True
        assert written == before, arguments
        return refused((code, out, err))

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def base(tmp_path: Path, checkpoint: Path) -> dict[tuple[str, ...], dict[str, object]]:
    """Arguments that each subcommand accepts, by option; positional ones by their name."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.py", "b.py", "c.py"):
        (data / name).write_text("x = 1\n" * 50)
    (tmp_path / "tiny.toml").write_text("".join(f"{name} = {value}\n" for name, value in TINY.items()))
    (tmp_path / "source").mkdir()
    served = tmp_path / "served"
    served.mkdir()
    (served / "config.json").write_text("{}")
    return {
        ("generate",): {"--prompt": "a", "--checkpoint": checkpoint, "--device": "cpu"},
        ("train",): {"--out": "run", "--data": data, "--config": tmp_path / "tiny.toml", "--device": "cpu"},
        ("convert",): {"source": tmp_path / "source", "target": "target", "--block-size": 4},
        ("doctor",): {"--device": "cpu"},
        ("lossless",): {"model": tmp_path / "source", "--device": "cpu"},
        ("train-adapter",): {"model": tmp_path / "source", "--out": "run", "--device": "cpu"},
        ("serve",): {"folder": served},
    }


# Their positional arguments may be names on the Hub.
WITH_TRANSFORMERS = {("convert",), ("lossless",), ("train-adapter",), ("serve",)}


def line(words: tuple[str, ...], settings: dict[str, object]) -> list[object]:
    """The command line of these settings; values may begin with a dash."""
    optional = [f"{name}={value}" for name, value in settings.items() if name.startswith("-")]
    positional = [value for name, value in settings.items() if not name.startswith("-")]
    return [*words, *optional, *(["--"] if positional else []), *positional]


@pytest.mark.parametrize(("words", "action"), OPTIONS)
def test_every_option_refuses_what_it_cannot_take(
    words: tuple[str, ...],
    action: argparse.Action,
    begins: Callable[..., str | bool],
    base: dict[tuple[str, ...], dict[str, object]],
    paths: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser = PARSERS[words]
    name = (action.option_strings or [action.dest])[-1]
    rivals = {
        rival
        for group in parser._mutually_exclusive_groups
        if any(other.dest == action.dest for other in group._group_actions)
        for other in group._group_actions
        for rival in other.option_strings
    }
    settings = {option: value for option, value in base.get(words, {}).items() if option not in rivals}
    values = [*NUMBERS, *TEXTS, *(paths if action.type or words in WITH_TRANSFORMERS else [])]
    if words in WITH_TRANSFORMERS:
        pytest.importorskip("transformers")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answers = {value: begins(*line(words, settings | {name: value})) for value in values}
    if action.choices:
        assert all(isinstance(answer, str) for answer in answers.values())
        assert "invalid choice" in str(answers["abc"])
    elif name not in ("--suffix", "--set") and action.type not in (None, any_path):
        for value in ("", *(() if name == "--kernels" else ("abc", " 7", "７", "0x10", "\udcff", "1e400"))):
            answer = answers[value]
            assert isinstance(answer, str), (name, value)
            assert answer.startswith(name), answer


def test_every_numeric_option_has_both_ends() -> None:
    """A whole number of 24 digits fits none of them, and is refused before PyTorch is loaded."""
    for words, parser in PARSERS.items():
        for action in parser._actions:
            if getattr(action.type, "__qualname__", "").startswith("whole_number."):
                name = action.option_strings[-1]
                for value in (10**23, -(10**23)):
                    with pytest.raises(common.UserError, match=rf"^{name}: expected a whole number [<>]= \d+, got"):
                        parser.parse_args([*words[1:0], f"{name}={value}"])


def numeric_options(words: tuple[str, ...]) -> list[str]:
    """The options of a subcommand that read a number, or several."""
    actions = [action for action in PARSERS[words]._actions if action.option_strings and not action.choices]
    return [one.option_strings[-1] for one in actions if one.type not in (None, any_path, Path)]


# Numbers, what looks like one, and anything else.
WORDS = st.one_of(
    st.integers(-2, 70).map(str),
    st.integers().map(str),
    st.floats().map(repr),
    st.lists(st.integers(-1, 9).map(str), max_size=4).map(",".join),
    st.text("0123456789.+-eE_, xnaif", max_size=6),
    st.text(max_size=4),
)


@pytest.mark.parametrize("words", [words for words in PARSERS if numeric_options(words)], ids=" ".join)
def test_any_numbers_in_any_options(
    words: tuple[str, ...],
    begins: Callable[..., str | bool],
    base: dict[tuple[str, ...], dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several options at a time, with drawn values: refused in one line, or the work would begin."""
    if words == ("convert",):
        pytest.importorskip("transformers")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    @settings(
        max_examples=12,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.nested_given],
    )
    @given(st.dictionaries(st.sampled_from(numeric_options(words)), WORDS, min_size=1, max_size=3))
    def check(drawn: dict[str, str]) -> None:
        answer = begins(*line(words, base.get(words, {}) | drawn))
        assert answer is True or answer

    check()


@pytest.mark.parametrize("words", [("frobnicate",), ("draw", "spiral"), ("\udcff",), ("x" * 100_000,), ("",), ("@",)])
def test_unknown_commands(words: tuple[str, ...], begins: Callable[..., str | bool]) -> None:
    answer = begins(*words)
    assert isinstance(answer, str)
    assert "invalid choice" in answer
    assert len(answer) < 1500


@pytest.mark.parametrize("words", list(PARSERS), ids=" ".join)
def test_unknown_options(words: tuple[str, ...], begins: Callable[..., str | bool]) -> None:
    for argument in ("--frobnicate", "-7", "\udcff", "@file", "--json=1", "x" * 100_000):
        assert isinstance(begins(*words, argument), str) or words in {("bench",), ("doctor",)}


def test_a_state_of_every_bad_kind(
    begins: Callable[..., str | bool], paths: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    for path in paths:
        assert isinstance(begins("train", "--resume", "--out", path, "--device", "cpu"), str), path
    whole = dict.fromkeys(("config", "corpus", "done", "seconds", "curve", "model", "optimisers"))
    states: list[Any] = [
        [],
        whole,
        whole | {"config": {"hidden_size": 10**9}},
        whole | {"config": {}, "files": {"folder": 3}},
        whole | {"config": TINY | {"block_sizes": (4,)}, "files": {"suffixes": [], "held_out": []}},
        whole | {"config": TINY | {"seed": -1}},
    ]
    out = tmp_path / "home" / "run"
    out.mkdir()
    for state in states:
        torch.save(state, out / "state.pt")
        assert isinstance(begins("train", "--resume", "--out", out, "--device", "cpu"), str), state


def test_checkpoints_whose_configuration_is_bad(
    begins: Callable[..., str | bool], checkpoint: Path, tmp_path: Path
) -> None:
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        good = json.loads(file.metadata()["transformer_config"])
    changes: list[dict[str, Any]] = [
        {name: value} for name in good for value in (None, -1, 0, 2.5, "x", [], {}, True, 10**9, 10**30)
    ]
    texts = ["[]", "null", "3", '"x"', "{}", "[" * 100_000, "NaN", *(json.dumps(good | change) for change in changes)]
    path = tmp_path / "home" / "bad.safetensors"
    for text in texts:
        safetensors.torch.save_file(tensors, path, metadata={"transformer_config": text})
        answer = begins("generate", "--prompt", "a", "--checkpoint", path, "--device", "cpu")
        assert answer is True or isinstance(answer, str), text
        if json.loads(text if len(text) < 10_000 else "0") != good and not text.startswith('{"vocab'):
            assert isinstance(answer, str), text


# Memory and threads.


def test_what_does_not_fit_into_memory(
    begins: Callable[..., str | bool], base: dict[tuple[str, ...], dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**8)

    def answer(command: str, **more: object) -> str:
        settings = base[command,] | {f"--{name.replace('_', '-')}": value for name, value in more.items()}
        said = begins(*line((command,), settings))
        assert isinstance(said, str), said
        return said

    end = r" \([\d,.]+ GiB needed, 0\.1 GiB free\)"
    for said, expected in {
        answer(
            "generate", max_new_tokens=10**6
        ): "--max-new-tokens: expected a cache that fits into memory, got 1000000 tokens",
        answer("generate", block_size=64): "--block-size: expected a step that fits into memory, got one of 4,160 rows",
        answer(
            "generate", block_size=64, levels="auto"
        ): "--block-size: expected a step that fits into memory, got one of 4,160 rows",
        answer(
            "train", hidden_size=2**17
        ): r"settings: expected a step that fits into memory, got batch 2, .*parameters",
        answer(
            "train", intermediate_size=2**20
        ): r"settings: expected a step that fits into memory, got batch 2, .*parameters",
        answer("train", batch=10**6): r"settings: expected a step that fits into memory, got batch 1000000, .*",
        answer("train", seq_len=1000, block_sizes=500): "--block-sizes: expected steps that fit into memory, got 500",
    }.items():
        assert re.fullmatch(expected + end, said), said
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**3)
    assert answer("generate").startswith("--max-new-tokens: ")


def test_free_memory_is_that_of_the_machine_or_of_its_container(tmp_path: Path) -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert memory._of_the_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\n")
    assert memory._of_the_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("3000\n")
    assert memory._of_the_group(tmp_path) == 2000


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RecursionError("maximum recursion depth exceeded"),
        UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
        OSError(28, "No space left on device"),
        ModuleNotFoundError("No module named 'safetensors.torch'", name="safetensors.torch"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception, begins: Callable[..., str | bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(doctor, "describe_machine", fails)
    assert isinstance(begins("doctor", "--json"), str)


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), ModuleNotFoundError("a bug", name="tidar_kernels.nowhere")])
def test_a_bug_of_the_package_keeps_its_traceback(
    bug: Exception, begins: Callable[..., str | bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise bug

    monkeypatch.setattr(doctor, "describe_machine", fails)
    with pytest.raises(type(bug), match="a bug"):
        begins("doctor", "--json")


@pytest.mark.parametrize("name", ["cuda:99999999999999", "cuda:256", "cuda:99", "cuda:0000000000000099"])
def test_devices_that_there_are_not(name: str) -> None:
    with pytest.raises(common.UserError, match=rf"^--device: expected a device of this machine, got {name} \("):
        common.resolve_device(name)


def test_training_that_writes_nothing_leaves_no_folder(
    begins: Callable[..., str | bool], base: dict[tuple[str, ...], dict[str, object]], tmp_path: Path
) -> None:
    """The folders are made before the first step, so that it is known that they can be, and go if nothing comes."""
    assert begins(*line(("train",), base["train",] | {"--out": tmp_path / "home" / "a" / "b"})) is True
    assert list((tmp_path / "home").iterdir()) == []


# Streams.

SHELL = f"{sys.executable} -m tidar_kernels "


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a POSIX shell and /dev/full")
@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("generate --prompt-file - <&-", 2, "--prompt-file: expected an open standard input, got none"),
        (
            "generate --prompt-file - 0>/dev/null",
            2,
            r"--prompt-file: expected a readable file, got standard input \(.+\)",
        ),
        (
            "generate --prompt-file /dev/full",
            2,
            "--prompt-file: expected at most 16777216 bytes, got more from /dev/full",
        ),
        ("--version >&-", 2, "standard output: expected an open one, got none"),
        ("train --print-config >&- <&-", 2, "standard output: expected an open one, got none"),
        ("train --print-config >/dev/full", 2, r"\[Errno 28\] No space left on device"),
        ("--help >/dev/full", 2, r"\[Errno 28\] No space left on device"),
        ("--version </dev/null 1</dev/null", 2, r"\[Errno 9\] Bad file descriptor"),
        ("frobnicate 2>/dev/full", 2, None),
        ("frobnicate 2>&-", 2, None),
        ("frobnicate >&- 2>&- <&-", 2, None),
        ("--version <&- 2>&- | cat", 0, None),
        ("train --print-config | true", 141, None),
        ("frobnicate 2>&1 >/dev/null | true", 2, None),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int, error: str | None) -> None:
    first, pipe, last = command.partition(" | ")
    done = in_a_shell("bash", "-c", f"{SHELL}{first}{pipe}{last}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == code
    assert done.stdout.startswith("tidar-kernels ") if last == "cat" else done.stdout == ""
    assert re.fullmatch("" if error is None else f"tidar-kernels: error: {error}\n", done.stderr)


# What the command says without PyTorch, and what the package says.


def test_strategies_and_rules_are_those_of_the_package() -> None:
    assert [name.replace("-", "_") for name in strategy.STRATEGIES] == list(get_args(StrategyName))
    assert list(sampling._RULES.values()) == list(RULES)


def test_parameters_are_counted_before_there_are_any(checkpoint: Path) -> None:
    for model in (load_checkpoint(checkpoint), Transformer(TransformerConfig(9, 8, 6, 3, 4, 2, 10, qk_norm=True))):
        assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
