"""The collator: documents of a batch one after another, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import tidar_kernels.integrations.transformers  # noqa: E402, F401  (registers the attention)
from tests.integrations.transformers.training_toys import BLOCK, EXAMPLES, MASK, batch_of, tiny  # noqa: E402
from tidar_kernels.integrations.transformers.collator import TiDARCollator, batch_pattern, pack  # noqa: E402
from tidar_kernels.integrations.transformers.training import compute_loss, count_labels  # noqa: E402


def test_a_batch_is_its_documents_one_after_another() -> None:
    batch = batch_of()
    assert batch["document_lengths"] == (5, 13, 7)
    assert batch["prompt_lengths"] == (4, 0, 2)
    clean = [token for example in EXAMPLES for token in example["input_ids"]]
    assert batch["input_ids"].tolist() == [clean + [MASK] * (1 + 13 + 5)]
    positions = [*range(5), *range(13), *range(7), 4, *range(13), *range(2, 7)]
    assert batch["position_ids"].tolist() == [positions]
    ignored = {0, 1, 2, 3, 18, 19, 22}
    assert batch["labels"].tolist() == [[-100 if i in ignored else token for i, token in enumerate(clean)]]
    pattern = batch_pattern(batch)
    assert pattern is batch_pattern(dict(batch, document_lengths=[5, 13, 7]))  # as pinning memory hands it on
    assert (pattern.q_len, pattern.kv_len) == (44, 44)
    assert count_labels(batch).tolist() == [1 + 12 + 4, 1 + 13 + 4]


def test_prompts_as_labels_padding_and_tensors_mean_the_same() -> None:
    tokens = [3, 4, 5, 6, 7, 8]
    expected = batch_of([{"input_ids": tokens, "prompt_length": 2}])
    others = [
        {"input_ids": tokens, "labels": [-100, -100, *tokens[2:]]},
        {"input_ids": torch.tensor(tokens), "prompt_length": torch.tensor(2), "labels": torch.tensor(tokens)},
        {"input_ids": [0, 0, *tokens], "attention_mask": [0, 0] + [1] * 6, "labels": [-100] * 4 + tokens[2:]},
        {"input_ids": [*tokens, 0], "attention_mask": [1] * 6 + [0], "prompt_length": 2, "token_type_ids": [0] * 7},
    ]
    for example in others:
        batch = batch_of([example])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(expected[key])) for key in batch)


@pytest.mark.parametrize(
    ("too_long", "documents", "prompts"),
    [("truncate", (5, 5, 5), (4, 0, 2)), ("split", (5, 5, 5, 3, 5, 2), (4, 0, 0, 0, 2, 0))],
)
def test_long_examples(too_long: Any, documents: tuple[int, ...], prompts: tuple[int, ...]) -> None:
    batch = batch_of(seq_len=5, too_long=too_long)
    assert (batch["document_lengths"], batch["prompt_lengths"]) == (documents, prompts)
    packs = list(pack(EXAMPLES, 10, too_long))
    assert all(len(p["input_ids"]) <= 10 for p in packs)


def test_pieces_of_nothing_but_prompt_are_left_out() -> None:
    long = {"input_ids": list(range(1, 12)), "prompt_length": 7}
    assert batch_of([long], seq_len=4, too_long="split")["document_lengths"] == (4, 3)
    assert batch_of([long], seq_len=4, too_long="split")["prompt_lengths"] == (3, 0)
    assert batch_of([long, EXAMPLES[1]], seq_len=5, too_long="truncate")["document_lengths"] == (5,)
    with pytest.raises(ValueError, match=r"^examples: expected a token to predict, got none in 1 examples"):
        batch_of([long], seq_len=5, too_long="truncate")


def test_packs_are_the_examples_in_order() -> None:
    packs = list(pack(EXAMPLES * 2, 20))
    assert [p["document_lengths"] for p in packs] == [[5, 13], [7, 5], [13, 7]]
    whole, packed = batch_of(EXAMPLES * 2), batch_of(packs)
    assert all(torch.equal(torch.as_tensor(whole[key]), torch.as_tensor(packed[key])) for key in whole)


@pytest.mark.parametrize("multiple", [8, 16, 50])
def test_padded_rows_change_nothing(multiple: int) -> None:
    model, plain = tiny(), batch_of()
    for examples in (EXAMPLES, EXAMPLES[:1], [{"input_ids": list(range(1, 9))}]):
        plain, padded = batch_of(examples), batch_of(examples, pad_to_multiple_of=multiple)
        assert padded["labels"].shape[1] % multiple == padded["input_ids"].shape[1] % multiple == 0
        assert padded["input_ids"].shape[1] - plain["input_ids"].shape[1] < 3 * multiple
        for one, other in zip(compute_loss(model, plain), compute_loss(model, padded), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_collates_in_the_workers_of_a_loader() -> None:
    loader = torch.utils.data.DataLoader(
        EXAMPLES * 2, batch_size=3, collate_fn=TiDARCollator(BLOCK, MASK), num_workers=1, multiprocessing_context="fork"
    )
    first, second = loader
    assert batch_pattern(first) is batch_pattern(second)
    assert torch.equal(first["input_ids"], batch_of()["input_ids"])


BAD_EXAMPLES = [
    ([1, 2], TypeError, r"^examples\[0\]: expected a mapping with input_ids, got list"),
    ({"text": "a"}, ValueError, r"^examples\[0\]: expected input_ids, got text"),
    ({"input_ids": []}, ValueError, r"^examples\[0\]: expected at least one token, got none"),
    ({"input_ids": [[1, 2]]}, TypeError, r"^examples\[0\]\.input_ids: expected a list of ints or an int tensor \[n\]"),
    ({"input_ids": [1.5, 2]}, TypeError, r"^examples\[0\]\.input_ids: expected a list of ints .* got torch\.float32"),
    ({"input_ids": [1, 2], "prompt_length": 3}, ValueError, r"prompt_length: expected at most its 2 tokens, got 3"),
    ({"input_ids": [1, 2], "prompt_length": -1}, ValueError, r"prompt_length: expected >= 0, got -1"),
    ({"input_ids": [1, 2], "labels": [1]}, ValueError, r"labels: expected 2 entries like input_ids, got 1"),
    (
        {"input_ids": [1, 2], "labels": [2, -100]},
        ValueError,
        r"labels: expected input_ids, not shifted, or -100, got 2",
    ),
    ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, ValueError, r"attention_mask: expected zeros at the ends"),
    ({"input_ids": [1, MASK]}, ValueError, r"^examples: expected text without the mask token 39, got it to predict"),
    ({"input_ids": [1, 2], "document_lengths": [1, 2]}, ValueError, r"document_lengths: expected a sum of 2 tokens"),
    ({"input_ids": [1, 2], "document_lengths": [1, 1], "prompt_lengths": [0]}, ValueError, r"one for each of 2 docu"),
    ({"input_ids": list(range(9))}, ValueError, r"^examples\[0\]: expected at most seq_len = 8 tokens, got 9 .*split"),
]


@pytest.mark.parametrize(("example", "error", "message"), BAD_EXAMPLES)
def test_bad_examples_are_refused(example: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batch_of([example], seq_len=8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_token_id": None}, TypeError, r"^mask_token_id: expected an int, got None \(add_mask_token"),
        ({"mask_token_id": -1}, ValueError, r"^mask_token_id: expected >= 0, got -1"),
        ({"block_size": 0}, ValueError, r"^block_size: expected >= 1, got 0"),
        ({"seq_len": 0}, ValueError, r"^seq_len: expected >= 1, got 0"),
        ({"too_long": "wrap"}, ValueError, r'^too_long: expected "error", "truncate" or "split", got \'wrap\''),
        ({"pad_to_multiple_of": 0}, ValueError, r"^pad_to_multiple_of: expected >= 1, got 0"),
    ],
)
def test_bad_collators_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TiDARCollator(**{"block_size": BLOCK, "mask_token_id": MASK} | options)
    with pytest.raises(ValueError, match=r"^seq_len: expected >= 1, got 0"):
        pack([], 0)
