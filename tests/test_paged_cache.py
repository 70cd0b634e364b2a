"""The KV cache in pages: the same tokens as without, pages taken, given back and shared, and what runs out by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tidar_kernels as tk
from tests.paths import DEVICES
from tidar_kernels import KVCache
from tidar_kernels.nn.rotary import RotaryEmbedding
from tidar_kernels.ops import paging
from tidar_kernels.ops.operands import Cached

SIZES = {"num_layers": 2, "batch_size": 3, "num_kv_heads": 2, "max_len": 20, "head_dim": 8}
DTYPES = [torch.float32, torch.float8_e4m3fn]


def cache(**changes: Any) -> KVCache:
    return KVCache(**(SIZES | changes))


def held(of: KVCache) -> list[Tensor]:
    """The committed tokens of every layer, without pages and dequantised: `[batch, heads, max_len, head_dim]`."""
    found: list[Tensor] = []
    for layer in range(of.num_layers):
        options = {"block_table": None, "k_scale": None, "v_scale": None} | of.options(layer)
        found += paging.dense(Cached(*of.layer(layer), of.lengths, 0, **options), of.max_len)
    return found


def same(one: KVCache, other: KVCache) -> bool:
    return torch.equal(one.lengths, other.lengths) and all(map(torch.equal, held(one), held(other)))


def draw(tokens: int, batch: int = 3, device: str = "cpu") -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, tokens, 2, 8, device=device).transpose(2, 3).unbind(0)
    return k, v


def fill(subject: KVCache, counts: list[int], seed: int = 0) -> None:
    """Commit so many random tokens of each sequence."""
    torch.manual_seed(seed)
    for sequence, count in enumerate(counts):
        one = subject.sequence(sequence)
        k, v = draw(count, 1, subject.k.device.type)
        for layer in range(subject.num_layers):
            one.append(layer, k + layer, v - layer)
        one.commit(count)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_the_same_tokens_as_without_pages(device: str, dtype: torch.dtype, page_size: int) -> None:
    """Appends, rotary appends, commits, compactions, resets, and one sequence alone."""
    plain, paged = cache(dtype=dtype, device=device), cache(dtype=dtype, device=device, page_size=page_size)
    rotary = RotaryEmbedding(8).to(device)(torch.arange(4, device=device), torch.float32)
    for subject in (plain, paged):
        torch.manual_seed(1)
        for accepted in ([1, 4, 2], [3, 0, 1]):
            k, v = draw(4, device=device)
            for layer in range(2):
                subject.append(layer, k + layer, v - layer)
            subject.commit(torch.tensor(accepted, device=device), at_most=4)
            subject.lengths_known(subject.lengths.tolist())
        k, v = draw(4, device=device)
        for layer in range(2):
            subject.rotary_append(layer, k, k, v, rotary, 3)
        subject.compact(torch.tensor([[0, 2, -1], [1, -1, -1], [0, 1, 2]], device=device))
        subject.commit(torch.tensor([2, 1, 3], device=device), at_most=3)
        subject.lengths_known(subject.lengths.tolist())
    assert same(plain, paged)
    for subject in (plain, paged):
        torch.manual_seed(2)
        one = subject.sequence(1)
        assert (one.batch_size, one.max_len, one.lengths.tolist()) == (1, 20, [5])
        one.reset()
        one.append(0, *draw(6, 1, device))
        one.commit(6)
    assert plain.lengths.tolist() == paged.lengths.tolist() == [6, 6, 6]
    assert all(map(torch.equal, held(plain)[:2], held(paged)[:2]))
    assert paged.pool is not None
    assert paged.free_pages == paged.pool.num_pages - sum(len(paged.pages_of(sequence)) for sequence in range(3))


def test_memory_follows_the_tokens() -> None:
    subject = cache(page_size=4, num_pages=6)
    assert subject.k.shape == subject.v.shape == (2, 7, 2, 4, 8)
    assert (subject.page_size, subject.max_len, subject.batch_size, subject.free_pages) == (4, 20, 3, 6)
    assert (cache().page_size, cache().free_pages, cache().pages_for(5)) == (None, 0, 0)
    fill(subject, [4, 4, 1])
    assert subject.free_pages == 3
    fill_one = subject.sequence(1)
    fill_one.append(0, *draw(1, 1))
    assert subject.free_pages == 2
    assert [len(subject.pages_of(sequence)) for sequence in range(3)] == [1, 2, 1]
    pages = [page for sequence in range(3) for page in subject.pages_of(sequence)]
    assert len(set(pages)) == 4
    assert 0 not in pages
    subject.reserve(2, 9)
    assert [len(subject.pages_of(sequence)) for sequence in range(3)] == [1, 2, 3]
    subject.reserve(2, 3)  # has them
    assert subject.free_pages == 0
    subject.sequence(1).reset()
    assert subject.free_pages == 2
    subject.reset()
    assert subject.free_pages == 6


def test_too_few_pages_are_an_error_and_nothing_is_written() -> None:
    subject = cache(page_size=4, num_pages=4)
    fill(subject, [4, 4, 1])
    before = [x.clone() for x in (subject.k, subject.v, subject.lengths, subject.block_table)]  # type: ignore[union-attr]
    for call in (
        lambda: subject.append(0, *draw(4)),
        lambda: subject.commit(torch.tensor([4, 4, 0]), at_most=4),
        lambda: subject.reserve(0, 12),
        lambda: subject.compact(torch.tensor([[0, 1], [0, 1], [0, 1]])),
    ):
        with pytest.raises(ValueError, match=r"^num_pages: expected [23] free pages, got 1 of 4$"):
            call()
    with pytest.raises(ValueError, match=r"^max_len: expected room for 17 more tokens in sequence 0, got 4 of 20"):
        subject.append(0, *draw(17))
    with pytest.raises(ValueError, match=r"^num_tokens: expected 0 <= num_tokens <= max_len = 20, got 21$"):
        subject.reserve(0, 21)
    assert subject.block_table is not None
    assert all(map(torch.equal, before, [subject.k, subject.v, subject.lengths, subject.block_table]))
    assert subject.free_pages == 1


def test_a_last_page_does_not_raise_the_limit() -> None:
    subject = cache(page_size=16)
    fill(subject, [20, 3, 3])
    with pytest.raises(ValueError, match=r"^max_len: expected room for 1 more tokens in sequence 0, got 20 of 20"):
        subject.append(0, *draw(1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 1, 4, 16])
@pytest.mark.parametrize("tokens", [0, 3, 8, 10])
def test_sequences_share_what_they_begin_with(
    device: str, dtype: torch.dtype, page_size: int | None, tokens: int
) -> None:
    subject = cache(page_size=page_size, dtype=dtype, device=device)
    fill(subject, [10, 2, 5])
    free, taken = subject.free_pages, subject.pages_for(2)
    before = held(subject)
    subject.share(1, 0, tokens)
    assert subject.lengths.tolist() == [10, tokens, 5]
    for old, new in zip(before, held(subject), strict=True):
        assert torch.equal(new[[0, 2]], old[[0, 2]])
        assert torch.equal(new[1, :, :tokens], old[0, :, :tokens])
    if page_size is not None:
        whole = tokens // page_size
        assert subject.pages_of(1)[:whole] == subject.pages_of(0)[:whole]
        assert not set(subject.pages_of(1)[whole:]) & set(subject.pages_of(0))
        assert len(subject.pages_of(1)) == subject.pages_for(tokens)
        assert subject.free_pages == free + taken - (tokens % page_size > 0)
    # Each goes on after its own tokens, and the other one does not notice.
    kept = held(subject)
    one = subject.sequence(1)
    for layer in range(2):
        one.append(layer, *draw(5, 1, device))
    one.commit(5)
    zero = subject.sequence(0)
    zero.append(0, *draw(5, 1, device))
    for old, new in zip(kept, held(subject), strict=True):
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[1, :, :tokens], old[1, :, :tokens])
    # The first one ends; what it began with is still there for the other.
    subject.sequence(0).reset()
    fill_new = subject.sequence(2)
    fill_new.append(0, *draw(5, 1, device))
    for old, new in zip(kept, held(subject), strict=True):
        assert torch.equal(new[1, :, :tokens], old[1, :, :tokens])
    subject.reset()
    if page_size is not None:
        assert subject.free_pages == subject.pool.num_pages  # type: ignore[union-attr]


def test_a_page_is_free_when_nobody_has_it() -> None:
    subject = cache(page_size=4, num_pages=8)
    fill(subject, [8, 1, 1])
    subject.share(1, 0, 8)
    subject.share(2, 1, 7)
    assert [subject.pool.users(page) for page in subject.pages_of(0)] == [3, 2]  # type: ignore[union-attr]
    assert subject.free_pages == 8 - 3
    subject.release(0)
    assert subject.free_pages == 5
    subject.release(1)
    assert subject.free_pages == 6
    subject.share(1, 2, 4)
    subject.share(1, 2, 7)  # instead of what it had
    assert [subject.pool.users(page) for page in subject.pages_of(2)] == [2, 1]  # type: ignore[union-attr]
    subject.release(2)
    assert subject.free_pages == 6


def test_what_cannot_be_shared_changes_nothing() -> None:
    subject = cache(page_size=4, num_pages=4)
    fill(subject, [8, 1, 1])
    before = [subject.block_table.tolist(), subject.lengths.tolist(), subject.free_pages]  # type: ignore[union-attr]
    for arguments, message in (
        ((1, 1, 1), r"^of: expected another sequence than 1, got the same$"),
        ((3, 0, 1), r"^sequence: expected 0 <= sequence < batch_size = 3, got 3$"),
        ((1, -1, 1), r"^of: expected 0 <= of < batch_size = 3, got -1$"),
        ((1, 0, 9), r"^num_tokens: expected 0 <= num_tokens <= the 8 tokens of sequence 0, got 9$"),
    ):
        with pytest.raises(ValueError, match=message):
            subject.share(*arguments)
    assert [subject.block_table.tolist(), subject.lengths.tolist(), subject.free_pages] == before  # type: ignore[union-attr]
    subject.share(1, 0, 4)
    subject.reserve(0, 12)
    assert subject.free_pages == 0
    with pytest.raises(ValueError, match=r"^num_pages: expected a free page, got 0 of 4$"):
        subject.share(1, 0, 7)
    assert subject.lengths.tolist() == [8, 4, 1]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_appended_to_a_released_sequence_is_lost(device: str) -> None:
    """A step computes all sequences, and of those that are idle nothing is kept; no page is taken for them."""
    subject = cache(page_size=4, num_pages=6, device=device)
    fill(subject, [3, 5, 2])
    before = held(subject)
    subject.release(1)
    assert subject.lengths.tolist() == [3, 0, 2]
    free = subject.free_pages
    for _ in range(8):
        subject.append(0, *draw(4, device=device))
        subject.length_bounds += 4
        subject.lengths_known([3, 0, 2])
    assert subject.free_pages == free - 2  # of the others, which have four more slots
    for old, new in zip(before, held(subject), strict=True):
        assert torch.equal(new[[0, 2]], old[[0, 2]])
    subject.reserve(1, 6)
    one = subject.sequence(1)
    k, v = draw(6, 1, device)
    one.append(0, k, v)
    one.commit(6)
    assert torch.equal(held(subject)[0][1, :, :6], k[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 0}, r"^page_size: expected an int >= 1, got 0$"),
        ({"page_size": 2.0}, r"^page_size: expected an int >= 1, got 2\.0$"),
        ({"page_size": 4, "num_pages": 0}, r"^num_pages: expected an int >= 1, got 0$"),
        ({"num_pages": 3}, r"^num_pages: expected None without a page_size, got 3$"),
        ({"page_size": True}, r"^page_size: expected an int >= 1, got True$"),
        ({"max_len": 2**31}, r"^max_len: expected an int < 2\*\*31, got 2147483648$"),
        ({"page_size": 4, "num_pages": 10**30}, r"^num_pages: expected an int < 2\*\*31, got 10+$"),
    ],
)
def test_sizes_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache(**changes)


def test_a_sequence_alone_takes_pages_of_the_whole_cache() -> None:
    subject = cache(page_size=4)
    one = subject.sequence(2)
    one.append(0, *draw(5, 1))
    assert subject.pages_of(2) == one.pages_of(0)
    assert len(subject.pages_of(2)) == 2
    assert tk.KVCache is KVCache


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, "float32"], ids=str)
def test_dtypes_are_those_of_the_operators(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"^dtype: expected a float dtype, float8_e4m3fn or float8_e5m2, got "):
        cache(dtype=dtype)


BAD_CALLS: dict[str, tuple[Callable[[KVCache], Any], type[Exception], str]] = {
    "sequence": (lambda c: c.sequence(None), ValueError, r"^index: expected 0 <= index < batch_size = 3, got None$"),  # type: ignore[arg-type]
    "release": (lambda c: c.release(1.5), ValueError, r"^sequence: expected 0 <= .* got 1\.5$"),  # type: ignore[arg-type]
    "reserve": (lambda c: c.reserve(0, "2"), TypeError, r"^num_tokens: expected an int, got str$"),  # type: ignore[arg-type]
    "share": (lambda c: c.share(0, 1, 0.0), TypeError, r"^num_tokens: expected an int, got float$"),  # type: ignore[arg-type]
    "floats": (lambda c: c.commit(torch.ones(3), at_most=1), TypeError, r"^accepted: expected an integer dtype, got t"),
    "a list": (lambda c: c.commit([1, 1, 1], at_most=1), TypeError, r"^accepted: expected a torch.Tensor, got list$"),  # type: ignore[arg-type]
    "counts": (
        lambda c: c.commit(torch.tensor([1, 1]), at_most=1),
        ValueError,
        r"^accepted: expected shape \[3\], got \[2\]$",
    ),
    "a layer": (
        lambda c: c.append(9, *draw(2, 3)),
        ValueError,
        r"^layer: expected 0 <= layer < num_layers = \d, got 9$",
    ),
    "a layer before the first": (lambda c: c.layer(-1), ValueError, r"^index: expected 0 <= index < .* got -1$"),
    "lists": (lambda c: c.append(0, [1.0], [1.0]), TypeError, r"^k: expected a torch.Tensor, got list$"),  # type: ignore[arg-type]
    "room": (lambda c: c.check_room("2"), TypeError, r"^num_tokens: expected an int, got str$"),  # type: ignore[arg-type]
    "lengths": (lambda c: c.lengths_known([1, 2]), ValueError, r"^lengths: expected 3 lengths, got 2$"),
    "at most": (
        lambda c: c.commit(torch.tensor([1, 1, 1]), at_most=1.5),  # type: ignore[arg-type]
        TypeError,
        r"^at_most: expected an int, got float$",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    subject = cache(page_size=4)
    with pytest.raises(error, match=message):
        call(subject)
    assert (subject.lengths.tolist(), subject.length_bounds.tolist()) == ([0, 0, 0], [0, 0, 0])
    assert subject.pool is not None
    assert subject.free_pages == subject.pool.num_pages


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_by_themselves(
    copied: Callable[[KVCache], KVCache], page_size: int | None, dtype: torch.dtype, inference: bool
) -> None:
    """Also copies that were made in inference mode; the original, its pages and its pool stay as they are."""
    subject = cache(page_size=page_size, dtype=dtype)
    fill(subject, [5, 3, 1])
    before, free = held(subject), subject.free_pages
    with torch.inference_mode(inference):
        other = copied(subject)
        one = copied(subject.sequence(0))
    assert same(other, subject)
    for each in (other, one):
        k, v = draw(6, each.batch_size)
        for layer in range(2):
            each.append(layer, k, v)
        each.commit(torch.full((each.batch_size,), 6), at_most=6)
        each.lengths_known(each.lengths.tolist())
    assert other.lengths.tolist() == [11, 9, 7]
    assert one.lengths.tolist() == [11]
    other.reset()
    assert all(map(torch.equal, before, held(subject)))
    assert (subject.lengths.tolist(), subject.free_pages) == ([5, 3, 1], free)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [None, 4])
def test_no_graph_goes_through_a_cache(device: str, page_size: int | None) -> None:
    """What is appended where gradients are on is written alike on every path, and keeps nothing alive."""
    subject = cache(page_size=page_size, device=device)
    k, v = (x.requires_grad_() for x in draw(3, device=device))
    rotary = RotaryEmbedding(8).to(device)(torch.arange(3, device=device), torch.float32)
    subject.append(0, k, v)
    turned, _ = subject.rotary_append(1, k, k, v, rotary, 3)
    subject.compact(torch.tensor([[0, 2]] * 3, device=device))
    assert not any(x.requires_grad for x in (subject.k, subject.v))
    with pytest.raises(RuntimeError, match=r"^rotary_append: expected no backward pass through a write into a cache"):
        turned.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k", "v"])
def test_a_gradient_of_a_write_is_refused(device: str, name: str) -> None:
    """The kernels have none, and PyTorch would drop it without a word."""
    caches = {"k_cache": torch.zeros(2, 2, 8, 4, device=device), "v_cache": torch.zeros(2, 2, 8, 4, device=device)}
    new = {"k": torch.randn(2, 2, 3, 4, device=device), "v": torch.randn(2, 2, 3, 4, device=device)}
    lengths = torch.tensor([2, 0], device=device)
    operands = caches | new
    operands[name] = operands[name].clone().requires_grad_() * 1
    path = torch.tensor([[0, 2]] * 2, device=device)
    rotary = RotaryEmbedding(4).to(device)(torch.arange(3, device=device), torch.float32)
    calls: dict[str, Callable[..., Any]] = {"append_kv": lambda **o: tk.append_kv(**o, lengths=lengths)}
    if name in caches:
        calls["compact_kv"] = lambda k, v, **o: tk.compact_kv(**o, lengths=lengths, path=path)
        calls["rotary_append"] = lambda **o: tk.rotary_append(o["k"], **o, rotary=rotary, lengths=lengths, keep=2)
    for call in calls.values():
        before = operands["k_cache"].clone()
        with pytest.raises(ValueError, match=rf"^{name}: expected no gradient through a write into a cache, got a"):
            call(**operands)
        assert torch.equal(operands["k_cache"], before)
        with torch.no_grad():
            call(**operands)
    loss = torch.zeros((), device=device)
    fresh = {key: value.detach().clone() for key, value in operands.items()}
    leaf = fresh[name].requires_grad_()
    fresh[name] = leaf * 1
    tk.append_kv(**fresh, lengths=lengths, backend="eager")
    loss = (fresh["k_cache"].square() + fresh["v_cache"].square()).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert bool(grad.isfinite().all())
    if name in new:
        assert torch.equal(grad, 2 * leaf)
