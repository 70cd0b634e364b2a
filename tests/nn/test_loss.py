"""tidar_loss against the formula with whole logits; labels row by row against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tidar_kernels as tk
from tidar_kernels.nn.loss import label_counts, tidar_loss

VOCAB, HIDDEN = 23, 12


def plain(hidden, head, tokens, seq_len: int, alpha: float, ignore: int):
    """The objective as the paper writes it, from whole logits: clean half shifted by one, mask half not."""
    logits = (hidden @ head.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    clean, masked = logits[:, :seq_len], logits[:, seq_len:]
    ar = F.cross_entropy(clean[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=ignore)
    diffusion = F.cross_entropy(masked.flatten(0, 1), tokens.flatten(), ignore_index=ignore)
    return (alpha * ar + diffusion) / (1 + alpha), ar, diffusion


def operands(seq_len: int, batch: int = 2, dtype: torch.dtype = torch.float64):
    hidden = torch.randn(batch, 2 * seq_len, HIDDEN, dtype=dtype, requires_grad=True)
    head = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(0, VOCAB, (batch, seq_len))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
@pytest.mark.parametrize("ignored", [False, True])
def test_value_and_gradients_are_the_formulas(alpha: float, chunk_size: int, ignored: bool) -> None:
    hidden, head, tokens = operands(11)
    if ignored:
        tokens[0, 4:] = -100
    got = tidar_loss(hidden, head, tokens, tk.patterns.tidar_training(11, 4), alpha=alpha, chunk_size=chunk_size)
    grads = torch.autograd.grad(got.loss * 1.7, (hidden, head))
    expected = plain(hidden, head, tokens, 11, alpha, -100)
    expected_grads = torch.autograd.grad(expected[0] * 1.7, (hidden, head))
    for a, b in zip((*got, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_within_twice_the_plain_error(dtype: torch.dtype) -> None:
    hidden, head, tokens = operands(40, dtype=dtype)
    pattern = tk.patterns.tidar_training(40, 8)
    exact = plain(hidden.double(), head.double(), tokens, 40, 1.0, -100)[0]
    exact_grads = torch.autograd.grad(exact, (hidden, head))
    ours = tidar_loss(hidden, head, tokens, pattern, chunk_size=16).loss
    half = plain(hidden, head, tokens, 40, 1.0, -100)[0]
    for mine, eager, true in zip(
        torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(half, (hidden, head)), exact_grads, strict=True
    ):
        error, budget = (mine.double() - true.double()).norm(), (eager.double() - true.double()).norm()
        # the exact gradient is itself rounded to the leaf's dtype: half an ulp of slack, as for eager
        assert error <= 2 * budget + torch.finfo(dtype).eps * true.double().norm()
    assert abs(ours.double() - exact) <= 2 * abs(half.double() - exact) + 1e-3


def test_every_row_predicts_the_token_of_its_definition() -> None:
    for seq_len, block in ((1, 1), (5, 2), (12, 4)):
        predicts = tk.patterns.tidar_training(seq_len, block).predicts.tolist()
        for row in range(2 * seq_len):
            if row >= seq_len:
                assert predicts[row] == row - seq_len
            else:
                assert predicts[row] == (row + 1 if row + 1 < seq_len else -1)


def test_packed_documents_with_prompts_are_the_documents_one_by_one() -> None:
    """Each document's rows by themselves: no label of a prompt, none across a border, padding ignored."""
    lengths, prompts, block = [5, 1, 7, 3], [2, 0, 0, 3], 3
    total = sum(lengths)
    pattern = tk.patterns.tidar_training(total, block, lengths, prompts)
    hidden = torch.randn(2, pattern.q_len, HIDDEN, dtype=torch.float64)
    head, tokens = torch.randn(VOCAB, HIDDEN, dtype=torch.float64), torch.randint(0, VOCAB, (2, total))
    tokens[1, 9:] = -100  # padding
    logits = hidden @ head.t()
    terms: dict[str, list[torch.Tensor]] = {"clean": [], "mask": []}
    for b in range(2):
        start, mask_row = 0, total
        for length, prompt in zip(lengths, prompts, strict=True):
            for at in range(length):
                wanted = tokens[b, start + at]
                if at >= prompt:
                    rows = {"mask": mask_row} | ({"clean": start + at - 1} if at else {})
                    mask_row += 1
                    for kind, row in rows.items():
                        if wanted >= 0:
                            terms[kind].append(F.cross_entropy(logits[b, row], wanted))
            start += length
    expected = {kind: torch.stack(values).mean() for kind, values in terms.items()}
    got = tidar_loss(hidden, head, tokens, pattern, alpha=0.5, chunk_size=4)
    torch.testing.assert_close(got.autoregressive.double(), expected["clean"], rtol=1e-5, atol=0)
    torch.testing.assert_close(got.diffusion.double(), expected["mask"], rtol=1e-5, atol=0)
    torch.testing.assert_close(got.loss.double(), (0.5 * expected["clean"] + expected["mask"]) / 1.5, rtol=1e-5, atol=0)


def test_the_first_draft_row_of_a_kind_without_labels_counts_nothing() -> None:
    hidden, head, tokens = operands(1)
    got = tidar_loss(hidden, head, tokens, tk.patterns.tidar_training(1, 4))
    assert got.autoregressive == 0.0
    torch.testing.assert_close(got.loss.double(), got.diffusion.double() / 2)
    everything_ignored = tidar_loss(hidden, head, torch.full_like(tokens, -100), tk.patterns.tidar_training(1, 4))
    assert everything_ignored.loss == 0.0


def test_frozen_operands_get_no_gradient() -> None:
    hidden, head, tokens = operands(6)
    pattern = tk.patterns.tidar_training(6, 2)
    tidar_loss(hidden, head.detach(), tokens, pattern).loss.backward()
    assert hidden.grad is not None
    assert head.grad is None
    assert not tidar_loss(hidden.detach(), head.detach(), tokens, pattern).loss.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden": torch.zeros(2, 10, HIDDEN)},
            ValueError,
            r"hidden: expected shape \[batch, 12, 12\].*got \[2, 10, 12\]",
        ),
        ({"hidden": torch.zeros(12, HIDDEN)}, ValueError, "hidden: expected 3 dimensions, got shape"),
        (
            {"head": torch.zeros(VOCAB, HIDDEN).half()},
            TypeError,
            "head: expected dtype torch.float32.*got torch.float16",
        ),
        ({"tokens": torch.zeros(2, 6)}, TypeError, "tokens: expected dtype int64, got torch.float32"),
        ({"tokens": torch.zeros(2, 5).long()}, ValueError, r"tokens: expected shape \[2, >= 6\], got \[2, 5\]"),
        ({"tokens": torch.full((2, 6), VOCAB)}, ValueError, r"tokens: expected labels in \[0, 23\) or -100, got 23"),
        ({"pattern": tk.patterns.causal(12)}, ValueError, "pattern: expected a training pattern.*got causal"),
        ({"pattern": "causal"}, TypeError, "pattern: expected a tidar_kernels.Pattern, got str"),
        ({"alpha": -1.0}, ValueError, "alpha: expected >= 0, got -1.0"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number, got nan"),
        ({"alpha": float("inf")}, ValueError, "alpha: expected a finite number, got inf"),
        ({"alpha": "1"}, TypeError, "alpha: expected a number, got str"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size: expected an int, got float"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
        ({"hidden": torch.zeros(2, 12, HIDDEN).long()}, TypeError, "hidden: expected a float dtype, got torch.int64"),
        ({"tokens": torch.zeros(2, 6, device="meta").long()}, ValueError, "tokens: expected device cpu.*got meta"),
        ({"head": torch.zeros(VOCAB, HIDDEN, device="meta")}, ValueError, "head: expected device cpu.*got meta"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected >= 1, got 0"),
    ],
)
def test_bad_arguments(change, error, message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 12, HIDDEN),
        "head": torch.zeros(VOCAB, HIDDEN),
        "tokens": torch.zeros(2, 6).long(),
        "pattern": tk.patterns.tidar_training(6, 2),
        **change,
    }
    with pytest.raises(error, match=message):
        tidar_loss(**arguments)


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_a_head_may_be_a_function(chunk_size: int) -> None:
    """Softcapped logits with a bias, which no weight alone gives; its parameters get their gradients too."""
    hidden, head, tokens = operands(11)
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    widest = 0

    def logits(rows: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, len(rows))
        return 3.0 * torch.tanh((rows @ head.t() + bias) / 3.0)

    got = tidar_loss(hidden, logits, tokens, tk.patterns.tidar_training(11, 4), alpha=0.5, chunk_size=chunk_size)
    grads = torch.autograd.grad(got.loss, (hidden, head, bias))
    assert widest == min(chunk_size, 44)
    clean, masked = logits(hidden).float().split(11, dim=1)
    ar = F.cross_entropy(clean[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    diffusion = F.cross_entropy(masked.flatten(0, 1), tokens.flatten())
    loss = (0.5 * ar + diffusion) / 1.5
    for a, b in zip(
        (*got, *grads), (loss, ar, diffusion, *torch.autograd.grad(loss, (hidden, head, bias))), strict=True
    ):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        again = tidar_loss(hidden, logits, tokens, tk.patterns.tidar_training(11, 4), alpha=0.5, chunk_size=chunk_size)
    torch.testing.assert_close(again.loss, got.loss)


def test_losses_over_common_counts_add_up() -> None:
    """Batches of different sizes, divided by what they have together, are one batch."""
    head = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    lengths, prompts = ([5, 9], [4]), ([2, 0], [3])
    parts = []
    for documents, own in zip(lengths, prompts, strict=True):
        pattern = tk.patterns.tidar_training(sum(documents), 4, documents, own)
        tokens = torch.randint(0, VOCAB, (1, sum(documents)))
        parts.append((torch.randn(1, pattern.q_len, HIDDEN, dtype=torch.float64), tokens, pattern))
    counts = sum(label_counts(tokens, pattern) for _, tokens, pattern in parts)
    assert counts.tolist() == [3 + 8 + 1, 3 + 9 + 1]
    alone = [tidar_loss(hidden, head, tokens, pattern, alpha=0.3) for hidden, tokens, pattern in parts]
    shared = [tidar_loss(hidden, head, tokens, pattern, alpha=0.3, counts=counts) for hidden, tokens, pattern in parts]
    ar = sum(part.autoregressive * n for part, n in zip(alone, (11, 1), strict=True)) / 12
    diffusion = sum(part.diffusion * n for part, n in zip(alone, (12, 1), strict=True)) / 13
    torch.testing.assert_close(sum(part.loss for part in shared), (0.3 * ar + diffusion) / 1.3)
    assert [part[1:] for part in shared] == [part[1:] for part in alone]


def test_heads_and_counts_are_checked() -> None:
    hidden, head, tokens = operands(5)
    pattern = tk.patterns.tidar_training(5, 4)
    with pytest.raises(TypeError, match=r"^head: expected a torch\.Tensor, got str"):
        tidar_loss(hidden, "lm_head", tokens, pattern)
    with pytest.raises(ValueError, match=r"^counts: expected shape \[2\], got \[3\]"):
        tidar_loss(hidden, head, tokens, pattern, counts=torch.ones(3))


# Dynamo makes an instance of the autograd function that it looks at.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("by_function", [False, True])
def test_compiles_without_a_graph_break(by_function: bool) -> None:
    hidden, head, tokens = operands(11, dtype=torch.float32)
    pattern = tk.patterns.tidar_training(11, 4)

    def loss(hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor) -> tk.TiDARLoss:
        return tidar_loss(
            hidden, (lambda rows: rows @ head.t()) if by_function else head, tokens, pattern, chunk_size=5
        )

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        result = run(hidden, head, tokens)
        results.append((*result, *torch.autograd.grad(result.loss, (hidden, head))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_autocast_takes_what_its_layers_give(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A layer under autocast may give bfloat16 beside a float32 weight, or float32 beside a bfloat16 one."""
    plain_hidden, plain_head, tokens = operands(11)
    pattern = tk.patterns.tidar_training(11, 4)
    for order in (dtypes, dtypes[::-1]):
        hidden, head = (
            t.detach().to(dtype).requires_grad_(True)
            for t, dtype in zip((plain_hidden, plain_head), order, strict=True)
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = tidar_loss(hidden, head, tokens, pattern).loss
        loss.backward()
        assert (hidden.grad.dtype, head.grad.dtype) == order
        assert loss.dtype == torch.float32
        exact = torch.autograd.grad(
            tidar_loss(plain_hidden, plain_head, tokens, pattern).loss, (plain_hidden, plain_head)
        )
        for ours, true in zip((hidden.grad, head.grad), exact, strict=True):
            assert (ours.double() - true).norm() <= 0.05 * true.norm()


def test_a_pattern_made_or_used_under_inference_mode_still_trains() -> None:
    hidden, head, tokens = operands(7)
    with torch.inference_mode():
        pattern = tk.patterns.tidar_training(7, 3)
        evaluated = tidar_loss(hidden.detach(), head.detach(), tokens, pattern).loss
    trained = tidar_loss(hidden, head, tokens, pattern).loss
    assert torch.equal(trained.detach(), evaluated)
    assert all(bool(grad.any()) for grad in torch.autograd.grad(trained, (hidden, head)))


@pytest.mark.parametrize("by_function", [False, True])
def test_a_default_device_changes_nothing(by_function: bool) -> None:
    hidden, head, tokens = operands(7)
    pattern = tk.patterns.tidar_training(7, 3)
    expected = tidar_loss(hidden, head, tokens, pattern).loss
    with torch.device("meta"):
        got = tidar_loss(hidden, (lambda rows: rows @ head.t()) if by_function else head, tokens, pattern)
    torch.testing.assert_close(got.loss, expected)


def test_a_second_derivative_is_an_error_not_zero() -> None:
    hidden, head, tokens = operands(7)
    loss = tidar_loss(hidden, head, tokens, tk.patterns.tidar_training(7, 3)).loss
    with pytest.raises(RuntimeError, match=r"^tidar_loss: expected at most first derivatives, got create_graph=True$"):
        torch.autograd.grad(loss, hidden, create_graph=True)
