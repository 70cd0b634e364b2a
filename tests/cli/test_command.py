"""The `tidar-kernels` command as a whole, `bench`, and what docs/cli.md says of it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.shell import FIGURES, SETTING, FakeTerminal, Run, in_a_shell, refused
from tests.paths import REPOSITORY
from tidar_kernels import cli
from tidar_kernels.cli import bench, common, draw


def test_help_as_a_module_needs_no_torch() -> None:
    code = (
        "import json, runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('tidar_kernels', run_name='__main__')\n"
        "except SystemExit as stop: print(json.dumps([stop.code, sorted(sys.modules)]))\n"
    )
    *lines, last = in_a_shell(sys.executable, "-c", code).stdout.splitlines()
    status, modules = json.loads(last)
    assert status == 0
    assert lines[0] == "usage: tidar-kernels COMMAND [options]"
    assert not {"torch", "numpy", "triton", "tidar_kernels.patterns"} & set(modules)


def test_module_and_script_are_one_command() -> None:
    done = in_a_shell(sys.executable, "-m", "tidar_kernels", "frobnicate")
    assert refused((done.returncode, done.stdout, done.stderr)).startswith("COMMAND: invalid choice: 'frobnicate'")


@pytest.mark.parametrize(
    "command", [[], *([name] for name in cli.COMMANDS), *(["draw", name] for name in draw.PATTERNS)]
)
def test_help(run: Run, command: list[str]) -> None:
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(" ".join(["usage: tidar-kernels", *command]))
    assert "example" in out
    assert command == [] or "--json" in out or command == ["draw"]


def test_version(run: Run) -> None:
    from tidar_kernels import __version__

    assert run("--version") == (0, f"tidar-kernels {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"expected a command ({', '.join(cli.COMMANDS)}), got none (see tidar-kernels --help)"),
        (["draw"], "the following arguments are required: PATTERN (see tidar-kernels draw --help)"),
        (["draw", "spiral"], "PATTERN: invalid choice: 'spiral'"),
        (["draw", "step", "--block-size", "0"], "--block-size: expected a whole number >= 1, got '0'"),
        (
            ["draw", "tree", "--tokens", "1"],
            "--tokens: expected a whole number >= 2, got '1' (see tidar-kernels draw tree --help)",
        ),
        (["draw", "step", "--seq-len", "8"], "unrecognized arguments: --seq-len 8"),
        (["generate"], "one of the arguments --prompt --prompt-file --demo is required"),
        (["generate", "--prompt", "a", "--demo"], "--demo: not allowed with argument --prompt"),
        (["generate", "--prompt", "a", "--block-size", "two"], "--block-size: expected a whole number >= 1, got 'two'"),
        (["generate", "--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens: expected a whole number >= 1"),
        (["generate", "--prompt", "a", "--max", "3"], "unrecognized arguments: --max 3"),
        (["generate", "--prompt", "a", "--mode", "fast"], "--mode: invalid choice: 'fast'"),
        (["generate", "--prompt", "a", "--threads", "0"], "--threads: expected a whole number >= 1, got '0'"),
        (["generate", "--prompt", "a", "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["doctor", "--device", "cuda:99"], "--device: expected a device of this machine, got cuda:99"),
    ],
)
def test_bad_arguments(run: Run, arguments: list[str], message: str) -> None:
    assert refused(run(*arguments)).startswith(message)


def test_a_bug_is_not_hidden_as_a_user_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: Any) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(draw, "run", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("draw", "step")


def test_interrupt_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(draw, "run", interrupted)
    assert run("draw", "step") == (130, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m tidar_kernels draw training --seq-len 4096 --json"
    done = in_a_shell("bash", "-c", f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stdout, done.stderr) == (141, "{\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = in_a_shell(
            *(sys.executable, "-m", "tidar_kernels", "draw", "step"),
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 2
    assert re.fullmatch(r"tidar-kernels: error: [^\n]*No space left on device\n", done.stderr)


# Tables and terminals.


def test_table() -> None:
    assert common.table([("name", "n"), ("a", "10"), ("bcdef", "7")], "<>") == ["name    n", "a      10", "bcdef   7"]


def test_styles_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert common.Terminal(FakeTerminal()).dim("text") == "\x1b[2mtext\x1b[0m"
    assert common.Terminal(io.StringIO()).dim("text") == "text"
    monkeypatch.setenv("NO_COLOR", "1")
    assert common.Terminal(FakeTerminal()).dim("text") == "text"


def test_a_terminal_obeys_no_decoded_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = "a\tb\n\x1b[2Jc\r\x07\x9b"
    assert common.Terminal(FakeTerminal()).safe(text) == "a\tb\n�[2Jc���"
    assert common.Terminal(io.StringIO()).safe(text) == text


# bench


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose decode part writes a file and fails, whose breakdown dies, and whose strategies do nothing."""
    folder = tmp_path / "checkout" / "benchmarks"
    (folder / "decoding").mkdir(parents=True)
    for package in (folder, folder / "decoding"):
        (package / "__init__.py").write_text("")
    (folder / "decoding" / "decode.py").write_text(
        "import pathlib, sys\nprint('a line of figures')\n"
        "(pathlib.Path(sys.argv[2]) / 'new.json').write_text('{}')\nsys.exit(1)\n"
    )
    (folder / "decoding" / "breakdown.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    (folder / "decoding" / "strategies.py").write_text("print('nothing')\n")
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path / "checkout")
    return folder


def test_bench_runs_parts_and_says_what_they_wrote(
    checkout: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = list(sys.path)
    results = tmp_path / "results"
    results.mkdir()
    (results / "old.json").write_text("{}")
    assert cli.main(["bench", "decode", "strategies", "decode", "--out", str(results), "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out) == {"parts": {"decode": 1, "strategies": 0}, "files": [str(results / "new.json")]}
    assert err.count("a line of figures") == 1
    assert cli.main(["bench", "strategies", "--out", str(tmp_path / "made")]) == 0
    assert capfd.readouterr().out == "nothing\n"
    # What ends one part does not end those after it, and is no success.
    assert cli.main(["bench", "breakdown", "strategies", "--out", str(results)]) == 137
    assert capfd.readouterr().out == "nothing\n"
    assert sys.path == path


def test_bench_needs_a_checkout(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    for arguments in (["decode", "--out", tmp_path], ["compare", "a", "b"], ["--tune", "--dry-run"]):
        assert refused(run("bench", *arguments)).startswith("bench: expected a source checkout, whose benchmarks/")


def test_bench_refuses(run: Run, tmp_path: Path) -> None:
    assert refused(run("bench", "decoding", "--out", tmp_path)).startswith(
        "PART: expected some of operators, training,"
    )
    (tmp_path / "file").write_text("")
    assert refused(run("bench", "--out", tmp_path / "file")).startswith("--out: expected a folder, got the file")
    assert refused(run("bench", "--out", "")).startswith("--out: expected a path, got ''")
    for value in ("nan", "inf", "0", "-1", "x", ""):
        assert refused(run("bench", "compare", tmp_path / "file", tmp_path / "file", "--fail-over", value)).startswith(
            f"--fail-over: expected a finite number > 0, got {value!r}"
        )
    assert refused(run("bench", "compare", tmp_path / "none", tmp_path / "file")).startswith(
        "compare: expected a results file, got"
    )
    for option, value in (
        ("chip", "9"),
        ("dtypes", "float16"),
        ("head-dims", "0"),
        ("head-dims", "1e3"),
        ("head-dims", "513"),
        ("kernels", ""),
    ):
        assert refused(run("bench", "--tune", "--dry-run", f"--{option}={value}")).startswith(f"--{option}: expected ")
    assert refused(run("bench", "--tune", "--chip", "90")).startswith("--tune: expected --out DIR and no --chip")
    assert refused(run("bench", "--tune", "--out", tmp_path / "file")).startswith(
        "--out: expected a folder, got the file"
    )


# docs/cli.md


def test_every_json_field_is_documented(run: Run, healthy: None) -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text()
    sections = dict(zip(*[iter(re.split(r"^## ([\w-]+)$", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert list(sections) == list(cli.COMMANDS)
    reports = {
        "generate": FIGURES.keys() | SETTING.keys() | {"modes", "identical", "promise"},
        "doctor": json.loads(run("doctor", "--device", "cpu", "--json")[1]).keys(),
        "draw": json.loads(run("draw", "step", "--json")[1]).keys(),
        "bench": {"parts", "files"},
        "train-adapter": {"out", "steps", "loss", "before", "after", "seconds"},
        "lossless": {"model", "dtype", "strategy", "block_size", "exact", "max_new_tokens", "temperature", "seed"}
        | {"prompts", "equal", "equal_bits", "new_tokens", "forwards", "stages", "trajectories", "versions"},
        "convert": {"path", "model", "block_size", "mask_token", "mask_token_id", "added", "vocab_size", "parameters"},
    }
    for command, fields in reports.items():
        assert fields - set(re.findall(r"`(\w+)`", sections[command])) == set()
