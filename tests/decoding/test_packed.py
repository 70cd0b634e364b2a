"""Packed bfloat16 weights: the bits of PyTorch's own product, and the weights as they are now."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.toys import PROMPTS, sharp_model
from tidar_kernels import Decoder
from tidar_kernels.decoding import packed
from tidar_kernels.decoding.packed import PackedWeights, can_pack, packed_linear

pytestmark = pytest.mark.skipif(not can_pack(), reason="needs a CPU that multiplies bfloat16 through oneDNN")


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16())


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 20, 72, 272])
@pytest.mark.parametrize("shape", [(96, 64), (576, 1536), (200, 33)])
def test_products_have_the_bits_of_linear(rows: int, shape: tuple[int, int]) -> None:
    w, bias, weights = weight(*shape), weight(shape[0]), PackedWeights()
    x = torch.randn(2, rows, shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
    with torch.inference_mode():
        expected = F.linear(x, w), F.linear(x[:, ::2], w, bias)
        with packed_linear(weights):
            found = F.linear(x, w), F.linear(x[:, ::2], w, bias)
    assert len(weights._held) == 1
    exact = F.linear(x.double(), w.double()), F.linear(x[:, ::2].double(), w.double(), bias.double())
    for ours, theirs, reference in zip(found, expected, exact, strict=True):  # the budget rule
        allowed = 2 * (theirs - reference).norm() + 1e-5 * reference.norm()
        assert (ours - reference).norm() <= allowed
    assert torch.equal(found[0], expected[0])


def test_a_weight_that_changed_is_packed_again() -> None:
    w, weights = weight(64, 32), PackedWeights()
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode(), packed_linear(weights):
        F.linear(x, w)
    for change in (lambda: w.mul_(2), *[lambda: setattr(w, "data", w.data * 2)] * 4, lambda: w.copy_(w + 1)):
        with torch.no_grad():
            change()
        with torch.inference_mode():
            with packed_linear(weights):
                found = F.linear(x, w)
            assert torch.equal(found, F.linear(x, w))
    assert not copy.deepcopy(weights)._held


def test_what_is_not_packed() -> None:
    weights = PackedWeights()
    w = weight(8, 8)
    with packed_linear(weights):
        F.linear(torch.ones(1, 8).bfloat16(), w)  # with gradients
        with torch.inference_mode():
            F.linear(torch.ones(1, 8), w.float())
            F.linear(torch.ones(1, 8).bfloat16(), w.detach())  # nobody's parameter
            F.linear(torch.ones(0, 8).bfloat16(), w)
            F.linear(torch.ones(1, 8).bfloat16(), nn.Parameter(w.detach().t()))
    assert not weights._held


@pytest.mark.parametrize("mode", ["tidar", "autoregressive"])
@pytest.mark.parametrize("exact", [False, True])
def test_decoding_is_the_same(mode: Any, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model().bfloat16()
    plain = Decoder(model, 4, mode=mode, exact=exact).generate(PROMPTS, 20)
    decoder = Decoder(model, 4, mode=mode, exact=exact, packed=True)
    found = decoder.generate(PROMPTS, 20)
    assert found.tokens == plain.tokens
    held = decoder._step.packed
    assert held is not None
    assert bool(held._held) != exact
    monkeypatch.setattr(packed.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert Decoder(model, 4, packed=True)._step.packed is None
