"""The `tidar-kernels` command: what it prints, what it returns, and how it refuses bad input."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tidar_kernels import cli, cpu, patterns, step_patterns, strategies, testing
from tidar_kernels.cli import common, doctor, draw, generate
from tidar_kernels.models import ByteTokenizer, Transformer, TransformerConfig, load_checkpoint, save_checkpoint
from tidar_kernels.models.tokenizer import EOS_ID, MASK_ID, VOCAB_SIZE

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPT = "def mean(values):\n"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in this process: `(exit code, standard output, standard error)`."""
    threads = torch.get_num_threads()

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)


def refused(result: tuple[int, str, str]) -> str:
    """The one line that a refused command printed: nothing else, and exit code 2."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"tidar-kernels: error: [^\n]+\n", err)
    return err.removeprefix("tidar-kernels: error: ").rstrip("\n")


def save_model(path: Path, **changes: Any) -> Path:
    """A random byte-level model. Large weights keep its logits apart, so that rounding decides no argmax."""
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "block_size": 4,
        "mask_token_id": MASK_ID,
    }
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    save_checkpoint(model, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny.safetensors")


# The command itself.


def in_a_shell(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, text=True, timeout=120, **{"capture_output": True} | options
    )


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


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


# generate


FIGURES = {
    "mode": str,
    "block_size": int,
    "text": str,
    "tokens": list,
    "forwards": int,
    "tokens_per_forward": float,
    "tokens_per_second": float,
    "seconds": float,
    "accepted": list,
    "prefill_forwards": int,
    "prefill_seconds": float,
}
SETTING = {
    "prompt": dict,
    "drafts": dict,
    "sampling": dict,
    "checkpoint": str,
    "device": str,
    "gpu": type(None),
    "dtype": str,
    "threads": int,
    "versions": dict,
}


def check_figures(figures: dict[str, Any], tokens: int) -> None:
    assert {name: type(value) for name, value in figures.items()} == FIGURES
    assert len(figures["tokens"]) == sum(figures["accepted"]) == tokens
    assert len(figures["accepted"]) == figures["forwards"]
    assert figures["tokens_per_forward"] == pytest.approx(tokens / figures["forwards"])
    assert figures["tokens_per_second"] == pytest.approx(tokens / figures["seconds"])
    assert figures["text"] == bytes(figures["tokens"]).decode("utf-8", errors="replace")


@pytest.mark.parametrize("mode", ["tidar", "autoregressive"])
def test_generate_json(run: Run, checkpoint: Path, mode: str) -> None:
    code, out, err = run(
        *("generate", "--prompt", PROMPT, "--checkpoint", checkpoint, "--max-new-tokens", 20, "--mode", mode),
        *("--device", "cpu", "--json"),
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert {name: type(report[name]) for name in SETTING} == SETTING
    check_figures({name: value for name, value in report.items() if name not in SETTING}, 20)
    assert report["mode"] == mode
    assert report["block_size"] == (4 if mode == "tidar" else 1)
    assert report["prompt"] == {"source": "--prompt", "text": PROMPT, "tokens": len(PROMPT)}
    assert report["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("mode", ["tidar", "autoregressive"])
@pytest.mark.parametrize("block_size", [1, 8])
def test_generate_compare_json(run: Run, checkpoint: Path, mode: str, block_size: int) -> None:
    code, out, _ = run(
        *("generate", "--prompt", PROMPT, "--checkpoint", checkpoint, "--max-new-tokens", 20, "--mode", mode),
        *("--compare", "--block-size", block_size, "--device", "cpu", "--threads", 1, "--json"),
    )
    report = json.loads(out)
    assert (code, report["identical"], report["threads"]) == (0, True, 1)
    assert list(report["modes"]) == [mode, "autoregressive" if mode == "tidar" else "tidar"]
    for name, figures in report["modes"].items():
        check_figures(figures, 20)
        assert figures["mode"] == name
    assert report["modes"]["tidar"]["block_size"] == block_size
    assert report["modes"][mode] == {name: report[name] for name in FIGURES}
    assert report["modes"]["tidar"]["tokens"] == report["modes"]["autoregressive"]["tokens"]


def test_generate_text(run: Run, checkpoint: Path) -> None:
    arguments = ("generate", "--prompt", PROMPT, "--checkpoint", checkpoint, "--max-new-tokens", 30, "--device", "cpu")
    text = json.loads(run(*arguments, "--json")[1])["text"]
    code, out, err = run(*arguments, "--compare")
    assert (code, err) == (0, "")
    assert out.startswith(text + "\n\nmode ")
    lines = out.removeprefix(text).split("\n")
    assert re.split(r"\s{2,}", lines[2]) == ["mode", "new tokens", "forwards", "tokens/forward", "tokens/s", "seconds"]
    assert re.match(r"TiDAR, B = 4 +30 +\d+ +\d\.\d\d +[\d.]+ +\d\.\d\d\d$", lines[3])
    assert re.match(r"autoregressive +30 +30 +1\.00 +[\d.]+ +\d\.\d\d\d$", lines[4])
    assert lines[-2:] == ["outputs identical: yes", ""]

    code, out, _ = run(*arguments)
    assert code == 0
    assert out.startswith(text + "\n")
    assert "outputs identical" not in out


def test_show_steps_separates_what_each_forward_accepted(run: Run, checkpoint: Path) -> None:
    arguments = ("generate", "--prompt", PROMPT, "--checkpoint", checkpoint, "--max-new-tokens", 30, "--device", "cpu")
    report = json.loads(run(*arguments, "--json")[1])
    out = run(*arguments, "--show-steps")[1]
    shown = out[: out.index("\n\nmode ")]
    assert "|" not in report["text"]
    assert shown.replace("|", "") == report["text"]
    assert shown.count("|") <= report["forwards"] - 1


def test_generate_on_a_terminal(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = FakeTerminal()
    monkeypatch.setattr(sys, "stdout", screen)
    arguments = ("--checkpoint", checkpoint, "--max-new-tokens", 30, "--device", "cpu", "--compare", "--show-steps")
    assert run("generate", "--prompt", "x = '\x1b'", *arguments)[0] == 0
    out = screen.getvalue()
    assert out.startswith("\x1b[2mx = '�'\x1b[0m")
    assert "\x1b[36m" in out
    assert "\rautoregressive: 30 of 30 tokens\x1b[K\r\x1b[K" in out
    assert out.endswith("outputs identical: \x1b[32myes\x1b[0m\n")
    assert set(re.findall(r"\x1b(?!\[[\d;]*[mK])", out)) == set()


def test_what_a_model_emits_reaches_a_terminal_as_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = FakeTerminal()
    printer = generate._Printer(common.Terminal(screen), show_steps=False)
    printer.step("a\x1b[2J\r", 4)
    printer.step("", 0)
    printer.finish()
    assert screen.getvalue() == "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\n"


def test_outputs_that_differ_fail(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = generate._Task.run

    def tampered(task: generate._Task, *watchers: Any) -> generate._Pass:
        done = finished(task, *watchers)
        if done.mode == "autoregressive":
            done.result.tokens[0][7] ^= 1
        return done

    monkeypatch.setattr(generate._Task, "run", tampered)
    arguments = ("generate", "--prompt", PROMPT, "--checkpoint", checkpoint, "--max-new-tokens", 12, "--device", "cpu")
    code, out, err = run(*arguments, "--compare")
    assert (code, err) == (1, "")
    assert out.endswith("first difference: new token 7\noutputs identical: no\n")
    code, out, _ = run(*arguments, "--compare", "--json")
    assert (code, json.loads(out)["identical"]) == (1, False)


def test_prompt_from_a_file_and_from_standard_input(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = "naïve = 'é'\r\n".encode()
    (tmp_path / "prompt.txt").write_bytes(raw)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    arguments = ("--checkpoint", checkpoint, "--max-new-tokens", 3, "--device", "cpu", "--json")
    prompts = [
        json.loads(run("generate", "--prompt-file", source, *arguments)[1])["prompt"]
        for source in (tmp_path / "prompt.txt", "-")
    ]
    assert [prompt["tokens"] for prompt in prompts] == [len(raw)] * 2
    assert [prompt["source"] for prompt in prompts] == [str(tmp_path / "prompt.txt"), "standard input"]
    assert prompts[0]["text"] == prompts[1]["text"] == raw.decode()


def test_demo_compares_on_held_out_code(run: Run, checkpoint: Path) -> None:
    code, out, _ = run("generate", "--demo", "--checkpoint", checkpoint, "--max-new-tokens", 8, "--device", "cpu")
    assert code == 0
    first = re.match(r"\[prompt: the first (\d+) bytes of ([\w/.]+), held out of training\]\n", out)
    assert first
    assert first[2] == generate.DEMO_MODULE
    assert 0 < int(first[1]) <= generate.DEMO_BYTES
    assert "\n[decoded]\n" in out
    assert out.endswith("outputs identical: yes\n")
    code, out, _ = run("generate", "--demo", "--checkpoint", checkpoint, "--max-new-tokens", 8, "--no-compare")
    assert "outputs identical" not in out


def test_the_end_of_text_stops(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("generate", "--prompt", PROMPT, "--checkpoint", checkpoint, "--max-new-tokens", 30, "--device", "cpu")
    tokens = json.loads(run(*arguments, "--json")[1])["tokens"]
    monkeypatch.setattr("tidar_kernels.models.tokenizer.EOS_ID", tokens[9])
    stopped = json.loads(run(*arguments, "--json")[1])["tokens"]
    assert stopped == tokens[: tokens.index(tokens[9]) + 1]
    assert EOS_ID not in tokens


def test_bad_prompts(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"na\xefve")
    end = ("--checkpoint", checkpoint)
    expected = "prompt: expected at least one character, got none from "
    assert refused(run("generate", "--prompt", "", *end)) == expected + "--prompt"
    assert refused(run("generate", "--prompt-file", tmp_path / "empty", *end)) == expected + str(tmp_path / "empty")
    message = refused(run("generate", "--prompt-file", tmp_path / "latin", *end))
    assert message.startswith(f"--prompt-file: expected UTF-8 text, got {tmp_path / 'latin'} (")
    for missing, reason in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        message = refused(run("generate", "--prompt-file", missing, *end))
        assert message == f"--prompt-file: expected a readable file, got {missing} ({reason})"


def test_bad_checkpoints(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    def message(path: Path, *options: Any) -> str:
        return refused(run("generate", "--prompt", PROMPT, "--checkpoint", path, "--device", "cpu", *options))

    assert message(tmp_path / "none") == f"--checkpoint: expected a checkpoint file, got {tmp_path / 'none'}"
    whole = checkpoint.read_bytes()
    for name, content in {"cut": whole[:-100], "noise": b"\xff" * 100, "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        assert message(tmp_path / name).startswith(f"{tmp_path / name}: expected a complete safetensors file, got ")
    words = save_model(tmp_path / "words", vocab_size=300)
    assert message(words) == "--checkpoint: expected a byte-level model of 258 tokens, got 300 tokens"
    plain = save_model(tmp_path / "plain", block_size=None, mask_token_id=None)
    assert message(plain).startswith("--block-size: expected one, for the checkpoint does not say")
    assert run("generate", "--prompt", PROMPT, "--checkpoint", plain, "--max-new-tokens", 4, "--block-size", 2)[0] == 0
    assert message(checkpoint, "--max-new-tokens", 10**15).startswith(
        "--max-new-tokens: expected a cache that fits into memory, got 1000000000000000 tokens ("
    )


# doctor


@pytest.fixture
def healthy(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing fails and the self-check takes no time."""
    monkeypatch.setattr("tidar_kernels.models.load_shipped", lambda: (load_checkpoint(checkpoint), ByteTokenizer()))
    monkeypatch.setattr(testing, "SUITES", [s for s in testing.SUITES if s.operator in ("append_kv", "step_attention")])


REPORT = {
    "ok": bool,
    "checks": list,
    "versions": dict,
    "device": str,
    "path": str,
    "gpu": type(None),
    "cpu": str,
    "threads": int,
    "operators": dict,
    "launch_configurations": list,
    "parity": list,
}


def test_doctor_json(run: Run, healthy: None) -> None:
    code, out, err = run("doctor", "--device", "cpu", "--json")
    report = json.loads(out)
    assert (code, err, report["ok"]) == (0, "", True)
    assert {name: type(report[name]) for name in REPORT} == REPORT
    assert set(report) - set(REPORT) == {"cuda", "triton_interpret"}
    assert (report["device"], report["path"], report["launch_configurations"]) == ("cpu", "cpu", [])
    assert report["versions"] == common.versions()
    assert set(report["operators"]) >= {"step_attention", "append_kv", "attention"}
    assert {check["name"]: check["ok"] for check in report["checks"]} == dict.fromkeys(
        ["python", "torch", "triton", "shipped model", "append_kv on cpu", "step_attention on cpu"], True
    )
    assert {result["operator"] for result in report["parity"]} == {"append_kv", "step_attention"}
    assert all(result["passed"] and result["device"] == "cpu" for result in report["parity"])


def test_doctor_text(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, err = run("doctor", "--device", "cpu")
    assert (code, err) == (0, "")
    titles = ["versions", "machine", "operators", "launch configurations", "checks"]
    assert [line for line in out.splitlines() if line in titles] == titles
    assert f"\n  torch          {torch.__version__}\n" in out
    assert "\n  TRITON_INTERPRET  not set\n" in out
    assert re.search(r"\n  step_attention +PyTorch, .+\n  attention +PyTorch, .+\n  append_kv +PyTorch, ", out)
    assert "\n  none: no kernel is launched on this device\n" in out
    assert re.search(r"\n  ok  step_attention on cpu  6 cases, at most \d+% of the error budget, \d+\.\d s\n", out)
    assert out.endswith("\nall 6 checks passed\n")


def test_doctor_names_the_path_that_runs(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it says PyTorch, the operators do call the module of the CPU paths."""
    called = set()

    def recording(name: str) -> Callable[..., Any]:
        real = getattr(cpu, name)

        def call(*arguments: Any) -> Any:
            called.add(name)
            return real(*arguments)

        return call

    for name in ("step_attention", "append_kv"):
        monkeypatch.setattr(cpu, name, recording(name))
    testing.run_parity("cpu")
    assert called == {"step_attention", "append_kv"}
    assert all(path.startswith("PyTorch") for path in doctor.operator_paths(torch.device("cpu")).values())


@pytest.mark.interpret
def test_doctor_in_the_interpreter(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from tidar_kernels.kernels import configs

    monkeypatch.setattr(testing, "run_parity", lambda *arguments, **options: [])
    report = json.loads(run("doctor", "--device", "cpu", "--json")[1])
    assert (report["path"], report["triton_interpret"]) == ("interpreter", "1")
    assert report["operators"]["step_attention"] == report["operators"]["append_kv"] == "Triton kernel, interpreted"
    assert [row["head_dim"] for row in report["launch_configurations"]] == [*configs.HEAD_DIM_TILES] * 2
    for row in report["launch_configurations"]:
        dtype = torch.float32 if row["dtype"] == "float32" else torch.bfloat16
        assert row.items() >= vars(configs.step_config(None, dtype, row["head_dim"])).items()


def test_doctor_on_a_gpu(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes of a GPU, as far as that can be told without one."""
    configs = pytest.importorskip("tidar_kernels.kernels.configs")
    gpu = SimpleNamespace(name="Some GPU", major=7, minor=5, multi_processor_count=40, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(configs, "chip_of", lambda device: 90)
    asked = []
    monkeypatch.setattr(testing, "run_parity", lambda *asked_for, **options: asked.append((*asked_for, options)) or [])
    code, out, _ = run("doctor", "--device", "cuda:1", "--parity", "--json")
    report = json.loads(out)
    assert (code, report["device"], report["path"]) == (1, "cuda:1", "triton")
    assert report["gpu"] == {"name": "Some GPU", "capability": "7.5", "multiprocessors": 40, "memory_gib": 16.0}
    assert report["operators"]["step_attention"] == "Triton kernel"
    assert [(where, options["quick"]) for where, options in asked] == [("cuda:1", False)] * 2 + [("cpu", True)] * 2
    assert [row["BLOCK_M"] for row in report["launch_configurations"]] == [
        configs.step_config(90, dtype, head_dim).BLOCK_M
        for dtype in (torch.float16, torch.float32)
        for head_dim in configs.HEAD_DIM_TILES
    ]
    assert [check for check in report["checks"] if not check["ok"]] == [
        {"name": "GPU", "ok": False, "detail": "expected compute capability >= 8.0, got 7.5"}
    ]


def test_doctor_parity_runs_every_case(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(device: str, **options: Any) -> list[Any]:
        asked.append((device, options))
        return []

    monkeypatch.setattr(testing, "run_parity", record)
    assert run("doctor", "--device", "cpu", "--parity")[0] == 0
    expected = [{"quick": False, "operators": [suite.operator]} for suite in testing.SUITES]
    assert asked == [("cpu", options) for options in expected]


def test_doctor_finds_a_wrong_operator(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.step_attention
    monkeypatch.setattr(cpu, "step_attention", lambda *operands: (right(*operands)[0] * 1.01, right(*operands)[1]))
    code, out, err = run("doctor", "--device", "cpu")
    assert (code, err) == (1, "")
    assert re.search(
        r"\n  FAILED  step_attention on cpu  \d of 6 cases; step_attention, case .+ expected .+ got .+\n", out
    )
    assert out.endswith("\n1 of 6 checks failed\n")


def test_doctor_names_what_crashes(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*operands: Any) -> None:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(cpu, "append_kv", broken)
    report = json.loads(run("doctor", "--device", "cpu", "--json")[1])
    assert not report["ok"]
    assert [check for check in report["checks"] if not check["ok"]] == [
        {"name": "append_kv on cpu", "ok": False, "detail": "RuntimeError: no such instruction"}
    ]


def test_doctor_finds_a_missing_model(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FileNotFoundError("path: expected a checkpoint file, got none")

    monkeypatch.setattr("tidar_kernels.models.load_shipped", missing)
    code, out, _ = run("doctor", "--device", "cpu")
    assert code == 1
    assert re.search(r"\n  FAILED  shipped model +path: expected a checkpoint file, got none\n", out)


@pytest.mark.parametrize(
    ("installed", "needs_triton", "failed"),
    [
        ({}, True, {}),
        ({"triton": None}, False, {}),
        ({"triton": None}, True, {"triton": "expected >= 3.6, got none"}),
        ({"torch": "2.10.1+cu128"}, False, {"torch": "expected >= 2.11, got 2.10.1+cu128"}),
        ({"torch": "3.0.0a0"}, False, {}),
        ({"python": "3.9.18"}, False, {"python": "expected >= 3.10, < 3.14, got 3.9.18"}),
        ({"python": "3.14.0"}, False, {"python": "expected >= 3.10, < 3.14, got 3.14.0"}),
    ],
)
def test_versions_that_are_supported(
    installed: dict[str, str | None], needs_triton: bool, failed: dict[str, str]
) -> None:
    good: dict[str, str | None] = {"python": "3.10.0", "torch": "2.11.0", "triton": "3.6.0"}
    checks = doctor.check_versions(good | installed, needs_triton)
    assert {check.name: check.detail for check in checks if not check.ok} == failed


def test_supported_versions_are_those_of_the_project() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=(\d+)\.(\d+),<(\d+)\.(\d+)"', project)
    assert python
    assert doctor.SUPPORTED["python"] == (tuple(map(int, python.groups()[:2])), tuple(map(int, python.groups()[2:])))
    for name in ("torch", "triton"):
        least = re.search(rf'"{name}>=(\d+)\.(\d+)', project)
        assert least
        assert doctor.SUPPORTED[name] == (tuple(map(int, least.groups())), None)


# draw


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["step", "--block-size", "3"], patterns.tidar_step(3)),
        (["step", "--block-size", "3", "--causal-blocks"], patterns.tidar_step(3, bidirectional=False)),
        (["prefill", "--prompt-len", "5", "--block-size", "2"], patterns.tidar_prefill(5, 2)),
        (["training", "--seq-len", "7", "--block-size", "3"], patterns.tidar_training(7, 3)),
        (["causal", "--length", "6"], patterns.causal(6)),
        (["isd", "--stride", "3"], step_patterns.isd_step(3)),
        (["isd", "--stride", "3", "--bidirectional"], step_patterns.isd_step(3, bidirectional=True)),
        (["isd", "--stride", "3", "--unshifted"], step_patterns.isd_step(3, shifted=False)),
        (["block", "--length", "5"], step_patterns.block_step(5)),
        (["tree", "--tokens", "3"], strategies.tree(3).pattern),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_draw(run: Run, arguments: list[str], pattern: patterns.Pattern) -> None:
    assert run("draw", *arguments) == (0, pattern.draw(), "")
    assert run("draw", *arguments, "--context-len", 3) == (0, pattern.draw(context_len=3), "")

    code, out, err = run("draw", *arguments, "--context-len", 3, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    rows = report.pop("rows")
    assert report == {
        "pattern": pattern.name,
        "q_len": pattern.q_len,
        "kv_len": pattern.kv_len,
        "context_len": 3,
        "visible_pairs": int(pattern.dense(3).sum()),
        "png": None,
    }
    assert [row["lead"] for row in rows] == pattern.lead.tolist()
    assert [row["own"] for row in rows] == pattern.own.tolist()
    assert [row["position"] for row in rows] == pattern.positions.tolist()
    assert [row["role"] for row in rows] == [patterns.Role(role).name.lower() for role in pattern.roles.tolist()]
    if pattern.bits is not None:
        assert [row["bits"] for row in rows] == [row.nonzero().flatten().tolist() for row in pattern.dense()]


def test_draw_has_defaults_for_every_pattern(run: Run) -> None:
    assert sorted(draw.PATTERNS) == ["block", "causal", "isd", "prefill", "step", "training", "tree"]
    for name, drawable in draw.PATTERNS.items():
        code, out, _ = run("draw", name, "--json")
        report = json.loads(out)
        assert code == 0
        assert report["q_len"] == drawable.rows(*(parameter.default for parameter in drawable.parameters))


def test_draw_png(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "step.png"
    assert run("draw", "step", "--out", path) == (0, f"tidar_step(block_size=4): wrote {path}\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads(run("draw", "step", "--out", path, "--json")[1])["png"] == str(path)


def test_draw_refuses_files_that_it_cannot_write(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    for path, expected in {
        tmp_path / "step.pdf": "a name that ends in .png",
        tmp_path / "none" / "step.png": "a file in a folder that exists",
        tmp_path / "folder.png": "a writable file",
    }.items():
        assert refused(run("draw", "step", "--out", path)).startswith(f"--out: expected {expected}, got '{path}'")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_draw_refuses_a_pattern_that_is_too_large(run: Run) -> None:
    message = refused(run("draw", "step", "--block-size", 10**9))
    assert message.startswith("--block-size 1000000000: expected a pattern of at most 1048576 rows, got 10000000")


# bench


def test_bench_runs_parts_and_says_what_they_wrote(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import decode, strategies

    def measure(arguments: list[str]) -> int:
        print("a line of figures")
        (Path(arguments[1]) / "new.json").write_text("{}")
        return 1

    monkeypatch.setattr(decode, "main", measure)
    monkeypatch.setattr(strategies, "main", lambda arguments: 0)
    (tmp_path / "old.json").write_text("{}")
    code, out, err = run("bench", "decode", "strategies", "decode", "--out", tmp_path, "--json")
    assert code == 1
    assert json.loads(out) == {"parts": {"decode": 1, "strategies": 0}, "files": [str(tmp_path / "new.json")]}
    assert err.count("a line of figures") == 1
    code, out, _ = run("bench", "strategies", "--out", tmp_path / "made")
    assert (code, out) == (0, "")


def test_bench_refuses(run: Run, tmp_path: Path) -> None:
    assert refused(run("bench", "decoding", "--out", tmp_path)).startswith(
        "PART: expected some of operators, training,"
    )
    (tmp_path / "file").write_text("")
    assert refused(run("bench", "--out", tmp_path / "file")).startswith("--out: expected a folder, got the file")


# docs/cli.md


def test_every_json_field_is_documented(run: Run, healthy: None) -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text()
    sections = dict(zip(*[iter(re.split(r"^## (\w+)$", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert list(sections) == list(cli.COMMANDS)
    reports = {
        "generate": FIGURES.keys() | SETTING.keys() | {"modes", "identical", "promise"},
        "doctor": json.loads(run("doctor", "--device", "cpu", "--json")[1]).keys(),
        "draw": json.loads(run("draw", "step", "--json")[1]).keys(),
        "bench": {"parts", "files"},
        "convert": {"path", "model", "block_size", "mask_token", "mask_token_id", "added", "vocab_size", "parameters"},
    }
    for command, fields in reports.items():
        assert fields - set(re.findall(r"`(\w+)`", sections[command])) == set()
