"""A batch whose requests join, leave, end and fail one by one: each is what it would be alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.toys import sharp_model
from tidar_kernels import Decoder, ops
from tidar_kernels.decoding.session import Session, StepConfig
from tidar_kernels.decoding.strategies import autoregressive, tidar
from tidar_kernels.models import ByteTokenizer, Transformer, TransformerConfig, load_shipped
from tidar_kernels.ops.verify import RULES, SamplingParams

CONFIG = TransformerConfig(
    vocab_size=40,
    hidden_size=48,
    intermediate_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
    mask_token_id=39,
    block_size=4,
)
POISON = 38  # a token whose embedding is NaN: whoever has it in the prompt gets NaN logits

PARAMS = [
    SamplingParams(),
    SamplingParams(0.8, seed=3),
    SamplingParams(1.2, top_k=7, seed=4),
    SamplingParams(0.9, top_p=0.8, seed=5),
    SamplingParams(1.0, min_p=0.1, seed=6),
    SamplingParams(repetition_penalty=1.3),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = sharp_model(CONFIG, seed=1)
    embed = model.embed_tokens
    embed.register_forward_hook(lambda _, args, out: out.masked_fill((args[0] == POISON)[..., None], math.nan))
    # Nobody drafts or generates it.
    logits = model.logits
    model.logits = lambda hidden: logits(hidden).index_fill(-1, torch.tensor([POISON]), -math.inf)
    return model


def prompt(index: int) -> list[int]:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 38, (1 + index * 5 % 11,), generator=generator).tolist()


def decoder(model: Transformer, block_size: int = 4, **options: Any) -> Decoder:
    if block_size == 0:
        return Decoder(model, mode="autoregressive", **options)
    return Decoder(model, block_size, **options)


def alone(model: Transformer, index: int, length: int, block_size: int, params: SamplingParams, rule: Any) -> list[int]:
    """What a request gives in a session of its own."""
    one = decoder(model, block_size, batch_size=1, max_len=128, sampling=rule)
    one.add(prompt(index), length, params)
    tokens: list[int] = []
    while one.session.requests:
        for event in one.step():
            tokens += event.tokens
    return tokens


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [1, 4])
def test_ragged_batch_of_sixteen(model: Transformer, block_size: int, rule: Any) -> None:
    """Joins, leaves, cancellations and a poisoned request, in slots that are used again and again."""
    serving = decoder(model, block_size, batch_size=16, max_len=128, sampling=rule)
    what = [(prompt(i), 6 + i * 7 % 19, PARAMS[i % len(PARAMS)]) for i in range(26)]
    poisoned, cancelled = 14, (3, 9)  # ids count up as requests join
    what[poisoned] = ([1, POISON, 2], 20, PARAMS[1])
    waiting = list(what)
    tokens: list[list[int]] = [[] for _ in what]
    reasons: list[str | None] = [None] * len(what)
    steps = 0
    while waiting or serving.session.requests:
        while waiting and serving.session.free_slots and len(serving.session.requests) < 8 + 3 * steps:
            serving.add(*waiting.pop(0))
        if steps == 2:
            for request_id in cancelled:
                got = serving.remove(request_id)
                reasons[request_id] = got.finish_reason
                assert got.tokens == tokens[request_id]
        for event in serving.step():
            tokens[event.id] += event.tokens
            reasons[event.id] = event.finish_reason
        steps += 1
        assert steps < 200
    assert (reasons[poisoned], tokens[poisoned]) == ("error", [])
    for i, (_, length, params) in enumerate(what):
        if i == poisoned:
            continue
        expected = alone(model, i, length, block_size, params, rule)
        if i in cancelled:
            assert reasons[i] == "cancelled"
            assert 0 < len(tokens[i]) < length
            assert tokens[i] == expected[: len(tokens[i])]
        else:
            assert (tokens[i], reasons[i]) == (expected, "length")


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_coupled_is_autoregressive_sampling(model: Transformer, params: SamplingParams) -> None:
    expected = [alone(model, index, 24, 0, params, "coupled") for index in (2, 5)]
    for block_size in (1, 2, 3, 4, 8):
        assert [alone(model, index, 24, block_size, params, "coupled") for index in (2, 5)] == expected


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(8, 20))]
)
def test_coupled_on_the_shipped_model(shipped: tuple[Transformer, ByteTokenizer], seed: int) -> None:
    """Temperature 0.8: the very tokens of autoregressive sampling, whatever B, batch and order of joining."""
    model, tokenizer = shipped
    prompts = [tokenizer.encode(text) for text in ("def add(a, b):\n", "class Queue:\n    ", "import sys\n\nfor ")]
    length, params = 16, [SamplingParams(0.8, seed=100 * seed + i) for i in range(3)]
    expected = [
        Decoder(model, mode="autoregressive").generate([p], length, temperature=0.8, seed=q.seed).tokens[0]
        for p, q in zip(prompts, params, strict=True)
    ]
    for block_size, order in ((1 + seed % 4, (0, 1, 2)), (8, (2, 0, 1)), (16 if seed % 2 else 5, (1, 2, 0))):
        serving = Decoder(model, block_size, batch_size=3, max_len=96)
        ids = {}
        tokens: dict[int, list[int]] = {}
        for late, index in enumerate(order):
            ids[serving.add(prompts[index], length, params[index])] = index
            for event in serving.step() if late else ():
                tokens.setdefault(event.id, []).extend(event.tokens)
        while serving.session.requests:
            for event in serving.step():
                tokens.setdefault(event.id, []).extend(event.tokens)
        assert {ids[i]: got for i, got in tokens.items()} == dict(enumerate(expected))


@pytest.fixture(scope="module")
def shipped() -> tuple[Transformer, ByteTokenizer]:
    return load_shipped()


def test_generate_samples_with_a_seed_for_each_prompt(model: Transformer) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "seed": 2**64 - 1}
    prompts = [prompt(2), prompt(2), prompt(7)]
    together = Decoder(model, 4).generate(prompts, 20, **options)
    assert together.tokens[0] != together.tokens[1]
    for i, seed in enumerate((2**64 - 1, 0, 1)):
        single = Decoder(model, 2).generate([prompts[i]], 20, **{**options, "seed": seed})
        assert single.tokens == [together.tokens[i]]
    assert together.finish_reasons == ["length"] * 3


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_beta_lets_the_block_choose(model: Transformer, beta: float) -> None:
    """By definition, from whole passes without a cache: slot 0 from both logits, B = 1, greedy."""
    tokens = prompt(5)
    got = Decoder(model, 1, beta=beta).generate([tokens], 12).tokens[0]
    assert Decoder(model, 1).generate([tokens], 12).tokens[0] != got
    n = len(tokens)
    for i, token in enumerate(got):
        if i:  # the first token comes with the prefill, where there is no block after it
            known = torch.tensor([tokens + got[:i] + [CONFIG.mask_token_id]])
            from tidar_kernels.patterns import tidar_prefill

            with torch.inference_mode():
                logits = model.logits(model(known, tidar_prefill(n + i, 1)))[0]
            assert token == int((beta * logits[-2] + (1 - beta) * logits[-1]).argmax())


def test_stop_strings_cross_token_boundaries(model: Transformer) -> None:
    alphabet = "".join(chr(97 + i % 26) + ("é" if i % 3 == 0 else "") for i in range(40))
    pieces = [alphabet[i : i + 1 + i % 2] for i in range(40)]

    def decode(tokens: list[int]) -> str:
        return "".join(pieces[t] for t in tokens)

    full = alone(model, 4, 30, 4, PARAMS[1], "coupled")
    text = decode(full)
    at = len(decode(full[:9])) - 1
    stop = text[at : at + 3]
    expected = next(k for k in range(1, 31) if stop in decode(full[:k]))
    for block_size in (0, 4, 8):
        serving = decoder(model, block_size, batch_size=2, max_len=128)
        request_id = serving.add(prompt(4), 30, PARAMS[1], stop_strings=[stop, "absent"], decode=decode)
        request = serving.session.requests[request_id]
        while serving.session.requests:
            serving.step()
        assert (request.tokens, request.finish_reason) == (full[:expected], "stop")


def test_callbacks_and_async_iteration(model: Transformer) -> None:
    serving = decoder(model, 4, batch_size=2, max_len=128)
    called: list[tuple[int, list[int]]] = []
    yielded: list[tuple[int, list[int]]] = []
    joined: list[int] = []

    async def serve() -> None:
        async for events in serving.session.steps():
            yielded.extend((event.id, event.tokens) for event in events)
            if not joined:
                joined.append(serving.add(prompt(3), 9, on_tokens=lambda *what: called.append(what)))

    first = serving.add(prompt(1), 12, on_tokens=lambda *what: called.append(what))
    asyncio.run(serve())
    assert called == yielded
    for request_id, index, length in ((first, 1, 12), (joined[0], 3, 9)):
        got = [token for i, tokens in called if i == request_id for token in tokens]
        assert got == alone(model, index, length, 4, PARAMS[0], "coupled")


def test_a_callback_that_raises_leaves_the_session_whole(model: Transformer) -> None:
    serving = decoder(model, 4, batch_size=2, max_len=128)

    def fail(*_: object) -> None:
        raise RuntimeError("consumer")

    failing = serving.session.requests[serving.add(prompt(1), 12, on_tokens=fail)]
    other = serving.add(prompt(2), 12)
    request = serving.session.requests[other]
    events = [event for _ in iter(lambda: len(serving.session.requests), 0) for event in serving.step()]
    assert [event.finish_reason for event in events if event.id == failing.id] == ["error"]
    assert failing.error == "RuntimeError: consumer"
    assert str(failing.exception) == "consumer"
    assert request.tokens == alone(model, 2, 12, 4, PARAMS[0], "coupled")
    assert [token for event in events if event.id == other for token in event.tokens] == request.tokens


def test_poison_in_the_prompt_and_later(model: Transformer) -> None:
    """NaN logits after the prompt, and NaN logits in the middle of a generation, end that request alone."""
    serving = decoder(model, 4, batch_size=3, max_len=128)
    poisoned, other = serving.add([3, POISON], 10), serving.add(prompt(2), 16)
    requests = dict(serving.session.requests)
    late = serving.add(prompt(6), 16)
    requests[late] = serving.session.requests[late]
    serving.step()
    slot = serving.session._slots.index(requests[late])
    before = list(requests[late].tokens)
    serving.session.cache.k[0, slot, :, 0] = math.nan
    while serving.session.requests:
        serving.step()
    assert requests[poisoned].error == "expected finite logits, got NaN, inf or nothing above -inf after the prompt"
    assert requests[late].finish_reason == "error"
    assert requests[late].tokens[: len(before)] == before
    assert len(requests[late].tokens) < 16
    assert requests[other].tokens == alone(model, 2, 16, 4, PARAMS[0], "coupled")
    # The slot of the poisoned cache is clean again for whoever comes next.
    again = serving.add(prompt(8), 10)
    request = serving.session.requests[again]
    while serving.session.requests:
        serving.step()
    assert request.tokens == alone(model, 8, 10, 4, PARAMS[0], "coupled")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": []}, ValueError, r"^prompt: expected at least one token, got none$"),
        ({"prompt": [40]}, ValueError, r"^prompt: expected tokens in \[0, 40\), got 40$"),
        ({"prompt": ["a"]}, TypeError, r"^prompt: expected ints, got str$"),
        ({"prompt": [1] * 50}, ValueError, r"^max_len: expected >= 74 \(prompt 50 \+ max_new_tokens 20 \+ 4 drafts\)"),
        ({"max_new_tokens": 0}, ValueError, r"^max_new_tokens: expected >= 1, got 0$"),
        ({"params": {"temperature": 1}}, TypeError, r"^params: expected a SamplingParams, got dict$"),
        ({"stop_tokens": [40]}, ValueError, r"^stop_tokens: expected token ids in \[0, 40\), got 40$"),
        ({"stop_strings": "end"}, TypeError, r"^stop_strings: expected a sequence of strings, got str$"),
        ({"stop_strings": [""]}, ValueError, r"^stop_strings: expected non-empty strings"),
        ({"stop_strings": ["end"]}, ValueError, r"^decode: expected a function from token ids to text"),
    ],
)
def test_bad_requests_change_nothing(model: Transformer, change: Any, error: type[Exception], message: str) -> None:
    session = Session(model, StepConfig(tidar(4), 39), 1, 64)
    with pytest.raises(error, match=message):
        session.add(**{"prompt": [1, 2], "max_new_tokens": 20} | change)
    assert session.free_slots == 1
    assert not session.cache.k.any()
    session.add([1, 2], 20)
    with pytest.raises(ValueError, match=r"^prompt: expected a free slot, got 1 requests running$"):
        session.add([1], 2)
    with pytest.raises(KeyError, match=r"request_id: expected one of \[0\], got 7"):
        session.remove(7)


def test_capture_and_replay_are_on_the_devices_of_the_weights(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session on GPU 1 while GPU 0 is the current one, with a `torch.cuda` that notes where things happen."""
    current, used = [0], []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen.index)
        try:
            yield
        finally:
            current.pop()

    class On:
        """A stream, an event or a graph: all of it must happen on one device."""

        def __init__(self) -> None:
            self.made_on = current[-1]

        def use(self, *_: Any) -> None:
            used.append((self.made_on, current[-1]))

        wait_stream = record = synchronize = use

        def replay(self) -> None:
            self.use()
            runner._device_step(runner._batch, runner._active, runner._report)
            runner.cache.length_bounds[:] = bounds

    @contextmanager
    def using(thing: On, pool: Any = None) -> Iterator[None]:
        thing.use()
        yield

    def current_stream() -> On:
        return On()

    for name, fake in {
        "device": device, "Stream": On, "Event": On, "CUDAGraph": On,
        "stream": using, "graph": using, "current_stream": current_stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))

    tokens = []
    for cuda_graph in (False, True):
        session = Session(model, StepConfig(tidar(4), 39), 2, 128, cuda_graph=cuda_graph)
        for i in range(2):
            session.add(prompt(i), 12, PARAMS[i])
        runner, bounds, requests = session._runner, session.cache.length_bounds, dict(session.requests)
        if cuda_graph:
            runner.device = torch.device("cuda", 1)
        while session.requests:
            bounds = session.cache.length_bounds.copy()
            session.step()
        tokens.append([request.tokens for request in requests.values()])
    assert tokens[0] == tokens[1]
    assert len(used) > 10
    assert set(used) == {(1, 1)}
    assert current == [0]


@pytest.mark.cuda
@pytest.mark.parametrize("rule", RULES)
def test_the_graph_is_the_step_and_never_waits(model: Transformer, rule: Any) -> None:
    """Captured and not: the same tokens; and no step but for its report makes the host wait."""
    on_gpu = Transformer(CONFIG).to("cuda")
    on_gpu.load_state_dict(model.state_dict())
    outputs = []
    for cuda_graph in (False, True):
        session = Session(on_gpu, StepConfig(tidar(4), 39, rule), 4, 128, cuda_graph=cuda_graph)
        for i in range(3):
            session.add(prompt(i), 20, PARAMS[i])
        requests = dict(session.requests)
        session.step()
        if cuda_graph:
            torch.cuda.set_sync_debug_mode("error")
        try:
            session.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        session.add(prompt(3), 20, PARAMS[5])
        requests |= session.requests
        while session.requests:
            session.step()
        outputs.append([requests[i].tokens for i in sorted(requests)])
    assert outputs[0] == outputs[1]


def test_a_captured_step_is_forgotten_when_weights_lie_elsewhere() -> None:
    """And only then. What captures a step needs a GPU; what forgets one does not."""
    model = sharp_model()
    runner = Session(model, StepConfig(autoregressive()), 1, 8)._runner
    captured: Any = {"a step": object()}
    runner._graphs.update(captured)
    runner.weights_may_have_moved()
    assert runner._graphs == captured, "there is no graph on this device"
    runner._use_graph = True
    runner.weights_may_have_moved()
    assert not runner._graphs, "its weights are not known"
    runner._graphs.update(captured)
    runner.weights_may_have_moved()
    assert runner._graphs == captured
    model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    runner.weights_may_have_moved()
    assert not runner._graphs


@pytest.mark.parametrize("page_size", [None, 16])
def test_no_key_of_a_slot_that_was_left_is_read(
    model: Transformer, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else notices: with the same neighbours the others' K/V has the same bits, left or not."""
    read: list[list[int]] = []
    attend = ops.step_attention

    def counted(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, lengths: Any, *args: Any, **options: Any) -> Any:
        read.append(lengths.tolist())
        return attend(q, k, v, k_cache, v_cache, lengths, *args, **options)

    monkeypatch.setattr(ops, "step_attention", counted)
    caches, tokens = [], []
    for leaves in (False, True):
        session = Session(model, StepConfig(tidar(4), 39), 3, 128, page_size=page_size)
        ids = [session.add(prompt(i), 30, PARAMS[i]) for i in range(3)]
        requests = dict(session.requests)
        for _ in range(4):
            session.step()
        if leaves:
            kept = len(prompt(1)) + len(session.remove(ids[1]).tokens)
        read.clear()
        session.step()
        idle = [lengths[1] for lengths in read]
        assert len(read) == CONFIG.num_layers
        assert set(idle) == {0} if leaves else min(idle) > 0
        assert all(lengths[0] > 0 and lengths[2] > 0 for lengths in read)
        if leaves and page_size is None:  # it stays as it was committed
            assert int(session.cache.lengths[1]) == kept
        while {ids[0], ids[2]} & set(session.requests):
            session.step()
        caches.append([x.clone() for x in (session.cache.k, session.cache.v)])
        tokens.append([requests[i].tokens for i in (ids[0], ids[2])])
        if leaves:  # whoever joins is read again
            session.add(prompt(4), 6)
            read.clear()
            session.step()
            assert {lengths[0] for lengths in read} == {len(prompt(4))}
    assert tokens[0] == tokens[1]
    if page_size is None:
        for slot in (0, 2):
            length = len(prompt(slot)) + 29
            for ours, theirs in zip(*caches, strict=True):
                assert torch.equal(ours[:, slot, :, :length], theirs[:, slot, :, :length])
