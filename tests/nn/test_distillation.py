"""The loss of an adapter that drafts: against the formula over whole logits, whatever the chunk, and in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tidar_kernels.nn.distillation import adapter_pattern, distillation_loss
from tidar_kernels.patterns import Role


def whole(hidden: Tensor, head: Tensor, kind: str, lengths: list[int], block: int) -> Tensor:
    """Row by row, from logits that exist all at once."""
    pattern = adapter_pattern(kind, sum(lengths), block, lengths)
    firsts = {sum(lengths[:i]) for i in range(len(lengths))}
    clean = (pattern.roles != int(Role.MASK)).nonzero().flatten().tolist()
    losses = []
    for row in range(pattern.q_len):
        token = int(pattern.predicts[row])
        if token < 0 or token in firsts:
            continue
        for batch in range(len(hidden)):
            target = (hidden[batch, clean[token - 1]].detach() @ head.t().detach()).softmax(-1)
            losses.append(-(target * (hidden[batch, row] @ head.t()).log_softmax(-1)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["isd", "tidar"])
@pytest.mark.parametrize("lengths", [[9], [4, 1, 5]])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_loss_and_gradient_are_those_of_the_formula(kind: str, lengths: list[int], chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 2 * sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 6, dtype=torch.float64)
    pattern = adapter_pattern(kind, sum(lengths), 3, lengths)
    loss = distillation_loss(hidden, lambda rows: rows @ head.t(), pattern, chunk_size=chunk)
    expected = whole(hidden, head, kind, lengths, 3)
    torch.testing.assert_close(loss, expected)
    (grad,), (other,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(grad, other)
    assert not grad[:, pattern.roles != int(Role.MASK)].any()


def test_logits_never_exist_for_more_rows_than_a_chunk() -> None:
    hidden = torch.randn(2, 128, 4, requires_grad=True)
    head, most = torch.randn(50, 4), 0

    def counted(rows: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(rows))
        return rows @ head.t()

    distillation_loss(hidden, counted, adapter_pattern("isd", 64, 4), chunk_size=16).backward()
    assert most == 16


def test_documents_of_one_token_ask_nothing() -> None:
    hidden = torch.randn(1, 8, 4, requires_grad=True)
    loss = distillation_loss(hidden, lambda rows: rows, adapter_pattern("isd", 4, 2, [1, 1, 1, 1]))
    assert float(loss.detach()) == 0.0
