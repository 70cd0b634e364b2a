"""The OpenAI-compatible server that `tidar-kernels serve` starts, asked by OpenAI's own client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make vllm")

import openai

from .engines import cases
from .server import Server, serving

pytestmark = pytest.mark.interpret


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, autoregressive: Any) -> Iterator[Server]:
    with serving(checkpoint, tmp_path_factory.mktemp("server") / "log") as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
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


def test_metrics_count_drafts(client: openai.OpenAI, server: Server) -> None:
    before = server.metrics()
    tokens = 32
    complete(client, cases()["greedy"][0].prompt, max_tokens=tokens)
    time.sleep(1)  # a step is recorded after its tokens were sent
    counted = {name: value - before[name] for name, value in server.metrics().items()}
    # The prompt's step gives one token, each other step one and the drafts that stayed; the last may give too many.
    made = 1 + counted["num_drafts"] + counted["num_accepted_tokens"]
    assert tokens <= made < tokens + 8
    by_place = [counted[f"num_accepted_tokens_per_pos{place}"] for place in range(7)]
    assert sum(by_place) == counted["num_accepted_tokens"] > counted["num_drafts"]
    assert by_place == sorted(by_place, reverse=True)
    assert counted["num_draft_tokens"] <= 7 * counted["num_drafts"]
    assert "num_accepted_tokens_per_pos7" not in counted


def test_two_processes_share_the_heads(
    checkpoint: Path, autoregressive: dict[str, list[Any]], tmp_path: Path, server: Server
) -> None:
    asked = cases()["greedy"] + cases()["sampled"]
    # What vLLM compiles for a shared layer asks Inductor for Triton on the CPU, which the tests' shim does not have.
    uncompiled = {"TORCH_COMPILE_DISABLE": "1"}
    with (
        serving(checkpoint, tmp_path / "log", environment=uncompiled, tensor_parallel_size=2) as two,
        openai.OpenAI(base_url=f"{two.url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        got = list(pool.map(lambda ask: complete(client, ask.prompt, **ask.params), asked))
        assert two.metrics()["num_accepted_tokens"] > 0
    assert got == texts(autoregressive["greedy"] + autoregressive["sampled"])


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
