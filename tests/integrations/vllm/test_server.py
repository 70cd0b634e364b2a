"""The OpenAI-compatible server that `tidar-kernels serve` starts, asked by OpenAI's own client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make vllm")

import openai

from . import engines
from .engines import cases

pytestmark = pytest.mark.interpret

STARTS_WITHIN = 600  # seconds; three processes import vLLM, one after the other


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, autoregressive: Any) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {name.replace("_", "-"): value for name, value in engines.ENGINE.items() if name != "max_num_seqs"}
    settings |= {"port": port, "host": "127.0.0.1", "served-model-name": "shipped"}
    given = [f"{name}={value}" if value is not True else name for name, value in settings.items()]
    words = [word for pair in given for word in ("--set", pair)]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tidar_kernels", "serve", str(checkpoint), "--max-num-seqs", "4", *words],
            stdout=file, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait(url, process, log)
        yield url
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(60)


def wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(STARTS_WITHIN):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as made:
        yield made


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def complete(client: openai.OpenAI, prompt: list[int], **given: Any) -> str:
    settings = {"temperature": 0.0, "max_tokens": 32} | given
    return client.completions.create(model="shipped", prompt=prompt, **settings).choices[0].text


def test_concurrent_requests(client: openai.OpenAI, autoregressive: dict[str, list[Any]]) -> None:
    asked = cases()["greedy"] + cases()["sampled"]
    expected = texts(autoregressive["greedy"] + autoregressive["sampled"])
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda ask: complete(client, ask.prompt, **ask.params), asked)) == expected


def test_a_stream_is_the_same_text(client: openai.OpenAI, autoregressive: dict[str, list[Any]]) -> None:
    prompt = cases()["greedy"][0].prompt
    stream = client.completions.create(model="shipped", prompt=prompt, temperature=0.0, max_tokens=32, stream=True)
    parts = [chunk.choices[0].text for chunk in stream]
    assert "".join(parts) == texts(autoregressive["greedy"])[0]
    assert 2 < len([part for part in parts if part]) < 32  # several tokens a step


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "def mean(values):"}]
    settings: dict[str, Any] = {"model": "shipped", "messages": messages, "temperature": 0.0, "max_tokens": 16}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**settings, stream=True)]
    assert "".join(parts) == whole
    assert whole


def test_a_cancelled_request_leaves_the_others_alone(
    client: openai.OpenAI, autoregressive: dict[str, list[Any]]
) -> None:
    asked = cases()["sampled"]
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(complete, client, ask.prompt, **ask.params) for ask in asked]
        stream = client.completions.create(model="shipped", prompt=asked[0].prompt, max_tokens=120, stream=True)
        next(iter(stream))
        stream.close()
        assert [other.result() for other in others] == texts(autoregressive["sampled"])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"extra_body": {"thinking_token_budget": 4}}, openai.BadRequestError),
        ({"temperature": -1.0}, openai.BadRequestError),
        ({"max_tokens": 10**6}, openai.BadRequestError),
        ({"model": "another"}, openai.NotFoundError),
    ],
)
def test_a_wrong_request_is_the_clients_fault(
    client: openai.OpenAI, given: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        client.completions.create(**{"model": "shipped", "prompt": "def f(", "max_tokens": 4} | given)
    assert complete(client, list(b"def f("), max_tokens=4)
