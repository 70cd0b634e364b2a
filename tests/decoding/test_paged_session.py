"""Sessions on pages: the tokens of a contiguous cache, admission by pages, and prompts that begin alike."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from tests.toys import sharp_model
from tidar_kernels import strategies
from tidar_kernels.decoding.session import Session, StepConfig
from tidar_kernels.decoding.strategies import Strategy
from tidar_kernels.models import Transformer
from tidar_kernels.ops.verify import SamplingParams

START = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
PROMPTS = [START, [9], [*START, 8, 9, 7], START[:7], [2, 7, 1]]
MADE: dict[str, Strategy] = {
    "autoregressive": strategies.autoregressive(),
    "tidar": strategies.tidar(3),
    "isd": strategies.isd(3),
    "self_speculation": strategies.by_name("self_speculation", 3),
    "tree": strategies.by_name("tree", 3),
    "block_diffusion": strategies.by_name("block_diffusion", 3),
}
PARAMS = [SamplingParams(), SamplingParams(0.8, seed=3), SamplingParams(1.1, top_k=5, seed=4)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharp_model()


def session(model: Transformer, name: str = "tidar", batch_size: int = 3, max_len: int = 40, **options: Any) -> Session:
    of_step = {key: options.pop(key) for key in ("exact", "prefill_chunk") if key in options}
    return Session(model, StepConfig(MADE[name], mask_token_id=29, **of_step), batch_size, max_len, **options)


def tokens_of(given: Session, new_tokens: int = 8) -> list[list[int]]:
    """What every prompt becomes; they join as others leave, so that slots and pages are used again."""
    waiting, found = list(enumerate(PROMPTS)), []
    while waiting or given.requests:
        while waiting and given.free_slots:
            index, prompt = waiting.pop(0)
            params = PARAMS[index % 3]
            found.append(given.requests[given.add(prompt, new_tokens, params)])
        given.step()
    return [request.tokens for request in found]


@pytest.mark.parametrize("name", MADE)
def test_the_tokens_of_a_contiguous_cache(model: Transformer, name: str) -> None:
    expected = tokens_of(session(model, name))
    given = session(model, name, page_size=4, prefill_chunk=5)
    assert tokens_of(given) == expected
    given.step()
    assert given.cache.pool is not None
    assert given.cache.free_pages == given.cache.pool.num_pages


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_sizes(model: Transformer, page_size: int) -> None:
    assert tokens_of(session(model, page_size=page_size)) == tokens_of(session(model))


def test_exact_tokens_share_whole_chunks(model: Transformer) -> None:
    expected = tokens_of(session(model, exact=True, prefill_chunk=4))
    given = session(model, exact=True, prefill_chunk=4, page_size=4)
    assert tokens_of(given) == expected
    first = given.add(START, 4)
    given.add([*START, 8, 9, 7], 4)
    slots = {request.id: slot for slot, request in enumerate(given._slots) if request is not None}
    shared = set(given.cache.pages_of(slots[first])) & set(given.cache.pages_of(slots[first + 1]))
    assert len(shared) == 2  # of eleven tokens the first eight are those of two whole chunks


def test_prompts_share_what_they_begin_with(model: Transformer) -> None:
    """Eleven tokens in common: two whole pages are shared, the third is copied, and only what follows is computed."""
    given = session(model, page_size=4, prefill_chunk=4)
    assert given.cache.pool is not None
    start, needed = given.cache.free_pages, -(-(len(START) + 6 + 3) // 4)
    given.add(START, 6)
    assert start - given.cache.free_pages == needed
    forwards = given.prefill_forwards
    given.add([*START, 8, 9], 6)
    more = -(-(len(START) + 2 + 6 + 3) // 4)
    assert start - given.cache.free_pages == needed + more - 2
    assert given.prefill_forwards == forwards + 1
    assert [given.cache.pool.users(page) for page in given.cache.pages_of(1)[:3]] == [2, 2, 1]
    assert given.cache.pages_of(0)[:2] == given.cache.pages_of(1)[:2]
    given.remove(0)  # the pages stay those of the other
    assert start - given.cache.free_pages == more
    alone = session(model)
    alone.add([*START, 8, 9], 6)
    for both in (given, alone):
        while both.requests:
            (request,) = both.requests.values()
            both.step()
        assert len(request.tokens) == 6
        both.last = request.tokens  # type: ignore[attr-defined]
    assert given.last == alone.last  # type: ignore[attr-defined]
    assert given.cache.free_pages == start


@pytest.mark.parametrize("other", [1, 27])
def test_prompts_share_no_more_than_is_equal(model: Transformer, other: int) -> None:
    """The token that differs is a smaller one, or a larger one."""
    given, alone = session(model, page_size=1), session(model)
    given.add(START, 6)
    prompt = [*START[:5], other, *START[6:]]
    requests = [each.requests[each.add(prompt, 6)] for each in (given, alone)]
    assert len(set(given.cache.pages_of(0)) & set(given.cache.pages_of(1))) == 5
    for each in (given, alone):
        while each.requests:
            each.step()
    assert requests[0].tokens == requests[1].tokens


def test_admission_is_by_pages_and_not_by_the_longest(model: Transformer) -> None:
    """Ten pages of four tokens: one request of 40 tokens, or four of ten."""
    given = session(model, "autoregressive", batch_size=6, max_len=40, page_size=4, num_pages=10)
    for index in range(3):
        given.add([index + 1, 2, 3], 6)  # ten tokens with the draft: three pages
    with pytest.raises(ValueError, match=r"^prompt: expected 3 free pages, got 1 of 10$"):
        given.add([7, 2, 3], 6)
    assert len(given.requests) == 3
    last = given.add([7], 2)  # one page
    assert given.cache.free_pages == 0
    while given.requests:
        given.step()
    assert given.cache.free_pages == 10
    with pytest.raises(ValueError, match=r"^max_len: expected >= 41 "):
        given.add([1, 2, 3], 37)
    with pytest.raises(ValueError, match=r"^num_pages: expected >= 4 for 13 tokens \(prompt 3 \+ .*, got 3$"):
        session(model, "autoregressive", page_size=4, num_pages=3).add([1, 2, 3], 9)
    assert given.add([1] * 30, 9) == last + 1


def test_an_ended_request_gives_its_pages_to_the_next(model: Transformer) -> None:
    """Also where it has not left its slot yet, and where its pages are shared."""
    given = session(model, "autoregressive", batch_size=3, max_len=40, page_size=4, num_pages=6)
    given.add(START, 4)  # four pages
    given.add([*START, 7], 3)  # two of its own
    assert given.cache.free_pages == 0
    with pytest.raises(ValueError, match=r"^prompt: expected 2 free pages, got 0 of 6$"):
        given.add([8, 8], 4)
    with given._turn:  # as if a step were under way: the slot is not left yet
        given._is_computing = True
        given.remove(0)
        with pytest.raises(ValueError, match=r"^prompt: expected 3 free pages, got 2 of 6$"):
            given.add([8, 8], 8)
        waits = given.add([8, 8], 4)
        with pytest.raises(ValueError, match=r"^prompt: expected 1 free pages, got 0 of 6$"):
            given.add([8], 1)
        given._is_computing = False
    request = given.requests[waits]
    while given.requests:
        given.step()
    assert len(request.tokens) == 4
    assert given.cache.free_pages == 6


def test_a_prompt_that_fails_gives_its_pages_back(model: Transformer) -> None:
    given = session(model, page_size=4)
    free = given.cache.free_pages

    def fail(*_: Any) -> None:
        raise RuntimeError("no prefill")

    handle = model.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="no prefill"):
            given.add(START, 4)
    finally:
        handle.remove()
    given.step()
    assert given.cache.free_pages == free
    assert tokens_of(given) == tokens_of(session(model))


@pytest.mark.parametrize("name", ["tidar", "tree"])
def test_ctrl_c_in_any_forward_pass_leaves_pages_whole(model: Transformer, name: str) -> None:
    """In prefills of prompts that share pages, and in steps: what is shared is not computed again, nor written."""
    expected = tokens_of(session(model, name, prefill_chunk=5), 4)
    passes = 0

    def interrupted(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes % 11 == 5:
            raise KeyboardInterrupt

    given = session(model, name, prefill_chunk=5, page_size=4)
    waiting, found = list(enumerate(PROMPTS)), []
    handle = model.register_forward_hook(interrupted)
    for _ in range(100):
        with suppress(KeyboardInterrupt):
            while waiting and given.free_slots:
                index, prompt = waiting[0]
                found.append(given.requests[given.add(prompt, 4, PARAMS[index % 3])])
                waiting.pop(0)  # what was interrupted is cancelled, and asked for again
            given.step()
        if not waiting and not given.requests:
            break
    handle.remove()
    assert passes > 10
    assert [request.tokens for request in found] == expected
    given.step()
    assert given.cache.pool is not None
    assert given.cache.free_pages == given.cache.pool.num_pages
