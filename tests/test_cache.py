"""The KV cache: what append and commit change, what they leave alone, and bounds that never read the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tidar_kernels as tk
from tidar_kernels import patterns, testing

SIZES = {"num_layers": 2, "batch_size": 3, "num_kv_heads": 2, "max_len": 12, "head_dim": 4}


def cache(**changes: Any) -> tk.KVCache:
    return tk.KVCache(**(SIZES | changes))


def fresh(num_new: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    """`(k, v)` of new tokens, strided as a projection leaves them."""
    k, v = torch.randn(2, batch, num_new, 2, 4).transpose(2, 3).unbind(0)
    return k, v


def state(of: tk.KVCache) -> list[Tensor]:
    return [of.k.clone(), of.v.clone(), of.lengths.clone(), torch.from_numpy(of.length_bounds.copy())]


def unchanged(of: tk.KVCache, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(of), before, strict=True))


def test_a_fresh_cache() -> None:
    new = cache(dtype=torch.bfloat16)
    assert new.k.shape == new.v.shape == (2, 3, 2, 12, 4)
    assert new.k.dtype == torch.bfloat16
    assert (new.num_layers, new.batch_size, new.max_len) == (2, 3, 12)
    assert new.lengths.tolist() == [0, 0, 0]
    assert new.lengths.dtype == torch.int32
    assert bool(new.k.isfinite().all())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.0, None])
def test_sizes_are_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected an int >= 1, got {value!r}$"):
        cache(**{name: value})


def test_append_writes_one_layer_and_commits_nothing() -> None:
    subject = cache()
    subject.commit(torch.tensor([1, 4, 8]), at_most=8)
    subject.lengths_known([1, 4, 8])
    before = state(subject)
    k, v = fresh(4)
    subject.append(1, k, v)
    for memory, old, new in ((subject.k, before[0], k), (subject.v, before[1], v)):
        expected = old.clone()
        for sequence, length in enumerate((1, 4, 8)):
            expected[1, sequence, :, length : length + 4] = new[sequence]
        assert torch.equal(memory, expected)
    assert subject.lengths.tolist() == [1, 4, 8]


def test_accepted_tokens_stay_and_rejected_ones_are_overwritten() -> None:
    """Three steps of four drafts; each sequence accepts another number of them."""
    subject = cache()
    history: list[list[Tensor]] = [[], [], []]
    for accepted in ([1, 4, 2], [3, 1, 1], [2, 2, 4]):
        k, v = fresh(4)
        for layer in range(2):
            subject.append(layer, k + layer, v - layer)
        subject.commit(torch.tensor(accepted), at_most=4)
        subject.lengths_known(subject.lengths.tolist())
        for sequence, count in enumerate(accepted):
            history[sequence].append(torch.stack([k[sequence, :, :count], v[sequence, :, :count]]))
    assert subject.lengths.tolist() == [6, 7, 7]
    for sequence, parts in enumerate(history):
        k, v = torch.cat(parts, dim=2)
        for layer in range(2):
            assert torch.equal(subject.k[layer, sequence, :, : k.shape[1]], k + layer)
            assert torch.equal(subject.v[layer, sequence, :, : v.shape[1]], v - layer)


def test_attention_never_reads_stale_slots() -> None:
    """Tokens that were appended and rejected are as good as not there."""
    subject = cache(num_layers=1, head_dim=16)
    pattern = patterns.causal(2)
    draw = torch.randn(3, 3, 2, 9, 16)
    subject.append(0, draw[1], draw[2])
    subject.commit(5)
    q, k, v = torch.randn(3, 3, 2, 2, 16)
    clean = tk.step_attention(q, k, v, *subject.layer(0), subject.lengths, pattern)
    subject.k[..., 5:, :] = torch.nan
    subject.v[..., 5:, :] = torch.nan
    assert torch.equal(tk.step_attention(q, k, v, *subject.layer(0), subject.lengths, pattern), clean)


def test_append_past_the_end_raises_first() -> None:
    subject = cache()
    subject.commit(torch.tensor([3, 9, 0]), at_most=9)
    subject.lengths_known([3, 9, 0])
    before = state(subject)
    message = "^max_len: expected room for 4 more tokens in sequence 1, got 9 of 12 slots taken$"
    with pytest.raises(ValueError, match=message):
        subject.append(0, *fresh(4))
    assert unchanged(subject, before)
    subject.append(0, *fresh(3))


def test_bounds_are_of_what_may_have_been_accepted() -> None:
    """Until the host knows the lengths, room is counted for the most that can have been accepted."""
    subject = cache()
    subject.commit(torch.tensor([1, 1, 1]), at_most=8)
    assert subject.length_bounds.tolist() == [8, 8, 8]
    with pytest.raises(ValueError, match="got 8 of 12 slots taken"):
        subject.check_room(5)
    subject.lengths_known([1, 1, 1])
    subject.check_room(11)
    with pytest.raises(ValueError, match="room for 12 more tokens in sequence 0, got 1 of 12"):
        subject.check_room(12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([1, 2, 3]),), "^at_most: expected an int beside a tensor of accepted counts, got None$"),
        ((13,), "^max_len: expected room for 13 more tokens in sequence 0, got 0 of 12 slots taken$"),
        ((torch.tensor([1, 2, 3]), 13), "^max_len: expected room for 13 more tokens"),
        ((-1,), "^accepted: expected >= 0, got -1$"),
        ((torch.tensor([1, 2, 3]), -1), "^at_most: expected >= 0, got -1$"),
    ],
)
def test_commit_refuses(arguments: tuple[Any, ...], message: str) -> None:
    subject = cache()
    before = state(subject)
    with pytest.raises(ValueError, match=message):
        subject.commit(*arguments)
    assert unchanged(subject, before)


def test_append_refuses_other_shapes_and_dtypes() -> None:
    subject = cache()
    before = state(subject)
    k, v = fresh(2)
    with pytest.raises(TypeError, match=r"^v: expected dtype torch.float32 .*, got torch.float16$"):
        subject.append(0, k, v.half())
    with pytest.raises(ValueError, match=r"^k: expected shape \[3, 2, 2, 4\], got \[2, 2, 2, 4\]$"):
        subject.append(0, k[:2], v[:2])
    assert unchanged(subject, before)


def test_a_sequence_is_a_view() -> None:
    """What is appended and committed through the view of one sequence is in the whole cache, and only there."""
    subject = cache()
    before = state(subject)
    one = subject.sequence(1)
    assert (one.batch_size, one.num_layers, one.max_len) == (1, 2, 12)
    k, v = fresh(3, batch=1)
    one.append(0, k, v)
    one.commit(2)
    assert subject.lengths.tolist() == [0, 2, 0]
    assert subject.length_bounds.tolist() == [0, 2, 0]
    expected = before[0].clone()
    expected[0, 1, :, :3] = k[0]
    assert torch.equal(subject.k, expected)
    with pytest.raises(ValueError, match="room for 11 more tokens in sequence 1, got 2 of 12"):
        subject.check_room(11)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_any_sequence_is_its_own_memory(index: int) -> None:
    subject = cache()
    one = subject.sequence(index)
    for view, whole in ((one.k, subject.k), (one.v, subject.v)):
        assert view.shape == (2, 1, 2, 12, 4)
        assert view.data_ptr() == whole[:, index].data_ptr()


def test_a_path_moves_together_in_every_layer() -> None:
    subject = cache()
    for layer in range(2):
        subject.append(layer, *fresh(5))
    subject.lengths_known([0, 2, 4])
    subject.lengths.copy_(torch.tensor([0, 2, 4]))
    before = [subject.k.clone(), subject.v.clone()]
    subject.compact(torch.tensor([[1, 3], [0, 2], [2, -1]]))
    for found, old in zip((subject.k, subject.v), before, strict=True):
        expected = old.clone()
        expected[:, 0, :, [0, 1]] = old[:, 0, :, [1, 3]]
        expected[:, 1, :, 3] = old[:, 1, :, 4]
        expected[:, 2, :, 4] = old[:, 2, :, 6]
        assert torch.equal(found, expected)
    assert subject.lengths.tolist() == [0, 2, 4]


@pytest.mark.parametrize("index", [-1, 3])
def test_a_sequence_that_is_not_there(index: int) -> None:
    with pytest.raises(ValueError, match=f"^index: expected 0 <= index < batch_size = 3, got {index}$"):
        cache().sequence(index)


@pytest.mark.parametrize("options", [{}, {"page_size": 4}, {"dtype": torch.float8_e4m3fn}], ids=str)
def test_layers_from_one_on_are_a_cache_of_the_same_sequences(options: dict[str, Any]) -> None:
    subject, whole = cache(num_layers=3, **options), cache(num_layers=3, **options)
    part = subject.from_layer(1)
    assert (part.num_layers, part.batch_size, part.max_len) == (2, 3, 12)
    for accepted in ([1, 2, 3], [3, 0, 1]):
        k, v = fresh(3)
        part.append(1, k, v)
        whole.append(2, k, v)
        part.commit(torch.tensor(accepted), at_most=3)
        whole.commit(torch.tensor(accepted), at_most=3)
    assert subject.lengths.tolist() == [4, 2, 4]
    assert subject.length_bounds.tolist() == whole.length_bounds.tolist() == [6, 6, 6]
    for name in ("k", "v", "k_scale", "v_scale", "block_table"):
        found, expected = getattr(subject, name), getattr(whole, name)
        assert found is expected is None or torch.equal(found.float(), expected.float())
    with subject.reading(subject.lengths * 0):
        assert subject.from_layer(1).context_lengths.tolist() == [0, 0, 0]
    one = subject.sequence(2).from_layer(2)
    one.reset()
    assert subject.lengths.tolist() == [4, 2, 0]
    with pytest.raises(ValueError, match=r"^first: expected 0 <= first < num_layers = 3, got 3$"):
        subject.from_layer(3)


def test_reset_forgets_tokens() -> None:
    subject = cache()
    subject.append(0, *fresh(3))
    subject.commit(3)
    memory = subject.k.data_ptr()
    subject.reset()
    assert subject.lengths.tolist() == [0, 0, 0]
    assert subject.length_bounds.tolist() == [0, 0, 0]
    assert subject.k.data_ptr() == memory
    subject.check_room(12)


@pytest.mark.interpret
def test_append_runs_the_kernel_where_kernels_run() -> None:
    subject = cache()
    subject.commit(torch.tensor([0, 2, 9]), at_most=9)
    k, v = fresh(3)
    subject.append(1, k, v)
    for sequence, length in enumerate((0, 2, 9)):
        assert torch.equal(subject.k[1, sequence, :, length : length + 3], k[sequence])
        assert torch.equal(subject.v[1, sequence, :, length : length + 3], v[sequence])


@pytest.mark.cuda
def test_nothing_reads_the_device() -> None:
    """Append and commit on a GPU leave no synchronisation behind."""
    subject = cache(device="cuda")
    k, v = (x.cuda() for x in fresh(4))
    accepted = torch.tensor([1, 4, 2], device="cuda")
    subject.append(0, k, v)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        subject.append(0, k, v)
        subject.commit(accepted, at_most=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert subject.lengths.tolist() == [1, 4, 2]
    assert torch.equal(testing.bits(subject.k[0, :, :, :4]), testing.bits(k))
