"""`tidar-kernels generate`: what it prints, what it returns, and how it refuses bad input."""

from __future__ import annotations

import codecs
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.shell import FIGURES, PROMPT, SETTING, FakeTerminal, Run, check_figures, refused, save_model
from tidar_kernels.cli import common, generate
from tidar_kernels.models.tokenizer import EOS_ID


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


def test_outputs_that_differ_fail(run: Run, checkpoint: Path, tampered: None) -> None:
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
    (tmp_path / "prompt.txt").write_bytes(codecs.BOM_UTF8 + raw)  # the mark says how it is written; it is no text
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
    assert "; temperature 0.5, coupled, seed 1; " in out
    assert out.endswith("outputs identical: yes\n")
    code, out, _ = run("generate", "--demo", "--checkpoint", checkpoint, "--max-new-tokens", 8, "--temperature", 0)
    assert "; greedy; " in out
    code, out, _ = run("generate", "--demo", "--checkpoint", checkpoint, "--max-new-tokens", 8, "--no-compare")
    assert "outputs identical" not in out


def test_the_demo_is_worth_reading(run: Run) -> None:
    """With the shipped model: no line comes again and again, and drafts are accepted."""
    code, out, _ = run("generate", "--demo", "--device", "cpu", "--threads", 1, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["identical"]
    assert found["tokens_per_forward"] > 3
    lines = [line.strip() for line in found["text"].splitlines() if line.strip()]
    assert len(lines) >= 8
    assert max(map(lines.count, lines)) <= 3


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
    assert message(checkpoint, "--max-new-tokens", 10**9).startswith(
        "--max-new-tokens: expected a cache that fits into memory, got 1000000000 tokens ("
    )
