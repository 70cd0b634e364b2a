"""Engines of vLLM in this process, the requests that they are asked, and a record of what their steps do."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# In this process, so that what a step does can be watched; nothing is asked of a network.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_V2_MODEL_RUNNER="1",
)

ENGINE = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 192, "max_num_seqs": 4}


DEFAULTS = {"temperature": 0.0, "max_tokens": 32}


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, and vLLM's sampling parameters; greedy without any."""

    prompt: list[int]
    params: dict[str, Any] = field(default_factory=dict)


@contextmanager
def running(**options: Any) -> Iterator[Any]:
    """An engine; there can be one at a time."""
    from vllm import LLM

    llm = LLM(**ENGINE | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@contextmanager
def asynchronous() -> Iterator[None]:
    """Engines that start here schedule a step before they know what the last one gave; vLLM alone does not on CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = classmethod(update)


def answers(llm: Any, asked: Sequence[Ask], adapters: Sequence[Any] | None = None) -> list[Any]:
    """vLLM's outputs, in order: every request at once, each with its LoRA adapter, if any."""
    from vllm import SamplingParams

    params = [SamplingParams(**DEFAULTS | ask.params) for ask in asked]
    prompts = [{"prompt_token_ids": ask.prompt} for ask in asked]
    outputs: list[Any] = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
    return outputs


def tokens(outputs: Sequence[Any]) -> list[list[list[int]]]:
    """Of every request, the tokens of each of its sequences."""
    return [[list(each.token_ids) for each in output.outputs] for output in outputs]


@dataclass
class Record:
    """What the steps of an engine did.

    Attributes:
        steps: of every request and step: the request, rows of the step, tokens that came out.
        stored: rows whose keys and values were written, in one layer; 0 on backends that are not ours.
        preempted: how often a request had to give its cache back.
    """

    steps: list[tuple[str, int, int]] = field(default_factory=list)
    stored: int = 0
    preempted: int = 0

    @property
    def tokens_per_step(self) -> float:
        decoding = [out for _, rows, out in self.steps if rows > 1]
        return sum(decoding) / max(len(decoding), 1)

    def draft_rows(self, drafts: int) -> int:
        """Draft rows of all steps after the prompts, whose last rows are draft rows too."""
        steps = [(name, min(rows, drafts)) for name, rows, out in self.steps if out]
        return sum(rows for _, rows in steps) - len({name for name, _ in steps})


@contextmanager
def recorded(monkeypatch: Any, *, cache: bool = True) -> Iterator[Record]:
    """Watch the sampler, the scheduler and, if its writes may be read while a step runs, the cache of the engine."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from tidar_kernels.integrations.vllm import backend
    from tidar_kernels.integrations.vllm.sampler import TidarSampler

    record, sample, step, preempt = Record(), TidarSampler.__call__, backend.step, Scheduler._preempt_request
    layer: list[int] = []

    def sampled(self: Any, hidden: Any, batch: Any) -> Any:
        output = sample(self, hidden, batch)
        rows = batch.cu_num_logits.diff().tolist()
        record.steps.extend(zip(batch.req_ids, rows, output.num_sampled.tolist(), strict=True))
        return output

    def stepped(path: Any, query: Any, key: Any, value: Any, cache: Any, batch: Any, *others: Any) -> None:
        def stored(cached: Any, keys: Any, written: Any) -> None:
            layer.append(cached.k_cache.data_ptr())
            if layer[0] == layer[-1]:
                record.stored += int(written.kept.sum())
            path.append(cached, keys, written)

        step(path._replace(append=stored), query, key, value, cache, batch, *others)

    def preempted(self: Any, *args: Any, **kwargs: Any) -> None:
        record.preempted += 1
        preempt(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TidarSampler, "__call__", sampled)
        if cache:
            patch.setattr(backend, "step", stepped)
        patch.setattr(Scheduler, "_preempt_request", preempted)
        yield record


_CODE = (
    "import os\n\ndef main(",
    "class Foo(object):\n    def __init__(self",
    "for i in range(",
    'def read(self, size=-1):\n        """Read and return up to size bytes.\n\n        ',
)


def _sampled(seed: int, **more: Any) -> dict[str, Any]:
    return {"temperature": 0.8, "top_p": 0.9, "seed": seed} | more


def _grammar(regex: str) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(regex=regex)


def cases() -> dict[str, list[Ask]]:
    """Requests by the name of what they show."""
    code = [list(text.encode()) for text in _CODE]
    filters = [
        {"top_k": 20},
        {"top_p": 1.0, "min_p": 0.05},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {32: -4.0, 40: 3.0}},
        {"temperature": 1.0, "top_p": 1.0},
    ]
    text = list("".join(_CODE).encode())
    return {
        "greedy": [Ask(prompt) for prompt in code],
        "one": [Ask(code[0], _sampled(5))],
        "sampled": [Ask(prompt, _sampled(seed)) for seed, prompt in enumerate(code)],
        "filters": [Ask(code[n % 4], _sampled(n, max_tokens=20) | more) for n, more in enumerate(filters)],
        "greedy with penalties": [Ask(code[3], {"repetition_penalty": 1.3}), Ask(code[1], {"bad_words": [" self"]})],
        "several": [Ask(code[1], _sampled(7, n=3, max_tokens=20))],
        "stopped": [Ask(code[0], {"stop_token_ids": [ord("\n")]}), Ask(code[1], _sampled(1, stop=["e"]))],
        "first tokens": [Ask(code[n % 4], {"max_tokens": n}) for n in range(1, 6)],
        "long": [Ask(text, {"max_tokens": 24}), Ask(code[2]), Ask(text[:70], _sampled(2)), Ask(text[9:], _sampled(3))],
        "logprobs": [
            Ask(code[0], {"logprobs": 3, "prompt_logprobs": 2}),
            Ask(code[2], _sampled(8, logprobs=0)),
            Ask(code[3], {"logprob_token_ids": [32, 40]}),
        ],
        "with a grammar": [
            Ask(code[0], {"structured_outputs": _grammar("[a-z]{2,5}(, [a-z]{1,4})?\\)")}),
            Ask(code[1]),
        ],
        "later": [Ask(code[1], {"max_tokens": 80})],
        "to the end": [Ask(text[:140], {"max_tokens": 99}), Ask(text[1:150], _sampled(4, max_tokens=99))],
        "ragged": [
            Ask(text[n % 40 : n % 40 + 1 + (7 * n) % 90], ({} if n % 3 else _sampled(n)) | {"max_tokens": 1 + n % 13})
            for n in range(64)
        ],
    }


def plain(folder: Path) -> dict[str, Any]:
    """The arguments of an engine that serves a checkpoint as vLLM does."""
    return {"model": str(folder)}
