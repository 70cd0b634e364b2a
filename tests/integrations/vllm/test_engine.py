"""Every token is vLLM's own: an engine with drafts against one without, on the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make vllm")

from tidar_kernels.integrations.vllm import attention, backend, engine_options

from . import engines
from .checkpoints import adapter, random_model
from .engines import Ask, Record, answers, cases, tokens

# vLLM's own kernels, on a CPU.
pytestmark = pytest.mark.interpret


class Engine(NamedTuple):
    """One that runs: its drafts a step, and how many tokens a step it should make at least, greedily."""

    llm: Any
    drafts: int
    ours: bool
    at_least: float


def start(checkpoint: Path, ours: bool, at_least: float, options: dict[str, Any]) -> Iterator[Engine]:
    made = engine_options(checkpoint, **{"max_num_seqs": 4} | options)
    drafts = made["hf_overrides"]["tidar"]["block_size"]
    with engines.asynchronous() if options.get("async_scheduling") else nullcontext(), engines.running(**made) as llm:
        yield Engine(llm, drafts, ours, at_least)


def check(engine: Engine, name: str, autoregressive: dict[str, list[Any]], record: Record) -> None:
    asked = cases()[name]
    got = answers(engine.llm, asked)
    assert tokens(got) == tokens(autoregressive[name])
    assert [out.outputs[0].finish_reason for out in got] == [o.outputs[0].finish_reason for o in autoregressive[name]]
    if engine.ours and not record.preempted:
        prompts = sum(len(out.prompt_token_ids) - out.num_cached_tokens for out in got for _ in out.outputs[:1])
        more = sum(len(out.outputs) - 1 for out in got)
        if not more:
            assert record.stored == prompts + record.draft_rows(engine.drafts)
    if name == "greedy":
        assert record.tokens_per_step > engine.at_least


CONFIGURATIONS = {
    "tidar": (True, 2.5, {"max_num_seqs": 16}),
    "tidar, B = 2": (True, 1.4, {"block_size": 2}),
    "tidar, B = 4": (True, 2.0, {"block_size": 4}),
    "tidar, levels 1 2 4": (True, 2.3, {"levels": [1, 2, 4]}),
    "isd, N = 4": (False, 1.8, {"strategy": "isd", "block_size": 4}),
    "flare, N = 4": (True, 1.5, {"strategy": "flare", "block_size": 4}),
    "a budget that cuts steps": (True, 1.2, {"max_num_batched_tokens": 100}),
    "scheduled ahead": (True, 2.5, {"async_scheduling": True}),
    "a cache that is too small": (True, 1.5, {"num_gpu_blocks_override": 9}),
}


class TestEveryToken:
    @pytest.fixture(scope="class", params=CONFIGURATIONS)
    def engine(self, request: Any, checkpoint: Path, autoregressive: Any) -> Iterator[Engine]:
        yield from start(checkpoint, *CONFIGURATIONS[request.param])

    @pytest.mark.parametrize("name", ["greedy", "one", "sampled", "long"])
    def test_is_autoregressive(
        self, engine: Engine, name: str, autoregressive: dict[str, list[Any]], record: Record, request: Any
    ) -> None:
        check(engine, name, autoregressive, record)
        if name == "long":
            configuration = request.node.callspec.params["engine"]
            whole = engine.llm.llm_engine.vllm_config.num_speculative_tokens + 1
            assert (record.preempted > 0) == (configuration == "a cache that is too small")
            if configuration == "a budget that cuts steps":
                assert any(1 < rows < whole for _, rows, _ in record.steps)


class TestRequests:
    """One engine, and everything that a request may ask for."""

    @pytest.fixture(scope="class")
    def engine(self, checkpoint: Path, autoregressive: Any) -> Iterator[Engine]:
        yield from start(checkpoint, True, 2.5, {"max_num_seqs": 16})

    @pytest.mark.parametrize(
        "name",
        ["filters", "greedy with penalties", "several", "stopped", "first tokens", "with a grammar", "ragged"],
    )
    def test_is_autoregressive(
        self, engine: Engine, name: str, autoregressive: dict[str, list[Any]], record: Record
    ) -> None:
        check(engine, name, autoregressive, record)

    def test_up_to_the_last_position(
        self, engine: Engine, autoregressive: dict[str, list[Any]], record: Record
    ) -> None:
        check(engine, "to the end", autoregressive, record)
        for output in autoregressive["to the end"]:
            assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == engines.ENGINE["max_model_len"]

    def test_logprobs(self, engine: Engine, autoregressive: dict[str, list[Any]], record: Record) -> None:
        check(engine, "logprobs", autoregressive, record)
        for got, expected in zip(answers(engine.llm, cases()["logprobs"]), autoregressive["logprobs"], strict=True):
            found = [got.outputs[0].logprobs, got.prompt_logprobs or []]
            wanted = [expected.outputs[0].logprobs, expected.prompt_logprobs or []]
            for a, b in zip(chain(*found), chain(*wanted), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert {token: entry.rank for token, entry in a.items()} == {t: e.rank for t, e in b.items()}
                    for token, entry in a.items():
                        assert entry.logprob == pytest.approx(b[token].logprob, abs=1e-4)

    def test_generated_blocks_are_found_in_the_cache(
        self, engine: Engine, autoregressive: dict[str, list[Any]], record: Record
    ) -> None:
        check(engine, "later", autoregressive, record)
        (asked,) = cases()["later"]
        ((whole,),) = tokens(autoregressive["later"])
        (again,) = answers(engine.llm, [Ask(asked.prompt + whole[:60], {"max_tokens": 20})])
        assert list(again.outputs[0].token_ids) == whole[60:]
        assert again.num_cached_tokens > len(asked.prompt) + 32

    def test_an_abort_leaves_the_others_alone(self, engine: Engine, autoregressive: dict[str, list[Any]]) -> None:
        from vllm import SamplingParams

        core, asked = engine.llm.llm_engine, cases()["sampled"]
        for n, ask in enumerate(asked):
            params = SamplingParams(**engines.DEFAULTS | ask.params)
            core.add_request(str(n), {"prompt_token_ids": ask.prompt}, params)
        got: dict[str, list[int]] = {}
        for step in range(100):
            for output in core.step():
                got[output.request_id] = list(output.outputs[0].token_ids)
            if step == 3:
                core.abort_request(["1"])
            if not core.has_unfinished_requests():
                break
        expected = [only for (only,) in tokens(autoregressive["sampled"])]
        assert [got[str(n)] for n in (0, 2, 3)] == [expected[n] for n in (0, 2, 3)]
        assert got["1"] == expected[1][: len(got["1"])] != expected[1]

    def test_what_cannot_be_right_is_refused_by_name(self, engine: Engine) -> None:
        from vllm.exceptions import VLLMValidationError

        with pytest.raises(VLLMValidationError, match="thinking_token_budget: expected none"):
            answers(engine.llm, [Ask([65], {"thinking_token_budget": 5})])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"diffusion_config": {"canvas_length": 3}}, "diffusion_config: expected canvas_length 71"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype: expected auto, float32, fp8, .* got bfloat16"),
    ],
)
def test_engines_that_would_be_wrong_are_refused(checkpoint: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), engines.running(**engine_options(checkpoint) | given):
        pass


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_a_float8_cache(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """A draft is seen with the values that the cache holds later: as one token at a time, on the same attention.

    vLLM's own kernel for float8 on CPUs rounds otherwise, so the plain engine has our attention too.
    """
    asked = cases()["greedy"] + cases()["sampled"]
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_has_patterns", lambda config: True)
        with engines.running(**engines.plain(checkpoint), max_num_batched_tokens=512, kv_cache_dtype=dtype) as llm:
            expected = tokens(answers(llm, asked))
    options = engine_options(checkpoint, max_num_seqs=4, kv_cache_dtype=dtype)
    with engines.running(**options) as llm, engines.recorded(monkeypatch) as record:
        assert tokens(answers(llm, asked)) == expected
    assert record.tokens_per_step > 2


def test_the_kernels_in_vllms_runner(
    checkpoint: Path, autoregressive: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs, interpreted: mixed prompts and steps, more requests than run at once."""
    monkeypatch.setattr(backend._OnCPU, "path", attention.KERNELS)
    asked = [Ask(ask.prompt, ask.params | {"max_tokens": 6}) for ask in cases()["sampled"][:3]]
    options = engine_options(checkpoint, max_num_seqs=2, block_size=4)
    with engines.running(**options) as llm, engines.recorded(monkeypatch) as record:
        got = tokens(answers(llm, asked))
    assert got == [[whole[:6]] for (whole,) in tokens(autoregressive["sampled"])[:3]]
    assert record.tokens_per_step > 1


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    """Random models: nearly no draft stays, but every row must be right."""
    folder = random_model(tmp_path / kind, kind)
    asked = [Ask([5, 6, 7 + n], {"max_tokens": 12} | ({"temperature": 0.7, "seed": n} if n else {})) for n in range(3)]
    more = {"skip_tokenizer_init": True}
    asked = [Ask(ask.prompt, ask.params | {"detokenize": False}) for ask in asked]
    with engines.running(**engines.plain(folder), **more) as llm:
        expected = tokens(answers(llm, asked))
    with engines.running(**engine_options(folder, max_num_seqs=4), **more) as llm:
        assert tokens(answers(llm, asked)) == expected


def test_adapters_a_request(checkpoint: Path, tmp_path: Path, autoregressive: dict[str, list[Any]]) -> None:
    """Requests with one of two adapters and with none, at once; an adapter of the lm_head is refused by name."""
    from vllm.lora.request import LoRARequest

    folders = [adapter(tmp_path / str(seed), checkpoint, seed) for seed in (1, 2)]
    adapters = [None, *(LoRARequest(folder.name, int(folder.name), str(folder)) for folder in folders)] * 3
    asked = cases()["greedy"] + cases()["sampled"]
    settings = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with engines.running(**engines.plain(checkpoint), max_num_batched_tokens=512, **settings) as llm:
        expected = tokens(answers(llm, asked, adapters[: len(asked)]))
    without = tokens(autoregressive["greedy"] + autoregressive["sampled"])
    changed = {str(each and each.lora_name) for each, a, b in zip(adapters, expected, without, strict=False) if a != b}
    assert changed >= {"1", "2"}  # on CPUs, vLLM 0.32 gives rows without an adapter the last one (index -1)
    with engines.running(**engine_options(checkpoint, max_num_seqs=4), **settings) as llm:
        assert tokens(answers(llm, asked, adapters[: len(asked)])) == expected
        head = adapter(tmp_path / "3", checkpoint, 3, lm_head=True)
        with pytest.raises(ValueError, match="lm_head"):
            answers(llm, asked[:1], [LoRARequest("3", 3, str(head))])
